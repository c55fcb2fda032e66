"""The primitive under `matmul`: its types, its batching, and its lowering for each platform.

The operands are bound in the one form that kernels see: every array of rank 3, a scale with the batch of its
values. A batch that shares its rhs is folded into M when it's lowered (a weight is then one matrix however
many batch axes the activations had). `vmap` adds a batch axis; it never becomes a loop.

Over a mesh it's lowered in shards (partition.py), each of which chooses its implementation: with explicit
axes by their types, under automatic sharding where the partitioner asks back. Where that is not so, as in a
program for devices that are not attached, the portable path is the compiler's to cut; a kernel needs
`shard_map` there, and dispatch says so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import mapped_aval
from jax.interpreters import mlir
from jax.sharding import NamedSharding

from qwix_kernels import dispatch, lowering
from qwix_kernels import partitioning_routes as routes
from qwix_kernels.chips import Chip
from qwix_kernels.lowering import How
from qwix_kernels.matmul import cost, elementwise, gpu_cost, partition, xla
from qwix_kernels.problem import NO_EXTRAS, ROW_EXTRAS, Epilogue, Extras, MatmulProblem, Operand, Tensor


def _run_xla(
    problem: MatmulProblem,
    lhs: Tensor,
    rhs: Tensor,
    extras: Extras,
    *,
    config: Any,
    chip: Chip,
    apart: bool = False,
) -> jax.Array | Tensor:
    quantized = problem.quantize_lhs and jnp.issubdtype(problem.quantize_lhs.dtype, jnp.integer)
    integers = problem.rhs.is_integer and (problem.lhs.is_integer or bool(quantized))
    one_by_one = chip.platform == "cpu" and integers
    return xla.run(problem, lhs, rhs, extras, one_by_one=one_by_one, apart=apart)


def _xla_estimate(problem: MatmulProblem, chip: Chip) -> dispatch.Estimate:
    of = gpu_cost if chip.platform == "cuda" else cost
    return of.xla_estimate(problem, chip)


dispatch.register(
    MatmulProblem,
    lowering.kernels_or_xla(
        "qwix_kernels.matmul.tpu_stored",
        _run_xla,
        _xla_estimate,
        gpu="qwix_kernels.matmul.gpu",
        on_request=("b200",),
    ),
)


def check_names(problem: MatmulProblem, how: How) -> None:
    """Raises ValueError for a name of no implementation, when called and not only when lowered."""
    dispatch.named(problem, how.implementation)


def bind(
    problem: MatmulProblem, how: How, lhs: Tensor, rhs: Tensor, extras: Extras = NO_EXTRAS
) -> list[jax.Array]:
    """[batch, M, N] of operands that `problem` describes; and the scales, where they are quantized."""
    if not all((problem.batch, problem.m, problem.n, problem.k)) or 0 in lhs.shape + rhs.shape:
        zeros = jnp.zeros((_batch(lhs, rhs), problem.m, problem.n), jnp.float32)
        gate = None if extras.gate is None else zeros
        return jax.tree.leaves(elementwise.finish(problem, zeros, gate, extras))
    lhs, rhs = with_own_batch(lhs), with_own_batch(rhs)
    extras = dataclasses.replace(extras, gate=extras.gate and with_own_batch(extras.gate))
    return matmul_p.bind(*jax.tree.leaves((lhs, rhs, extras)), problem=problem, how=how.traced())


def _folds(problem: MatmulProblem, extras: Extras) -> bool:
    """Whether a batch shares its rhs and all that does not change from row to row: then it's more rows."""
    return problem.rhs.batch == 1 and problem.lhs.batch > 1 and _columns_shared(extras)


def _folded(problem: MatmulProblem) -> MatmulProblem:
    rows = problem.batch * problem.m
    return dataclasses.replace(problem, m=rows, lhs=dataclasses.replace(problem.lhs, batch=1, free=rows))


def _fold(problem: MatmulProblem, operands: Operands) -> Operands:
    lhs, rhs, extras = operands
    lhs = jax.tree.map(lambda a: a.reshape(1, -1, a.shape[2]), lhs)
    by_row: dict[str, Any] = {f: _into_rows(getattr(extras, f), problem.batch, problem.m) for f in _BY_ROW}
    return lhs, rhs, dataclasses.replace(extras, **by_row)


def _bind_folded(problem: MatmulProblem, how: How, *arrays: jax.Array) -> list[jax.Array]:
    outs = bind(_folded(problem), how, *_fold(problem, _unflatten(problem, arrays)))
    return [out.reshape(problem.batch, problem.m, out.shape[2]) for out in outs]


# The fields of Extras with one entry per row (or a single one), and those with one per column or K.
_BY_ROW = ("lhs_scale", "lhs_noise", "residual", "out_scale", "low_rank_mask")
_BY_COLUMN = ("lhs_columns", "norm_weight", "bias", "gate_bias", "low_rank_a", "low_rank_b")


def _columns_shared(extras: Extras) -> bool:
    """Whether all batches share what does not change from row to row."""
    given = (getattr(extras, f) for f in _BY_COLUMN)
    return all(x is None or x.shape[0] == 1 for x in given)


def _into_rows(x: jax.Array | None, batch: int, m: int) -> jax.Array | None:
    """[batch or 1, M or 1, ...] as [1, batch * M, ...]; one row for all stays."""
    if x is None or x.shape[:2] == (1, 1):
        return x
    return jnp.broadcast_to(x, (batch, m, x.shape[2])).reshape(1, batch * m, x.shape[2])


def vary_alike(operands: Operands) -> Operands:
    """Inside shard_map: marks all arrays as varying over the axes that any of them varies over."""
    varying = [jax.typeof(a).mat.varying for a in jax.tree.leaves(operands)]
    union = frozenset().union(*varying)
    if all(v == union for v in varying):
        return operands

    def cast(a):
        missing = tuple(sorted(union - jax.typeof(a).mat.varying))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, operands)


def _batch(lhs: Tensor, rhs: Tensor) -> int:
    return rhs.shape[0] if lhs.shape[0] == 1 else lhs.shape[0]


def with_own_batch(x: Tensor) -> Tensor:
    """The same tensor with one scale for each batch of its values."""
    if x.scale is None or x.scale.shape[0] == x.shape[0]:
        return x
    repeat = lambda a: None if a is None else jnp.repeat(a, x.shape[0] // a.shape[0], axis=0)
    return dataclasses.replace(x, scale=repeat(x.scale), zero_point=repeat(x.zero_point))


Operands = tuple[Tensor, Tensor, Extras]


def _unflatten(problem: MatmulProblem, leaves: Sequence[Any]) -> Operands:
    """The operands from what was bound."""
    return jax.tree.unflatten(_structure(problem), leaves)


@functools.lru_cache(maxsize=4096)
def _structure(problem: MatmulProblem) -> Any:
    """The tree of the operands: which arrays a problem has."""

    def some(there: Any, x: Any = 0) -> Any:
        return x if there else None

    def tensor(x: Operand) -> Tensor:
        return Tensor(some(True), some(x.is_quantized), some(x.zero_point), x.codebook)

    q, e = problem.quantize_lhs, problem.epilogue or Epilogue()
    extras = Extras(
        lhs_scale=some(q and q.static),
        lhs_columns=some(q and q.columns),
        lhs_noise=some(q and q.noise),
        norm_weight=some(problem.norm),
        bias=some(e.bias),
        gate=some(e.gate, tensor(problem.rhs)),
        gate_bias=some(e.gate_bias),
        residual=some(e.residual),
        out_scale=some(e.quantize and e.quantize.static),
        low_rank_a=some(problem.low_rank),
        low_rank_b=some(problem.low_rank),
        low_rank_mask=some(problem.low_rank and problem.low_rank.mask_dtype),
    )
    return jax.tree.structure((tensor(problem.lhs), tensor(problem.rhs), extras))


# --- types


def _abstract(*avals, problem: MatmulProblem, how: How):
    given: Any = _unflatten(problem, avals)
    lhs = given[0].values
    shapes = [((problem.batch, problem.m, problem.n), problem.out_dtype)]
    e = problem.epilogue
    if e and e.quantize and e.scales_out:
        shapes.append(((problem.batch, problem.m, problem.n // (e.quantize.tile_k or problem.n)), "float32"))
    outs = [lhs.update(shape=shape, dtype=jnp.dtype(dtype)) for shape, dtype in shapes]
    mesh = routes.explicit_mesh(avals)
    if mesh is None:
        return outs
    specs = routes.plan_of_types(partition.layout_of(problem, given), avals, how.out).results
    return [out.update(sharding=NamedSharding(mesh, spec)) for out, spec in zip(outs, specs, strict=True)]


# --- batching


def _batch_rule(args, axes, *, problem: MatmulProblem, how: How):
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    groups = _groups(_unflatten(problem, args))
    at = _groups(_unflatten(problem, [-1 if axis is None else axis for axis in axes]))
    inside = [
        jax.typeof(a) if i is None else mapped_aval(size, i, jax.typeof(a))
        for a, i in zip(args, axes, strict=True)
    ]
    folds = not routes.has_explicit_axes(inside) and _folds(problem, _unflatten(problem, inside)[2])
    if folds and max(jax.tree.leaves(at["rhs"])) >= 0:
        # Weights that the batch shared up to here are not copied for each of it.
        folded = functools.partial(_bind_folded, problem, how)
        outs = jax.vmap(folded, in_axes=tuple(axes), axis_size=size)(*args)
        return outs, [0] * len(outs)
    front = {name: _front(jax.tree.leaves(x), jax.tree.leaves(at[name]), size) for name, x in groups.items()}
    shared = {name for name, x in front.items() if x is None}
    if "lhs" not in shared and problem.rhs.batch > 1 and {"rhs", "gate", *_BY_COLUMN} & {*groups} <= shared:
        outs = _batch_into_rows(groups, front, problem, how, size)
        return outs, [1] * len(outs)
    batch = problem.batch
    flat = {name: _flat(jax.tree.leaves(groups[name]), x, batch, size) for name, x in front.items()}
    wide = lambda x: [jnp.broadcast_to(a, (size * batch, *a.shape[1:])) for a in x]
    if "gate" in flat and len(flat["gate"][0]) != len(flat["rhs"][0]):
        flat["gate"], flat["rhs"] = wide(flat["gate"]), wide(flat["rhs"])
    # The rows have a batch where what is done to them has one, and where only the epilogue has one.
    widest = max(len(flat[name][0]) for name in ("lhs", "rhs", *ROW_EXTRAS) if name in flat)
    if widest < size * batch or any(len(flat[x][0]) > 1 for x in ROW_EXTRAS if x in flat):
        flat["lhs"] = wide(flat["lhs"])
    new = dataclasses.replace(
        problem,
        lhs=dataclasses.replace(problem.lhs, batch=len(flat["lhs"][0])),
        rhs=dataclasses.replace(problem.rhs, batch=len(flat["rhs"][0])),
    )
    outs = bind(new, how, *_unflatten(new, [a for x in flat.values() for a in x]))
    return [out.reshape(size, batch, *out.shape[1:]) for out in outs], [0] * len(outs)


def _groups(operands: Operands) -> dict[str, Any]:
    """What is there, by name and in the order of the leaves; a `Tensor` is one group."""
    lhs, rhs, extras = operands
    named = {f.name: getattr(extras, f.name) for f in dataclasses.fields(extras)}
    return {"lhs": lhs, "rhs": rhs} | {name: x for name, x in named.items() if x is not None}


def _front(arrays, axes, size: int) -> list[jax.Array] | None:
    """The arrays with the mapped axis first, or None where none of them is mapped (-1)."""
    if all(axis < 0 for axis in axes):
        return None
    return [
        jnp.broadcast_to(a, (size, *a.shape)) if axis < 0 else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(arrays, axes, strict=True)
    ]


def _flat(old: list[jax.Array], front: list[jax.Array] | None, batch: int, size: int) -> list[jax.Array]:
    """[size * batch, ...], a shared batch of 1 written out; what is shared by all stays as it is."""
    if front is None:
        if old[0].shape[0] == 1:
            return old
        front = [jnp.broadcast_to(a, (size, *a.shape)) for a in old]
    whole = [jnp.broadcast_to(a, (size, batch, *a.shape[2:])) for a in front]
    return [a.reshape(-1, *a.shape[2:]) for a in whole]


def _batch_into_rows(groups, front, problem: MatmulProblem, how: How, size: int) -> list[jax.Array]:
    """Many lhs against each of several rhs: more rows, so that no rhs is copied. -> [batch, size, M, X]"""

    def rows(name: str) -> list[jax.Array]:
        old, new = jax.tree.leaves(groups[name]), front[name]
        if name not in ("lhs", *_BY_ROW) or (new is None and old[0].shape[1] == 1):
            return old
        if new is None:
            new = [jnp.broadcast_to(a, (size, *a.shape)) for a in old]
        turned = [jnp.moveaxis(a, 0, 1) for a in new]  # [batch or 1, size, M or 1, X]
        if name != "lhs":
            turned = [jnp.broadcast_to(a, (*a.shape[:2], problem.m, a.shape[3])) for a in turned]
        return [a.reshape(a.shape[0], -1, a.shape[3]) for a in turned]

    left = dataclasses.replace(problem.lhs, free=size * problem.m)
    new = dataclasses.replace(problem, m=size * problem.m, lhs=left)
    outs = bind(new, how, *_unflatten(new, [a for name in groups for a in rows(name)]))
    return [out.reshape(problem.batch, size, problem.m, out.shape[2]) for out in outs]


# --- lowering


def _lower(ctx, *args, problem: MatmulProblem, how: How, platform: str | None):
    known = _has_sizes(problem)
    outs = routes.lower(ctx, args, functools.partial(_op, problem, how, ctx.avals_in)) if known else None
    if outs is not None:
        return outs
    explicit = routes.has_explicit_axes(ctx.avals_in)
    fold = not explicit and _folds(problem, _unflatten(problem, ctx.avals_in)[2])
    rows = _folded(problem) if fold else problem
    described = rows
    if not known:
        left, right = _sized(rows.lhs), _sized(rows.rhs)
        described = dataclasses.replace(rows, m=_NOMINAL, lhs=left, rhs=right)
    decision = lowering.decide(ctx, platform, described, how, sizes_known=known, warns=_is_quantized)
    options: dict[str, Any] = {"config": decision.config, "chip": decision.chip}
    if decision.impl.name == "xla":
        options["apart"] = decision.platforms == ("cpu",) and decision.devices == 1 and known
    count, shardings = len(ctx.avals_out), tuple(aval.sharding for aval in ctx.avals_out)

    def fun(*arrays):
        def run_here(*operands):
            operands = _fold(problem, operands) if fold else operands
            outs = jax.tree.leaves(decision.impl.run(rows, *operands, **options))[:count]
            return tuple(x.reshape(problem.batch, problem.m, x.shape[2]) if fold else x for x in outs)

        run: Any = run_here
        if decision.impl.name == "xla" and explicit:
            run = jax.sharding.auto_axes(run, out_sharding=shardings)
        with routes.traced_plainly(arrays):
            return run(*_unflatten(problem, arrays))

    return mlir.lower_fun(fun, multiple_results=True)(ctx, *args)


def _op(problem: MatmulProblem, how: How, avals: Sequence[Any]) -> routes.Op:
    """What cuts it over a mesh."""

    def shard(plan, *arrays):
        return partition.run(problem, how, bind, plan, *_unflatten(problem, plan.local(arrays)))

    whole = functools.partial(matmul_p.bind, problem=problem, how=dataclasses.replace(how, out=None))
    return routes.Op(partition.layout_of(problem, _unflatten(problem, avals)), shard, whole, how.out)


def _is_quantized(problem: MatmulProblem) -> bool:
    return bool(problem.lhs.is_quantized or problem.rhs.is_quantized or problem.quantize_lhs)


def _has_sizes(problem: MatmulProblem) -> bool:
    """Whether all sizes are known: `jax.export` has symbolic ones."""
    return all(isinstance(s, int) for s in (problem.m, problem.lhs.batch, problem.rhs.batch))


def _sized(x: Operand) -> Operand:
    """With stand-ins for symbolic sizes, so that it can be priced."""
    fixed: dict[str, Any] = {
        f: v if isinstance(v := getattr(x, f), int) else _NOMINAL for f in ("batch", "free", "tile_free")
    }
    return dataclasses.replace(x, **fixed)


_NOMINAL = 256

matmul_p = lowering.primitive("qwix_matmul", _abstract, _batch_rule, _lower)
