"""The primitives under `gmm` and `tgmm`: their types, their batching, and their lowering for each platform.

`vmap` makes more ranges of rows, never a loop: the rows of all batches lie one after the other, and the
ranges of each have its own matrices, or the same ones where the matrices have no batch. The one exception
is a batch of what all rows share (a norm's weight, columns), which is mapped over.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir
from jax.sharding import NamedSharding

from qwix_kernels import chips, dispatch, lowering
from qwix_kernels import partitioning_routes as routes
from qwix_kernels.lowering import How
from qwix_kernels.matmul.primitive import with_own_batch
from qwix_kernels.partitioning import Layout
from qwix_kernels.problem import Epilogue, Extras, Operand, Tensor
from qwix_kernels.ragged_matmul import cost, partition, xla
from qwix_kernels.ragged_matmul.problem import GmmProblem, Groups, TgmmProblem

Problem = GmmProblem | TgmmProblem
GmmOperands = tuple[Tensor, Tensor, Extras, Groups]
TgmmOperands = tuple[Tensor, Tensor, Groups]


def _gmm_estimate(p: GmmProblem, chip: chips.Chip) -> dispatch.Estimate:
    return cost.gmm_xla_estimate(p, chip, xla.rows_at_once(p.product.m, p.matrices))


def _tgmm_estimate(p: TgmmProblem, chip: chips.Chip) -> dispatch.Estimate:
    return cost.tgmm_xla_estimate(p, chip, xla.rows_at_once(p.m, p.matrices))


def _run_gmm(problem: GmmProblem, *operands: Any, config: Any, chip: chips.Chip) -> jax.Array:
    return xla.gmm(problem, *operands)


def _run_tgmm(problem: TgmmProblem, *operands: Any, config: Any, chip: chips.Chip) -> jax.Array:
    return xla.tgmm(problem, *operands)


_HERE = "qwix_kernels.ragged_matmul"
dispatch.register(
    GmmProblem,
    # An earlier form was wrong at the right edge on an H100, and crashed. Both are mended, and not run since.
    lowering.kernels_or_xla(
        f"{_HERE}.tpu", _run_gmm, _gmm_estimate, gpu=f"{_HERE}.gpu", on_request=("h100",)
    ),
)
dispatch.register(TgmmProblem, lowering.kernels_or_xla(f"{_HERE}.tpu_tgmm", _run_tgmm, _tgmm_estimate))


def bind_gmm(
    problem: GmmProblem, how: How, lhs: Tensor, rhs: Tensor, extras: Extras, groups: Groups
) -> jax.Array:
    """[M, N] of lhs [1, M, K] and rhs [matrices, K, N] that `problem` describes."""
    p = problem.product
    if 0 in (p.m, p.n, p.k):
        return _of_nothing(problem, extras, groups)
    rhs, gate = with_own_batch(rhs), extras.gate and with_own_batch(extras.gate)
    operands = lhs, rhs, dataclasses.replace(extras, gate=gate), groups
    return gmm_p.bind(*jax.tree.leaves(operands), problem=problem, how=how.traced())


def bind_tgmm(problem: TgmmProblem, how: How, lhs: Tensor, g: Tensor, groups: Groups) -> jax.Array:
    """[matrices, K, N] of lhs [1, M, K] and g [1, M, N] that `problem` describes."""
    if 0 in (problem.m, problem.n, problem.k):
        return jnp.zeros((problem.matrices, problem.k, problem.n), problem.out_dtype)
    return tgmm_p.bind(*jax.tree.leaves((lhs, g, groups)), problem=problem, how=how.traced())


def _of_nothing(problem: GmmProblem, extras: Extras, groups: Groups) -> jax.Array:
    """The sums over an empty K are zero, and what is fused after them goes on."""
    p = problem.product
    if 0 in (p.m, p.n):
        return jnp.zeros((p.m, p.n), p.out_dtype)
    one = jnp.zeros((1, p.m, 1), jnp.float32), jnp.zeros((problem.matrices, 1, p.n), jnp.float32)
    gate = None if extras.gate is None else Tensor(one[1])
    lhs = dataclasses.replace(p.lhs, dtype="float32", scale_dtype=None, zero_point=False, codebook=None)
    rhs = dataclasses.replace(p.rhs, dtype="float32", scale_dtype=None, zero_point=False, codebook=None)
    plain = dataclasses.replace(p, k=1, lhs=lhs, rhs=rhs, rhs_transposed=False, quantize_lhs=None, norm=None)
    after = Extras(bias=extras.bias, gate=gate, gate_bias=extras.gate_bias, residual=extras.residual)
    return xla.gmm(dataclasses.replace(problem, product=plain), Tensor(one[0]), Tensor(one[1]), after, groups)


@functools.lru_cache(maxsize=4096)
def _structure(problem: Problem) -> Any:
    """The tree of the operands: which arrays a problem has."""

    def some(there: Any, x: Any = 0) -> Any:
        return x if there else None

    def tensor(x: Operand) -> Tensor:
        return Tensor(some(True), some(x.is_quantized), some(x.zero_point), x.codebook)

    groups: Any = Groups(some(True), some(problem.mapped))
    if isinstance(problem, TgmmProblem):
        return jax.tree.structure((tensor(problem.lhs), tensor(problem.g), groups))
    p = problem.product
    q, e = p.quantize_lhs, p.epilogue or Epilogue()
    extras = Extras(
        lhs_scale=some(q and q.static),
        lhs_columns=some(q and q.columns),
        lhs_noise=some(q and q.noise),
        norm_weight=some(p.norm),
        bias=some(e.bias),
        gate=some(e.gate, tensor(p.rhs)),
        gate_bias=some(e.gate_bias),
        residual=some(e.residual),
    )
    return jax.tree.structure((tensor(p.lhs), tensor(p.rhs), extras, groups))


def _unflatten(problem: Problem, leaves: Sequence[Any]) -> Any:
    return jax.tree.unflatten(_structure(problem), leaves)


# --- types


def _abstract(*avals, problem: Problem, how: How):
    operands = _unflatten(problem, avals)
    lhs = operands[0].values
    if isinstance(problem, TgmmProblem):
        shape, dtype = (problem.matrices, problem.k, problem.n), problem.out_dtype
    else:
        p = problem.product
        shape, dtype = (p.m, p.n), p.out_dtype
    mesh = routes.explicit_mesh(avals)
    if mesh is None:
        return lhs.update(shape=shape, dtype=jnp.dtype(dtype))
    (spec,) = routes.plan_of_types(_layout(problem, operands), avals, how.out).results
    return lhs.update(shape=shape, dtype=jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))


def _layout(problem: Problem, operands: Any) -> Layout:
    if isinstance(problem, TgmmProblem):
        return partition.tgmm_layout(problem, operands)
    return partition.gmm_layout(problem, operands)


# --- batching


def _batched(size: int, x: Any, axes: Any) -> Any:
    """All arrays of a tree with the mapped axis first, and None where none of them is mapped (-1)."""
    flat, tree = jax.tree.flatten(x)
    where = jax.tree.leaves(axes)
    if all(axis < 0 for axis in where):
        return None
    front = [
        jnp.broadcast_to(a, (size, *a.shape)) if axis < 0 else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(flat, where, strict=True)
    ]
    return jax.tree.unflatten(tree, front)


def _rows_folded(size: int, x: Any, front: Any) -> Any:
    """[1, M or 1, X] of every batch as [1, size * M or 1, X]."""
    if x is None:
        return None
    if front is None:
        front = jax.tree.map(lambda a: jnp.broadcast_to(a, (size, *a.shape)), x)
    return jax.tree.map(lambda a: a.reshape(1, -1, a.shape[3]), front)


def _row_extra(size: int, x: Any, front: Any, m: int) -> Any:
    """As `_rows_folded`; what has one row and no batch stays so."""
    if x is None or (front is None and x.shape[1] == 1):
        return x
    if front is not None and x is not None and front.shape[2] == 1:
        front = jnp.broadcast_to(front, (size, 1, m, front.shape[3]))
    return _rows_folded(size, x, front)


def _groups_folded(size: int, problem: Problem, groups: Groups, front: Any, step: int) -> Groups:
    """The groups of all batches; `step` matrices further on for each."""
    if front is None:
        front = jax.tree.map(lambda a: jnp.broadcast_to(a, (size, *a.shape)), groups)
    matrix = front.matrix
    if matrix is None and not step:
        own = np.arange(problem.batch * problem.groups, dtype=np.int32).reshape(problem.batch, -1)
        matrix = jnp.broadcast_to(own, front.sizes.shape)
    elif matrix is not None:
        further = step * jnp.arange(size, dtype=jnp.int32)[:, None, None]
        matrix = jnp.where(matrix < 0, -1, matrix + further)
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[2]), Groups(front.sizes, matrix))


_BY_ROW = ("lhs_scale", "lhs_noise", "residual")
_BY_GROUP = ("bias", "gate", "gate_bias")
_SHARED = ("lhs_columns", "norm_weight")


def _gmm_batch_rule(args, axes, *, problem: GmmProblem, how: How):
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    marks = _unflatten(problem, [-1 if axis is None else axis for axis in axes])
    operands = _unflatten(problem, args)
    lhs, rhs, extras, groups = operands
    fronts = [
        _batched(size, x, at) for x, at in zip(operands, marks, strict=True) if not isinstance(x, Extras)
    ]
    of = {f.name: (getattr(extras, f.name), getattr(marks[2], f.name)) for f in dataclasses.fields(Extras)}
    of = {name: (x, _batched(size, x, at)) for name, (x, at) in of.items() if x is not None}
    if any(of[name][1] is not None for name in _SHARED if name in of):
        one = lambda *leaves: gmm_p.bind(*leaves, problem=problem, how=how)
        return _mapped(one, args, axes, size), 0
    p = problem.product
    own = fronts[1] is not None or any(of[name][1] is not None for name in _BY_GROUP if name in of)
    new: dict[str, Any] = {name: x for name, (x, _) in of.items() if name in _SHARED}
    new |= {name: _row_extra(size, *of[name], p.m) for name in _BY_ROW if name in of}
    folded = functools.partial(_matrices_folded, size, problem.matrices, own)
    new |= {name: folded(*of[name]) for name in _BY_GROUP if name in of}
    rhs = folded(rhs, fronts[1])
    lhs = _rows_folded(size, lhs, fronts[0])
    groups = _groups_folded(size, problem, groups, fronts[2], problem.matrices if own else 0)
    product = dataclasses.replace(
        p,
        m=size * p.m,
        lhs=dataclasses.replace(p.lhs, free=size * p.m),
        rhs=dataclasses.replace(p.rhs, batch=rhs.values.shape[0]),
    )
    big = GmmProblem(product, problem.groups, size * problem.batch, groups.matrix is not None)
    out = bind_gmm(big, how, lhs, rhs, Extras(**new), groups)
    return out.reshape(size, p.m, p.n), 0


def _matrices_folded(size: int, matrices: int, own: bool, x: Any, front: Any) -> Any:
    """[matrices or 1, ...] of every batch as [size * matrices, ...], where any of them has a batch."""
    shared = front is None and not isinstance(x, Tensor) and x.shape[0] == 1
    if shared or not own:
        return x
    if front is None:
        front = jax.tree.map(lambda a: jnp.broadcast_to(a, (size, *a.shape)), x)
    each = jax.tree.map(lambda a: jnp.broadcast_to(a, (size, matrices, *a.shape[2:])), front)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), each)


def _mapped(fun: Callable, args, axes, size: int) -> jax.Array:
    """fun for every batch, one after the other."""
    moved = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(args, axes, strict=True)]
    pick = lambda i: [a if axis is None else a[i] for a, axis in zip(moved, axes, strict=True)]
    return jax.lax.map(lambda i: fun(*pick(i)), jnp.arange(size))


def _tgmm_batch_rule(args, axes, *, problem: TgmmProblem, how: How):
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    marks = _unflatten(problem, [-1 if axis is None else axis for axis in axes])
    operands = _unflatten(problem, args)
    lhs, g, groups = operands
    fronts = [_batched(size, x, at) for x, at in zip(operands, marks, strict=True)]
    if any(x.scale is not None and f is not None for x, f in zip(operands[:2], fronts[:2], strict=True)):
        # Every batch has scales of its own for the columns, which all rows of a tgmm share.
        one = lambda *leaves: tgmm_p.bind(*leaves, problem=problem, how=how)
        return _mapped(one, args, axes, size), 0
    folded = [
        dataclasses.replace(x, values=_rows_folded(size, x.values, f and f.values))
        for x, f in zip((lhs, g), fronts[:2], strict=True)
    ]
    groups = _groups_folded(size, problem, groups, fronts[2], problem.matrices)
    wide = lambda x: dataclasses.replace(x, tile_k=size * problem.m if x.is_quantized else 0)
    big = dataclasses.replace(
        problem,
        m=size * problem.m,
        matrices=size * problem.matrices,
        batch=size * problem.batch,
        lhs=wide(problem.lhs),
        g=wide(problem.g),
    )
    left, right = folded
    out = bind_tgmm(big, how, left, right, groups)
    return out.reshape(size, problem.matrices, problem.k, problem.n), 0


# --- lowering


def _lower(ctx, *args, problem: Problem, how: How, platform: str | None):
    outs = routes.lower(ctx, args, functools.partial(_op, problem, how, ctx.avals_in))
    if outs is not None:
        return outs
    decision = lowering.decide(ctx, platform, problem, how)
    (sharding,) = (aval.sharding for aval in ctx.avals_out)
    explicit = routes.has_explicit_axes(ctx.avals_in)

    def fun(*arrays):
        def run_here(*operands):
            return decision.impl.run(problem, *operands, config=decision.config, chip=decision.chip)

        run: Any = run_here
        if decision.impl.name == "xla" and explicit:
            run = jax.sharding.auto_axes(run, out_sharding=sharding)
        with routes.traced_plainly(arrays):
            return run(*_unflatten(problem, arrays))

    return mlir.lower_fun(fun, multiple_results=False)(ctx, *args)


def _op(problem: Problem, how: How, avals: Sequence[Any]) -> routes.Op:
    """What cuts it over a mesh."""
    is_gmm = isinstance(problem, GmmProblem)
    run: Any = partition.run_gmm if is_gmm else partition.run_tgmm
    bind = bind_gmm if is_gmm else bind_tgmm

    def shard(plan, *arrays):
        return run(problem, how, bind, plan, *_unflatten(problem, plan.local(arrays)))

    whole = lambda *arrays: ((gmm_p if is_gmm else tgmm_p).bind(*arrays, problem=problem, how=how),)
    return routes.Op(_layout(problem, _unflatten(problem, avals)), shard, whole, how.out)


gmm_p = lowering.primitive("qwix_gmm", _abstract, _gmm_batch_rule, _lower, multiple_results=False)
tgmm_p = lowering.primitive("qwix_tgmm", _abstract, _tgmm_batch_rule, _lower, multiple_results=False)
