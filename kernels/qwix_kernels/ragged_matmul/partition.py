"""Grouped matmuls in shards: how their arrays are cut, and what one shard computes.

Factors are m, n, k and g, the matrices. The sizes of all groups are on every shard.

    m   a shard has a run of the rows: of each group the part that lies in it
    g   a shard has some of the matrices: rows of the others are nobody's to it, and give zeros. One shard has
        each row's result, so that adding them up is exact, in the output's dtype
    k   partial sums, as in a matmul; a bias is added by the first shard
    m of a tgmm   partial sums of each group

Where rows and matrices are cut over the same mesh axis (experts and tokens over the same devices), the rows
are gathered and the results scattered: weights stay where they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.lowering import How
from qwix_kernels.matmul import elementwise
from qwix_kernels.matmul import partition as matmul
from qwix_kernels.partitioning import Dim, Dims, Layout, Plan
from qwix_kernels.problem import Epilogue, Extras, Tensor
from qwix_kernels.ragged_matmul.groups import alive, matrix_of, ranges
from qwix_kernels.ragged_matmul.problem import GmmProblem, Groups, TgmmProblem

_EXTRAS: dict[str, tuple[str, str, str]] = {
    "lhs_scale": ("", "m", "k"),
    "lhs_columns": ("", "", "k"),
    "lhs_noise": ("", "m", ""),
    "norm_weight": ("", "", "k"),
    "bias": ("g", "", "n"),
    "gate_bias": ("g", "", "n"),
    "residual": ("", "M", "N"),
}
_FIELDS = ("", "'s scale", "'s zero point")


def gmm_layout(problem: GmmProblem, operands: Any) -> Layout:
    """The arrays of a gmm, in the order of the leaves. Only their shapes are read."""
    lhs, rhs, extras, groups = operands
    p = problem.product
    sizes = {"m": p.m, "n": p.n, "k": p.k, "g": problem.matrices, "M": p.m, "N": p.n}
    right = ("g", "n", "k") if p.rhs_transposed else ("g", "k", "n")
    given = [("lhs", lhs, ("", "m", "k")), ("rhs", rhs, right)]
    given += [(name, x, _EXTRAS.get(name, right)) for name, x in extras.given.items()]
    names, dims, shapes = _arrays(given, sizes, problem.batch, groups)
    r = names.index("rhs")
    claims = ((r, 0), (r, right.index("n")), (r, right.index("k")), (0, 1), (0, 2))
    result: Dims = _dim("M", sizes, problem.batch), Dim("N", p.n)
    return Layout(names, dims, shapes, (result,), ((p.m, p.n),), claims, ("g", "k"), operands_first=True)


def tgmm_layout(problem: TgmmProblem, operands: Any) -> Layout:
    """The arrays of a tgmm, in the order of the leaves."""
    lhs, g, groups = operands
    p = problem
    sizes = {"m": p.m, "n": p.n, "k": p.k}
    given = [("lhs", lhs, ("", "m", "k")), ("g", g, ("", "m", "n"))]
    names, dims, shapes = _arrays(given, sizes, problem.batch, groups)
    second = names.index("g")
    claims = ((0, 1), (second, 1), (0, 2), (second, 2))
    result: Dims = Dim("G", p.matrices), Dim("k", p.k), Dim("n", p.n)
    return Layout(names, dims, shapes, (result,), ((p.matrices, p.k, p.n),), claims, ("m",))


def _arrays(given: Any, sizes: dict[str, int], batch: int, groups: Groups) -> Any:
    names, dims, shapes = [], [], []
    for name, x, factors in given:
        for leaf, field in zip(jax.tree.leaves(x), _FIELDS, strict=False):
            names.append(name + field)
            dims.append(tuple(_dim(f, sizes, batch) for f in factors))
            shapes.append(tuple(leaf.shape))
    for leaf in jax.tree.leaves(groups):
        names.append("group_sizes")
        dims.append((None, None))
        shapes.append(tuple(leaf.shape))
    return tuple(names), tuple(dims), tuple(shapes)


def _dim(factor: str, sizes: dict[str, int], batch: int) -> Dim | None:
    """Rows of several batches (vmap) are not cut: each batch starts with its groups."""
    if not factor or (factor in ("m", "M") and batch > 1):
        return None
    return Dim(factor, sizes[factor])


def run_gmm(problem: GmmProblem, how: How, bind: Any, plan: Plan, *operands: Any) -> tuple[jax.Array]:
    """One shard's result, of its own arrays. `bind`: the op on them."""
    lhs, rhs, extras, groups = operands
    how, whole = dataclasses.replace(how, out=None), groups
    product = problem.product
    if set(plan.axes("k")) & set(plan.reduced):
        product, lhs, extras = matmul.rows_of_all(product, plan, lhs, extras)
    product = matmul.described(product, lhs, rhs, extras)
    groups = _groups(plan, groups, rhs.shape[0], problem.matrices)
    local = dataclasses.replace(problem, product=product, mapped=groups.matrix is not None)
    run = lambda product, rhs, extras: bind(
        dataclasses.replace(local, product=product), how, lhs, rhs, extras, groups
    )
    if not plan.reduced:
        return (run(product, rhs, extras),)
    after, e = Extras(residual=extras.residual), product.epilogue or Epilogue()
    extras = dataclasses.replace(extras, residual=None)
    wide = product.out_dtype if product.out_dtype in ("int32", "float64") else "float32"
    if not set(plan.axes("k")) & set(plan.reduced):  # whole sums, of some rows
        if after.residual is not None:
            rest = _or_none(dataclasses.replace(e, residual=None))
            product = dataclasses.replace(product, out_dtype=wide, epilogue=rest)
        (out,) = plan.reduce([run(product, rhs, extras)], {"M": 0, "N": 1})
        e = Epilogue(residual=e.residual)
        return (_after(problem, plan, e, out, None, after, whole),)
    rows, first = extras.of_rows, plan.index("k") == 0
    only_first = lambda x: None if x is None else jnp.where(first, x, 0)

    def part(rhs: Tensor, bias: jax.Array | None) -> jax.Array:
        own = Epilogue(bias=True) if bias is not None else None
        return run(
            dataclasses.replace(product, out_dtype=wide, epilogue=own),
            rhs,
            dataclasses.replace(rows, bias=only_first(bias)),
        )

    sums = [part(rhs, extras.bias)]
    sums += [] if extras.gate is None else [part(extras.gate, extras.gate_bias)]
    z, *gate = plan.reduce(sums, {"M": 0, "N": 1})
    e = dataclasses.replace(e, bias=False, gate_bias=False)
    return (_after(problem, plan, e, z, gate[0] if gate else None, after, whole),)


def _or_none(e: Epilogue) -> Epilogue | None:
    return None if e == Epilogue() else e


def _after(
    problem: GmmProblem,
    plan: Plan,
    e: Epilogue,
    z: jax.Array,
    gate: jax.Array | None,
    extras: Extras,
    groups: Groups,
) -> jax.Array:
    """What is left of the epilogue, of reduced sums. Rows of no group stay zero."""
    dtype = problem.product.out_dtype
    if e == Epilogue():
        return z.astype(dtype)
    out = elementwise.combine(e, z[None], None if gate is None else gate[None], extras)[0]
    if extras.residual is not None:
        mine = alive(groups, problem.product.m)
        if plan.axes("M"):
            mine = jax.lax.dynamic_slice_in_dim(mine, plan.index("M") * z.shape[0], z.shape[0])
        out = jnp.where(mine[:, None], out, 0)
    return out.astype(dtype)


def run_tgmm(problem: TgmmProblem, how: How, bind: Any, plan: Plan, *operands: Any) -> tuple[jax.Array]:
    """One shard's result, of its own arrays."""
    lhs, g, groups = operands
    p, how = problem, dataclasses.replace(how, out=None)
    matrices = p.matrices // plan.shards("g")
    groups = _groups(plan, groups, matrices, p.matrices)
    out_dtype = p.out_dtype if p.out_dtype in ("int32", "float64") or not plan.reduced else "float32"

    def side(of: Any, x: Tensor) -> Any:
        found = dataclasses.replace(of, free=x.shape[2])
        if x.scale is None:
            return found
        return dataclasses.replace(found, tile_free=x.shape[2] // x.scale.shape[2], tile_k=x.shape[1])

    local = dataclasses.replace(
        p,
        m=lhs.shape[1],
        k=lhs.shape[2],
        n=g.shape[2],
        matrices=matrices,
        lhs=side(p.lhs, lhs),
        g=side(p.g, g),
        out_dtype=out_dtype,
        mapped=groups.matrix is not None,
    )
    out = bind(local, how, lhs, g, groups)
    (out,) = plan.reduce([out], {"G": 0})
    return (out.astype(p.out_dtype),)


def _groups(plan: Plan, groups: Groups, matrices: int, all_matrices: int) -> Groups:
    """The groups as this shard sees them, with its own rows and its own matrices."""
    if plan.axes("g"):
        own = matrix_of(groups) - plan.index("g") * matrices
        there = (own >= 0) & (own < matrices) & (matrix_of(groups) < all_matrices)
        groups = Groups(groups.sizes, jnp.where(there, own, -1))
    if not plan.axes("m"):
        return groups
    part = next(d.full for d in plan.layout.operands[0] if d and d.factor == "m") // plan.shards("m")
    start = plan.index("m") * part
    begin, end, _ = ranges(groups, part * plan.shards("m"))
    sizes = jnp.clip(end - start, 0, part) - jnp.clip(begin - start, 0, part)
    return Groups(sizes[None].astype(jnp.int32), groups.matrix)
