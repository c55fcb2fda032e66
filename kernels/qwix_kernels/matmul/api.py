"""The matmul of quantized operands as one JAX operation.

`matmul` describes and checks its operands, brings them into the form of problem.py and binds one primitive.
Which implementation that becomes is decided when it is lowered, for the platform and the chip it is lowered
for; the same traced program therefore runs here, compiles for a chip that is not attached and exports for
several platforms.

The rules of JAX's transformations are in primitive.py. This file holds the gradient: it flows to float
operands through the other side's dequantized values, by the same op on the same stored arrays
(`rhs_transposed` flipped), so that a backward pass dequantizes no weight either. Row quantization of the lhs
is passed straight through. Quantized operands and their scales get zero gradients: train those through the
float values that they came from.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.matmul import primitive, xla
from qwix_kernels.matmul.describe import as_tensor, problem_of
from qwix_kernels.problem import MatmulProblem, RowQuantize, Tensor

__all__ = ["matmul", "problem_of"]


def matmul(
    lhs: Tensor | jax.Array,
    rhs: Tensor | jax.Array,
    *,
    quantize_lhs: RowQuantize | None = None,
    rhs_transposed: bool = False,
    out_dtype: Any = None,
    precision: Any = None,
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
) -> jax.Array:
    """lhs [batch, M, K] times rhs [batch, K, N], either of them quantized.

    Integers without scales give their exact int32 accumulator. Anything else is computed in float32 (integer
    products in integers, as long as their scale is shared) and rounded once, to `out_dtype`;
    `reference.error_bound` says how far from the exact result it may be.

    Args:
      lhs: a `Tensor` or a plain array, [batch, M, K]. A batch of 1 is shared by all batches of the other
      side. rhs: the same, [batch, K, N], or [batch, N, K] with `rhs_transposed`.
      quantize_lhs: quantize the rows of a plain float lhs on the way.
      rhs_transposed: whether N comes before K in rhs.
      out_dtype: of the result; by default int32 for integers without scales, else what the represented values
      promote
        to.
      precision: of float products, as in `jax.lax.dot`.
      implementation: None takes the best that runs ("mosaic_tpu" on a TPU, "xla" anywhere) and never fails; a
      name or
        several names are used in that order, or raise.
      config: block sizes of the implementation; None looks them up (see `qwix_kernels.tuning`).

    Returns: [batch, M, N] in `out_dtype`.

    Raises:
      ValueError, TypeError: operands that disagree, before anything runs.
      NotImplementedError: when lowered, if none of the named implementations can run this.

    >>> x = jnp.array([[[1, -2], [3, 4]]], jnp.int8)
    >>> w = Tensor(jnp.array([[[7, 0], [0, -8]]], jnp.int4), jnp.array([[[0.5, 0.25]]], jnp.float32))
    >>> matmul(x, w).tolist()
    [[[3.5, 4.0], [10.5, -8.0]]]
    """
    problem = problem_of(
        lhs,
        rhs,
        quantize_lhs=quantize_lhs,
        rhs_transposed=rhs_transposed,
        out_dtype=out_dtype,
        precision=precision,
    )
    names = (implementation,) if isinstance(implementation, str) else implementation
    how = primitive.How(None if names is None else tuple(names), config)
    primitive.check_names(problem, how)
    left, right = as_tensor(lhs), as_tensor(rhs)
    values = jax.tree.map(jnp.asarray, (left, right))
    return _matmul(problem, how, *primitive.vary_alike(values))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(problem: MatmulProblem, how: primitive.How, lhs: Tensor, rhs: Tensor) -> jax.Array:
    return primitive.bind(problem, how, lhs, rhs)


def _forward(problem: MatmulProblem, how: primitive.How, lhs: Tensor, rhs: Tensor):
    return primitive.bind(problem, how, lhs, rhs), (lhs, rhs)


def _backward(problem: MatmulProblem, how: primitive.How, saved: tuple[Tensor, Tensor], g: jax.Array):
    lhs, rhs = saved
    # The backward problems are others: a config for this one says nothing about them.
    again = functools.partial(matmul, precision=problem.precision, implementation=how.implementation)
    dlhs = drhs = None
    if _is_float(lhs):
        d = again(g, rhs, rhs_transposed=not problem.rhs_transposed, out_dtype=lhs.values.dtype)
        dlhs = Tensor(_sum_shared(d, lhs))
    if _is_float(rhs):
        used = xla.quantize_rows(lhs.values, problem.quantize_lhs) if problem.quantize_lhs else lhs
        d = again(g.mT, used, out_dtype=rhs.values.dtype)  # [batch, N, K]
        drhs = Tensor(_sum_shared(d if problem.rhs_transposed else d.mT, rhs))
    return dlhs, drhs


_matmul.defvjp(_forward, _backward)


def _is_float(x: Tensor) -> bool:
    return (
        x.scale is None
        and x.codebook is None
        and jnp.issubdtype(x.values.dtype, jnp.floating)
        and (jnp.finfo(x.values.dtype).bits > 8)
    )


def _sum_shared(d: jax.Array, x: Tensor) -> jax.Array:
    """The gradient of an operand whose one batch served all batches of the other side is their sum."""
    if d.shape[0] == x.shape[0]:
        return d
    return jnp.sum(d, axis=0, keepdims=True, dtype=jnp.float32).astype(d.dtype)
