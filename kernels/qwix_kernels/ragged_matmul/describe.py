"""From arrays to a `GmmProblem` or a `TgmmProblem`: every check of what a caller may give.

Only shapes and dtypes are read, so `jax.ShapeDtypeStruct`s serve as well as arrays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.matmul.describe import as_tensor, problem_of
from qwix_kernels.problem import Extras, RowQuantize, Tensor
from qwix_kernels.ragged_matmul.problem import GmmProblem, TgmmProblem

Operand = Tensor | jax.Array | jax.ShapeDtypeStruct


def gmm_problem_of(
    lhs: Operand,
    rhs: Operand,
    group_sizes: Any,
    extras: Extras | None = None,
    *,
    group_offset: Any = None,
    quantize_lhs: RowQuantize | None = None,
    rhs_transposed: bool = False,
    out_dtype: Any = None,
    precision: Any = None,
    norm_eps: float = 1e-6,
    activation: str | None = None,
) -> GmmProblem:
    """Describes the gmm of these operands, or says what is wrong with them.

    Args: as for `qwix_kernels.ragged_matmul.gmm`.

    Raises ValueError for shapes, tiles or options that disagree, TypeError for dtypes that no gmm takes.

    >>> x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    >>> w, scale = ((8, 256, 128), jnp.int4), ((8, 2, 128), jnp.bfloat16)
    >>> w = Tensor(jax.ShapeDtypeStruct(*w), jax.ShapeDtypeStruct(*scale))
    >>> gmm_problem_of(x, w, jax.ShapeDtypeStruct((8,), jnp.int32)).scheme
    'gmm_w4a16_g128'
    """
    lhs, rhs, extras = as_tensor(lhs), as_tensor(rhs), extras or Extras()
    if len(lhs.shape) != 2:
        raise ValueError(f"lhs must have 2 axes, [M, K], got {lhs.shape}.")
    if len(rhs.shape) != 3:
        raise ValueError(f"rhs must have 3 axes, [groups, K, N] or transposed, got {rhs.shape}.")
    _check_sizes(group_sizes, group_offset)
    if group_offset is None and group_sizes.shape[0] != rhs.shape[0]:
        raise ValueError(
            f"rhs {rhs.shape} has {rhs.shape[0]} groups, group_sizes {group_sizes.shape[0]}. "
            "Give group_offset if rhs holds some of the groups only."
        )
    if rhs.shape[0] == 0:
        raise ValueError(f"rhs {rhs.shape} has no group.")
    if extras.of_low_rank != Extras():
        raise ValueError("A grouped matmul takes no low-rank update; add that of two grouped matmuls.")
    product = problem_of(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), lhs),
        rhs,
        extras,
        quantize_lhs=quantize_lhs,
        rhs_transposed=rhs_transposed,
        out_dtype=out_dtype,
        precision=precision,
        norm_eps=norm_eps,
        activation=activation,
    )
    if extras.residual is not None and extras.residual.shape[0] != 1:
        raise ValueError(
            f"residual has shape {extras.residual.shape}; it must be (1, {product.m}, {product.n})."
        )
    return GmmProblem(product, group_sizes.shape[0], mapped=group_offset is not None)


def tgmm_problem_of(
    lhs: Operand,
    g: Operand,
    group_sizes: Any,
    *,
    group_offset: Any = None,
    matrices: int | None = None,
    out_dtype: Any = None,
    precision: Any = None,
) -> TgmmProblem:
    """Describes the tgmm of these operands, or says what is wrong with them.

    Args: as for `qwix_kernels.ragged_matmul.tgmm`.

    Raises ValueError for shapes or scales that disagree, TypeError for dtypes that no tgmm takes.
    """
    lhs, g = as_tensor(lhs), as_tensor(g)
    _check_sizes(group_sizes, group_offset)
    for name, x in (("lhs", lhs), ("g", g)):
        if len(x.shape) != 2:
            raise ValueError(f"{name} must have 2 axes, rows first, got {x.shape}.")
        if x.scale is not None and (len(x.scale.shape) != 2 or x.scale.shape[0] != 1):
            raise ValueError(
                f"The scale of {name} {x.shape} has shape {tuple(x.scale.shape)}: the sum is over rows, so "
                "it must not change along them. Fold it into the other operand, or dequantize."
            )
    if lhs.shape[0] != g.shape[0]:
        raise ValueError(f"lhs {lhs.shape} and g {g.shape} have {lhs.shape[0]} and {g.shape[0]} rows.")
    matrices = group_sizes.shape[0] if matrices is None else matrices
    if group_offset is None and matrices != group_sizes.shape[0]:
        raise ValueError(f"{matrices} matrices of {group_sizes.shape[0]} groups need a group_offset.")
    # The product of one group: [1, K, M] x [1, M, N].
    turned = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[::-1]), x.dtype), lhs)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), g)
    product = problem_of(turned, plain, out_dtype=out_dtype, precision=precision)
    return TgmmProblem(
        m=lhs.shape[0],
        k=lhs.shape[1],
        n=g.shape[1],
        matrices=matrices,
        groups=group_sizes.shape[0],
        lhs=product.lhs,
        g=product.rhs,
        out_dtype=product.out_dtype,
        precision=product.precision,
        mapped=group_offset is not None,
    )


def _check_sizes(group_sizes: Any, group_offset: Any) -> None:
    if len(group_sizes.shape) != 1 or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes must be a vector of integers, got {group_sizes.dtype}{list(group_sizes.shape)}."
        )
    if group_offset is not None and tuple(jnp.shape(group_offset)) not in ((), (1,)):
        raise ValueError(f"group_offset must be a number, got shape {jnp.shape(group_offset)}.")
