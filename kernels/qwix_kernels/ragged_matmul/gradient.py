"""The gradients of the grouped matmuls, by each other.

    gmm     dlhs = gmm(g, rhs^T)      drhs = tgmm(lhs, g)
    tgmm    dlhs = gmm(g, dout^T)     dg   = gmm(lhs, dout)

As for a matmul (matmul/gradient.py): gradients flow to float operands through the other side's dequantized
values, row quantization is passed straight through, quantized operands and scales get none, and sums that an
activation or a gate needs are computed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qwix_kernels.lowering import How
from qwix_kernels.matmul import elementwise
from qwix_kernels.matmul.gradient import is_float, sum_to
from qwix_kernels.partitioning_routes import layout_of
from qwix_kernels.problem import Epilogue, Extras, MatmulProblem, Operand, Tensor
from qwix_kernels.ragged_matmul.groups import alive
from qwix_kernels.ragged_matmul.problem import GmmProblem, Groups, TgmmProblem

Op = Callable[..., jax.Array]


def of_gmm(
    problem: GmmProblem, how: How, gmm: Op, tgmm: Op, saved: Any, g: jax.Array
) -> tuple[Tensor | None, Tensor | None, Extras, None]:
    """(d lhs, d rhs, d extras, None) for a gradient `g` [M, N]; `gmm` and `tgmm` are the ops themselves."""
    lhs, rhs, extras, groups = saved
    p, how = problem.product, How(how.implementation)
    g = jnp.where(alive(groups, p.m)[:, None], g, 0)
    dz, dgate, dextras = _through_epilogue(problem, how, gmm, tgmm, saved, g)
    dlhs = drhs = None
    if is_float(lhs):
        dtype = "float32" if p.norm or dgate is not None else p.lhs.dtype
        own = layout_of(lhs.values)
        back = dataclasses.replace(how, out=own and PartitionSpec(*own[1:]))
        dy = gmm(*_turned(problem, back, dz, rhs, dtype), groups)
        if dgate is not None:
            dy = dy + gmm(*_turned(problem, back, dgate, extras.gate, dtype), groups)
        dx = dy[None]
        if p.norm is not None:
            wide = jnp.promote_types(lhs.values.dtype, jnp.float32)
            normalise = lambda x, w: elementwise.rms_norm(x, w, p.norm)
            _, pull = jax.vjp(normalise, lhs.values, extras.norm_weight)
            dx, dweight = pull(dx.astype(wide))
            dextras = dataclasses.replace(dextras, norm_weight=dweight)
        dlhs = Tensor(sum_to(dx, lhs.shape, lhs.values.dtype))
    if is_float(rhs):
        used = elementwise.prepare(p, lhs, extras)
        drhs = _of_weight(problem, how, tgmm, used, dz, rhs, groups)
        if dgate is not None:
            gate = _of_weight(problem, how, tgmm, used, dgate, extras.gate, groups)
            dextras = dataclasses.replace(dextras, gate=gate)
    return dlhs, drhs, dextras, None


def of_tgmm(
    problem: TgmmProblem, how: How, gmm: Op, saved: Any, dout: jax.Array
) -> tuple[Tensor | None, Tensor | None, None]:
    """(d lhs, d g, None) for a gradient `dout` [matrices, K, N]."""
    lhs, g, groups = saved
    p, how = problem, How(how.implementation)

    def rows(x: Tensor, k: int, n: int, dtype: str, transposed: bool) -> jax.Array:
        """x [1, M, k] times dout or its transpose, [M, n]."""
        x = _rows_of_columns(x)
        left = _described(x, p.m, k)
        right = Operand(dout.dtype.name, p.matrices, n)
        product = MatmulProblem(p.m, k, n, left, right, dtype, transposed, precision=p.precision)
        return gmm(GmmProblem(product, p.groups, p.batch, p.mapped), how, x, Tensor(dout), Extras(), groups)[
            None
        ]

    dlhs = Tensor(rows(g, p.n, p.k, p.lhs.dtype, True)) if is_float(lhs) else None
    dg = Tensor(rows(lhs, p.k, p.n, p.g.dtype, False)) if is_float(g) else None
    return dlhs, dg, None


def _rows_of_columns(x: Tensor) -> Tensor:
    """A tgmm's operand as the lhs of a gmm: a scale for each column, which are that one's K."""
    if x.scale is None:
        return x
    wide = lambda a: None if a is None else jnp.repeat(a, x.shape[2] // a.shape[2], axis=2)
    return dataclasses.replace(x, scale=wide(x.scale), zero_point=wide(x.zero_point))


def _described(x: Tensor, m: int, k: int) -> Operand:
    plain = Operand(x.values.dtype.name, 1, m)
    if x.scale is None:
        return dataclasses.replace(plain, codebook=x.codebook)
    return dataclasses.replace(
        plain,
        scale_dtype=x.scale.dtype.name,
        tile_free=m,
        tile_k=k // x.scale.shape[2],
        zero_point=x.zero_point is not None,
        codebook=x.codebook,
    )


def _turned(problem: GmmProblem, how: How, dz: jax.Array, w: Tensor, dtype: str) -> tuple[Any, ...]:
    """What gmm(dz, w^T) is called with."""
    p = problem.product
    left = Operand(dz.dtype.name, 1, p.m)
    tiles: dict[str, Any] = (
        {"tile_free": p.rhs.tile_k, "tile_k": p.rhs.tile_free} if p.rhs.is_quantized else {}
    )
    right = dataclasses.replace(p.rhs, free=p.k, **tiles)
    product = MatmulProblem(
        p.m, p.n, p.k, left, right, dtype, rhs_transposed=not p.rhs_transposed, precision=p.precision
    )
    return (
        GmmProblem(product, problem.groups, problem.batch, problem.mapped),
        how,
        Tensor(dz[None]),
        w,
        Extras(),
    )


def _of_weight(
    problem: GmmProblem, how: How, tgmm: Op, used: Tensor, d: jax.Array, w: Tensor, groups: Groups
) -> Tensor:
    """The gradient of a weight of the rows that were used, in the weight's order and dtype.

    Scales of rows that were quantized go into d, where they do not change along K; else the rows are
    dequantized. Groups that share a matrix, as under vmap, are the batching rule's.
    """
    p = problem.product
    if used.scale is not None and used.scale.shape[2] == 1 and used.zero_point is None and not used.codebook:
        each = p.m // used.scale.shape[1]
        scale = used.scale[0] if each == 1 else jnp.repeat(used.scale[0], each, axis=0)
        d, used = (d.astype(jnp.float32) * scale).astype(d.dtype), Tensor(used.values)
    elif used.scale is not None or used.codebook:
        used = Tensor(_dequantized(used, d.dtype))
    x = used.values
    one = TgmmProblem(
        m=p.m,
        k=p.k,
        n=p.n,
        matrices=problem.matrices,
        groups=problem.groups,
        lhs=Operand(x.dtype.name, 1, p.k),
        g=Operand(d.dtype.name, 1, p.n),
        out_dtype=w.values.dtype.name,
        precision=p.precision,
        batch=problem.batch,
        mapped=problem.mapped,
    )
    left, right = (Tensor(d[None]), used) if p.rhs_transposed else (used, Tensor(d[None]))
    if p.rhs_transposed:
        one = dataclasses.replace(one, k=p.n, n=p.k, lhs=one.g, g=one.lhs)
    return Tensor(tgmm(one, dataclasses.replace(how, out=layout_of(w.values)), left, right, groups))


def _dequantized(x: Tensor, dtype: Any) -> jax.Array:
    from qwix_kernels.matmul.xla import Side

    return Side(x, is_left=True, free=1, contracting=2).dequantized(dtype, scaled=True)


def _through_epilogue(
    problem: GmmProblem, how: How, gmm: Op, tgmm: Op, saved: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array | None, Extras]:
    """The gradients of the two sums (the gate's is None without one), and of the epilogue's arrays."""
    lhs, rhs, extras, groups = saved
    p = problem.product
    e = p.epilogue or Epilogue()
    dresidual = None if extras.residual is None else g[None].astype(extras.residual.dtype)
    bias = lambda d, x: None if x is None else _of_bias(problem, how, tgmm, d, x, groups)
    if e.activation is None and not e.gate:
        return g, None, Extras(bias=bias(g, extras.bias), residual=dresidual)

    def sums(w: Tensor, add: jax.Array | None) -> jax.Array:
        only = Epilogue(bias=add is not None)
        product = dataclasses.replace(p, out_dtype="float32", epilogue=only if add is not None else None)
        more = dataclasses.replace(extras.of_rows, bias=add)
        return gmm(dataclasses.replace(problem, product=product), how, lhs, w, more, groups)

    z = sums(rhs, extras.bias)
    if not e.gate:
        _, pull = jax.vjp(lambda z: elementwise.activate(z, e.activation), z)
        (dz,) = pull(g.astype(jnp.float32))
        return dz.astype(g.dtype), None, Extras(bias=bias(dz, extras.bias), residual=dresidual)
    gate = sums(extras.gate, extras.gate_bias)
    _, pull = jax.vjp(lambda z, gate: elementwise.activate(gate, e.activation) * z, z, gate)
    dz, dgate = pull(g.astype(jnp.float32))
    dextras = Extras(bias=bias(dz, extras.bias), gate_bias=bias(dgate, extras.gate_bias), residual=dresidual)
    return dz.astype(g.dtype), dgate.astype(g.dtype), dextras


def _of_bias(
    problem: GmmProblem, how: How, tgmm: Op, d: jax.Array, x: jax.Array, groups: Groups
) -> jax.Array:
    """The sums of d over the rows of each group, or over all of them: a tgmm with a column of ones."""
    p = problem.product
    ones = jnp.ones((1, p.m, 1), d.dtype)
    one = TgmmProblem(
        m=p.m,
        k=1,
        n=p.n,
        matrices=problem.matrices,
        groups=problem.groups,
        lhs=Operand(d.dtype.name, 1, 1),
        g=Operand(d.dtype.name, 1, p.n),
        out_dtype="float32",
        precision="highest",
        batch=problem.batch,
        mapped=problem.mapped,
    )
    out = tgmm(one, How(("xla",)), Tensor(ones), Tensor(d[None]), groups)
    return sum_to(out, x.shape, x.dtype)
