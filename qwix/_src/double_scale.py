"""Double quantization: the scales of a weight are stored as int8 codes, with a scale for each 256 of them.

A 4-bit weight with a float32 scale for each 64 values takes 4.5 bits per value; with its scales quantized,
8 + 32/256 bits each, it takes 4.127 (QLoRA, https://arxiv.org/abs/2305.14314, section 3). The mean of the
scales is subtracted first, since they are all positive.

Invariants:
- `QArray.scale` (or `TransposedQArray.scale`) is then a `DoubleScale`, in what is stored alone. Ops get the
  QArray that `prepack.unpack` makes of it, whose scale is an array.
- A step has 16 significant bits and a code 8, so that their product is exact in float32: `rebuild` gives the
  same bits whether or not a compiler fuses the product with the sum.
- Fields have the scale's rank. Axes along which layers are stacked keep their size in all of them, so a scan
  or a vmap can cut the weight; the blocks run along the other axes, flattened. The last block may be shorter:
  nothing is padded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.nnx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwix._src.core import numerics, qarray
from qwix._src.core.transposed_qarray import TransposedQArray

BLOCK = 256
_LARGEST = 127
Stored = qarray.QArray | TransposedQArray


@flax.struct.dataclass
class DoubleScale:
    """Scales as `codes * step + mean`.

    Attributes:
      codes: int8, of the scales' shape.
      step: float32, one for each block; the axes of stacked layers first come with their own size.
      mean: float32, one for each stacked layer.
      dtype: of the scales.
    """

    codes: jax.Array
    step: jax.Array
    mean: jax.Array
    dtype: np.dtype = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes of stacked layers (those longer than 1)."""
        return tuple(axis for axis, size in enumerate(self.mean.shape) if size != 1)

    def __jax_array__(self) -> jax.Array:
        return self.rebuild()

    def astype(self, dtype: Any) -> jax.Array:
        """The scales as of an array, so that what is stored dequantizes by itself."""
        return self.rebuild().astype(dtype)

    def rebuild(self) -> jax.Array:
        """The scales, never negative. The same bits eagerly and compiled."""
        return _rebuild(self)


flax.nnx.register_data_type(DoubleScale)


@functools.partial(jax.jit, inline=True)
def _rebuild(scale: DoubleScale) -> jax.Array:
    step = _spread(scale.step, scale.lead, scale.shape)
    return jnp.maximum(scale.codes.astype(jnp.float32) * step + scale.mean, 0).astype(scale.dtype)


def _order(lead: Sequence[int], ndim: int) -> list[int]:
    return [*lead, *(axis for axis in range(ndim) if axis not in lead)]


def _spread(step: jax.Array, lead: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """The step of each scale."""
    order = _order(lead, len(shape))
    sizes = [shape[axis] for axis in order]
    lead_sizes, count = sizes[: len(lead)], math.prod(sizes[len(lead) :])
    blocks = step.transpose(order).reshape(*lead_sizes, -1, 1)
    rows = jnp.broadcast_to(blocks, (*blocks.shape[:-1], BLOCK)).reshape(*lead_sizes, -1)[..., :count]
    return rows.reshape(sizes).transpose(np.argsort(order))


def encode(scale: jax.Array, lead: Sequence[int] = (), unused: jax.Array | None = None) -> DoubleScale:
    """Quantizes scales: `|scale - rebuilt| <= step / 2`, up to float32 rounding.

    Args:
      scale: positive, any float dtype and shape.
      lead: axes of stacked layers, each of which has blocks and a mean of its own.
      unused: True where it doesn't matter what the scale is, of scale's shape.

    >>> scales = 1 + jnp.arange(600.0).reshape(4, 150) / 600
    >>> double = encode(scales)
    >>> double.step.shape, double.mean.shape, float(jnp.abs(double.rebuild() - scales).max()) < 0.5 / 127 / 2
    ((1, 3), (1, 1), True)
    """
    lead = [axis for axis in lead if scale.shape[axis] != 1]
    order = _order(lead, scale.ndim)
    rest = order[len(lead) :]
    layers = [scale.shape[axis] for axis in lead]
    rows_of = lambda x: x.transpose(order).reshape(*layers, -1)
    wide = scale.astype(jnp.float32)
    used = jnp.ones(scale.shape, bool) if unused is None else ~unused
    mean = rows_of(wide).sum(-1, where=rows_of(used)) / jnp.maximum(rows_of(used).sum(-1), 1)
    mean = mean.reshape([n if axis in lead else 1 for axis, n in enumerate(scale.shape)])
    off = jnp.where(used, wide - mean, 0)
    rows = rows_of(jnp.abs(off))
    count, blocks = rows.shape[-1], _blocks(rows.shape[-1])
    padded = jnp.pad(rows, [(0, 0)] * len(lead) + [(0, blocks * BLOCK - count)])
    largest = padded.reshape(*layers, blocks, BLOCK).max(-1)
    longest = max(rest, key=lambda axis: (scale.shape[axis], axis))
    shape = [n if axis in lead else blocks if axis == longest else 1 for axis, n in enumerate(scale.shape)]
    largest = largest.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
    step = lax.reduce_precision(largest / _LARGEST, exponent_bits=8, mantissa_bits=15)
    each = _spread(step, lead, scale.shape)
    ratio = jnp.round(off / jnp.where(each == 0, 1, each))
    codes = jnp.clip(ratio, -_LARGEST, _LARGEST).astype(jnp.int8)
    return DoubleScale(codes, step, mean, jnp.dtype(scale.dtype))


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def scale_bytes(shape: Sequence[int], dtype: Any, lead: Sequence[int] = ()) -> int:
    """Bytes of scales as they are stored, quantized or not.

    >>> scale_bytes((64, 4096), "float32") / (64 * 4096)
    1.0156402587890625
    """
    plain = numerics.device_bytes(dtype, math.prod(shape))
    return min(plain, _double_bytes(shape, lead))


def _double_bytes(shape: Sequence[int], lead: Sequence[int]) -> int:
    layers = math.prod(shape[axis] for axis in lead)
    count = math.prod(n for axis, n in enumerate(shape) if axis not in lead)
    return layers * (count + 4 * _blocks(count) + 4)


def double[T: Stored](array: T, lead: Sequence[int] = ()) -> T:
    """The weight with its scales quantized; as it is, where that would take no fewer bytes."""
    scale: Any = array.scale
    if _double_bytes(scale.shape, lead) >= numerics.device_bytes(scale.dtype, math.prod(scale.shape)):
        return array
    return encoded(array, lead)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _encoded(array: Stored, lead: tuple[int, ...]) -> DoubleScale:
    return encode(array.scale, lead, _zero_tiles(array))


def _zero_tiles(array: Stored) -> jax.Array:
    """Where all values are zero: such a tile has the scale 1, whatever its neighbours have."""
    q = qarray.QArray(array.qvalue, array.scale, array.zero_point, array.qtype)
    pairs = [(s, n // s) for n, s in zip(q.shape, q.scale.shape, strict=True)]
    split = (qarray.dequantize(q) == 0).reshape([n for pair in pairs for n in pair])
    return split.all(axis=tuple(range(1, 2 * q.ndim, 2)))


def encoded[T: Stored](array: T, lead: Sequence[int]) -> T:
    """The weight with its scales quantized, whether or not that takes fewer bytes."""
    return dataclasses.replace(array, scale=_encoded(array, tuple(lead)))


def rebuilt[T: Stored](array: T) -> T:
    """The weight with its scales as an array."""
    scale: Any = array.scale
    return dataclasses.replace(array, scale=scale.rebuild()) if isinstance(scale, DoubleScale) else array
