"""`dot_general` of QArrays inside a kernel: one dot per run of the contracting axes, unrolled.

Within a run ("chunk") both operands have one scale and one zero point per row, so

    sum_k (ql - zl) (qr - zr) sl sr  =  (ql . qr  -  zl sum_k qr  -  zr sum_k ql  +  chunk zl zr) sl sr

and the dot runs on the stored values: integers accumulate exactly in int32, scales come after, in float32.
Chunks are as long as both operands' tiles allow (their greatest common divisor), so tiles need not agree.

Everything here must lower in a kernel: no gathers, static slices only, transposes only where an axis really
moves.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from qwix_kernels.problem import NF4

from qwix._src.core import layout, numerics, qarray

# Below this many elements a dot is not worth its start: such an operand is dequantized first.
_MIN_CHUNK = 8


def loop_dot_general(
    lhs: jax.Array | qarray.QArray,
    rhs: jax.Array | qarray.QArray,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """`jax.lax.dot_general` on loaded arrays or QArrays, for use inside Pallas kernels.

    Args:
      lhs: array or QArray (any qtype; zero points and tiles on any axis).
      rhs: the same.
      dimension_numbers: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)) axes.
      precision: of dots on floats.
      preferred_element_type: of the result; by default the dequantized type, or int32 for plain integers.
      **kwargs: handed to `jax.lax.dot_general`.

    Returns:
      Array of shape batch + remaining lhs + remaining rhs. Integer dots are exact; int16 goes through
      float32.

    Raises:
      ValueError: when contracting axes disagree in size.

    >>> a = qarray.quantize_api(jnp.ones((4, 64)), "int8", tiled_axes={1: 32})
    >>> b = qarray.quantize_api(jnp.ones((64, 8)), "int8", channelwise_axes=[1])
    >>> out = loop_dot_general(a, b, (((1,), (0,)), ((), ())))
    >>> bool(jnp.allclose(out, qarray.dequantize(a) @ qarray.dequantize(b), rtol=1e-6))
    True
    """
    acc, result = qarray.get_accumulator_and_result_type(
        lhs, rhs, preferred_element_type=preferred_element_type
    )
    kwargs["precision"] = precision
    dims = _Dims.of(dimension_numbers, lhs, rhs)
    if not isinstance(lhs, qarray.QArray) and not isinstance(rhs, qarray.QArray):
        acc = acc if acc in (jnp.int32, jnp.float64) else jnp.float32  # what matrix units have
        return _dot(*_common(lhs, rhs), dims.numbers, acc, kwargs).astype(result)
    lhs = _coarsened(lhs, dims.lhs_contracting)
    rhs = _coarsened(rhs, dims.rhs_contracting)
    tiles = zip(_tiles(lhs, dims.lhs_contracting), _tiles(rhs, dims.rhs_contracting), strict=True)
    steps = [max(math.gcd(*pair), 1) for pair in tiles]
    sizes = [lhs.shape[axis] for axis in dims.lhs_contracting]
    total = None
    for starts in itertools.product(*(range(0, n, step) for n, step in zip(sizes, steps, strict=True))):
        left = _chunk(lhs, dims.lhs_contracting, starts, steps)
        right = _chunk(rhs, dims.rhs_contracting, starts, steps)
        term = _scaled_dot(left, right, dims, math.prod(steps), kwargs)
        total = term if total is None else total + term
    if total is None:  # an empty contracting axis
        total = jnp.zeros(dims.out_shape(lhs.shape, rhs.shape), jnp.float32)
    return total.astype(result)


@dataclasses.dataclass(frozen=True)
class _Dims:
    """Dimension numbers with the axes that remain."""

    lhs_contracting: tuple[int, ...]
    rhs_contracting: tuple[int, ...]
    lhs_batch: tuple[int, ...]
    rhs_batch: tuple[int, ...]
    lhs_rest: tuple[int, ...]
    rhs_rest: tuple[int, ...]

    @classmethod
    def of(cls, dimension_numbers: Any, lhs: Any, rhs: Any) -> _Dims:
        (lc, rc), (lb, rb) = dimension_numbers
        lc, lb = layout.canonical_axes(lc, lhs.ndim), layout.canonical_axes(lb, lhs.ndim)
        rc, rb = layout.canonical_axes(rc, rhs.ndim), layout.canonical_axes(rb, rhs.ndim)
        if [lhs.shape[a] for a in (*lc, *lb)] != [rhs.shape[a] for a in (*rc, *rb)]:
            raise ValueError(
                f"Contracting and batch axes must agree in size, got {lhs.shape=}, {rhs.shape=}, "
                f"{dimension_numbers=}."
            )
        lhs_rest = tuple(a for a in range(lhs.ndim) if a not in (*lc, *lb))
        rhs_rest = tuple(a for a in range(rhs.ndim) if a not in (*rc, *rb))
        return cls(lc, rc, lb, rb, lhs_rest, rhs_rest)

    @property
    def numbers(self) -> Any:
        return (self.lhs_contracting, self.rhs_contracting), (self.lhs_batch, self.rhs_batch)

    def lhs_in_output(self, x: jax.Array) -> jax.Array:
        """What holds one entry along the contracting axes, in the layout of the result."""
        return layout.transpose_array(x, [*self.lhs_batch, *self.lhs_rest, *(None for _ in self.rhs_rest)])

    def rhs_in_output(self, x: jax.Array) -> jax.Array:
        return layout.transpose_array(x, [*self.rhs_batch, *(None for _ in self.lhs_rest), *self.rhs_rest])

    def out_shape(self, lhs: Sequence[int], rhs: Sequence[int]) -> list[int]:
        return [lhs[a] for a in (*self.lhs_batch, *self.lhs_rest)] + [rhs[a] for a in self.rhs_rest]


@dataclasses.dataclass(frozen=True)
class _Part:
    """A chunk of one operand: (values - zero_point) * scale, with one entry of both along the contracting
    axes."""

    values: jax.Array
    scale: jax.Array | None
    zero_point: jax.Array | None  # int32


def _tiles(x: Any, contracting: Sequence[int]) -> list[int]:
    if not isinstance(x, qarray.QArray):
        return [x.shape[a] for a in contracting]
    return [x.shape[a] // max(x.scale.shape[a], 1) for a in contracting]


def _coarsened(x: Any, contracting: Sequence[int]) -> Any:
    """The operand, dequantized if its scales change too often along the contracting axes."""
    if not isinstance(x, qarray.QArray):
        return x
    tiles = _tiles(x, contracting)
    if all(t >= min(_MIN_CHUNK, x.shape[a]) for t, a in zip(tiles, contracting, strict=True)):
        return x
    values = _values(x)
    values = values.astype(jnp.promote_types(jnp.float32, x.scale.dtype))
    if x.zero_point is not None:
        values = layout.call_with_generic_broadcast(jnp.subtract, values, x.zero_point.astype(values.dtype))
    scaled = layout.call_with_generic_broadcast(jnp.multiply, values, x.scale.astype(values.dtype))
    return scaled.astype(x.scale.dtype)


def _values(x: qarray.QArray) -> jax.Array:
    """What the stored values stand for: themselves, or the numbers that nf4 indices name."""
    if numerics.can_dequant_on_output(x.qtype):
        return x.qvalue
    return _nf4(x.qvalue).astype(x.scale.dtype)


def _nf4(index: jax.Array) -> jax.Array:
    """The table look-up as a tree of 15 selects on the bits of the index: kernels have no gather."""
    index = index.astype(jnp.int32)
    level: list[Any] = list(NF4)
    for bit in range(4):
        is_set = (index >> bit) & 1 == 1
        level = [jnp.where(is_set, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0].astype(jnp.float32)


def _chunk(x: Any, contracting: Sequence[int], starts: Sequence[int], steps: Sequence[int]) -> _Part:
    """The part of an operand from `starts` on, `steps` long along its contracting axes."""
    if not isinstance(x, qarray.QArray):
        return _Part(_slice(x, contracting, starts, steps), None, None)
    tiles = _tiles(x, contracting)
    entries = [start // tile for start, tile in zip(starts, tiles, strict=True)]
    ones = [1] * len(entries)
    scale = _slice(x.scale, contracting, entries, ones)
    zero_point = x.zero_point
    if zero_point is not None:
        zero_point = _slice(zero_point, contracting, entries, ones).astype(jnp.int32)
    part = dataclasses.replace(
        x, qvalue=_slice(x.qvalue, contracting, starts, steps), scale=scale, zero_point=None
    )
    values = _values(part)
    if values.dtype == jnp.uint8:
        # Matrix units take signed bytes: move the zero of both by 128.
        values = (values.astype(jnp.int32) - 128).astype(jnp.int8)
        zero_point = (jnp.zeros(scale.shape, jnp.int32) if zero_point is None else zero_point) - 128
    return _Part(values, scale, zero_point)


def _slice(x: jax.Array, axes: Sequence[int], starts: Sequence[int], sizes: Sequence[int]) -> jax.Array:
    for axis, start, size in zip(axes, starts, sizes, strict=True):
        if size != x.shape[axis]:
            x = lax.slice_in_dim(x, start, start + size, axis=axis)
    return x


def _scaled_dot(lhs: _Part, rhs: _Part, dims: _Dims, chunk: int, kwargs: dict[str, Any]) -> jax.Array:
    """The product of two chunks in float32 (float64 for float64)."""
    if lhs.values.dtype.itemsize == rhs.values.dtype.itemsize == 1 and all(
        numerics.is_integer(part.values.dtype) for part in (lhs, rhs)
    ):
        out = _dot(*_common(lhs.values, rhs.values), dims.numbers, jnp.int32, kwargs)
        out = _without_zero_points(out, lhs, rhs, dims, chunk).astype(jnp.float32)
    else:
        lhs_values, rhs_values = _common(_centred(lhs), _centred(rhs))
        if any(part.values.dtype == jnp.int16 for part in (lhs, rhs)):
            kwargs = {**kwargs, "precision": lax.Precision.HIGHEST}  # anything less drops bits of the values
        wide = jnp.float64 if lhs_values.dtype == jnp.float64 else jnp.float32
        out = _dot(lhs_values, rhs_values, dims.numbers, wide, kwargs)
    for part, in_output in ((lhs, dims.lhs_in_output), (rhs, dims.rhs_in_output)):
        if part.scale is not None:
            scale = in_output(part.scale.astype(out.dtype))
            out = layout.call_with_generic_broadcast(jnp.multiply, out, scale)
    return out


def _without_zero_points(out: jax.Array, lhs: _Part, rhs: _Part, dims: _Dims, chunk: int) -> jax.Array:
    """The exact int32 correction of the header's formula."""
    multiply = lambda x, y: layout.call_with_generic_broadcast(jnp.multiply, x, y)
    lhs_zero = None if lhs.zero_point is None else dims.lhs_in_output(lhs.zero_point)
    rhs_zero = None if rhs.zero_point is None else dims.rhs_in_output(rhs.zero_point)
    terms = []
    if lhs_zero is not None:
        terms.append(multiply(lhs_zero, dims.rhs_in_output(_sum(rhs.values, dims.rhs_contracting))))
    if rhs_zero is not None:
        terms.append(multiply(rhs_zero, dims.lhs_in_output(_sum(lhs.values, dims.lhs_contracting))))
    if lhs_zero is not None and rhs_zero is not None:
        terms.append(-chunk * multiply(lhs_zero, rhs_zero))
    for term in terms:
        out = layout.call_with_generic_broadcast(jnp.subtract, out, term)
    return out


def _sum(values: jax.Array, axes: Sequence[int]) -> jax.Array:
    return jnp.sum(values.astype(jnp.int32), axis=tuple(axes), keepdims=True)


def _centred(part: _Part) -> jax.Array:
    """Values less their zero point, in a float type that holds the difference exactly; floats as they are."""
    values = part.values
    if values.dtype.itemsize > 1 and numerics.is_integer(values.dtype):
        values = values.astype(jnp.float32)
    if part.zero_point is None:
        return values
    centred = layout.call_with_generic_broadcast(
        jnp.subtract, values.astype(jnp.float32), part.zero_point.astype(jnp.float32)
    )
    # Differences of bytes lie within +-255, and bfloat16 has every integer up to 256.
    return centred.astype(jnp.bfloat16) if values.dtype.itemsize == 1 else centred


def _common(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in the narrowest type that a matrix unit multiplies and that holds the values of both exactly."""
    dtypes = lhs.dtype, rhs.dtype
    floats = [d for d in dtypes if numerics.should_quantize(d)]
    if all(numerics.is_integer(d) for d in dtypes):
        signed_bytes = all(d.itemsize == 1 and d != jnp.uint8 for d in dtypes)
        common = jnp.dtype(jnp.int8) if signed_bytes else jnp.dtype(jnp.int32)
    elif floats:
        common = jnp.result_type(*floats)
    elif lhs.dtype == rhs.dtype and lhs.dtype != jnp.float4_e2m1fn:
        common = lhs.dtype
    else:
        common = jnp.dtype(jnp.bfloat16)
    return lhs.astype(common), rhs.astype(common)


def _dot(lhs: jax.Array, rhs: jax.Array, numbers: Any, acc: Any, kwargs: dict[str, Any]) -> jax.Array:
    if numerics.is_integer(lhs.dtype):
        kwargs = {**kwargs, "precision": None}
    return lax.dot_general(lhs, rhs, numbers, preferred_element_type=acc, **kwargs)
