"""A matmul in shards: how its arrays are cut, and what one shard computes.

Factors are b, m, n and k. With K cut every shard has a part of the sums: those are computed in float32 (int32
for plain integers), added up once, and only then biased, gated, activated and rounded. What a row needs of
all of K comes first: its absmax as one small max-reduce, the mean square of a norm as one small sum; then the
kernel is given the scales. A result that is quantized along a cut N gets its absmax likewise.

A low-rank update is linear in the lhs, so each shard adds its part of K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qwix_kernels.absmax import absmax
from qwix_kernels.lowering import How
from qwix_kernels.matmul import elementwise
from qwix_kernels.partitioning import Dim, Dims, Layout, Plan, make_plan
from qwix_kernels.problem import Epilogue, Extras, MatmulProblem, Operand, RowQuantize, Tensor

# The axes of what is fused, by factor; capitals: those of the result.
_EXTRAS: dict[str, tuple[str, str, str]] = {
    "lhs_scale": ("b", "m", "k"),
    "lhs_columns": ("b", "", "k"),
    "lhs_noise": ("b", "m", ""),
    "norm_weight": ("b", "", "k"),
    "bias": ("b", "", "N"),
    "gate_bias": ("b", "", "N"),
    "residual": ("b", "M", "N"),
    "out_scale": ("b", "M", "N"),
    "low_rank_a": ("b", "k", ""),
    "low_rank_b": ("b", "", "n"),
    "low_rank_mask": ("b", "m", ""),
}


def layout_of(problem: MatmulProblem, operands: tuple[Tensor, Tensor, Extras]) -> Layout:
    """The arrays of a problem, in the order of the leaves. Only their shapes are read."""
    lhs, rhs, extras = operands
    sizes = {"b": problem.batch, "m": problem.m, "n": problem.n, "k": problem.k}
    sizes |= {"M": problem.m, "N": problem.n}
    right = ("b", "n", "k") if problem.rhs_transposed else ("b", "k", "n")
    given: list[tuple[str, Any, tuple[str, str, str]]] = [("lhs", lhs, ("b", "m", "k")), ("rhs", rhs, right)]
    given += [(name, x, _EXTRAS.get(name, right)) for name, x in extras.given.items()]
    names, dims, shapes = [], [], []
    for name, x, factors in given:
        for leaf, field in zip(jax.tree.leaves(x), ("", "'s scale", "'s zero point"), strict=False):
            names.append(name + field)
            dims.append(tuple(Dim(f, sizes[f]) if f else None for f in factors))
            shapes.append(tuple(leaf.shape))
    e, rows = problem.epilogue, (problem.batch, problem.m)
    result: Dims = Dim("b", problem.batch), Dim("M", problem.m), Dim("N", problem.n)
    results, result_shapes = [result], [(*rows, problem.n)]
    if e and e.quantize and e.scales_out:
        results.append((*result[:2], None))  # too few to be cut
        result_shapes.append((*rows, problem.n // (e.quantize.tile_k or problem.n)))
    r, n, k = names.index("rhs"), right.index("n"), right.index("k")
    claims = [(0, 0), (r, 0), (0, 1), (r, n), (r, k), (0, 2)]
    claims = [(i, axis) for i, axis in claims if axis or shapes[i][0] == problem.batch]
    return Layout(
        tuple(names), tuple(dims), tuple(shapes), tuple(results), tuple(result_shapes), tuple(claims), ("k",)
    )


def plan_of(
    problem: MatmulProblem,
    mesh: Mapping[str, int],
    lhs: PartitionSpec,
    rhs: PartitionSpec,
    out: PartitionSpec | None = None,
) -> Plan:
    """How a matmul is cut over a mesh, without any array. `str()` of it says it in words.

    Args:
      problem: as `matmul.problem_of` makes it.
      mesh: {axis: size}.
      lhs, rhs: how the operands are laid out, [batch, M, K] and [batch, K, N] (or [batch, N, K]).
      out: how the result is wanted. None: batch and M as in lhs, N as in rhs.

    Raises:
      ValueError: an axis that the mesh doesn't have, or that doesn't divide a size.

    >>> from qwix_kernels.matmul import problem_of
    >>> x = jax.ShapeDtypeStruct((1, 64, 512), jnp.bfloat16)
    >>> w = jax.ShapeDtypeStruct((1, 512, 256), jnp.int8)
    >>> mesh, x_spec = {"data": 2, "model": 8}, PartitionSpec(None, "data", "model")
    >>> print(plan_of(problem_of(x, w), mesh, x_spec, PartitionSpec(None, "model")))
    m over data; k over model; sums added up over model
    """
    operands = _shapes(problem)
    layout = layout_of(problem, operands)
    right = layout.names.index("rhs")
    specs = [PartitionSpec()] * len(layout.names)
    specs[0], specs[right] = lhs, rhs
    return make_plan(layout, mesh, specs, None if out is None else [out], strict=True)


def _shapes(problem: MatmulProblem) -> tuple[Tensor, Tensor, Extras]:
    """What operands of a problem look like, without what is fused."""

    def tensor(x: Operand, shape: tuple[int, ...], tiles: tuple[int, ...]) -> Tensor:
        small = jax.ShapeDtypeStruct(tiles, x.scale_dtype or "float32")
        zero = jax.ShapeDtypeStruct(tiles, x.dtype) if x.zero_point else None
        values: Any = jax.ShapeDtypeStruct(shape, x.dtype)
        return Tensor(values, small if x.is_quantized else None, zero, x.codebook)  # type: ignore[arg-type]

    p, turn = problem, (0, 2, 1) if problem.rhs_transposed else (0, 1, 2)
    of = lambda shape: tuple(shape[a] for a in turn)
    left, right = p.lhs, p.rhs
    tiles = left.batch, p.m // (left.tile_free or 1), p.k // (left.tile_k or 1)
    lhs = tensor(left, (left.batch, p.m, p.k), tiles)
    tiles = right.batch, p.k // (right.tile_k or 1), p.n // (right.tile_free or 1)
    return lhs, tensor(right, of((right.batch, p.k, p.n)), of(tiles)), Extras()


def run(
    problem: MatmulProblem, how: How, bind: Any, plan: Plan, lhs: Tensor, rhs: Tensor, extras: Extras
) -> list[jax.Array]:
    """One shard's results, of its own arrays. `bind`: the op on them."""
    how = dataclasses.replace(how, out=None)
    e = problem.epilogue
    if plan.reduced:
        problem, lhs, extras = rows_of_all(problem, plan, lhs, extras)
    local = described(problem, lhs, rhs, extras)
    shared_tiles = e and e.quantize and not e.quantize.static and _straddles(plan, "N", e.quantize.tile_k)
    if not plan.reduced and not shared_tiles:
        return bind(local, how, lhs, rhs, extras)
    if not plan.reduced:
        assert e
        wide = dataclasses.replace(local, out_dtype="float32", epilogue=_but_quantized(e))
        (out,) = bind(wide, how, lhs, rhs, extras)
        return _quantized(e.quantize, plan, out)
    gates = [] if extras.gate is None else [extras.gate]
    own = dataclasses.replace(extras.of_low_rank, **extras.of_rows.given)
    out_dtype = problem.out_dtype if problem.out_dtype in ("int32", "float64") else "float32"
    part = dataclasses.replace(local, out_dtype=out_dtype, epilogue=None)
    gate_part = dataclasses.replace(part, low_rank=None)
    sums = bind(part, how, lhs, rhs, own)
    sums += [bind(gate_part, how, lhs, gate, extras.of_rows)[0] for gate in gates]
    z, *gate = plan.reduce(sums, {"M": 1, "N": 2})
    return _finished(local, plan, z, gate[0] if gate else None, extras)


def _finished(
    problem: MatmulProblem, plan: Plan, z: jax.Array, gate: jax.Array | None, extras: Extras
) -> list[jax.Array]:
    """The epilogue of reduced sums."""
    e = problem.epilogue
    if e is None or e.quantize is None or e.quantize.static or not plan.axes("N"):
        return jax.tree.leaves(elementwise.finish(problem, z, gate, extras))[: 2 if e and e.scales_out else 1]
    return _quantized(e.quantize, plan, elementwise.combine(_but_quantized(e) or Epilogue(), z, gate, extras))


def _but_quantized(e: Epilogue) -> Epilogue | None:
    rest = dataclasses.replace(e, quantize=None)
    return None if rest == Epilogue() else rest


def described(problem: MatmulProblem, lhs: Tensor, rhs: Tensor, extras: Extras) -> MatmulProblem:
    """The problem of these arrays, parts of those that it was made for."""
    n, k = (1, 2) if problem.rhs_transposed else (2, 1)
    left, right = _operand(problem.lhs, lhs, 1, 2), _operand(problem.rhs, rhs, n, k)
    e, rows = problem.epilogue, problem.quantize_lhs
    size = left.free, lhs.shape[2], right.free
    if rows and extras.lhs_scale is not None:
        rows = _tiled(rows, size[1], extras.lhs_scale.shape[2])
    elif rows and rows.tile_k == size[1]:
        rows = dataclasses.replace(rows, tile_k=0)
    if e and e.quantize and extras.out_scale is not None:
        e = dataclasses.replace(e, quantize=_tiled(e.quantize, size[2], extras.out_scale.shape[2]))
    return dataclasses.replace(
        problem, m=size[0], k=size[1], n=size[2], lhs=left, rhs=right, quantize_lhs=rows, epilogue=e
    )


def _tiled(rows: RowQuantize, size: int, tiles: int) -> RowQuantize:
    return dataclasses.replace(rows, tile_k=0 if tiles == 1 else size // tiles)


def _operand(of: Operand, x: Tensor, free: int, contracting: int) -> Operand:
    found = dataclasses.replace(of, batch=x.shape[0], free=x.shape[free])
    if x.scale is None:
        return found
    tiles = x.shape[free] // x.scale.shape[free], x.shape[contracting] // x.scale.shape[contracting]
    return dataclasses.replace(found, tile_free=tiles[0], tile_k=tiles[1])


# --- what rows need of all of K


def _straddles(plan: Plan, factor: str, tile: int) -> bool:
    """Whether tiles of a row (0: the whole of it) lie in several shards."""
    dim = _dim(plan, factor)
    part = dim.full // plan.shards(factor)
    return part < dim.full and bool(part % (tile or dim.full))


def _dim(plan: Plan, factor: str) -> Dim:
    dims = (*plan.layout.operands, *plan.layout.results)
    return next(d for each in dims for d in each if d is not None and d.factor == factor)


def rows_of_all(
    problem: MatmulProblem, plan: Plan, lhs: Tensor, extras: Extras
) -> tuple[MatmulProblem, Tensor, Extras]:
    """The lhs normalised by all of its row, and with given scales where tiles lie in several shards."""
    if problem.norm:
        assert extras.norm_weight is not None
        x = lhs.values.astype(jnp.promote_types(lhs.values.dtype, jnp.float32))
        squares = jax.lax.psum(jnp.sum(x * x, axis=-1, keepdims=True), plan.axes("k"))
        x = x * jax.lax.rsqrt(squares / problem.k + np.float32(problem.norm.eps))
        x = x * extras.norm_weight.astype(x.dtype)
        lhs = Tensor(x if problem.quantize_lhs else x.astype(lhs.values.dtype))
        left = dataclasses.replace(problem.lhs, dtype=lhs.values.dtype.name)
        problem = dataclasses.replace(problem, norm=None, lhs=left)
        extras = dataclasses.replace(extras, norm_weight=None)
    rows = problem.quantize_lhs
    if rows is None or rows.static or not _straddles(plan, "k", rows.tile_k):
        return problem, lhs, extras
    x = lhs.values.astype(jnp.float32)
    if extras.lhs_columns is not None:
        x = x * extras.lhs_columns.astype(jnp.float32)
    scale, own = _scale_of_all(plan, "k", rows, x)
    static = dataclasses.replace(rows, static=True, scale_dtype="float32")
    extras = dataclasses.replace(extras, lhs_scale=jnp.take(scale, own, axis=2))
    return dataclasses.replace(problem, quantize_lhs=static), lhs, extras


def _scale_of_all(plan: Plan, factor: str, rows: RowQuantize, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scales [batch, M, tiles] of whole rows, of which x is a part, and which of them are x's."""
    dim = _dim(plan, factor)
    tiles = dim.full // (rows.tile_k or dim.full)
    own = plan.entries(dim, tiles)
    most = absmax(x.reshape(*x.shape[:2], own.shape[0], -1), -1)
    whole = jnp.zeros((*x.shape[:2], tiles), jnp.float32).at[:, :, own].max(most)
    return elementwise.row_scale(jax.lax.pmax(whole, plan.axes(factor)), rows), own


def _quantized(rows: RowQuantize | None, plan: Plan, out: jax.Array) -> list[jax.Array]:
    """A result quantized by whole rows, of which `out` is a part; and their scales."""
    assert rows
    out = out.astype(jnp.float32)
    scale, own = _scale_of_all(plan, "N", rows, out)
    mine = jnp.take(scale, own, axis=2)
    static = dataclasses.replace(
        _tiled(rows, out.shape[2], mine.shape[2]), static=True, scale_dtype="float32"
    )
    stored = elementwise.quantize_rows(out, static, Extras(lhs_scale=mine))
    return [stored.values.astype(rows.dtype), scale]
