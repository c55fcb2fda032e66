"""From arrays to a `MatmulProblem`: every check of what a caller may give, and the type of the result.

Only shapes and dtypes are read, so `jax.ShapeDtypeStruct`s serve as well as arrays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.matmul.describe_extras import (
    check_rows,
    check_rows_extras,
    check_static,
    epilogue_of,
    low_rank_of,
    norm_of,
)
from qwix_kernels.problem import CODEBOOKS, Extras, MatmulProblem, Operand, RowQuantize, Tensor

_PRECISIONS = ("default", "high", "highest")


def problem_of(
    lhs: Tensor | jax.Array | jax.ShapeDtypeStruct,
    rhs: Tensor | jax.Array | jax.ShapeDtypeStruct,
    extras: Extras | None = None,
    *,
    quantize_lhs: RowQuantize | None = None,
    rhs_transposed: bool = False,
    out_dtype: Any = None,
    precision: Any = None,
    norm_eps: float = 1e-6,
    low_rank_scaling: float = 1.0,
    activation: str | None = None,
    quantize_out: RowQuantize | None = None,
) -> MatmulProblem:
    """Describes the matmul of these operands, or says what is wrong with them.

    Args: as for `qwix_kernels.matmul.matmul`.

    Raises ValueError for shapes, tiles or options that disagree, TypeError for dtypes that no matmul takes.

    >>> x = jax.ShapeDtypeStruct((1, 16, 256), jnp.bfloat16)
    >>> w = jax.ShapeDtypeStruct((1, 256, 128), jnp.int4)
    >>> scale = jax.ShapeDtypeStruct((1, 2, 128), jnp.bfloat16)
    >>> problem_of(x, Tensor(w, scale)).scheme
    'w4a16_g128'
    """
    lhs, rhs, extras = as_tensor(lhs), as_tensor(rhs), extras or Extras()
    left = _operand(lhs, "lhs", free=1, contracting=2)
    axes = {"free": 1, "contracting": 2} if rhs_transposed else {"free": 2, "contracting": 1}
    right = _operand(rhs, "rhs", **axes)
    if extras.gate is not None:
        gate = _operand(as_tensor(extras.gate), "gate", **axes)
        if gate != right or extras.gate.shape != rhs.shape:
            raise ValueError(
                f"The gate must be quantized and shaped like rhs, got {gate} {extras.gate.shape} and {right} "
                f"{rhs.shape}. Multiply by them one after the other instead."
            )
    k, rhs_k = lhs.shape[2], rhs.shape[2 if rhs_transposed else 1]
    if k != rhs_k:
        raise ValueError(
            f"K disagrees: lhs [batch, M, K] is {lhs.shape}, rhs "
            f"{'[batch, N, K]' if rhs_transposed else '[batch, K, N]'} is {rhs.shape}: {k} against {rhs_k}."
        )
    if left.batch != right.batch and 1 not in (left.batch, right.batch):
        raise ValueError(
            f"Batches disagree: lhs has {left.batch}, rhs {right.batch}. Make them equal, or one of them 1."
        )
    batch = max(left.batch, right.batch)
    if quantize_lhs is not None:
        _check_row_quantize(quantize_lhs, left, k)
    check_static("quantize_lhs", quantize_lhs, "lhs_scale", extras.lhs_scale, (left.batch, left.free, k))
    check_rows_extras(quantize_lhs, extras, (left.batch, left.free, k))
    norm = norm_of(extras, norm_eps, left, k)
    epilogue = epilogue_of(extras, activation, quantize_out, batch, left.free, right.free)
    low_rank = low_rank_of(extras, low_rank_scaling, left, (batch, left.free, k, right.free))
    integers = left.is_integer and right.is_integer and not (left.is_quantized or right.is_quantized)
    exact = integers and epilogue is None
    default = jnp.int32 if exact else jnp.result_type(_value_dtype(left), _value_dtype(right))
    default = jnp.float32 if integers and not exact else default
    if quantize_out is not None:
        if out_dtype is not None and jnp.dtype(out_dtype) != jnp.dtype(quantize_out.dtype):
            raise ValueError(f"out_dtype is {out_dtype}, but quantize_out stores {quantize_out.dtype}.")
        out_dtype = quantize_out.dtype
    out = jnp.dtype(out_dtype if out_dtype is not None else default)
    if quantize_out is None and not (jnp.issubdtype(out, jnp.floating) or (exact and out == jnp.int32)):
        also = ", or int32 for integers without scales" if exact else ""
        raise TypeError(f"out_dtype is {out}; it must be a float{also}.")
    return MatmulProblem(
        m=left.free,
        k=k,
        n=right.free,
        lhs=left,
        rhs=right,
        out_dtype=out.name,
        rhs_transposed=rhs_transposed,
        quantize_lhs=quantize_lhs,
        precision=_precision(precision),
        norm=norm,
        epilogue=epilogue,
        low_rank=low_rank,
    )


def as_tensor(x: Any) -> Tensor:
    """A plain array as a `Tensor` without a scale; a `Tensor` as it is."""
    return x if isinstance(x, Tensor) else Tensor(x)


def _operand(x: Tensor, side: str, free: int, contracting: int) -> Operand:
    shape, dtype = tuple(x.values.shape), jnp.dtype(x.values.dtype)
    if len(shape) != 3:
        raise ValueError(f"{side} must have 3 axes (batch and two of the matrix), got shape {shape}.")
    _check_dtype(x, side, dtype)
    if x.scale is None:
        if x.zero_point is not None:
            raise ValueError(f"{side} has a zero point and no scale; give both, or neither.")
        return Operand(dtype.name, shape[0], shape[free], codebook=x.codebook)
    scale = tuple(x.scale.shape)
    if len(scale) != 3 or any(d % s if s else d for d, s in zip(shape, scale, strict=True)):
        raise ValueError(
            f"The scale of {side} has shape {scale}; each size must divide that of the values, {shape}."
        )
    if not jnp.issubdtype(x.scale.dtype, jnp.floating):
        raise TypeError(f"The scale of {side} must be floating, got {x.scale.dtype}.")
    if x.zero_point is not None:
        _check_zero_point(x, scale, x.zero_point, side)
    return Operand(
        dtype=dtype.name,
        batch=shape[0],
        free=shape[free],
        scale_dtype=jnp.dtype(x.scale.dtype).name,
        tile_free=max(1, shape[free] // max(1, scale[free])),
        tile_k=max(1, shape[contracting] // max(1, scale[contracting])),
        zero_point=x.zero_point is not None,
        codebook=x.codebook,
    )


def _check_dtype(x: Tensor, side: str, dtype: jnp.dtype) -> None:
    integer = jnp.issubdtype(dtype, jnp.integer)
    if not (jnp.issubdtype(dtype, jnp.floating) or (integer and jnp.iinfo(dtype).bits <= 16)):
        raise TypeError(f"{side} has dtype {dtype}; a matmul takes integers of at most 16 bits and floats.")
    if x.codebook is None:
        return
    if x.codebook not in CODEBOOKS:
        raise ValueError(f"{side} has codebook {x.codebook!r}; known: {', '.join(CODEBOOKS)}.")
    if not integer or jnp.iinfo(dtype).max < len(CODEBOOKS[x.codebook]) - 1:
        raise TypeError(f"{side} holds indices into {x.codebook!r} and needs uint4 or wider, got {dtype}.")


def _check_zero_point(x: Tensor, scale: tuple[int, ...], zero_point: jax.Array, side: str) -> None:
    if x.codebook is not None:
        raise ValueError(
            f"{side} has codebook {x.codebook!r} and a zero point; only plain values can have one."
        )
    if tuple(zero_point.shape) != scale:
        raise ValueError(
            f"The zero point of {side} has shape {tuple(zero_point.shape)}, its scale "
            f"{scale}; they must be equal."
        )
    if jnp.dtype(zero_point.dtype) != jnp.dtype(x.values.dtype):
        raise TypeError(
            f"The zero point of {side} has dtype {zero_point.dtype}, its values {x.values.dtype}; "
            "they must be equal."
        )


def _check_row_quantize(how: RowQuantize, left: Operand, k: int) -> None:
    if left.is_quantized or left.codebook or not jnp.issubdtype(left.dtype, jnp.floating):
        raise ValueError(f"quantize_lhs needs a plain float lhs, got {left}.")
    check_rows("quantize_lhs", how, k, "K")


def _value_dtype(x: Operand) -> jnp.dtype:
    """The dtype of the values that an operand represents."""
    if x.scale_dtype is not None and jnp.finfo(x.scale_dtype).bits > 8:
        return jnp.dtype(x.scale_dtype)
    if x.is_integer and not x.is_quantized:
        return jnp.dtype(jnp.int32)
    return jnp.dtype(jnp.bfloat16) if x.bits <= 8 else jnp.dtype(x.dtype)


def _precision(given: Any) -> str | None:
    """None, "high" or "highest"; "default" is None, so that equal problems compare equal."""
    if isinstance(given, tuple | list):
        names = [p for p in map(_precision, given) if p]
        return max(names, key=_PRECISIONS.index) if names else None
    if given is None:
        return None
    name = given.name.lower() if isinstance(given, jax.lax.Precision) else given
    if name not in _PRECISIONS:
        raise ValueError(
            f"precision must be None, a jax.lax.Precision or one of {_PRECISIONS}, got {given!r}."
        )
    return None if name == "default" else name
