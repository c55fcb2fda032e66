"""What is fused round a product: checks of the arrays in `Extras`, and the static facts about them.

Only shapes and dtypes are read, so `jax.ShapeDtypeStruct`s serve as well as arrays.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from qwix_kernels.problem import (
    ACTIVATIONS,
    ROW_SCALES,
    Epilogue,
    Extras,
    LowRank,
    Operand,
    RMSNorm,
    RowQuantize,
)


def norm_of(extras: Extras, eps: float, left: Operand, k: int) -> RMSNorm | None:
    """The normalisation that `extras` ask for."""
    weight = extras.norm_weight
    if weight is None:
        return None
    if left.is_quantized or left.codebook or not jnp.issubdtype(left.dtype, jnp.floating):
        raise ValueError(f"norm_weight normalises a plain float lhs, got {left}.")
    if not eps >= 0:
        raise ValueError(f"norm_eps is {eps}; it must be 0 or positive.")
    _check_vector("norm_weight", weight, left.batch, k, "K")
    return RMSNorm(float(eps), jnp.dtype(weight.dtype).name)


def epilogue_of(
    extras: Extras, activation: str | None, quantize: RowQuantize | None, batch: int, m: int, n: int
) -> Epilogue | None:
    """The epilogue that `extras` and the options ask for; None where nothing is fused. The gate is checked
    by the caller, as an operand."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}, or None.")
    if extras.gate_bias is not None and extras.gate is None:
        raise ValueError("gate_bias is given without a gate; give the gate's weight as well, or `bias`.")
    for name in ("bias", "gate_bias"):
        if (x := getattr(extras, name)) is not None:
            _check_vector(name, x, batch, n, "N")
    residual = extras.residual
    if residual is not None:
        _check_float("residual", residual)
        shape = tuple(residual.shape)
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1:] != (m, n):
            raise ValueError(f"residual has shape {shape}; it is added to the result, ({batch}, {m}, {n}).")
    check_static("quantize_out", quantize, "out_scale", extras.out_scale, (batch, m, n))
    if quantize is not None:
        check_rows("quantize_out", quantize, n, "N")
    out = Epilogue(
        bias=extras.bias is not None,
        activation=activation,
        gate=extras.gate is not None,
        gate_bias=extras.gate_bias is not None,
        residual=None if residual is None else jnp.dtype(residual.dtype).name,
        quantize=quantize,
    )
    return None if out == Epilogue() else out


def low_rank_of(
    extras: Extras, scaling: float, left: Operand, sizes: tuple[int, int, int, int]
) -> LowRank | None:
    """The low-rank update that `extras` ask for; None without one. `sizes` are batch, M, K and N."""
    a, b, mask = extras.low_rank_a, extras.low_rank_b, extras.low_rank_mask
    if a is None and b is None and mask is None:
        return None
    if a is None or b is None:
        raise ValueError("low_rank_a and low_rank_b are given together (low_rank_mask only with them).")
    if left.is_quantized or not jnp.issubdtype(left.dtype, jnp.floating) or left.bits <= 8:
        raise ValueError(f"A low-rank update multiplies a plain float lhs, got {left}.")
    if extras.norm_weight is not None:
        raise ValueError("A low-rank update and norm_weight exclude each other. Normalise before.")
    batch, m, k, n = sizes
    rank = a.shape[-1] if len(a.shape) == 3 else 0
    _check_low_rank("low_rank_a", a, (batch, k, rank))
    _check_low_rank("low_rank_b", b, (batch, rank, n))
    if rank < 1:
        raise ValueError(f"low_rank_a has shape {tuple(a.shape)}; its last axis, the rank, is at least 1.")
    if mask is not None:
        rows = 1 if len(mask.shape) == 3 and mask.shape[1] == 1 else m
        _check_low_rank("low_rank_mask", mask, (batch, rows, rank))
    name = lambda x: jnp.dtype(x.dtype).name
    return LowRank(rank, float(scaling), name(a), name(b), None if mask is None else name(mask))


def _check_low_rank(name: str, x: Any, wanted: tuple[int, int, int]) -> None:
    _check_float(name, x)
    shape = tuple(x.shape)
    if len(shape) != 3 or shape[0] not in (1, wanted[0]) or shape[1:] != wanted[1:]:
        raise ValueError(
            f"{name} has shape {shape}; it must be (1 or {wanted[0]}, {wanted[1]}, {wanted[2]}): low_rank_a "
            "is [batch, K, rank], low_rank_b [batch, rank, N], low_rank_mask [batch, M or 1, rank]."
        )


def check_rows(name: str, how: RowQuantize, size: int, axis: str) -> None:
    """Raises for a `RowQuantize` that cannot be applied to rows of `size`."""
    integer = jnp.issubdtype(how.dtype, jnp.integer)
    if not (jnp.issubdtype(how.dtype, jnp.floating) or (integer and jnp.iinfo(how.dtype).bits <= 16)):
        raise TypeError(
            f"{name}.dtype is {how.dtype!r}; it must be an integer of at most 16 bits or a float."
        )
    if not how.bound > 0:
        raise ValueError(f"{name}.bound is {how.bound}; it must be positive.")
    if how.tile_k < 0 or (how.tile_k and size % how.tile_k):
        raise ValueError(
            f"{name}.tile_k is {how.tile_k}, which does not divide {axis}={size}. "
            f"Give 0 (the whole row) or one of {divisors(size)}."
        )
    if how.scale_dtype not in ROW_SCALES:
        raise ValueError(f"{name}.scale_dtype is {how.scale_dtype!r}; it must be one of {ROW_SCALES}.")
    if name == "quantize_out" and (how.columns or how.noise):
        raise ValueError(f"{name} takes neither columns nor noise, got {how!r}.")
    if how.static and how.scale_dtype != "float32":
        raise ValueError(
            f"{name} is static and has scale_dtype {how.scale_dtype!r}: given scales are used as they are. "
            "Leave scale_dtype out."
        )


def check_static(
    name: str, how: RowQuantize | None, array: str, scale: Any, shape: tuple[int, int, int]
) -> None:
    """Raises where the array of a static scale is missing, superfluous or of another shape."""
    static = how is not None and how.static
    if static != (scale is not None):
        given, wanted = ("not given", "set it") if static else ("given", "leave it out")
        raise ValueError(
            f"{array} is {given}, but {name} is {how!r}: {wanted}, or make {name} "
            f"{'dynamic' if static else 'static'}."
        )
    if how is None or scale is None:
        return
    _check_float(array, scale)
    batch, rows, k = shape
    tiles = k // (how.tile_k or k) if k else 1
    got = tuple(scale.shape)
    if len(got) != 3 or got[0] not in (1, batch) or got[1] not in (1, rows) or got[2] != tiles:
        raise ValueError(
            f"{array} has shape {got}; it must be (1 or {batch}, 1 or {rows}, {tiles}): batch, rows and "
            f"tiles of {name}."
        )


def check_rows_extras(how: RowQuantize | None, extras: Extras, shape: tuple[int, int, int]) -> None:
    """Raises where `lhs_columns` or `lhs_noise` are missing, superfluous or of another shape."""
    batch, rows, k = shape
    for name, field in (("lhs_columns", "columns"), ("lhs_noise", "noise")):
        x = getattr(extras, name)
        if (how is not None and getattr(how, field)) != (x is not None):
            given, wanted = ("not given", "set it") if x is None else ("given", "leave it out")
            raise ValueError(
                f"{name} is {given}, but quantize_lhs is {how!r}: {wanted}, or change `{field}`."
            )
    if extras.lhs_columns is not None:
        _check_vector("lhs_columns", extras.lhs_columns, batch, k, "K")
    if how is None or extras.lhs_noise is None:
        return
    if not jnp.issubdtype(how.dtype, jnp.integer):
        raise ValueError(f"lhs_noise rounds to integers, not to {how.dtype}. Add it before the matmul.")
    _check_float("lhs_noise", extras.lhs_noise)
    got = tuple(extras.lhs_noise.shape)
    if len(got) != 3 or got[0] not in (1, batch) or got[1] not in (1, rows) or got[2] != 1:
        raise ValueError(
            f"lhs_noise has shape {got}; it must be (1 or batch, 1 or M, 1), with batch {batch} and M {rows}."
        )


def _check_vector(name: str, x: Any, batch: int, size: int, axis: str) -> None:
    _check_float(name, x)
    shape = tuple(x.shape)
    if shape != (size,) and (len(shape) != 3 or shape[0] not in (1, batch) or shape[1:] != (1, size)):
        raise ValueError(f"{name} has shape {shape}; it must be ({axis},) = ({size},) or (batch, 1, {size}).")


def _check_float(name: str, x: Any) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {x.dtype}; it must be a float.")


def divisors(n: int) -> list[int]:
    """The divisors of n in order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [d for d in range(1, n + 1) if n % d == 0]
