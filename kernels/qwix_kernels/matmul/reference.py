"""The plainest correct matmul: numpy, float64 and exact integers. Tests trust only this.

`error_bound` says how far a float result may be from it. The bound is derived, not fitted. For one element of
the result, with A and B the represented operands:

    accumulation   K products are added in float32 in any order: (K + c) * eps32 * (|A| @ |B|), the standard
                   bound (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1) with c for the
                   scalings
    dequantizing   a value that is rounded to the multiplying dtype is off by its eps: 2 * eps_dtype * (|A| @
                   |B|)
    zero points    (a - za) * (b - zb) expanded over its four sums, so |a| + |za| stands in for |a - za|
    the result     half an eps of the output's dtype, and its smallest subnormal

A float operand is multiplied in its own dtype at most as coarse as bfloat16; `precision` "highest" makes that
float32.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from qwix_kernels.problem import CODEBOOKS, MatmulProblem, RowQuantize, Tensor

_EPS32 = 2.0**-24  # unit roundoff
# Roundings besides the sum: three products with scales, the conversion of an accumulator, one spare for a
# fused add.
_SCALINGS = 5
# Products below float32's normal range may be flushed to zero.
_TINY = 2.0**-126


def run(problem: MatmulProblem, lhs: Tensor, rhs: Tensor) -> np.ndarray:
    """[batch, M, N] in float64; in exact Python-sized integers (int64) for integers without scales.

    >>> from qwix_kernels.matmul.describe import problem_of
    >>> a, b = np.full((1, 1, 3), -128, np.int8), np.full((1, 3, 1), 127, np.int8)
    >>> run(problem_of(a, b), Tensor(a), Tensor(b)).tolist()
    [[[-48768]]]
    """
    if problem.out_dtype == "int32":
        return accumulators(problem, lhs, rhs)
    a, b = operands(problem, lhs, rhs)
    return a @ b


def operands(problem: MatmulProblem, lhs: Tensor, rhs: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The values that the stored operands stand for, [batch, M, K] and [batch, K, N], in float64."""
    if problem.quantize_lhs:
        lhs = quantize_rows(np.asarray(lhs.values), problem.quantize_lhs)
    b = dequantize(rhs)
    return dequantize(lhs), np.swapaxes(b, 1, 2) if problem.rhs_transposed else b


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


def quantize_rows(x: np.ndarray, how: RowQuantize) -> Tensor:
    """Row quantization step by step in float32, as `RowQuantize` documents it."""
    batch, m, k = x.shape
    tiled = x.astype(np.float32).reshape(batch, m, -1, how.tile_k or k)
    scale = np.max(np.abs(tiled), axis=-1, keepdims=True) * np.float32(how.reciprocal)
    scale = np.where(scale < np.sqrt(np.finfo(np.float32).tiny), np.float32(1), scale)
    with np.errstate(invalid="ignore"):
        scaled = tiled * (np.float32(1) / scale)
        if jnp.issubdtype(how.dtype, jnp.integer):
            scaled = np.nan_to_num(np.round(scaled), nan=0.0)
        values = np.clip(scaled, *how.limits).astype(jnp.dtype(how.dtype))
    stored: Any = values.reshape(x.shape), scale[..., 0]
    return Tensor(*stored)


def error_bound(
    problem: MatmulProblem, lhs: Tensor, rhs: Tensor, *, multiplied: str | None = None
) -> np.ndarray:
    """How far each element of a result in `problem.out_dtype` may be from `run`'s, [batch, M, N] in float64.

    `multiplied` is the dtype to which an implementation may round dequantized values before it multiplies
    them; None stands for the portable path: bfloat16 where a side is bfloat16 to begin with, else float32.

    Zero for integers without scales. Where the exact result is not finite, the bound is not either: compare
    such elements for being NaN.
    """
    if problem.out_dtype == "int32":
        return np.zeros((problem.batch, problem.m, problem.n))
    if problem.quantize_lhs:
        lhs = quantize_rows(np.asarray(lhs.values), problem.quantize_lhs)
    turn = lambda b: np.swapaxes(b, 1, 2) if problem.rhs_transposed else b
    total = _magnitude(lhs) @ turn(_magnitude(rhs))
    exact = np.abs(dequantize(lhs) @ turn(dequantize(rhs)))
    eps = {"bfloat16": 2.0**-8, "float32": _EPS32}[multiplied or _multiplied(problem)]
    computed = ((problem.k + _SCALINGS) * _EPS32 + 2 * eps) * total
    out = jnp.finfo(problem.out_dtype)
    return computed + float(out.eps) / 2 * (exact + computed) + float(out.smallest_subnormal) + _TINY


def _multiplied(problem: MatmulProblem) -> str:
    """The dtype to which the portable path may round dequantized values."""
    left = problem.quantize_lhs.dtype if problem.quantize_lhs else problem.lhs.dtype
    return "bfloat16" if "bfloat16" in (left, problem.rhs.dtype) else "float32"


def _stored(x: Tensor) -> np.ndarray:
    values = np.asarray(x.values)
    if x.codebook is not None:
        return np.asarray(CODEBOOKS[x.codebook], np.float32).astype(np.float64)[values.astype(np.int64)]
    return values.astype(np.float64)


def _magnitude(x: Tensor) -> np.ndarray:
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
