"""The gradient of a matmul and of what is fused round it.

It flows to float operands through the other side's dequantized values, by the same op on the same stored
arrays (`rhs_transposed` flipped), so that a backward pass dequantizes no weight either. Row quantization of
the lhs is passed straight through. Quantized operands and all scales get zero gradients: train those through
the float values that they came from.

A low-rank update of the rhs is one of the transposed weight too, its factors turned round, so the gradient of
the rows stays one op. Those of its factors are XLA's products with `rank` columns, summed in float32.

Where an activation or a gate needs the sums before it, they are computed again by the forward kernel instead
of being kept: [M, N] float32 is more than most layers' weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qwix_kernels.lowering import How, explicit_axes
from qwix_kernels.matmul import elementwise
from qwix_kernels.matmul.primitive import Operands
from qwix_kernels.partitioning_routes import layout_of
from qwix_kernels.problem import Epilogue, Extras, MatmulProblem, Tensor

Matmul = Callable[..., Any]


def backward(problem: MatmulProblem, how: How, matmul: Matmul, saved: Operands, g: jax.Array):
    """(d lhs, d rhs, d extras) for a gradient `g` of the result; `matmul` is the op itself."""
    lhs, rhs, extras = saved
    # The backward problems are others: a config for this one says nothing about them.
    again = functools.partial(matmul, precision=problem.precision, implementation=how.implementation)
    dz, dgate, dextras = _through_epilogue(problem, again, saved, g)
    dlhs = drhs = None
    if is_float(lhs):
        turned, scaling = _turned_low_rank(problem, extras)
        own = _layout_of(lhs, rhs)
        dy = again(
            dz,
            rhs,
            turned,
            rhs_transposed=not problem.rhs_transposed,
            out_dtype=_dtype_of_rows(problem),
            low_rank_scaling=scaling,
            out_sharding=own,
        )
        if dgate is not None:
            dy = again(
                dgate,
                extras.gate,
                Extras(residual=dy),
                rhs_transposed=not problem.rhs_transposed,
                out_dtype=_dtype_of_rows(problem),
                out_sharding=own,
            )
        if problem.norm is None:
            dx = dy
        else:
            normalise = functools.partial(elementwise.rms_norm, norm=problem.norm)
            _, pull = jax.vjp(normalise, lhs.values, extras.norm_weight)
            dx, dweight = pull(sum_to(dy, lhs.shape, jnp.promote_types(lhs.values.dtype, jnp.float32)))
            dextras = dataclasses.replace(dextras, norm_weight=dweight)
        dlhs = Tensor(sum_to(dx, lhs.shape, lhs.values.dtype))
    if problem.low_rank:
        own = extras.of_low_rank
        factors: Any = functools.partial(_of_low_rank, problem)
        if explicit_axes():
            # Sums over what is cut are the compiler's business; the results are laid out as the factors.
            out = {name: jax.typeof(x).sharding for name, x in own.given.items()}
            factors = jax.sharding.auto_axes(factors, out_sharding=out)
        dextras = dataclasses.replace(dextras, **factors(lhs.values, own, dz))
    if is_float(rhs):
        used = elementwise.prepare(problem, lhs, extras)

        def of_weight(d: jax.Array, w: Tensor) -> Tensor:
            own = _layout_of(w, lhs)
            if own is not None and not problem.rhs_transposed:
                own = PartitionSpec(own[0], own[2], own[1])
            d = again(d.mT, used, out_dtype=w.values.dtype, out_sharding=own)  # [batch, N, K]
            return Tensor(sum_to(d if problem.rhs_transposed else d.mT, w.shape, w.values.dtype))

        drhs = of_weight(dz, rhs)
        if dgate is not None:
            assert extras.gate is not None
            dextras = dataclasses.replace(dextras, gate=of_weight(dgate, extras.gate))
    return dlhs, drhs, dextras


def _layout_of(x: Tensor, other: Tensor) -> PartitionSpec | None:
    """How the gradient of x is laid out; one that serves all batches is summed over them afterwards."""
    own, batch = layout_of(x.values), layout_of(other.values)
    if own is None or batch is None or x.shape[0] >= other.shape[0]:
        return own
    taken = {axis for entry in own for axis in (entry if isinstance(entry, tuple) else (entry,))}
    axes = batch[0] if isinstance(batch[0], tuple) else (batch[0],)
    return PartitionSpec(tuple(a for a in axes if a and a not in taken) or None, *own[1:])


def _through_epilogue(
    problem: MatmulProblem, again: Matmul, saved: Operands, g: jax.Array
) -> tuple[jax.Array, jax.Array | None, Extras]:
    """The gradients of the two sums (the gate's is None without one), and of the epilogue's arrays."""
    lhs, rhs, extras = saved
    e = problem.epilogue or Epilogue()
    dresidual = _to(g, extras.residual)
    if e.activation is None and not e.gate:
        return g, None, Extras(bias=_to(g, extras.bias), residual=dresidual)
    prologue = extras.of_rows
    sums = functools.partial(
        again,
        lhs,
        quantize_lhs=problem.quantize_lhs,
        norm_eps=problem.norm.eps if problem.norm else 0.0,
        rhs_transposed=problem.rhs_transposed,
        out_dtype=jnp.float32,
    )
    own = dataclasses.replace(extras.of_low_rank, **prologue.given, bias=extras.bias)
    z = sums(rhs, own, low_rank_scaling=problem.low_rank.scaling if problem.low_rank else 1.0)
    if not e.gate:
        _, pull = jax.vjp(lambda z: elementwise.activate(z, e.activation), z)
        (dz,) = pull(g.astype(jnp.float32))
        return dz.astype(g.dtype), None, Extras(bias=_to(dz, extras.bias), residual=dresidual)
    gate = sums(extras.gate, dataclasses.replace(prologue, bias=extras.gate_bias))
    _, pull = jax.vjp(lambda z, gate: elementwise.activate(gate, e.activation) * z, z, gate)
    dz, dgate = pull(g.astype(jnp.float32))
    dextras = Extras(bias=_to(dz, extras.bias), gate_bias=_to(dgate, extras.gate_bias), residual=dresidual)
    return dz.astype(g.dtype), dgate.astype(g.dtype), dextras


def _turned_low_rank(problem: MatmulProblem, extras: Extras) -> tuple[Extras | None, float]:
    """The update of the transposed weight: its factors change places."""
    if problem.low_rank is None:
        return None, 1.0
    assert extras.low_rank_a is not None and extras.low_rank_b is not None
    turned = Extras(
        low_rank_a=extras.low_rank_b.mT,
        low_rank_b=extras.low_rank_a.mT,
        low_rank_mask=extras.low_rank_mask,
    )
    return turned, problem.low_rank.scaling


def _of_low_rank(problem: MatmulProblem, x: jax.Array, extras: Extras, dz: jax.Array) -> dict[str, Any]:
    """The gradients of the update's arrays, from those of the sums; products of K or N with rank columns.

    With t = x @ a * mask and s = dz @ b.T, times the scaling: a gets x.T @ (s * mask), b gets t.T @ dz, and
    the mask x @ a * s.
    """
    assert problem.low_rank and extras.low_rank_a is not None and extras.low_rank_b is not None
    a, b, mask = extras.low_rank_a, extras.low_rank_b, extras.low_rank_mask
    scaling = np.float32(problem.low_rank.scaling)
    wide = functools.partial(jnp.asarray, dtype=jnp.promote_types(x.dtype, jnp.float32))
    t = elementwise.low_rank_rows(problem, x, a) * scaling
    s = elementwise.low_rank_rows(problem, dz, b.mT)
    masked = (lambda v: v) if mask is None else (lambda v: v * wide(mask))

    def summed(u: jax.Array, v: jax.Array, like: jax.Array) -> jax.Array:
        """u.T @ v of [batch, M, ...], over the rows of all batches where they share what it is for."""
        u, v = (jnp.broadcast_to(wide(w), (problem.batch, *w.shape[1:])) for w in (u, v))
        shared = like.shape[0] == 1
        axes = (((0, 1),) * 2, ((),) * 2) if shared else (((1,),) * 2, ((0,),) * 2)
        out = jax.lax.dot_general(u, v, axes, problem.precision, u.dtype)
        return (out[None] if shared else out).astype(like.dtype)

    grads = {"low_rank_a": summed(x, masked(s) * scaling, a), "low_rank_b": summed(masked(t), dz, b)}
    return grads if mask is None else grads | {"low_rank_mask": sum_to(t * s, mask.shape, mask.dtype)}


def _dtype_of_rows(problem: MatmulProblem) -> str:
    """What the gradient of the rows is computed to: float32 where more is to come."""
    return "float32" if problem.norm or problem.products > 1 else problem.lhs.dtype


def is_float(x: Tensor) -> bool:
    return (
        x.scale is None
        and x.codebook is None
        and jnp.issubdtype(x.values.dtype, jnp.floating)
        and (jnp.finfo(x.values.dtype).bits > 8)
    )


def _to(d: jax.Array, x: jax.Array | None) -> jax.Array | None:
    return None if x is None else sum_to(d, x.shape, x.dtype)


def sum_to(d: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The gradient of what served several batches or rows is their sum, taken in float32."""
    axes = tuple(a for a, (wide, one) in enumerate(zip(d.shape, shape, strict=True)) if wide != one)
    return (jnp.sum(d, axes, keepdims=True, dtype=jnp.float32) if axes else d).astype(dtype)
