"""Trees of arrays as rows of blocks, quantized, and back.

A block is `block_size` neighbours of one flattened array, and has one scale. Blocks never hold values of two
arrays, as those of one layer say nothing about the range of the next; the last one of each array is filled up
with zeros. All arrays of a tree travel together: one collective for the values, one for the scales.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from qwix_kernels.problem import dtype_bits

from qwix._src.core import numerics, qarray, stochastic_rounding
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.qarray import QArray


@dataclasses.dataclass(frozen=True)
class Format:
    """What a value becomes for the way: `block_size` neighbours share a scale of dtype `compute`."""

    qtype: Any
    block_size: int
    compute: np.dtype

    def how(self, ndim: int, key: jax.Array | None) -> HowToQuantize:
        noise = functools.partial(stochastic_rounding.uniform_noise, key) if key is not None else None
        return HowToQuantize(qtype=self.qtype, channelwise_axes=tuple(range(ndim - 1)), noise_fn=noise)


def checked_format(op: str, qtype: DTypeLike | str, block_size: int, leaves: Sequence[jax.Array]) -> Format:
    """The format for arrays of these dtypes.

    Raises ValueError for a qtype that can't travel or a block size below 1.
    """
    qtype = numerics.canonical_qtype(qtype)
    if isinstance(qtype, str) and qtype in numerics.BLOCK_FORMATS:
        element, size = numerics.BLOCK_FORMATS[qtype]
        raise ValueError(f"{op}: give qtype {element!r} and block_size {size} instead of {qtype!r}.")
    if dtype_bits(numerics.storage_dtype(qtype).name) not in (4, 8, 16) or jnp.dtype(
        numerics.storage_dtype(qtype)
    ).name.endswith("e8m0fnu"):
        raise ValueError(f"{op} sends values of 4, 8 or 16 bits, such as 'int8', 'int4', 'float8_e4m3fn'.")
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"{op}: block_size is {block_size!r}; it counts values, 1 or more.")
    compute = jnp.dtype(
        functools.reduce(jnp.promote_types, (x.dtype for x in leaves), jnp.dtype(jnp.float32))
    )
    return Format(qtype, block_size, compute)


def float_leaves(op: str, tree: Any) -> tuple[list[jax.Array], Any]:
    """The arrays of a tree, and its structure. Raises TypeError for one that isn't a float array."""
    with_paths, structure = jax.tree.flatten_with_path(tree)
    leaves = []
    for path, leaf in with_paths:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not numerics.should_quantize(dtype):
            where = f" at {jax.tree_util.keystr(path)}" if path else ""
            got = type(leaf).__name__ if dtype is None else f"{dtype}{list(leaf.shape)}"
            raise TypeError(
                f"{op} quantizes bfloat16, float16, float32 and float64 arrays, but got {got}{where}. "
                "Send the others by jax.lax.psum, jax.lax.all_gather or jax.lax.psum_scatter."
            )
        leaves.append(jnp.asarray(leaf))
    return leaves, structure


def count(size: int, block_size: int) -> int:
    """Blocks that `size` values fill."""
    return -(-size // block_size)


def cut(x: jax.Array, block_size: int, lead: int) -> jax.Array:
    """[*lead axes, ...] as [*lead axes, blocks, block_size], zeros at the end.

    >>> cut(jnp.arange(6.0).reshape(2, 3), 2, 1).tolist()
    [[[0.0, 1.0], [2.0, 0.0]], [[3.0, 4.0], [5.0, 0.0]]]
    """
    kept = x.shape[:lead]
    flat = x.reshape(*kept, -1) if x.size else jnp.zeros((*kept, 0), x.dtype)
    blocks = count(flat.shape[-1], block_size)
    padding = blocks * block_size - flat.shape[-1]
    if padding:
        flat = jnp.pad(flat, [(0, 0)] * lead + [(0, padding)])
    return flat.reshape(*kept, blocks, block_size)


def joined(blocks: jax.Array, shape: Sequence[int], lead: int) -> jax.Array:
    """What `cut` was given: an array of this shape."""
    kept = tuple(shape[:lead])
    size = int(np.prod(shape[lead:], dtype=np.int64))
    return blocks.reshape(*kept, -1)[..., :size].reshape(shape)


def quantized(format: Format, blocks: Sequence[jax.Array], key: jax.Array | None) -> list[QArray]:
    """Each array of blocks in the format; stochastically rounded with a key, each with numbers of its own.

    A block that holds NaN or infinity becomes NaN: a scale that hid it would make it a number.
    """
    keys = [None if key is None else jax.random.fold_in(key, i) for i in range(len(blocks))]
    return [
        _quantized(format, x, k) if x.size else _empty(format, x) for x, k in zip(blocks, keys, strict=True)
    ]


def _quantized(format: Format, x: jax.Array, key: jax.Array | None) -> QArray:
    q = qarray.quantize(x, format.how(x.ndim, key))
    finite = jnp.isfinite(x).all(-1, keepdims=True)
    return dataclasses.replace(q, scale=jnp.where(finite, q.scale, jnp.nan))


def _empty(format: Format, x: jax.Array) -> QArray:
    values = x.astype(numerics.storage_dtype(format.qtype))
    return QArray(values, jnp.ones((*x.shape[:-1], 1), x.dtype), None, format.qtype)


def together(parts: Sequence[QArray], axis: int, multiple: int = 1) -> QArray:
    """One QArray of all blocks, along `axis`, and blocks of zeros up to a multiple of `multiple`."""

    def concatenated(*xs: jax.Array) -> jax.Array:
        missing = -sum(x.shape[axis] for x in xs) % multiple
        if missing:
            shape = list(xs[0].shape)
            shape[axis] = missing
            xs = *xs, jnp.zeros(shape, xs[0].dtype)
        return jnp.concatenate(xs, axis) if len(xs) > 1 else xs[0]

    return jax.tree.map(concatenated, *parts)


def apart(blocks: Any, counts: Sequence[int], axis: int) -> list[Any]:
    """An array or QArray of blocks, cut along `axis` into parts of so many; what is left over is dropped."""
    ends = np.cumsum(counts)
    pick: Callable[[jax.Array, int], jax.Array]
    pick = lambda x, i: jax.lax.slice_in_dim(x, int(ends[i]) - counts[i], int(ends[i]), axis=axis)
    return [jax.tree.map(lambda x, i=i: pick(x, i), blocks) for i in range(len(counts))]
