"""A convolution in shards: how its arrays are cut, and what one shard computes.

Factors are n (images), o (output features) and c (input features, which are summed over). With feature groups
there is no c: o cuts whole groups of both sides, and no sum. Space is never cut.

Images are quantized by the absmax of the whole image; where its features are cut, that is one small
max-reduce before the kernel, or after it for a result that is quantized.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.conv import images
from qwix_kernels.conv.problem import ConvExtras, ConvProblem
from qwix_kernels.lowering import How
from qwix_kernels.matmul.elementwise import row_scale
from qwix_kernels.partitioning import Dim, Dims, Layout, Plan
from qwix_kernels.problem import Epilogue, Operand, RowQuantize, Tensor

_FIELDS = ("", "'s scale", "'s zero point")


def layout_of(problem: ConvProblem, operands: tuple[Tensor, Tensor, ConvExtras]) -> Layout:
    """The arrays of a convolution, in the order of the leaves. Only their shapes are read."""
    lhs, rhs, extras = operands
    p, space = problem, (None,) * len(problem.windows)
    grouped = p.groups > 1
    n, o = Dim("n", p.batch), Dim("o", p.out_features)
    c = Dim("o" if grouped else "c", p.features)
    dims_of: dict[str, Dims] = {
        "lhs": (n, *space, c),
        "rhs": (*space, None if grouped else c, o),
        "lhs_scale": (n, *space, c),
        "bias": (Dim("O", p.out_features),),
        "out_scale": (n, *space, Dim("O", p.out_features)),
    }
    given: dict[str, Any] = {"lhs": lhs, "rhs": rhs}
    given |= {f.name: getattr(extras, f.name) for f in dataclasses.fields(extras)}
    found = [
        (name + field, dims_of[name], tuple(leaf.shape))
        for name, x in given.items()
        for leaf, field in zip(jax.tree.leaves(x), _FIELDS, strict=False)
    ]
    names, dims, shapes = zip(*found, strict=True)
    results: list[Dims] = [(n, *space, Dim("O", p.out_features))]
    result_shapes: list[tuple[int, ...]] = [p.out_shape]
    if p.epilogue and p.epilogue.scales_out:
        results.append((n, *space, None))
        result_shapes.append((p.batch, *(1,) * len(space), 1))
    r, last = names.index("rhs"), len(space) + 1
    claims = ((0, 0), (r, last), (r, last - 1), (0, last))
    parts = (("o", p.groups),) if grouped else ()
    return Layout(
        names,
        dims,
        shapes,
        tuple(results),
        tuple(result_shapes),
        claims,
        () if grouped else ("c",),
        parts=parts,
    )


def run(
    problem: ConvProblem, how: How, bind: Any, plan: Plan, lhs: Tensor, rhs: Tensor, extras: ConvExtras
) -> list[jax.Array]:
    """One shard's results, of its own arrays. `bind`: the op on them."""
    how = dataclasses.replace(how, out=None)
    factor = "o" if problem.groups > 1 else "c"
    problem, extras = _images_of_all(problem, plan, factor, lhs, extras)
    local = _described(problem, plan, lhs, rhs, extras)
    e = local.epilogue or Epilogue()
    apart = e.scales_out and plan.shards("O") > 1
    if not plan.reduced and not apart:
        return bind(local, how, lhs, rhs, extras)
    wide = "int32" if local.out_dtype == "int32" and not local.epilogue else "float32"
    if not plan.reduced:
        rest = dataclasses.replace(e, quantize=None)
        part = dataclasses.replace(local, out_dtype=wide, epilogue=None if rest == Epilogue() else rest)
        (z,) = bind(part, how, lhs, rhs, extras)
        return _quantized(e.quantize, plan, z)
    part = dataclasses.replace(local, out_dtype=wide, epilogue=None)
    sums = bind(part, how, lhs, rhs, ConvExtras(lhs_scale=extras.lhs_scale))
    (z,) = plan.reduce(sums, {"O": len(local.windows) + 1})
    after = dataclasses.replace(extras, lhs_scale=None)
    if not apart:
        return jax.tree.leaves(images.finish(local, z, after))[: 2 if e.scales_out else 1]
    rest = dataclasses.replace(local, out_dtype="float32", epilogue=dataclasses.replace(e, quantize=None))
    return _quantized(e.quantize, plan, images.finish(rest, z, after))


def _described(problem: ConvProblem, plan: Plan, lhs: Tensor, rhs: Tensor, extras: ConvExtras) -> ConvProblem:
    """The problem of these arrays, parts of those that it was made for."""

    def operand(of: Operand, x: Tensor, free: int, contracting: int) -> Operand:
        found = dataclasses.replace(of, free=x.shape[free])
        if x.scale is None:
            return found
        tiles = [x.shape[a] // x.scale.shape[a] for a in (free, contracting)]
        return dataclasses.replace(found, tile_free=tiles[0], tile_k=tiles[1])

    last = lhs.values.ndim - 1
    rows, features = problem.quantize_lhs, lhs.shape[-1]
    if rows and extras.lhs_scale is not None:
        tiles = extras.lhs_scale.shape[-1]
        rows = dataclasses.replace(rows, tile_k=0 if tiles == 1 else features // tiles)
    return dataclasses.replace(
        problem,
        features=features,
        groups=problem.groups // plan.shards("o") if problem.groups > 1 else 1,
        lhs=operand(problem.lhs, lhs, 0, last),
        rhs=operand(problem.rhs, rhs, last, last - 1),
        quantize_lhs=rows,
    )


def _images_of_all(
    problem: ConvProblem, plan: Plan, factor: str, lhs: Tensor, extras: ConvExtras
) -> tuple[ConvProblem, ConvExtras]:
    """Given scales for images of which a shard has some of the features."""
    rows, part = problem.quantize_lhs, lhs.shape[-1]
    if rows is None or rows.static or plan.shards(factor) == 1:
        return problem, extras
    if rows.tile_k and part % rows.tile_k == 0:
        return problem, extras
    dim = Dim(factor, problem.features)
    tiles = problem.features // (rows.tile_k or problem.features)
    own = plan.entries(dim, tiles)
    most = images.absmax(lhs.values, part // own.shape[0])
    whole = jnp.zeros((*most.shape[:-1], tiles), jnp.float32).at[..., own].max(most)
    scale = row_scale(jax.lax.pmax(whole, plan.axes(factor)), rows)
    static = dataclasses.replace(rows, static=True, scale_dtype="float32")
    extras = dataclasses.replace(extras, lhs_scale=jnp.take(scale, own, axis=-1))
    return dataclasses.replace(problem, quantize_lhs=static), extras


def _quantized(rows: RowQuantize | None, plan: Plan, out: jax.Array) -> list[jax.Array]:
    """A result quantized by whole images, of which `out` has some of the features; and their scales."""
    assert rows
    scale = row_scale(jax.lax.pmax(images.absmax(out, 0), plan.axes("O")), rows)
    stored = images.quantize(out, dataclasses.replace(rows, scale_dtype="float32"), scale)
    return [stored.values.astype(rows.dtype), scale]
