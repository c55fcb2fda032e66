"""The plainest correct convolution: numpy, float64 and exact integers. Tests trust only this.

One loop over the taps of the kernel: each multiplies a strided window of the padded, dilated lhs with its
slice of the kernel. `error_bound` says how far a float result may be from it; the terms are those of
qwix_kernels.matmul.reference, with K the products of one element of the result.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from qwix_kernels.conv.problem import NO_EXTRAS, ConvExtras, ConvProblem
from qwix_kernels.matmul import reference as matmul_reference
from qwix_kernels.matmul.reference import activate, dequantize
from qwix_kernels.problem import Epilogue, RowQuantize, Tensor

_EPS32 = 2.0**-24  # unit roundoff
_SCALINGS = 8  # roundings besides the sum: scales, zero points, the conversion of an accumulator
_ELEMENTARY = 16  # roundings in an exponential or an error function
_LIPSCHITZ = 1.13  # the steepest any activation gets
_TINY = 2.0**-126  # products below float32's normal range may be flushed to zero


def run(problem: ConvProblem, lhs: Tensor, rhs: Tensor, extras: ConvExtras = NO_EXTRAS) -> np.ndarray:
    """[N, *out, O] in float64; exact int64 for integers without scales.

    Of a problem that quantizes its result, what is quantized.

    >>> from qwix_kernels.conv.describe import problem_of
    >>> x, w = np.ones((1, 3, 1), np.int8), np.ones((3, 1, 1), np.int8)
    >>> run(problem_of(x, w, padding=((1, 1),)), Tensor(x), Tensor(w))[0, :, 0].tolist()
    [2, 3, 2]
    """
    if problem.out_dtype == "int32":
        return convolve(
            problem, np.asarray(lhs.values).astype(np.int64), np.asarray(rhs.values).astype(np.int64)
        )
    z = convolve(problem, dequantize(prepared(problem, lhs, extras)), dequantize(rhs))
    e = problem.epilogue or Epilogue()
    if extras.bias is not None:
        z = z + np.asarray(extras.bias).astype(np.float64)
    return activate(z, e.activation)


def convolve(problem: ConvProblem, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The convolution itself, in the dtype of its operands: [N, *spatial, C], [*kernel, C / groups, O]."""
    p = problem
    n, groups = x.shape[0], p.groups
    stretched = np.zeros(
        (n, *[(v.size - 1) * v.lhs_dilation + 1 if v.size else 0 for v in p.windows], p.features), x.dtype
    )
    stretched[(slice(None), *[slice(None, None, v.lhs_dilation) for v in p.windows])] = x
    crop = [
        slice(max(0, -v.low), s - max(0, -v.high))
        for v, s in zip(p.windows, stretched.shape[1:], strict=False)
    ]
    stretched = stretched[(slice(None), *crop)]
    pads = [(max(0, v.low), max(0, v.high)) for v in p.windows]
    padded = np.pad(stretched, [(0, 0), *pads, (0, 0)])
    out = np.zeros((n, *p.out, groups, p.out_features // groups), x.dtype)
    if 0 in out.shape:
        return out.reshape(n, *p.out, p.out_features)
    for tap in np.ndindex(*p.kernel):
        starts = [t * v.rhs_dilation for t, v in zip(tap, p.windows, strict=True)]
        at = [
            slice(s, s + (v.out - 1) * v.stride + 1, v.stride) for s, v in zip(starts, p.windows, strict=True)
        ]
        window = padded[(slice(None), *at)].reshape(n, *p.out, groups, p.inputs)
        kernel = w[tap].reshape(p.inputs, groups, -1)
        out += np.einsum("...gi,igo->...go", window, kernel)
    return out.reshape(n, *p.out, p.out_features)


def prepared(problem: ConvProblem, lhs: Tensor, extras: ConvExtras = NO_EXTRAS) -> Tensor:
    """The lhs after quantization of its images."""
    how = problem.quantize_lhs
    return lhs if how is None else quantize(np.asarray(lhs.values), how, extras.lhs_scale)


def quantize(x: np.ndarray, how: RowQuantize, scale: Any = None) -> Tensor:
    """Quantization of images step by step in float32, as `RowQuantize` documents it for rows."""
    n, features = x.shape[0], x.shape[-1]
    tile = how.tile_k or features
    x = x.astype(np.float32)
    rows = np.moveaxis(x.reshape(n, -1, features // tile, tile), 2, 1).reshape(n, features // tile, -1)
    if scale is None:
        stored = matmul_reference.quantize_rows(rows.reshape(1, -1, rows.shape[2]), _whole(how))
        found = np.asarray(stored.scale)
    else:
        found = np.broadcast_to(np.asarray(scale, np.float32).reshape(-1, features // tile), rows.shape[:2])
        scales: Any = found.reshape(1, -1, 1)
        given = matmul_reference.Extras(lhs_scale=scales)
        stored = matmul_reference.quantize_rows(rows.reshape(1, -1, rows.shape[2]), _whole(how), given)
    values = np.asarray(stored.values).reshape(n, features // tile, -1, tile)
    back: Any = np.moveaxis(values, 1, 2).reshape(x.shape), found.reshape(n, *(1,) * (x.ndim - 2), -1)
    return Tensor(*back)


def _whole(how: RowQuantize) -> RowQuantize:
    return RowQuantize(how.dtype, how.bound, 0, how.static, how.scale_dtype)


def error_bound(
    problem: ConvProblem,
    lhs: Tensor,
    rhs: Tensor,
    extras: ConvExtras = NO_EXTRAS,
    *,
    multiplied: str | None = None,
) -> np.ndarray:
    """How far each element of a result in `problem.out_dtype` may be from `run`'s, in float64.

    `multiplied` is the dtype to which dequantized values may be rounded before they are multiplied; None
    stands for the portable path: bfloat16 where a side is bfloat16, else float32.
    """
    p = problem
    if p.out_dtype == "int32":
        return np.zeros(p.out_shape)
    stored = prepared(p, lhs, extras)
    left = p.quantize_lhs.dtype if p.quantize_lhs else p.lhs.dtype
    portable = "bfloat16" if "bfloat16" in (left, p.rhs.dtype) else "float32"
    eps = {"bfloat16": 2.0**-8, "float32": _EPS32}[multiplied or portable]
    z = convolve(p, dequantize(stored), dequantize(rhs))
    size = convolve(p, matmul_reference.magnitude(stored), matmul_reference.magnitude(rhs))
    computed = ((p.k + _SCALINGS) * _EPS32 + 2 * eps) * size
    e = p.epilogue or Epilogue()
    if extras.bias is not None:
        bias = np.asarray(extras.bias).astype(np.float64)
        computed = computed + 2 * _EPS32 * (np.abs(z) + np.abs(bias) + computed)
        z = z + bias
    if e.activation:
        computed = _LIPSCHITZ * computed + _ELEMENTARY * _EPS32 * np.abs(z)
    exact = activate(z, e.activation)
    if e.quantize:
        return computed + _TINY
    info = jnp.finfo(p.out_dtype)
    return (
        computed + float(info.eps) / 2 * (np.abs(exact) + computed) + float(info.smallest_subnormal) + _TINY
    )
