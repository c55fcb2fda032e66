"""Grouped matmuls of quantized operands as JAX operations: `gmm`, and `tgmm`, which is its weight gradient.

Either describes and checks its operands and binds a primitive (primitive.py); which implementation that
becomes is decided when it is lowered. The gradients, by the same two ops, are in gradient.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels import dispatch
from qwix_kernels.lowering import How
from qwix_kernels.matmul.describe import as_tensor
from qwix_kernels.matmul.primitive import vary_alike
from qwix_kernels.partitioning_routes import laid_out_alike
from qwix_kernels.problem import Extras, RowQuantize, Tensor
from qwix_kernels.ragged_matmul import gradient, primitive
from qwix_kernels.ragged_matmul.describe import gmm_problem_of, tgmm_problem_of
from qwix_kernels.ragged_matmul.groups import local_groups
from qwix_kernels.ragged_matmul.problem import GmmProblem, Groups, TgmmProblem

__all__ = ["gmm", "gmm_problem_of", "tgmm", "tgmm_problem_of"]


def gmm(
    lhs: Tensor | jax.Array,
    rhs: Tensor | jax.Array,
    group_sizes: jax.Array,
    extras: Extras | None = None,
    *,
    group_offset: Any = None,
    quantize_lhs: RowQuantize | None = None,
    rhs_transposed: bool = False,
    out_dtype: Any = None,
    precision: Any = None,
    norm_eps: float = 1e-6,
    activation: str | None = None,
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
) -> jax.Array:
    """Rows of lhs [M, K] times the matrix of their group in rhs [G, K, N], either of them quantized.

    What a matmul may have, a gmm may have: the schemes, zero points, scales by column and by tiles, rows that
    are quantized on the way, and what `problem.Extras` lists but for quantization of the result. The cost
    follows the rows that there are; an empty group costs nothing.

    Args:
      lhs: a `Tensor` or a plain array, [M, K]; a scale [M or a divisor, tiles].
      rhs: the same, [G, K, N], or [G, N, K] with `rhs_transposed`; scales [G or 1, tiles, N or a divisor].
      group_sizes: [G] integers: the first group_sizes[0] rows are group 0, and so on. More than G of them
        with `group_offset`.
      extras: the arrays of what is fused. `bias`, `gate_bias` and `gate` are by group: [G, 1, N] (or [N], for
        all groups) and a second rhs; `residual` is [1, M, N].
      group_offset: a number: rhs[0] belongs to this group. For a device that holds some of the matrices.
      quantize_lhs, rhs_transposed, out_dtype, precision, norm_eps, activation: as for `matmul`.
      implementation: as for `matmul`.
      config: block sizes of the implementation.

    Returns: [M, N] in `out_dtype`; zeros in rows that belong to no group of rhs.

    Raises:
      ValueError, TypeError: operands that disagree, before anything runs.
      NotImplementedError: when lowered, if none of the named implementations can run this.

    >>> x = jnp.array([[1, -2], [3, 4], [5, 6]], jnp.int8)
    >>> w = Tensor(jnp.array([[[7, 0], [0, -8]], [[1, 1], [1, 1]]], jnp.int4), jnp.full((2, 1, 2), 0.5))
    >>> gmm(x, w, jnp.array([1, 1])).tolist()
    [[3.5, 8.0], [3.5, 3.5], [0.0, 0.0]]
    """
    problem = gmm_problem_of(
        lhs,
        rhs,
        group_sizes,
        extras,
        group_offset=group_offset,
        quantize_lhs=quantize_lhs,
        rhs_transposed=rhs_transposed,
        out_dtype=out_dtype,
        precision=precision,
        norm_eps=norm_eps,
        activation=activation,
    )
    how = _how(problem, implementation, config)
    groups = local_groups(jnp.asarray(group_sizes), group_offset, problem.matrices)
    left = jax.tree.map(lambda x: jnp.asarray(x)[None], as_tensor(lhs))
    right, more = jax.tree.map(jnp.asarray, (as_tensor(rhs), extras or Extras()))
    more = jax.tree.map(lambda x: x[None, None] if x.ndim == 1 else x, more)
    operands: Any = left, right, more, groups
    return _gmm(problem, how, *vary_alike(operands))


def tgmm(
    lhs: Tensor | jax.Array,
    g: Tensor | jax.Array,
    group_sizes: jax.Array,
    *,
    group_offset: Any = None,
    matrices: int | None = None,
    out_dtype: Any = None,
    precision: Any = None,
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
) -> jax.Array:
    """For each group, lhs^T g over its rows: [M, K] and [M, N] give [G, K, N], zeros for an empty group.

    Args:
      lhs, g: a `Tensor` or a plain array, [M, K] and [M, N]; scales [1, K or a divisor], as the sum is over
        rows.
      group_sizes: [G] integers, as for `gmm`.
      group_offset, matrices: the result is that of `matrices` groups from this one.
      out_dtype, precision, implementation, config: as for `gmm`.

    Raises: as `gmm`.

    >>> x, g = jnp.array([[1, 2], [3, 4], [5, 6]], jnp.int8), jnp.array([[1], [1], [10]], jnp.int8)
    >>> tgmm(x, g, jnp.array([2, 1])).tolist()
    [[[4], [6]], [[50], [60]]]
    """
    problem = tgmm_problem_of(
        lhs,
        g,
        group_sizes,
        group_offset=group_offset,
        matrices=matrices,
        out_dtype=out_dtype,
        precision=precision,
    )
    how = _how(problem, implementation, config)
    groups = local_groups(jnp.asarray(group_sizes), group_offset, problem.matrices)
    left, right = (jax.tree.map(lambda a: jnp.asarray(a)[None], as_tensor(x)) for x in (lhs, g))
    operands: Any = left, right, groups
    return _tgmm(problem, how, *vary_alike(operands))


def _how(problem: GmmProblem | TgmmProblem, implementation: Any, config: Any) -> How:
    names = (implementation,) if isinstance(implementation, str) else implementation
    how = How(None if names is None else tuple(names), config)
    dispatch.named(problem, how.implementation)
    return how


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gmm(
    problem: GmmProblem, how: How, lhs: Tensor, rhs: Tensor, extras: Extras, groups: Groups
) -> jax.Array:
    return primitive.bind_gmm(problem, how, lhs, rhs, extras, groups)


def _gmm_forward(problem: GmmProblem, how: How, *operands: Any):
    return _gmm(problem, how, *operands), operands


def _gmm_backward(problem: GmmProblem, how: How, saved: Any, g: jax.Array):
    return laid_out_alike(gradient.of_gmm(problem, how, _gmm, _tgmm, saved, g), saved)


_gmm.defvjp(_gmm_forward, _gmm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tgmm(problem: TgmmProblem, how: How, lhs: Tensor, g: Tensor, groups: Groups) -> jax.Array:
    return primitive.bind_tgmm(problem, how, lhs, g, groups)


def _tgmm_forward(problem: TgmmProblem, how: How, *operands: Any):
    return _tgmm(problem, how, *operands), operands


def _tgmm_backward(problem: TgmmProblem, how: How, saved: Any, g: jax.Array):
    return laid_out_alike(gradient.of_tgmm(problem, how, _gmm, saved, g), saved)


_tgmm.defvjp(_tgmm_forward, _tgmm_backward)
