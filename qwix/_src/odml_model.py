"""TfliteModel: the bytes of a `.tflite` file, to be saved, run by LiteRT's interpreter, and looked into.

What ops there are is read from the file, not from the interpreter, which may have fused some.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

INSTALL = "pip install ai-edge-litert==2.3.0 && pip install --no-deps litert-converter==0.5.0"
_CASTS = ("QUANTIZE", "DEQUANTIZE")
# What may run a file -> the interpreter's name of it. XNNPACK leaves what it lacks to the builtin kernels.
KERNELS = {"xnnpack": "BUILTIN", "builtin": "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "reference": "BUILTIN_REF"}


def needed(module: str) -> Any:
    """A module of LiteRT. Raises ImportError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0].replace("_", "-")
        raise ImportError(f"qwix.odml needs {missing}, which is not installed: {INSTALL}") from error


@dataclasses.dataclass(frozen=True)
class Op:
    """One op of a file.

    Attributes:
      name: as LiteRT calls it: "FULLY_CONNECTED".
      signature: that whose program it is in.
      inputs, outputs: the types of what it reads and writes, "int8" say, constants left out.
      constants: the types of the constants that it reads.
      constant_bytes: what these take. Of a constant that several ops read, each counts all of it.
    """

    name: str
    signature: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[str, ...] = ()
    constant_bytes: int = 0

    @property
    def is_float(self) -> bool:
        """Whether it computes with floats; a change between floats and integers does not count."""
        types = (*self.inputs, *self.outputs)
        return self.name not in _CASTS and any("float" in name for name in types)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a file holds.

    Attributes:
      ops: in the order in which they run.
      bytes: of the file.
      constant_bytes: of the weights and other constants in it.

    >>> ops = [Op("QUANTIZE", "f", ("float32",), ("int8",))]
    >>> ops += [Op("FULLY_CONNECTED", "f", ("int8",), ("int8",), ("int8", "int32"), 320)] * 2
    >>> print(Summary(tuple(ops), 1000, 640))
    op               n  inputs   constants    outputs  constant bytes
    QUANTIZE         1  float32               int8                  0
    FULLY_CONNECTED  2  int8     int8, int32  int8                640
    1000 bytes, 640 of them constants; 2 integer ops; no float ops.
    """

    ops: tuple[Op, ...]
    bytes: int
    constant_bytes: int

    @property
    def float_ops(self) -> tuple[Op, ...]:
        """The ops that compute with floats."""
        return tuple(op for op in self.ops if op.is_float)

    @property
    def integer_ops(self) -> tuple[Op, ...]:
        """The ops that compute with integers; QUANTIZE and DEQUANTIZE don't count."""
        return tuple(op for op in self.ops if not op.is_float and op.name not in _CASTS)

    def __str__(self) -> str:
        titles = ("op", "n", "inputs", "constants", "outputs", "constant bytes")
        kind = lambda op: (op.name, op.inputs, op.constants, op.outputs)
        counts, sizes = Counter(map(kind, self.ops)), Counter[Any]()
        for op in self.ops:
            sizes[kind(op)] += op.constant_bytes
        row = lambda key, n: (key[0], str(n), *map(", ".join, key[1:]), str(sizes[key]))
        rows = [titles, *(row(key, n) for key, n in counts.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left = lambda texts: "  ".join(text.ljust(n) for text, n in zip(texts, widths[:-1], strict=True))
        lines = [f"{left(texts[:-1])}  {texts[-1].rjust(widths[-1])}" for texts in rows]
        count = lambda ops: f"{len(ops) or 'no'} {{}} op{'s' * (len(ops) != 1)}"
        names = ", ".join(sorted({op.name for op in self.float_ops}))
        floats = count(self.float_ops).format("float") + (f": {names}" if names else "")
        integers = count(self.integer_ops).format("integer")
        end = f"{self.bytes} bytes, {self.constant_bytes} of them constants; {integers}; {floats}."
        return "\n".join([*lines, end])


@dataclasses.dataclass(frozen=True)
class TfliteModel:
    """A `.tflite` file in memory.

    Attributes:
      content: its bytes.
    """

    content: bytes = dataclasses.field(repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TfliteModel:
        """A file from disk."""
        return cls(pathlib.Path(path).read_bytes())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file."""
        pathlib.Path(path).write_bytes(self.content)

    @functools.cached_property
    def signatures(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """{name: (names of its inputs, names of its outputs)}, in the order of the program's."""

        def names(maps: Any, tensors: Any) -> tuple[str, ...]:
            order = sorted(maps or (), key=lambda item: list(tensors).index(item.tensorIndex))
            return tuple(item.name.decode() for item in order)

        found = {}
        for one in self._read.signatureDefs or ():
            graph = self._read.subgraphs[one.subgraphIndex]
            found[one.signatureKey.decode()] = (
                names(one.inputs, graph.inputs),
                names(one.outputs, graph.outputs),
            )
        return found

    def run(
        self, inputs: Mapping[str, Any], signature: str | None = None, *, kernels: str = "xnnpack"
    ) -> dict[str, np.ndarray]:
        """Runs a signature by LiteRT's interpreter, on this machine's CPU.

        Args:
          inputs: {name: array}, of numpy or JAX, with the shapes and dtypes that the file has.
          signature: which one; may be left out where there is one.
          kernels: whose results: "xnnpack", which is the interpreter's default, the interpreter's own
            "builtin" ones, or its plain and slow "reference". They round differently here and there.

        Returns: {name: array} of the outputs.

        Raises:
          ValueError: kernels, a signature, names, shapes or dtypes that there are not.
          ImportError: ai-edge-litert is not installed.
        """
        name = self._chosen(signature)
        expected = self.signatures[name][0]
        if set(inputs) != set(expected):
            raise ValueError(f"{name!r} has the inputs {list(expected)}, got {list(inputs)}.")
        runner = self._interpreter(kernels).get_signature_runner(name)
        arrays = {key: np.asarray(x) for key, x in jax.device_get(dict(inputs)).items()}
        for key, details in runner.get_input_details().items():
            shape, dtype = tuple(map(int, details["shape"])), np.dtype(details["dtype"])
            if (arrays[key].shape, arrays[key].dtype) != (shape, dtype):
                raise ValueError(
                    f"The input {key!r} of {name!r} is {dtype}{list(shape)}, got {arrays[key].dtype}"
                    f"{list(arrays[key].shape)}."
                )
        return {key: np.array(x) for key, x in runner(**arrays).items()}

    def summary(self) -> Summary:
        """The ops by type, and the bytes; printed, a table."""
        sizes = [0 if buffer.data is None else len(buffer.data) for buffer in self._read.buffers]
        ops = tuple(op for name in self.signatures for op in self._ops(name))
        return Summary(ops, len(self.content), sum(sizes))

    def quantization(self, signature: str | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{name: (scales, zero points)} of the inputs and outputs that are integers.

        An integer q stands for (q - zero point) * scale.
        """
        one = self._definition(self._chosen(signature))
        tensors = self._read.subgraphs[one.subgraphIndex].tensors
        found = {}
        for item in (*one.inputs, *one.outputs):
            given = tensors[item.tensorIndex].quantization
            if given is not None and given.scale is not None and len(given.scale):
                found[item.name.decode()] = np.asarray(given.scale), np.asarray(given.zeroPoint)
        return found

    def _definition(self, signature: str) -> Any:
        (one,) = (one for one in self._read.signatureDefs if one.signatureKey.decode() == signature)
        return one

    def _chosen(self, signature: str | None) -> str:
        if signature is None and len(self.signatures) == 1:
            return next(iter(self.signatures))
        if signature not in self.signatures:
            raise ValueError(f"signature is {signature!r}; the file has {list(self.signatures)}.")
        return signature

    def _interpreter(self, kernels: str) -> Any:
        if kernels not in KERNELS:
            raise ValueError(f"kernels is {kernels!r}; it is one of {', '.join(map(repr, KERNELS))}.")
        if kernels not in self._interpreters:
            litert = needed("ai_edge_litert.interpreter")
            which = getattr(litert.OpResolverType, KERNELS[kernels])
            self._interpreters[kernels] = litert.Interpreter(
                model_content=self.content, experimental_op_resolver_type=which
            )
        return self._interpreters[kernels]

    @functools.cached_property
    def _interpreters(self) -> dict[str, Any]:
        return {}

    @functools.cached_property
    def _read(self) -> Any:
        """The file as objects."""
        return needed("ai_edge_litert.schema_py_generated").ModelT.InitFromPackedBuf(self.content, 0)

    def _ops(self, signature: str) -> list[Op]:
        which = self._definition(signature).subgraphIndex
        types = _names(needed("ai_edge_litert.schema_py_generated").TensorType)
        names, graph = op_names(self._read), self._read.subgraphs[which]
        data = lambda i: self._read.buffers[graph.tensors[i].buffer].data
        kinds = lambda places: tuple(types[graph.tensors[i].type].lower() for i in places)
        found = []
        for operator in graph.operators:
            name = names[operator.opcodeIndex]
            reads = [i for i in operator.inputs if i >= 0]
            constants = [i for i in reads if data(i) is not None]
            moving = [i for i in reads if i not in constants]
            size = sum(len(data(i)) for i in constants)
            types_of = kinds(moving), kinds(operator.outputs), kinds(constants)
            found.append(Op(name, signature, *types_of, size))
        return found


def op_names(file: Any) -> list[str]:
    """What each entry of a file's table of ops is called."""
    builtins = _names(needed("ai_edge_litert.schema_py_generated").BuiltinOperator)
    number = lambda code: max(code.builtinCode, code.deprecatedBuiltinCode)
    name = lambda code: code.customCode.decode() if code.customCode else builtins[number(code)]
    return [name(code) for code in file.operatorCodes]


def _names(enumeration: Any) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if isinstance(value, int)}
