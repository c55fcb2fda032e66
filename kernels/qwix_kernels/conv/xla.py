"""The portable convolution: XLA's, on integers where both sides are integers, in any geometry.

Integers are convolved as they are stored and scaled afterwards:

    scales     of an image, of a feature group and of an output feature go on the sums. Scales that change
               along the input features cut those into runs: one convolution of integers for each run, scaled
               and added up, so that no more than one of their results is alive.
    zeros      sum over the taps that meet the image of (a - za)(b - zb)
                   = sum a b - za sum b - zb sum a + za zb count,
               where a convolution with real-zero padding gives the first term, the second is known per
               position and output feature from the kernel alone, the third is a windowed sum of the image's
               features, and the fourth is static. Exact, and no dequantized copy.
    overflow   runs are cut so that int32 holds their sums.

XLA's convolution of integers on a CPU is up to ten times as fast as that of float32, but for three kinds:
depthwise (six times slower), with a dilated lhs and with few input features (20 and 4 times). Depthwise, the
sum over the taps is written out as shifted products, which beats either by ten. Up to 1024 products of 8-bit
integers are exact in float32, so where that holds for the other two they go through that.

Everything else is multiplied as floats: stored values with their zero points taken off, scaled before the
product only where the scale changes along the sum.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix_kernels.conv import images
from qwix_kernels.conv.problem import NO_EXTRAS, ConvExtras, ConvProblem, is_stored_integer
from qwix_kernels.problem import CODEBOOKS, Tensor

_EXACT_IN_FLOAT32 = 1 << 24
_FEW_FEATURES = 16
_INT32_PRODUCTS = 1 << 16  # (a - za)(b - zb) of 8 bits is below 2**16, and int32 holds 2**31
_UNROLLED = 4
# Runs with fewer products cost more in passes over their results than dequantizing costs.
_LEAST_PRODUCTS = 16


def run(
    problem: ConvProblem,
    lhs: Tensor,
    rhs: Tensor,
    extras: ConvExtras = NO_EXTRAS,
    *,
    on_cpu: bool = False,
    out_sharding: Any = None,
) -> Any:
    """[N, *out, O] in `problem.out_dtype`; a `Tensor` where the result is quantized.

    Args:
      problem: describes the operands.
      lhs, rhs, extras: see problem.py.
      on_cpu: take what is fast on a CPU: see above.
      out_sharding: of the result, as for `jax.lax.conv_general_dilated`.
    """
    if problem.quantize_lhs:
        lhs = images.quantize(lhs.values, problem.quantize_lhs, extras.lhs_scale)
    return images.finish(problem, sums(problem, lhs, rhs, on_cpu, out_sharding), extras)


def sums(
    problem: ConvProblem, lhs: Tensor, rhs: Tensor, on_cpu: bool = False, out_sharding: Any = None
) -> jax.Array:
    """The convolution of an lhs that is quantized already, scaled: float32, or int32 without any scale."""
    p = problem
    integers = is_stored_integer(p.lhs, p.quantize_lhs) and is_stored_integer(p.rhs)
    length = _run(p)
    if not integers or length * p.taps < min(_LEAST_PRODUCTS, p.k):
        return _floats(p, lhs, rhs, on_cpu, out_sharding)
    left, right = _Side(lhs, p.lhs.codebook), _Side(rhs, p.rhs.codebook)
    count = p.inputs // length
    if count == 1:
        out = _scaled_run(
            p, left, right, _indices(p, 0, length), lhs.values, rhs.values, on_cpu, out_sharding
        )
        return out
    n, groups = lhs.shape[0], p.groups
    # [runs, N, *spatial, groups * run] and [runs, *kernel, run, O]
    cut = lhs.values.reshape(*lhs.shape[:-1], groups, count, length)
    lefts = jnp.moveaxis(cut, -2, 0).reshape(count, n, *p.spatial, groups * length)
    rights = jnp.moveaxis(rhs.values.reshape(*p.kernel, count, length, p.out_features), -3, 0)
    if count <= _UNROLLED:
        parts = [
            _scaled_run(p, left, right, _indices(p, t, length), lefts[t], rights[t], on_cpu, out_sharding)
            for t in range(count)
        ]
        return sum(parts[1:], parts[0])
    indices = jax.tree.map(lambda *x: np.stack(x), *[_indices(p, t, length) for t in range(count)])

    def step(total: jax.Array, at: Any) -> tuple[jax.Array, None]:
        index, x, w = at
        return total + _scaled_run(p, left, right, index, x, w, on_cpu, out_sharding), None

    dtype = jnp.int32 if left.scale is None and right.scale is None else jnp.float32
    first = jnp.zeros((n, *p.out, p.out_features), dtype)
    return jax.lax.scan(step, first, (indices, lefts, rights))[0]


class _Side:
    """A quantized operand's small arrays in the forms that the sums need them, the values in int8."""

    def __init__(self, x: Tensor, codebook: str | None):
        assert codebook is None
        unsigned = x.values.dtype in (jnp.dtype(jnp.uint8), jnp.dtype(jnp.uint4), jnp.dtype(jnp.uint2))
        # int8 holds unsigned values less 128, and so does their zero point.
        self._offset = 128 if x.values.dtype == jnp.dtype(jnp.uint8) else 0
        self._via = jnp.int32 if unsigned else jnp.int8
        self.scale = x.scale
        zero = None if x.zero_point is None else x.zero_point.astype(jnp.int32) - self._offset
        if zero is None and self._offset:
            shape = (1,) * x.values.ndim if x.scale is None else x.scale.shape
            zero = jnp.full(shape, -self._offset, jnp.int32)
        self.zero = zero

    def values(self, x: jax.Array) -> jax.Array:
        """As int8."""
        return (x.astype(self._via) - self._offset).astype(jnp.int8) if self._offset else x.astype(jnp.int8)


def _run(p: ConvProblem) -> int:
    """Neighbouring input features of a group that share all scales and that int32 has room for."""
    length = math.gcd(p.inputs, p.lhs_tile or p.inputs, p.rhs_tile or p.inputs)
    most = max(1, _INT32_PRODUCTS // (2 * p.taps))
    return length if length <= most else max(d for d in range(1, most + 1) if length % d == 0)


def _indices(p: ConvProblem, t: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Which scale of the lhs every group has in run `t`, and which row of scales of the rhs."""
    tile = p.quantize_lhs.tile_k if p.quantize_lhs else p.lhs.tile_k
    features = np.arange(p.groups) * p.inputs + t * length
    return features // (tile or p.features), np.asarray(t * length // (p.rhs.tile_k or p.inputs))


def _scaled_run(
    p: ConvProblem,
    left: _Side,
    right: _Side,
    at: tuple[Any, Any],
    x: jax.Array,
    w: jax.Array,
    on_cpu: bool,
    out_sharding: Any,
) -> jax.Array:
    """One run of features, [N, *out, O]: the exact integer sums, zero points taken off, scaled."""
    x, w = left.values(x), right.values(w)
    out = _integers(p, x, w, on_cpu, out_sharding)
    groups, images_ = p.groups, x.shape[0]
    zero_x = None if left.zero is None else _of_groups(p, left.zero, at[0])
    zero_w = None if right.zero is None else _of_outputs(p, right.zero, at[1])
    if zero_x is not None:
        out = out - zero_x * _kernel_sums(p, w)
    if zero_w is not None:
        features = x.astype(jnp.int32).reshape(images_, *p.spatial, groups, -1).sum(-1)
        out = out - zero_w * jnp.repeat(_window_sums(p, features), p.out_features // groups, axis=-1)
    if zero_x is not None and zero_w is not None:
        out = out + zero_x * zero_w * (_counts(p) * w.shape[-2])
    if left.scale is not None:
        out = out.astype(jnp.float32) * _of_groups(p, left.scale, at[0]).astype(jnp.float32)
    if right.scale is not None:
        out = out.astype(jnp.float32) * _of_outputs(p, right.scale, at[1]).astype(jnp.float32)
    return out


def _of_groups(p: ConvProblem, x: jax.Array, index: Any) -> jax.Array:
    """[N or 1, 1, ..., tiles] of the lhs as [N or 1, 1, ..., O or 1], by the tile of each group."""
    if 1 < x.shape[0] < p.batch:
        x = jnp.repeat(x, p.batch // x.shape[0], axis=0)
    if x.shape[-1] == 1:
        return x
    return jnp.repeat(jnp.take(x, index, axis=-1), p.out_features // p.groups, axis=-1)


def _of_outputs(p: ConvProblem, x: jax.Array, index: Any) -> jax.Array:
    """[1, ..., tiles, O or fewer] of the rhs as [1, ..., O or 1], of the tile `index`."""
    row = jnp.take(x, index, axis=-2) if x.shape[-2] > 1 else x[..., 0, :]
    return images.per_feature(row, p.out_features)[None]


def _kernel_sums(p: ConvProblem, w: jax.Array) -> jax.Array:
    """[1, *out, O]: the sum of the weights that meet the image, at each position."""
    total = w.astype(jnp.int32).sum(-2)
    for axis, window in enumerate(p.windows):
        valid = window.valid.reshape(*(1,) * axis, *window.valid.shape, *(1,) * (total.ndim - axis - 1))
        total = jnp.sum(jnp.where(valid, jnp.expand_dims(total, axis), 0), axis + 1)
    return total[None]


def _window_sums(p: ConvProblem, features: jax.Array) -> jax.Array:
    """[N, *out, groups]: sums over each position's window of [N, *spatial, groups] integers."""
    ones = lambda sizes: (1, *sizes, 1)
    w = p.windows
    return jax.lax.reduce_window(
        features,
        np.int32(0),
        jax.lax.add,
        ones(p.kernel),
        ones([x.stride for x in w]),
        ((0, 0), *[(x.low, x.high) for x in w], (0, 0)),
        base_dilation=ones([x.lhs_dilation for x in w]),
        window_dilation=ones([x.rhs_dilation for x in w]),
    )


def _counts(p: ConvProblem) -> np.ndarray:
    """[1, *out, 1]: how many taps meet the image at each position."""
    total = np.ones((), np.int32)
    for window in p.windows:
        total = total[..., None] * window.valid.sum(1).astype(np.int32)
    return total[None, ..., None]


# --- the convolutions


def convolve(
    p: ConvProblem, x: jax.Array, w: jax.Array, dtype: Any, out_sharding: Any, precision: Any
) -> jax.Array:
    rank = x.ndim
    spatial = tuple(range(1, rank - 1))
    numbers = jax.lax.ConvDimensionNumbers(
        (0, rank - 1, *spatial), (rank - 1, rank - 2, *range(rank - 2)), (0, rank - 1, *spatial)
    )
    return jax.lax.conv_general_dilated(
        x,
        w,
        [v.stride for v in p.windows],
        [(v.low, v.high) for v in p.windows],
        [v.lhs_dilation for v in p.windows],
        [v.rhs_dilation for v in p.windows],
        numbers,
        feature_group_count=p.groups,
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    )


def _integers(p: ConvProblem, x: jax.Array, w: jax.Array, on_cpu: bool, out_sharding: Any) -> jax.Array:
    """The exact sums of products of int8, in int32."""
    if on_cpu and p.is_depthwise:
        return depthwise(p, x.astype(jnp.int32), w.astype(jnp.int32))
    slow = w.shape[-2] < _FEW_FEATURES or any(v.lhs_dilation > 1 for v in p.windows)
    if on_cpu and slow and 128 * 128 * p.taps * w.shape[-2] <= _EXACT_IN_FLOAT32:
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
        return convolve(p, x, w, jnp.float32, out_sharding, jax.lax.Precision.HIGHEST).astype(jnp.int32)
    return convolve(p, x, w, jnp.int32, out_sharding, None)


def depthwise(p: ConvProblem, x: jax.Array, w: jax.Array) -> jax.Array:
    """Each feature with its own kernels, tap by tap: [N, *out, O] of [N, *spatial, C] and [*kernel, 1, O]."""
    pads = [(0, 0, 0), *[(v.low, v.high, v.lhs_dilation - 1) for v in p.windows], (0, 0, 0)]
    x = jax.lax.pad(x, np.zeros((), x.dtype), pads)
    total: Any = jnp.zeros((), x.dtype)
    for tap in np.ndindex(*p.kernel):
        starts = [t * v.rhs_dilation for t, v in zip(tap, p.windows, strict=True)]
        stops = [s + (v.out - 1) * v.stride + 1 for s, v in zip(starts, p.windows, strict=True)]
        strides = (1, *[v.stride for v in p.windows], 1)
        part = jax.lax.slice(x, (0, *starts, 0), (x.shape[0], *stops, x.shape[-1]), strides)
        kernel = w[tap].reshape(p.features, -1)
        if kernel.shape[1] == 1:
            total = total + part * kernel[:, 0]
        else:
            total = total + (part[..., None] * kernel).reshape(*part.shape[:-1], -1)
    return total


def _floats(p: ConvProblem, lhs: Tensor, rhs: Tensor, on_cpu: bool, out_sharding: Any) -> jax.Array:
    """The float32 sums of represented values, whose scales go on them afterwards where they can."""
    act = p.quantize_lhs.dtype if p.quantize_lhs else p.lhs.dtype
    dtype = multiplied(act, p.rhs.dtype)
    x, x_scale = dequantized(lhs, p.lhs_tile > 0, dtype)
    w, w_scale = dequantized(rhs, p.rhs_tile > 0, dtype)
    if on_cpu and p.is_depthwise:
        out = depthwise(p, x.astype(jnp.float32), w.astype(jnp.float32))
    else:
        out = convolve(p, x, w, jnp.float32, out_sharding, p.precision)
    if x_scale is not None:
        features = np.arange(p.groups) * p.inputs
        tiles = x_scale.shape[-1]
        out = out * _of_groups(p, x_scale, features // (p.features // tiles)).astype(jnp.float32)
    if w_scale is not None:
        out = out * _of_outputs(p, w_scale, 0).astype(jnp.float32)
    return out


def multiplied(lhs: str, rhs: str) -> Any:
    """bfloat16 where a side is, and holds the other exactly or to its own precision; float32 otherwise."""
    dtypes = (jnp.dtype(lhs), jnp.dtype(rhs))
    return (
        jnp.bfloat16
        if jnp.dtype(jnp.bfloat16) in dtypes and jnp.dtype(jnp.float32) not in dtypes
        else jnp.float32
    )


def dequantized(x: Tensor, scale_now: bool, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Values in `dtype`, and the scale that they still lack."""
    values = x.values
    if x.codebook is not None:
        table = jnp.asarray(CODEBOOKS[x.codebook], jnp.float32)
        values = table.at[values.astype(jnp.int32)].get(mode="promise_in_bounds")
    elif jnp.issubdtype(values.dtype, jnp.integer):
        values = values.astype(jnp.int32)
    if x.zero_point is not None:
        values = values - _spread(x.zero_point.astype(values.dtype), values.shape)
    if x.scale is None or not scale_now:
        return values.astype(dtype), x.scale
    scaled = values.astype(jnp.float32) * _spread(x.scale.astype(jnp.float32), values.shape)
    return scaled.astype(dtype), None


def _spread(small: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Each entry repeated over the run of neighbours that it covers; single ones stay."""
    for axis, size in enumerate(shape):
        if small.shape[axis] not in (1, size):
            small = jnp.repeat(small, size // small.shape[axis], axis=axis)
    return small
