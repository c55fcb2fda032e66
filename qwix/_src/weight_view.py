"""Moves of a weight that leave it a weight, and the way back from a moved weight to the stored param.

Scales belong to the stored param, but what they must look like is decided where the weight is eaten, which
may be after `w.T`, `w.reshape(...)`, a cast, or one step of a scan over stacked layers. `to_param` carries
the wish back: for each axis, how many neighbours share a scale (its "run").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwix._src import weight_steps
from qwix._src.adapter import Adapter, CutChange
from qwix._src.core import qarray
from qwix._src.turned import Turned, canonical
from qwix._src.weight import WeightTracer
from qwix._src.weight_steps import Step


def runs_of(how: qarray.HowToQuantize, shape: Sequence[int]) -> tuple[int, ...]:
    """For each axis, how many neighbours share a scale: 1 is per channel, the whole size is shared.

    >>> runs_of(qarray.HowToQuantize(qtype="int8", channelwise_axes=(1,), tiled_axes={0: 4}), (8, 3))
    (4, 1)
    """
    scale_shape = qarray.get_scale_shape(tuple(shape), how)
    return tuple(n // s if s else 1 for n, s in zip(shape, scale_shape, strict=True))


def to_param(how: qarray.HowToQuantize, view: Sequence[Step], shape: Sequence[int]) -> qarray.HowToQuantize:
    """`how` of a moved weight of shape `shape`, said of the stored param.

    Axes that a step took away (a scan's, an index's) get a scale per entry.

    Raises:
      ValueError: the moves scatter the values that should share a scale.
    """
    if not view:
        return how
    runs = runs_of(how, shape)
    for step in reversed(view):
        runs = _BACK[step.kind](step, runs)
    shape = view[0].old
    return dataclasses.replace(
        how,
        channelwise_axes=tuple(
            a for a, (r, n) in enumerate(zip(runs, shape, strict=True)) if r == 1 and n > 1
        ),
        tiled_axes={a: r for a, (r, n) in enumerate(zip(runs, shape, strict=True)) if 1 < r < n},
    )


def lifted(view: Sequence[Step]) -> tuple[int, ...]:
    """Axes of the param that scans cut before anything else happens to it."""
    axes: list[int] = []
    left = list(range(len(view[0].old))) if view else []
    for step in view:
        if step.kind != "index":
            break
        axes.append(left.pop(step.args[0]))
    return tuple(axes)


def is_stacked(view: Sequence[Step]) -> bool:
    """Whether scans cut the param, along whichever axis."""
    return any(step.kind == "index" for step in view)


def _back_transpose(step: Step, runs: tuple[int, ...]) -> tuple[int, ...]:
    back = [0] * len(runs)
    for to, origin in enumerate(step.args):
        back[origin] = runs[to]
    return tuple(back)


def _back_index(step: Step, runs: tuple[int, ...]) -> tuple[int, ...]:
    (axis,) = step.args
    return (*runs[:axis], 1, *runs[axis:])


def _back_slice(step: Step, runs: tuple[int, ...]) -> tuple[int, ...]:
    back = []
    for old, new, run, start in zip(step.old, step.new, runs, step.args, strict=True):
        if run == new and run > 1:
            back.append(old)  # one scale for the slice: one for the axis serves, too
        elif start % run or old % run:
            raise ValueError(
                f"tiles of {run} don't meet the slice [{start}:{start + new}] of an axis of size {old}"
            )
        else:
            back.append(run)
    return tuple(back)


def _back_reshape(step: Step, runs: tuple[int, ...]) -> tuple[int, ...]:
    back: list[int] = []
    for old, new in _groups(step.old, step.new):
        back += _regroup([step.old[i] for i in old], [(step.new[i], runs[i]) for i in new])
    return tuple(back)


_BACK = {
    "transpose": _back_transpose,
    "index": _back_index,
    "slice": _back_slice,
    "reshape": _back_reshape,
}


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """The smallest runs of axes of equal product, in order; axes of size 1 join the group before them."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        p, q = 1, 1
        while i == i0 or j == j0 or p != q:
            if (p <= q and i < len(old)) or j >= len(new):
                if i >= len(old):
                    break
                p, i = p * old[i], i + 1
            else:
                q, j = q * new[j], j + 1
        while i < len(old) and old[i] == 1:
            i += 1
        while j < len(new) and new[j] == 1:
            j += 1
        groups.append((range(i0, i), range(j0, j)))
    return groups


def _regroup(old: Sequence[int], new: Sequence[tuple[int, int]]) -> list[int]:
    """Runs of the axes `old` that share scales as the axes `new`, given as (size, run), do.

    The flattened group is a chain of factors, each "own" or "shared"; every old axis must be one own part
    followed by one shared part.
    """
    chain = [(f, shared) for n, r in new for f, shared in ((n // r, False), (r, True)) if f > 1]
    runs = []
    for size in old:
        run, left, seen_shared = 1, size, False
        while left > 1:
            factor, shared = chain.pop(0)
            part = math.gcd(factor, left)
            if part == 1 or (part != factor and part != left) or (seen_shared and not shared):
                raise ValueError(
                    f"values that share a scale are scattered by the reshape between {old} and {new}"
                )
            if part < factor:
                chain.insert(0, (factor // part, shared))
            seen_shared = seen_shared or shared
            run = run * part if shared else run
            left //= part
        runs.append(run)
    return runs


def move(trace: Any, primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> WeightTracer | None:
    """The weight after an op that only moves it; None when the op isn't one, or the scales can't follow."""
    weight, *rest = args
    if not isinstance(weight, WeightTracer) or any(isinstance(a, WeightTracer) for a in rest):
        return None
    if primitive.name == "convert_element_type":
        floats = jnp.issubdtype(params["new_dtype"], jnp.floating)
        return weight.moved(weight.stored, dtype=params["new_dtype"]) if floats and not rest else None
    if primitive.name in ("copy", "copy_p", "optimization_barrier"):
        return weight if not rest else None
    if primitive.name == "pvary":  # inside of shard_map: as the other operand of an op varies
        vary = lambda x: _as_varying(x, params["axes"])
        content = trace.outside(jax.tree.map, vary, weight.content)
        return weight.varying(*content)
    make = _MOVES.get(primitive.name)
    step = make(weight.aval.shape, params, rest) if make else None
    if step is None:
        return None
    dynamic = rest if primitive.name == "dynamic_slice" else None
    try:
        stored = trace.outside(_apply, step, weight.stored, dynamic)
        adapter = trace.outside(_cut_adapter, weight, step, dynamic)
    except ValueError:  # the scales, or the magnitudes of the adapter, can't follow this one
        return None
    return weight.with_adapter(adapter).moved(stored, step)


def _as_varying(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    missing = tuple(a for a in axes if a not in jax.typeof(x).mat.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def _cut_adapter(
    weight: WeightTracer, step: Step, dynamic: Sequence[Any] | None
) -> Adapter | CutChange | None:
    """The weight's adapter after a step: what it adds, where that is cut or has been."""
    adapter = weight.adapter
    if isinstance(adapter, CutChange):
        return CutChange(_apply(step, adapter.dense, dynamic))
    if adapter is None or step.kind != "slice":
        return adapter
    if adapter.m is not None:
        raise ValueError("Magnitudes belong to a whole weight.")
    whole = weight_steps.apply(weight_steps.of_layer(weight.steps), adapter.change())
    return CutChange(_apply(step, whole, dynamic))


def _transpose(shape: Any, params: dict[str, Any], _: Any) -> Step:
    perm = tuple(params["permutation"])
    return Step("transpose", tuple(shape), tuple(shape[p] for p in perm), perm)


def _reshape(shape: Any, params: dict[str, Any], _: Any) -> Step | None:
    if params.get("dimensions") is not None:
        return None
    return Step("reshape", tuple(shape), tuple(params["new_sizes"]))


def _squeeze(shape: Any, params: dict[str, Any], _: Any) -> Step:
    kept = tuple(n for a, n in enumerate(shape) if a not in params["dimensions"])
    return Step("reshape", tuple(shape), kept)


def _expand(shape: Any, params: dict[str, Any], rest: Any) -> Step | None:
    """broadcast_in_dim that only adds axes of size 1."""
    if rest or math.prod(params["shape"]) != math.prod(shape):
        return None
    return Step("reshape", tuple(shape), tuple(params["shape"]))


def _slice(shape: Any, params: dict[str, Any], _: Any) -> Step | None:
    if params["strides"] is not None and any(s != 1 for s in params["strides"]):
        return None
    starts, limits = params["start_indices"], params["limit_indices"]
    return Step(
        "slice", tuple(shape), tuple(b - a for a, b in zip(starts, limits, strict=True)), tuple(starts)
    )


def _dynamic_slice(shape: Any, params: dict[str, Any], _: Any) -> Step | None:
    """Only whole axes and single entries: then the starts don't matter to the scales."""
    sizes = tuple(params["slice_sizes"])
    if any(size not in (1, n) for size, n in zip(sizes, shape, strict=True)):
        return None
    return Step("slice", tuple(shape), sizes, (0,) * len(sizes))


_MOVES = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _expand,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}


def _apply(step: Step, payload: Any, dynamic: Sequence[Any] | None) -> Any:
    """The step on a payload: on a QArray, on its values and its scales; on a Turned, on those as they lie."""
    if step.kind == "transpose":
        return payload.transpose(step.args)
    if step.kind == "reshape":
        return canonical(payload).reshape(step.new)
    starts = step.args if dynamic is None else dynamic
    if isinstance(payload, Turned):
        lying = lambda of: tuple(of[axis] for axis in payload.axes)
        step, starts = dataclasses.replace(step, old=lying(step.old), new=lying(step.new)), lying(starts)
    return jax.tree.map(lambda leaf: _cut(leaf, step, starts), payload)


def _cut(leaf: jax.Array, step: Step, starts: Sequence[Any]) -> jax.Array:
    """The part of the values, or of the scales that go with them."""
    begins, sizes = [], []
    for axis, (old, new, start) in enumerate(zip(step.old, step.new, starts, strict=True)):
        count = leaf.shape[axis]
        run = old // count if count else 1
        if count == 1:
            begins.append(0)
            sizes.append(1)
        elif run == 1 or (isinstance(start, int) and start % run == 0 and new % run == 0):
            begins.append(start if run == 1 else start // run)
            sizes.append(new // run)
        elif new == old:
            begins.append(0)
            sizes.append(count)
        else:
            raise ValueError(f"A cut of {new} at {start} doesn't meet the tiles of {run} along axis {axis}.")
    if all(isinstance(b, int) for b in begins):
        return lax.slice(leaf, begins, [b + s for b, s in zip(begins, sizes, strict=True)])
    return lax.dynamic_slice(leaf, begins, sizes)


def is_lookup(primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> bool:
    """Whether a gather takes whole rows (along one axis) of a weight, as an embedding does."""
    if (
        primitive.name != "gather"
        or not isinstance(args[0], WeightTracer)
        or isinstance(args[1], WeightTracer)
    ):
        return False
    dnums = params["dimension_numbers"]
    rows = dnums.start_index_map
    shape, sizes = args[0].aval.shape, params["slice_sizes"]
    return (
        len(rows) == 1
        and tuple(dnums.collapsed_slice_dims) == tuple(rows)
        and not dnums.operand_batching_dims
        and all(size == (1 if a in rows else n) for a, (size, n) in enumerate(zip(sizes, shape, strict=True)))
    )


def look_up(payload: qarray.QArray, indices: jax.Array, params: dict[str, Any]) -> qarray.QArray:
    """The rows of a QArray, with their scales. A row out of range has the scale nan where the op fills."""
    (row_axis,) = params["dimension_numbers"].start_index_map
    rows = payload.qvalue.shape[row_axis]

    def take(leaf: jax.Array) -> jax.Array:
        if leaf.shape[row_axis] != rows:  # shared by runs of rows: give each row its own
            leaf = jnp.repeat(leaf, rows // leaf.shape[row_axis], axis=row_axis)
        sizes = tuple(1 if a == row_axis else n for a, n in enumerate(leaf.shape))
        fill = params["fill_value"] if jnp.issubdtype(leaf.dtype, jnp.floating) else None
        return lax.gather(leaf, indices, **params | {"slice_sizes": sizes, "fill_value": fill})

    return jax.tree.map(take, payload)
