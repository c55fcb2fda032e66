"""The plainest correct matmul: numpy, float64 and exact integers. Tests trust only this.

`error_bound` says how far a float result may be from it. The bound is derived, not fitted. For one element of
the result, with A and B the represented operands:

    accumulation   K products are added in float32 in any order: (K + c) * eps32 * (|A| @ |B|), the standard
                   bound (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1) with c for the
                   scalings
    dequantizing   a value that is rounded to the multiplying dtype is off by its eps: 2 * eps_dtype * (|A| @
                   |B|)
    zero points    (a - za) * (b - zb) expanded over its four sums, so |a| + |za| stands in for |a - za|
    low rank       both sums of the update, and the roundings of its four factors
    rows           where the lhs is normalised, its errors, and one step of the stored type for values that
                   are on a rounding boundary within them
    epilogue       one rounding for each sum and product; an activation's own, and its steepness
    the result     half an eps of the output's dtype, and its smallest subnormal

A float operand is multiplied in its own dtype at most as coarse as bfloat16; `precision` "highest" makes that
float32.
"""

from __future__ import annotations

import math
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from qwix_kernels.problem import (
    CODEBOOKS,
    NO_EXTRAS,
    Epilogue,
    Extras,
    MatmulProblem,
    RMSNorm,
    RowQuantize,
    Tensor,
)

_EPS32 = 2.0**-24  # unit roundoff
# Roundings besides the sum: three products with scales, the conversion of an accumulator, one spare for a
# fused add.
_SCALINGS = 5
# Roundings in an exponential, a tanh, an error function or an inverse square root.
_ELEMENTARY = 16
# The steepest any activation gets: gelu, near 1.4.
_LIPSCHITZ = 1.13
_SMOOTH = ("silu", "gelu", "gelu_tanh")
# Products below float32's normal range may be flushed to zero.
_TINY = 2.0**-126


def run(problem: MatmulProblem, lhs: Tensor, rhs: Tensor, extras: Extras = NO_EXTRAS) -> np.ndarray:
    """[batch, M, N] in float64; in exact Python-sized integers (int64) for integers without scales.

    Of a problem that quantizes its result, what is quantized: `quantize_rows` does the rest.

    >>> from qwix_kernels.matmul.describe import problem_of
    >>> a, b = np.full((1, 1, 3), -128, np.int8), np.full((1, 3, 1), 127, np.int8)
    >>> run(problem_of(a, b), Tensor(a), Tensor(b)).tolist()
    [[[-48768]]]
    """
    if problem.out_dtype == "int32":
        return accumulators(problem, lhs, rhs)
    a, b = operands(problem, lhs, rhs, extras)
    gate = None if extras.gate is None else a @ _turned(problem, dequantize(extras.gate))
    z = a @ b if problem.low_rank is None else a @ b + low_rank(problem, lhs, extras)[0]
    return _epilogue(problem.epilogue or Epilogue(), z, gate, extras)[0]


def operands(
    problem: MatmulProblem, lhs: Tensor, rhs: Tensor, extras: Extras = NO_EXTRAS
) -> tuple[np.ndarray, np.ndarray]:
    """The values that are multiplied, [batch, M, K] and [batch, K, N], in float64."""
    return dequantize(prepared(problem, lhs, extras)), _turned(problem, dequantize(rhs))


def prepared(problem: MatmulProblem, lhs: Tensor, extras: Extras) -> Tensor:
    """The lhs after normalisation (exact where nothing is quantized after it) and row quantization."""
    if problem.norm:
        lhs = Tensor(cast(Any, rms_norm(lhs, extras, problem.norm)))
    if problem.quantize_lhs:
        lhs = quantize_rows(np.asarray(lhs.values), problem.quantize_lhs, extras)
    return lhs


def rms_norm(lhs: Tensor, extras: Extras, norm: RMSNorm) -> np.ndarray:
    """x * rsqrt(mean(x^2) + eps) * weight in float64."""
    x = np.asarray(lhs.values).astype(np.float64)
    root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + float(np.float32(norm.eps)))
    return x / root * np.asarray(extras.norm_weight).astype(np.float64)


def low_rank(problem: MatmulProblem, lhs: Tensor, extras: Extras) -> tuple[np.ndarray, np.ndarray]:
    """(the update's part of the sums, what its terms add up to without their signs), in float64."""
    assert problem.low_rank
    wide = lambda x: np.asarray(x).astype(np.float64)
    x, a, b = wide(lhs.values), wide(extras.low_rank_a), wide(extras.low_rank_b)
    scaling = np.float64(np.float32(problem.low_rank.scaling))
    mask = scaling if extras.low_rank_mask is None else scaling * wide(extras.low_rank_mask)
    return (x @ a * mask) @ b, np.abs(x) @ np.abs(a) * np.abs(mask) @ np.abs(b)


def accumulators(problem: MatmulProblem, lhs: Tensor, rhs: Tensor) -> np.ndarray:
    """The sums of products of the stored integers, in int64."""
    a, b = np.asarray(lhs.values).astype(np.int64), np.asarray(rhs.values).astype(np.int64)
    return a @ (np.swapaxes(b, 1, 2) if problem.rhs_transposed else b)


def dequantize(x: Tensor) -> np.ndarray:
    """(q - zero_point) * scale in float64."""
    values = _stored(x)
    if x.zero_point is not None:
        values = values - _spread(x.zero_point, values.shape)
    return values if x.scale is None else values * _spread(x.scale, values.shape)


def quantize_rows(x: np.ndarray, how: RowQuantize, extras: Extras = NO_EXTRAS) -> Tensor:
    """Row quantization step by step in float32, as `RowQuantize` documents it."""
    batch, m, k = x.shape
    x, scale = x.astype(np.float32), extras.lhs_scale
    if extras.lhs_columns is not None:
        x = x * np.asarray(extras.lhs_columns).astype(np.float32)
    tiled = x.reshape(batch, m, -1, how.tile_k or k)
    if scale is None:
        scale = _row_scale(np.max(np.abs(tiled), axis=-1, keepdims=True), how)
    else:
        scale = np.asarray(scale).astype(np.float32)[..., None]
    with np.errstate(invalid="ignore"):
        scaled = tiled * (np.float32(1) / scale)
        if extras.lhs_noise is not None:
            scaled = scaled + np.asarray(extras.lhs_noise).astype(np.float32)[..., None]
        if jnp.issubdtype(how.dtype, jnp.integer):
            scaled = np.nan_to_num(np.round(scaled), nan=0.0)
        values = np.clip(scaled, *how.limits).astype(jnp.dtype(how.dtype))
    stored: Any = values.reshape(x.shape), scale[..., 0]
    return Tensor(*stored)


def _row_scale(absmax: np.ndarray, how: RowQuantize) -> np.ndarray:
    if how.scale_dtype == "float32":
        scale = absmax * np.float32(how.reciprocal)
    else:
        _, exponent = np.frexp(absmax)  # absmax = mantissa * 2**exponent, 0.5 <= mantissa < 1
        scale = np.ldexp(np.float32(1), np.maximum(exponent - 1 - how.emax, -126))
        scale = np.where(np.isfinite(absmax), np.where(absmax == 0, np.float32(0), scale), np.float32(np.nan))
    return np.where(scale < np.sqrt(np.finfo(np.float32).tiny), np.float32(1), scale)


def error_bound(
    problem: MatmulProblem,
    lhs: Tensor,
    rhs: Tensor,
    extras: Extras = NO_EXTRAS,
    *,
    multiplied: str | None = None,
) -> np.ndarray:
    """How far each element of a result in `problem.out_dtype` may be from `run`'s, [batch, M, N] in float64.

    `multiplied` is the dtype to which an implementation may round dequantized values before it multiplies
    them; None stands for the portable path: bfloat16 where a side is bfloat16 to begin with, else float32.

    Zero for integers without scales. Where the exact result is not finite, the bound is not either: compare
    such elements for being NaN.
    """
    if problem.out_dtype == "int32":
        return np.zeros((problem.batch, problem.m, problem.n))
    wrong = _rounding_of_rows(problem, lhs, extras)
    lhs_given, lhs = lhs, prepared(problem, lhs, extras)
    eps = {"bfloat16": 2.0**-8, "float32": _EPS32}[multiplied or _multiplied(problem)]

    def product(w: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The exact product, and how far a computed one may be from it."""
        total = magnitude(lhs) @ _turned(problem, magnitude(w))
        computed = ((problem.k + _SCALINGS) * _EPS32 + 2 * eps) * total
        if wrong is not None:
            computed = computed + (1 + 3 * eps) * wrong @ _turned(problem, magnitude(w))
        return dequantize(lhs) @ _turned(problem, dequantize(w)), computed

    z, computed = product(rhs)
    if problem.low_rank:
        added, total = low_rank(problem, lhs_given, extras)
        z, computed = z + added, computed + _low_rank_bound(problem, eps) * total
        computed = computed + 2 * _EPS32 * (np.abs(z) + computed)
    gate, gate_computed = (None, 0.0) if extras.gate is None else product(extras.gate)
    exact, computed = _epilogue(
        problem.epilogue or Epilogue(), z, gate, extras, computed=computed, gate_computed=gate_computed
    )
    if problem.epilogue and problem.epilogue.quantize:
        return computed + _TINY
    out = jnp.finfo(problem.out_dtype)
    rounding = float(out.eps) / 2 * (np.abs(exact) + computed) + float(out.smallest_subnormal)
    return computed + rounding + _TINY


def _low_rank_bound(problem: MatmulProblem, eps: float) -> float:
    """Of an update's terms, how far the computed ones may be off: two sums in float32, and lhs, a, their
    product and b each rounded to the dtype in which they are multiplied."""
    assert problem.low_rank
    return (1 + eps) ** 4 * (1 + (problem.k + problem.low_rank.rank + _SCALINGS) * _EPS32) - 1


def _rounding_of_rows(problem: MatmulProblem, lhs: Tensor, extras: Extras) -> np.ndarray | None:
    """How far a normalised (and quantized) lhs may be from `prepared`'s, [batch, M, K]; None without norm.

    mean(x^2) is off by (K + 2) eps32 at most, its inverse square root by half of that and its own error, and
    two products follow. Where the quotient with the scale is that close to a rounding boundary, the stored
    value may be the next one.
    """
    if problem.norm is None:
        return None
    y = rms_norm(lhs, extras, problem.norm)
    relative = ((problem.k + 2) / 2 + 2 + _ELEMENTARY) * _EPS32
    if problem.quantize_lhs is None:
        return relative * np.abs(y)
    how = problem.quantize_lhs
    stored = quantize_rows(y, how, extras)
    scale = _spread(stored.scale, y.shape)
    scaled = y / scale
    most = 3 * relative * np.abs(scaled) + _EPS32  # the quotient, with the errors of y and of the scale
    low, high = how.limits
    step = np.maximum(_stored_step(np.clip(scaled + most, low, high), how), 0)
    below = np.clip(scaled - most, low, high)
    above = np.clip(scaled + most, low, high)
    dtype = jnp.dtype(how.dtype)
    convert = lambda v: (np.round(v) if jnp.issubdtype(dtype, jnp.integer) else v).astype(dtype)
    moved = convert(below).astype(np.float64) != convert(above).astype(np.float64)
    scale_moves = 0 if how.static else 2 * relative * np.abs(dequantize(stored))
    return np.where(moved, step * scale * (1 + relative), 0.0) + scale_moves


def _stored_step(x: np.ndarray, how: RowQuantize) -> np.ndarray:
    """The distance between the stored values round x."""
    if jnp.issubdtype(how.dtype, jnp.integer):
        return np.ones_like(x)
    info = jnp.finfo(how.dtype)
    least = float(info.smallest_normal)
    return 2.0 ** np.floor(np.log2(np.maximum(np.abs(x), least))) * float(info.eps)


def _epilogue(
    e: Epilogue,
    z: np.ndarray,
    gate: np.ndarray | None,
    extras: Extras,
    *,
    computed: Any = 0.0,
    gate_computed: Any = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(what follows the product, in float64; how far off it may be if the products are by `computed`).

    Every addition and multiplication rounds once; an activation magnifies an error by its Lipschitz constant
    and adds its own.
    """
    given = {name: getattr(extras, name) for name in ("bias", "gate_bias", "residual")}
    wide = {name: np.asarray(x).astype(np.float64) for name, x in given.items() if x is not None}
    z, computed = _added(z, computed, wide.get("bias"))
    active, active_computed = _added(z if gate is None else gate, computed, None)
    if gate is not None:
        active, active_computed = _added(gate, gate_computed, wide.get("gate_bias"))
    own = _ELEMENTARY * _EPS32 * np.abs(active) if e.activation in _SMOOTH else 0.0
    active, active_computed = activate(active, e.activation), _LIPSCHITZ * active_computed + own
    if gate is not None:
        both = np.abs(active) * computed + np.abs(z) * active_computed + computed * active_computed
        active, active_computed = active * z, both + 2 * _EPS32 * np.abs(active * z)
    return _added(active, active_computed, wide.get("residual"))


def _added(z: np.ndarray, computed: Any, other: np.ndarray | None) -> tuple[np.ndarray, Any]:
    if other is None:
        return z, computed
    return z + other, computed + 2 * _EPS32 * (np.abs(z) + np.abs(other) + computed)


def activate(x: np.ndarray, name: str | None) -> np.ndarray:
    """One of `problem.ACTIVATIONS` in float64."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    with np.errstate(over="ignore"):
        return {
            None: lambda: x,
            "relu": lambda: np.maximum(x, 0),
            "relu6": lambda: np.clip(x, 0, 6),
            "silu": lambda: x / (1 + np.exp(-x)),
            "gelu": lambda: x / 2 * (1 + erf(x / math.sqrt(2))),
            "gelu_tanh": lambda: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        }[name]()


def _turned(problem: MatmulProblem, w: np.ndarray) -> np.ndarray:
    return np.swapaxes(w, 1, 2) if problem.rhs_transposed else w


def _multiplied(problem: MatmulProblem) -> str:
    """The dtype to which the portable path may round dequantized values."""
    left = problem.quantize_lhs.dtype if problem.quantize_lhs else problem.lhs.dtype
    return "bfloat16" if "bfloat16" in (left, problem.rhs.dtype) else "float32"


def _stored(x: Tensor) -> np.ndarray:
    values = np.asarray(x.values)
    if x.codebook is not None:
        return np.asarray(CODEBOOKS[x.codebook], np.float32).astype(np.float64)[values.astype(np.int64)]
    return values.astype(np.float64)


def magnitude(x: Tensor) -> np.ndarray:
    """(|q| + |zero_point|) * |scale|: what the terms of an expanded product are bounded by."""
    values = np.abs(_stored(x))
    if x.zero_point is not None:
        values = values + np.abs(_spread(x.zero_point, values.shape))
    return values if x.scale is None else values * np.abs(_spread(x.scale, values.shape))


def _spread(small: object, shape: tuple[int, ...]) -> np.ndarray:
    """float64 with each entry repeated over the run of neighbours that it covers."""
    out = np.asarray(small).astype(np.float64)
    for axis, size in enumerate(shape):
        out = np.repeat(out, size // max(1, out.shape[axis]), axis=axis)
    return out
