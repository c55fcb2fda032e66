"""Where the arrays of a quantized weight lie on a mesh: derived from where the weight's axes do.

Along an axis that a scale has in full, or of which it has a whole number of entries for each shard, it's
sharded as the values are: each device then has the scales of its own values, and nobody gathers anything.
Where tiles straddle shards, the scale is sharded over as many of the mesh axes as it can be, from the first
on, and is whole on the rest. An axis of size 1 is never sharded.

An "entry" says of one axis what a PartitionSpec does: None, a name, or a tuple of names. Where there is no
mesh (`sizes` is None) names may be logical, and are kept as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core import meta, spmd
from jax.sharding import NamedSharding, PartitionSpec

from qwix._src import double_scale
from qwix._src.core import qarray
from qwix._src.core.transposed_qarray import Layout, TransposedQArray
from qwix._src.utils import flax_util

Entry = None | str | tuple[str, ...]
Entries = tuple[Entry, ...]
Stored = qarray.QArray | TransposedQArray


def names_in(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry.

    >>> names_in(None), names_in("tp"), names_in(("data", "fsdp"))
    ((), ('tp',), ('data', 'fsdp'))
    """
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def shards(entry: Any, sizes: Mapping[str, int]) -> int:
    """Into how many pieces it cuts an axis."""
    return math.prod(sizes[name] for name in names_in(entry))


def padded(spec: Sequence[Any], ndim: int) -> Entries:
    """One entry per axis."""
    return (*spec, *(None,) * (ndim - len(spec)))


def fitting(entry: Any, size: int, sizes: Mapping[str, int] | None) -> Entry:
    """What of an entry an axis of `size` can have: the first names, as far as their shards divide it.

    >>> fitting(("fsdp", "tp"), 6, {"fsdp": 2, "tp": 4}), fitting("tp", 6, {"tp": 4})
    ('fsdp', None)
    >>> fitting("rows", 6, None)
    'rows'
    """
    if entry is None or size == 1:
        return None
    names = names_in(entry)
    if sizes is None or any(name not in sizes for name in names) or size % shards(entry, sizes) == 0:
        return entry
    kept = max(n for n in range(len(names) + 1) if size % shards(names[:n], sizes) == 0)
    return None if kept == 0 else names[0] if kept == 1 else names[:kept]


def merged(entries: Sequence[Any], layout: Layout, shape: Sequence[int]) -> Entries | None:
    """The entries of [batch, free, K] or [batch, K, free], after those of stacked axes.

    Axes that are merged keep the shards of the first. None where another one has some: the pieces of the
    merged axis are then no pieces of the array.
    """
    stacked = len(shape) - len(layout.shape)
    result = list(padded(entries, len(shape)))[:stacked]
    own = list(padded(entries, len(shape)))[stacked:]
    for group in layout.groups:
        long_axes = [a for a in group if layout.shape[a] != 1]
        if any(own[a] is not None for a in long_axes[1:]):
            return None
        result.append(own[long_axes[0]] if long_axes else None)
    return tuple(result)


def on_mesh_axes(entry: Any, rules: Mapping[str, Any]) -> Entry:
    """An entry of logical names as one of mesh axes; a name without a rule is a mesh axis.

    >>> on_mesh_axes(("embed", "mlp"), {"embed": ("data", "fsdp"), "mlp": None})
    ('data', 'fsdp')
    """
    axes = [axis for name in names_in(entry) for axis in names_in(rules.get(name, name))]
    return None if not axes else axes[0] if len(axes) == 1 else tuple(axes)


def survives(entries: Sequence[Any], stored: Any) -> bool:
    """Whether a weight sharded so can be stored in this form without being gathered."""
    return (
        not isinstance(stored, TransposedQArray) or merged(entries, stored.layout, stored.shape) is not None
    )


def of_stored(
    entries: Sequence[Any],
    stored: Any,
    sizes: Mapping[str, int] | None,
    fit: Callable[[Any, int, Mapping[str, int] | None], Entry] = fitting,
) -> Any:
    """The weight with the entries of each array in its place, as a PartitionSpec.

    Args:
      entries: of the weight, one per axis.
      stored: a QArray or TransposedQArray of arrays, or of `jax.ShapeDtypeStruct`s.
      sizes: of the mesh axes, as `mesh.shape` has them; None: there's no mesh yet.
      fit: what of an entry an axis of some size can have, as `fitting`.

    >>> import jax.numpy as jnp
    >>> w = qarray.quantize_api(jnp.ones((64, 8)), "int4", channelwise_axes=(1,), tiled_axes={0: 32})
    >>> specs = of_stored(("fsdp", "tp"), w, {"fsdp": 4, "tp": 2})
    >>> tuple(specs.qvalue), tuple(specs.scale)
    (('fsdp', 'tp'), (None, 'tp'))
    """
    rank = len(stored.shape)
    own = padded(entries, rank)
    if isinstance(stored, TransposedQArray):
        own = merged(own, stored.layout, stored.shape) or (None,) * len(stored.qvalue.shape)
    spec = lambda entries, child: PartitionSpec(
        *(fit(e, n, sizes) for e, n in zip(entries, child.shape, strict=True))
    )
    put = lambda child: spec(own, child)
    scale: Any = stored.scale
    if not isinstance(scale, double_scale.DoubleScale):
        return jax.tree.map(put, stored)
    # Blocks of scales aren't an axis of the weight: only the axes of stacked layers stay what they are.
    of_layers = [e if n != 1 else None for e, n in zip(own, scale.mean.shape, strict=True)]
    step = spec(of_layers, scale.step)
    parts: Any = {"codes": put(scale.codes), "step": step, "mean": put(scale.mean)}
    specs = dataclasses.replace(scale, **parts)
    return dataclasses.replace(jax.tree.map(put, dataclasses.replace(stored, scale=None)), scale=specs)


def on_mesh(sharding: Any, stored: Any) -> Any:
    """The weight with the sharding of each array in its place; None if the weight's isn't a NamedSharding."""
    if not isinstance(sharding, NamedSharding):
        return None
    specs = of_stored(tuple(sharding.spec), stored, dict(sharding.mesh.shape))
    place = lambda spec: NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return jax.tree.map(place, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def abstract_on(abstract: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct`s that say where their arrays lie; as they are where `shardings` is None."""
    if shardings is None:
        return abstract
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, abstract, shardings)


def boxed(stored: Any, box: Any) -> Any:
    """Each array of a weight in a box like `box`, with the partition names of the axes that it has.

    Where the mesh is known (by the array in the box, by the box, or `jax.set_mesh`), tiles that straddle
    shards cost a scale its name; elsewhere it keeps the name, and `qwix.shardings` finds out.
    """
    names = flax_util.partition_names(box)
    if names is None:
        return jax.tree.map(lambda child: flax_util.reboxed(box, child, lambda spec: spec), stored)
    rules, sizes = axis_rules(box), _sizes_around(box)

    def fit(entry: Any, size: int, sizes: Mapping[str, int] | None) -> Entry:
        resolved = on_mesh_axes(entry, rules)
        kept = fitting(resolved, size, sizes)
        return entry if kept == resolved and size != 1 else kept if resolved == entry else None

    specs = of_stored(names, stored, sizes, fit)

    def put(child: Any, spec: PartitionSpec) -> Any:
        kind = lambda old: spec if isinstance(old, PartitionSpec) else type(old)(spec)
        return flax_util.reboxed(box, child, kind)

    return jax.tree.map(put, stored, specs)


def axis_rules(box: Any) -> dict[str, Any]:
    """What the logical names of a box mean: {name: mesh axis, tuple of them or None}, the box's own first."""
    own = box.get_metadata().get("sharding_rules") if isinstance(box, nnx.Variable) else None
    own = getattr(box, "rules", None) if isinstance(box, meta.AxisMetadata) else own
    rules: dict[str, Any] = {}
    for name, axes in (*(own or ()), *spmd.get_logical_axis_rules()):
        rules.setdefault(name, axes)
    return rules


def _sizes_around(box: Any) -> Mapping[str, int] | None:
    """Of the axes of the mesh that a boxed weight is made for; None if nobody has said."""
    sharding = getattr(flax_util.unbox(box), "sharding", None)
    own = box.get_metadata().get("mesh") if isinstance(box, nnx.Variable) else getattr(box, "mesh", None)
    for mesh in (getattr(sharding, "mesh", None), own, jax.sharding.get_abstract_mesh()):
        if mesh is not None and not mesh.empty:
            return dict(mesh.shape)
    return None
