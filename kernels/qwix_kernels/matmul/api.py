"""The matmul of quantized operands as one JAX operation.

`matmul` describes and checks its operands, brings them into the form of problem.py and binds one primitive.
Which implementation that becomes is decided when it is lowered, for the platform and the chip it is lowered
for; the same traced program therefore runs here, compiles for a chip that is not attached and exports for
several platforms. The rules of JAX's transformations are in primitive.py, the gradient is in gradient.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.lowering import How, spec_of
from qwix_kernels.matmul import gradient, primitive
from qwix_kernels.matmul.describe import as_tensor, problem_of
from qwix_kernels.partitioning_routes import laid_out_alike, placed
from qwix_kernels.problem import Extras, MatmulProblem, RowQuantize, Tensor

__all__ = ["matmul", "problem_of"]


def matmul(
    lhs: Tensor | jax.Array,
    rhs: Tensor | jax.Array,
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
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
    out_sharding: Any = None,
) -> Any:
    """lhs [batch, M, K] times rhs [batch, K, N], either of them quantized, and what is fused round it.

    Integers without scales give their exact int32 accumulator. Anything else is computed in float32 (integer
    products in integers, as long as their scale is shared) and rounded once, to `out_dtype`;
    `reference.error_bound` says how far from the exact result it may be. Hopper sums products of 8-bit floats
    more coarsely, unless `precision` is "highest".

    Args:
      lhs: a `Tensor` or a plain array, [batch, M, K]. A batch of 1 is shared by all batches of the other
        side.
      rhs: the same, [batch, K, N], or [batch, N, K] with `rhs_transposed`.
      extras: the arrays of what is fused: see `problem.Extras`. `norm_weight`, `bias` and `gate_bias` may be
        vectors.
      quantize_lhs: quantize the rows of a plain float lhs on the way.
      rhs_transposed: whether N comes before K in rhs.
      out_dtype: of the result; by default int32 for integers without scales, else what the represented values
        promote to.
      precision: of float products, as in `jax.lax.dot`.
      norm_eps: of the normalisation by `extras.norm_weight`.
      low_rank_scaling: what the update by `extras.low_rank_a` and `low_rank_b` is multiplied with.
      activation: "relu", "relu6", "gelu", "gelu_tanh" or "silu", of the result, or of the gate if there is
        one.
      quantize_out: quantize the rows of the result, as the lhs of another matmul.
      implementation: None takes the best that runs ("mosaic_tpu" on a TPU, "xla" anywhere) and never fails; a
        name or several names are used in that order, or raise.
      config: block sizes of the implementation; None looks them up (see `qwix_kernels.tuning`).
      out_sharding: of the result, under a mesh with explicit axes. None: batch and M as in lhs, N as in rhs.

    Returns: [batch, M, N] in `out_dtype`; with `quantize_out` a `Tensor` of that shape and its scales,
      [batch, M, tiles] (or `extras.out_scale`, if they are static).

    Raises:
      ValueError, TypeError: operands that disagree, before anything runs; a gradient through `quantize_out`.
      NotImplementedError: when lowered, if none of the named implementations can run this.

    >>> x = jnp.array([[[1, -2], [3, 4]]], jnp.int8)
    >>> w = Tensor(jnp.array([[[7, 0], [0, -8]]], jnp.int4), jnp.array([[[0.5, 0.25]]], jnp.float32))
    >>> matmul(x, w).tolist()
    [[[3.5, 4.0], [10.5, -8.0]]]
    >>> matmul(x, w, Extras(bias=jnp.array([-5.0, 0])), activation="relu").tolist()
    [[[0.0, 4.0], [5.5, 0.0]]]
    """
    problem = problem_of(
        lhs,
        rhs,
        extras,
        quantize_lhs=quantize_lhs,
        rhs_transposed=rhs_transposed,
        out_dtype=out_dtype,
        precision=precision,
        norm_eps=norm_eps,
        low_rank_scaling=low_rank_scaling,
        activation=activation,
        quantize_out=quantize_out,
    )
    names = (implementation,) if isinstance(implementation, str) else implementation
    spec = None if out_sharding is None else spec_of(out_sharding)
    how = How(None if names is None else tuple(names), config, out=spec)
    primitive.check_names(problem, how)
    given = as_tensor(lhs), as_tensor(rhs), extras or Extras()
    left, right, more = primitive.vary_alike(jax.tree.map(jnp.asarray, given))
    more = jax.tree.map(lambda x: x[None, None] if x.ndim == 1 else x, more)
    out = _matmul(problem, how, left, right, more)
    out[0] = placed(out[0], spec)
    if quantize_out is None:
        return out[0]
    return Tensor(out[0], more.out_scale if quantize_out.static else out[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(problem: MatmulProblem, how: How, lhs: Tensor, rhs: Tensor, extras: Extras) -> list[jax.Array]:
    return primitive.bind(problem, how, lhs, rhs, extras)


def _forward(problem: MatmulProblem, how: How, lhs: Tensor, rhs: Tensor, extras: Extras):
    if problem.epilogue and problem.epilogue.quantize:
        raise ValueError(
            "A result that is quantized (quantize_out) has no gradient. Leave it float where gradients flow "
            "and quantize it on the way into the next matmul (quantize_lhs), which passes them through."
        )
    return primitive.bind(problem, how, lhs, rhs, extras), (lhs, rhs, extras)


def _backward(problem: MatmulProblem, how: How, saved: primitive.Operands, g: list[jax.Array]):
    return laid_out_alike(gradient.backward(problem, how, matmul, saved, g[0]), saved)


_matmul.defvjp(_forward, _backward)
