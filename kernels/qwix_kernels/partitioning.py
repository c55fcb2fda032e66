"""How one op is cut over a mesh: what each shard holds, what is reduced, and what has to move first.

An op names the axes of its arrays by factors (a matmul: b, m, n, k). A plan gives every mesh axis to at most
one factor, so that each shard runs the same op on smaller arrays:

    factors of the result     nothing has to be exchanged
    summed factors            every shard has a part of the sums, which are reduced once, in float32 or exact
                              integers: over all shards, or scattered where the result is cut over that axis

Who gets a mesh axis that two factors ask for: the one that the result is asked to be cut along, else the one
that the op names first. The array that loses it is gathered over that axis, and `Plan.moved` says so.

Scales are cut where their entries divide. Where a tile straddles shards, or a shard lies inside of one, the
scale (it is small) is whole on every shard, which takes its own entries, for runs of gcd(tile, shard).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class Dim:
    """One axis of an array: what it is, and its full size, which a scale's divides."""

    factor: str
    full: int


Dims = tuple[Dim | None, ...]  # None: an axis that is never cut


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of an op's arrays, one entry for each array.

    names, operands, shapes: of the arrays that it's given.
    results, result_shapes: of those it gives. Their factors are those of operands, or, where a sum may be
      scattered over them, capital letters: "M" is m after the reduction.
    claims: (array, axis) of those that say how factors are cut, the one that wins first.
    summed: factors that the result lacks and that are summed over.
    operands_first: whether claims come before what is wanted of results; those who lose get it back as far as
      sums can be scattered.
    parts: (factor, n) of those that come in n parts, which are not cut further.
    """

    names: tuple[str, ...]
    operands: tuple[Dims, ...]
    shapes: tuple[tuple[int, ...], ...]
    results: tuple[Dims, ...]
    result_shapes: tuple[tuple[int, ...], ...]
    claims: tuple[tuple[int, int], ...]
    summed: tuple[str, ...] = ()
    operands_first: bool = False
    parts: tuple[tuple[str, int], ...] = ()


Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One op on one mesh. `str()` says it in words.

    operands, results: how the arrays have to be laid out, and are.
    moved: what has to be gathered first and why, one sentence each.
    """

    layout: Layout
    mesh: tuple[tuple[str, int], ...]
    cut: tuple[tuple[str, Axes], ...]
    operands: tuple[PartitionSpec, ...]
    results: tuple[PartitionSpec, ...]
    moved: tuple[str, ...] = ()

    def axes(self, factor: str) -> Axes:
        """The mesh axes that cut a factor, the slowest first."""
        return dict(self.cut).get(factor, ())

    def shards(self, factor: str) -> int:
        """Into how many parts a factor is cut."""
        return _count(self.axes(factor), dict(self.mesh))

    @property
    def reduced(self) -> Axes:
        """The mesh axes over which partial sums are added up."""
        mesh = dict(self.mesh)
        return tuple(a for factor in self.layout.summed for a in self.axes(factor) if mesh[a] > 1)

    @property
    def scattered(self) -> dict[str, Axes]:
        """Those of them over which the sums are scattered, by the result's factor ("M", "N")."""
        found = {f: tuple(a for a in axes if a in self.reduced) for f, axes in self.cut if f.isupper()}
        return {f: axes for f, axes in found.items() if axes}

    @property
    def is_cut(self) -> bool:
        return any(axes for _, axes in self.cut)

    def index(self, factor: str) -> jax.Array:
        """Which part of a factor this shard has. Inside of shard_map only."""
        return jax.lax.axis_index(self.axes(factor))

    def local(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """The shard's own entries of scales that could not be cut; all else as it is."""
        return [self._own(i, x) for i, x in enumerate(arrays)]

    def _own(self, i: int, x: jax.Array) -> jax.Array:
        for axis, (dim, size) in enumerate(zip(self.layout.operands[i], self.layout.shapes[i], strict=True)):
            if dim is None or size == 1 or not self.axes(dim.factor) or self.operands[i][axis] is not None:
                continue
            x = jnp.take(x, self.entries(dim, size), axis=axis)
        return x

    def entries(self, dim: Dim, size: int) -> jax.Array:
        """Which of `size` entries, each for as many neighbours, the runs of this shard have.

        The runs are as long as fits both the entries and the shards.
        """
        part, tile = dim.full // self.shards(dim.factor), dim.full // size
        run = math.gcd(part, tile)
        starts = np.arange(0, part, run, dtype=np.int32)
        return (self.index(dim.factor).astype(np.int32) * part + starts) // tile

    def reduce(self, sums: Sequence[jax.Array], at: Mapping[str, int]) -> list[jax.Array]:
        """Adds up partial sums, all of one shape and dtype, at once.

        Args:
          at: the axis of each of the result's factors ("M", "N").
        """
        if not self.reduced:
            return list(sums)
        together = jnp.stack(sums) if len(sums) > 1 else sums[0]
        rest = [a for a in self.reduced if a not in {a for axes in self.scattered.values() for a in axes}]
        for factor, axes in self.scattered.items():
            axis = at[factor] + (len(sums) > 1)
            together = jax.lax.psum_scatter(together, axes, scatter_dimension=axis, tiled=True)
        together = jax.lax.psum(together, tuple(rest)) if rest else together
        return list(together) if len(sums) > 1 else [together]

    def __str__(self) -> str:
        cut = [f"{f} over {', '.join(axes)}" for f, axes in self.cut if axes and not f.isupper()]
        parts = ["; ".join(cut) or "not cut"]
        if self.reduced:
            scattered = ", ".join(f"scattered over {', '.join(a)}" for a in self.scattered.values())
            parts.append(f"sums added up over {', '.join(self.reduced)}" + (scattered and f", {scattered}"))
        return "; ".join([*parts, *self.moved])


def make_plan(
    layout: Layout,
    mesh: Mapping[str, int],
    operands: Sequence[PartitionSpec],
    results: Sequence[PartitionSpec] | None = None,
    *,
    strict: bool = False,
) -> Plan:
    """Cuts an op over a mesh.

    Args:
      layout: the op's arrays.
      mesh: {axis: size}.
      operands: how each array is laid out now.
      results: how the results are wanted, if that is known.
      strict: raise where an array can't be cut as it's said to be, instead of gathering it.

    Raises:
      ValueError: an axis that the mesh doesn't have; with `strict`, a size that its axes don't divide.
    """
    given = [_entries(s, len(d), mesh) for s, d in zip(operands, layout.operands, strict=True)]
    wanted: dict[str, Axes] = {}
    for spec, dims in zip(results or (), layout.results, strict=False):
        for dim, axes in zip(dims, _entries(spec, len(dims), mesh), strict=True):
            if dim is not None and axes:
                wanted.setdefault(dim.factor, axes)
                if strict:
                    _check_divides(dim, axes, mesh)
    if strict:
        for dims, entries in zip(layout.operands, given, strict=True):
            for dim, axes in zip(dims, entries, strict=True):
                if dim is not None:
                    _check_divides(dim, axes, mesh)
    claims = [
        (layout.operands[i][axis], axes)
        for i, axis in layout.claims
        if (axes := given[i][axis]) and layout.operands[i][axis] is not None
    ]
    owner = _owners([(d.factor, axes) for d, axes in claims if d], {} if layout.operands_first else wanted)
    if results is None and layout.operands_first:
        wanted = {d.factor.upper(): axes for d, axes in reversed(claims) if d}
    cut: dict[str, Axes] = {}
    for dim, axes in claims:
        assert dim is not None
        own = tuple(a for a in axes if owner[a] == dim.factor)
        if own and dim.factor not in cut:
            cut[dim.factor] = _dividing(_whole(layout, dim), own, mesh)
    _add_wanted(layout, cut, wanted, mesh, owner)
    _scatter(layout, cut, wanted, mesh)
    of = functools.partial(_spec, cut=cut, mesh=mesh)
    plan = Plan(
        layout,
        tuple(mesh.items()),
        tuple(cut.items()),
        tuple(of(d, s) for d, s in zip(layout.operands, layout.shapes, strict=True)),
        tuple(of(d, s) for d, s in zip(layout.results, layout.result_shapes, strict=True)),
    )
    return dataclasses.replace(plan, moved=tuple(_moved(plan, given)))


def _entries(spec: PartitionSpec | None, ndim: int, mesh: Mapping[str, int]) -> list[Axes]:
    """The mesh axes of each axis of an array."""
    if spec is not None and len(spec) > ndim:
        raise ValueError(f"{spec} has {len(spec)} entries for an array of {ndim} axes.")
    found: list[Axes] = []
    for entry in (*(spec or ()), *(None,) * ndim)[:ndim]:
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        for axis in axes:
            if axis not in mesh:
                known = ", ".join(f"{a!r} ({n})" for a, n in mesh.items())
                raise ValueError(f"{spec} names the mesh axis {axis!r}; the mesh has {known}.")
        found.append(axes)
    return found


def _owners(claims: Sequence[tuple[str, Axes]], wanted: Mapping[str, Axes]) -> dict[str, str]:
    """Which factor has each mesh axis: one that the result wants there and an operand has, else the first."""
    owner: dict[str, str] = {}
    for factor, axes in wanted.items():
        have = {a for f, given in claims if f == factor.lower() for a in given}
        owner.update({a: factor.lower() for a in axes if a in have and a not in owner})
    for factor, axes in claims:
        for axis in axes:
            owner.setdefault(axis, factor)
    return owner


def _whole(layout: Layout, dim: Dim) -> Dim:
    """A factor with what the number of its shards has to divide."""
    return Dim(dim.factor, dict(layout.parts).get(dim.factor.lower(), dim.full))


def _dividing(dim: Dim, axes: Axes, mesh: Mapping[str, int]) -> Axes:
    """As many of the axes as divide the size."""
    while axes and dim.full % _count(axes, mesh):
        axes = axes[:-1]
    return axes


def _check_divides(dim: Dim, axes: Axes, mesh: Mapping[str, int]) -> None:
    if dim.full % _count(axes, mesh):
        fits = [n for n in range(1, dim.full + 1) if dim.full % n == 0]
        sizes = " x ".join(f"{a!r} ({mesh[a]})" for a in axes)
        raise ValueError(
            f"Axis {dim.factor} of size {dim.full} can't be cut over {sizes}: {_count(axes, mesh)} parts "
            f"don't divide it. What does: {', '.join(map(str, fits))}."
        )


def _add_wanted(
    layout: Layout,
    cut: dict[str, Axes],
    wanted: Mapping[str, Axes],
    mesh: Mapping[str, int],
    owner: dict[str, str],
) -> None:
    """Cuts along the result's axes that no operand is cut along: a shard takes its part of what it has."""
    full = {d.factor: _whole(layout, d).full for dims in layout.results for d in dims if d is not None}
    for factor, axes in wanted.items():
        own = cut.get(factor.lower(), ())
        free = tuple(a for a in axes if a in own or a not in owner)
        if set(own) < set(free) and full[factor] % _count(free, mesh) == 0:
            cut[factor.lower()] = free
            owner.update(dict.fromkeys(free, factor.lower()))


def _scatter(layout: Layout, cut: dict[str, Axes], wanted: Mapping[str, Axes], mesh: Mapping[str, int]):
    """How results are cut: as operands, and as they are wanted over the axes that are summed over."""
    summed = {a for f in layout.summed for a in cut.get(f, ()) if mesh[a] > 1}
    for dim in {d.factor: d for dims in layout.results for d in dims if d is not None}.values():
        if not dim.factor.isupper():
            continue
        own, axes = cut.get(dim.factor.lower(), ()), wanted.get(dim.factor, ())
        more = axes[len(own) :]
        if axes[: len(own)] == own and more and set(more) <= summed and dim.full % _count(axes, mesh) == 0:
            cut[dim.factor] = axes
            summed -= set(more)
        else:
            cut[dim.factor] = own


def _spec(dims: Dims, shape: Sequence[int], *, cut: Mapping[str, Axes], mesh: Mapping[str, int]):
    entries: list[Any] = []
    for dim, size in zip(dims, shape, strict=True):
        axes = cut.get(dim.factor, ()) if dim is not None else ()
        whole = not axes or size % _count(axes, mesh) or size == 1
        entries.append(None if whole else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


def _moved(plan: Plan, given: Sequence[Sequence[Axes]]):
    """What is gathered, and why."""
    mesh, owner = dict(plan.mesh), {a: f for f, axes in plan.cut for a in axes if not f.isupper()}
    for name, dims, before, spec in zip(
        plan.layout.names, plan.layout.operands, given, plan.operands, strict=True
    ):
        after = _entries(spec, len(dims), mesh)
        for dim, old, new in zip(dims, before, after, strict=True):
            lost = [a for a in old if a not in new]
            if lost:
                what = dim.factor if dim is not None else "an axis that's never cut"
                why = [f"{a!r} cuts {owner[a]}" if a in owner else f"{a!r} can't cut it" for a in lost]
                yield f"{name} is gathered along {what}: {', '.join(why)}"


def _count(axes: Sequence[str], mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[a] for a in axes)


def sharding_rule(layout: Layout) -> str:
    """The same axes for Shardy, which propagates layouts by it: one letter per factor and size.

    An axis of tiles, or one that's never cut, has a letter of its own: nothing follows from how it's cut.
    """
    names: dict[Dim, str] = {}
    count = iter(range(1 << 20))

    def letters(dims: Dims, shape: Sequence[int]) -> str:
        found = []
        for dim, size in zip(dims, shape, strict=True):
            if dim is None or size != dim.full or size == 1:
                found.append(f"u{next(count)}")
            else:
                key = Dim(dim.factor.lower(), dim.full)
                found.append(names.setdefault(key, f"f{len(names)}"))
        return " ".join(found)

    operands = [letters(d, s) for d, s in zip(layout.operands, layout.shapes, strict=True)]
    results = [letters(d, s) for d, s in zip(layout.results, layout.result_shapes, strict=True)]
    return f"{', '.join(operands)} -> {', '.join(results)}"
