"""Reading a state dict that torch saved before version 1.6, without torch.

Such a file is a row of pickles (a magic number, a protocol, the sizes of C types, the state dict, the keys of
its storages) followed by the storages: a count of 8 bytes and the raw values of each. A pickle may name any
function of any module, so only the four names that a state dict of floats needs are known here.
"""

import collections
import dataclasses
import pathlib
import pickle
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor is: `offset` and `strides` count values of the storage."""

    key: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage: tuple[str, np.dtype], offset: int, shape: Any, strides: Any, *_: Any) -> Tensor:
    """Stands for `torch._utils._rebuild_tensor_v2`."""
    return Tensor(*storage, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    """Knows ordered dicts, tensors and their storages, and nothing else."""

    _KNOWN: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    } | {("torch", name): dtype for name, dtype in DTYPES.items()}

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a state dict; it was not run.")
        return self._KNOWN[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, np.dtype]:
        kind, dtype, key, _location, _size, view = pid
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError(f"A whole storage was expected, got {pid!r}.")
        return key, dtype


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a file, by name.

    Raises:
      ValueError: it is no file of that kind, or it's cut short.
      pickle.UnpicklingError: it names functions that a state dict doesn't need.
    """
    with path.open("rb") as file:
        if _Unpickler(file).load() != MAGIC:
            raise ValueError(f"{path} is not a state dict in torch's format before version 1.6.")
        _protocol, system = _Unpickler(file).load(), _Unpickler(file).load()
        if not system["little_endian"]:
            raise ValueError(f"{path} was written on a big-endian machine.")
        tensors = _Unpickler(file).load()
        dtypes = {tensor.key: tensor.dtype for tensor in tensors.values()}
        storages = {key: _storage(file, dtypes[key], path) for key in _Unpickler(file).load()}
    return {name: _array(tensor, storages[tensor.key]) for name, tensor in tensors.items()}


def _storage(file: BinaryIO, dtype: np.dtype, path: pathlib.Path) -> np.ndarray:
    (count,) = struct.unpack("<q", file.read(8))
    values = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    if values.size != count:
        raise ValueError(f"{path} is cut short: a storage of {count} values has {values.size}.")
    return values


def _array(tensor: Tensor, storage: np.ndarray) -> np.ndarray:
    """
    >>> storage = np.arange(6, dtype="<f4")
    >>> _array(Tensor("0", storage.dtype, 1, (2, 2), (1, 2)), storage).tolist()
    [[1.0, 3.0], [2.0, 4.0]]
    """
    index = np.full(tensor.shape, tensor.offset)
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.strides, strict=True)):
        index = index + stride * np.arange(size).reshape([-1 if a == axis else 1 for a in range(index.ndim)])
    return storage[index]
