"""Where the arrays of a quantized model go on a mesh: one tree of shardings for all that it holds.

Values lie as the weight's partition names say, and scales, zero points and adapters follow them, see
derived_sharding. Everything that the mesh can't do is found before any array is made.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qwix._src.core import numerics
from qwix._src.derived_sharding import Entries, axis_rules, fitting, names_in, on_mesh_axes, padded, shards
from qwix._src.utils import flax_util

Rules = Iterable[tuple[str, str | Sequence[str] | None]]


def shardings(model_or_params: Any, mesh: Any, rules: Rules = (), *, strict: bool = False) -> Any:
    """The sharding of each array of a quantized model, to place, restore or make it.

    Args:
      model_or_params: an NNX model or its `nnx.State`; or Linen variables or params with their boxes, as
        `jax.eval_shape(model.init, ...)` has them. Abstract or not, quantized, with adapters, or float.
      mesh: a `jax.sharding.Mesh` or AbstractMesh, with automatic or explicit axes.
      rules: (logical name, mesh axis or axes or None) pairs, as Flax has them; also those in scope and in
        boxes count. A name without a rule is a mesh axis.
      strict: tiles that straddle shards are an error. Otherwise their scales are sharded less, or not, with a
        warning that says so.

    Returns:
      The tree with a `NamedSharding` for each array: for NNX an `nnx.State`, for Linen without boxes. Fits
      `jax.device_put(tree, shardings)`, `jax.jit(..., out_shardings=shardings)` and the targets of orbax.

    Raises:
      ValueError: a mesh axis that isn't there, or twice in one param; an axis whose size its shards don't
        divide; a model in which no param says how it's sharded. The message names params and sizes.

    >>> import jax, qwix
    >>> init = nnx.with_partitioning(nnx.initializers.normal(), ("embed", "mlp"), eager_sharding=False)
    >>> make = lambda: nnx.Linear(64, 32, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))
    >>> rule = qwix.QuantizationRule(weight_qtype="int4", tile_size=16)
    >>> model = qwix.quantize_model(nnx.eval_shape(make), rule)
    >>> mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tp"))
    >>> placed = shardings(model, mesh, [("embed", "fsdp"), ("mlp", "tp")])
    >>> tuple(placed["kernel"]["array"]["scale"].get_raw_value().spec)
    ('fsdp', 'tp')
    """
    tree = nnx.state(model_or_params) if isinstance(model_or_params, nnx.Module) else model_or_params
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=flax_util.is_box)
    leaves = [(tuple(map(_key, path)), leaf) for path, leaf in flat]
    values = {p[:-1]: tuple(flax_util.unbox(x).shape) for p, x in leaves if p[-1:] == ("qvalue",)}
    placing = _Placing(mesh, dict(rules), values)
    placed = [placing.place(path, leaf) for path, leaf in leaves]
    if not placing.named:
        raise ValueError(
            f"A model with no shardings: none of its {len(leaves)} arrays says how it's sharded. Give its "
            "params partition names (nn.with_partitioning, nn.with_logical_partitioning, "
            "nnx.with_partitioning), or make an NNX model by nnx.get_abstract_model; for one copy on each "
            "device, use NamedSharding(mesh, PartitionSpec())."
        )
    if placing.straddling:
        text = "Scales are sharded less than their weights: " + "; ".join(placing.straddling) + "."
        if strict:
            raise ValueError(text)
        warnings.warn(text, stacklevel=2)
    return jax.tree.unflatten(treedef, placed)


def device_bytes(tree: Any, shardings: Any = None) -> int:
    """The bytes that one device holds of the arrays of a tree: 4-bit values are half a byte.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s, in QArrays, boxes and models too. Those with a sharding of
        their own count with the largest shard.
      shardings: of `qwix.shardings(tree, mesh)`, instead of their own.

    Raises:
      TypeError: something that holds no array.

    >>> device_bytes(jax.ShapeDtypeStruct((256, 3), "int4"))
    384
    """
    tree = flax_util.unbox(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)
    every = jax.tree.leaves(tree)
    leaves = [x for x in every if hasattr(x, "shape")]
    if every and not leaves:
        raise TypeError(f"No array in {tree!r}. Give arrays, a tree of them, or a model.")
    if shardings is None:
        own = [getattr(x, "sharding", None) for x in leaves]
    else:
        own = jax.tree.leaves(flax_util.unbox(shardings), is_leaf=lambda x: isinstance(x, NamedSharding))
    shape = lambda x, sharding: x.shape if sharding is None else sharding.shard_shape(tuple(x.shape))
    pairs = zip(leaves, own, strict=True)
    return sum(_bytes(x.dtype, math.prod(shape(x, sharding))) for x, sharding in pairs)


def _bytes(dtype: Any, size: int) -> int:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):  # of the rngs of a model
        return size * dtype.itemsize
    return numerics.device_bytes(dtype, size)


_PARTS = ("scale", "zero_point", "codes", "step", "mean")  # of a quantized weight, which follow its values


@dataclasses.dataclass
class _Placing:
    """One call of `shardings`, and what was found on the way."""

    mesh: Any
    rules: dict[str, Any]
    sizes: dict[tuple[str, ...], tuple[int, ...]]  # shapes of the values of quantized weights
    named: bool = False  # some param says how it's sharded
    straddling: list[str] = dataclasses.field(default_factory=list)

    def place(self, path: tuple[str, ...], leaf: Any) -> Any:
        """The sharding of one array, in the variable that it's in."""
        array, names = flax_util.unbox(leaf), flax_util.partition_names(leaf)
        own = getattr(array, "sharding", None)
        if names is None and isinstance(own, NamedSharding) and own.mesh.axis_names == self.mesh.axis_names:
            names = tuple(own.spec)
        self.named |= names is not None
        rules = axis_rules(leaf) | self.rules
        shape = tuple(getattr(array, "shape", ()))
        wanted = tuple(on_mesh_axes(entry, rules) for entry in padded(names or (), len(shape)))
        self._check_axes("/".join(path), wanted)
        entries = tuple(self._entry(path, axis, entry, shape) for axis, entry in enumerate(wanted))
        sharding = NamedSharding(self.mesh, PartitionSpec(*entries))
        return leaf.replace(sharding) if isinstance(leaf, nnx.Variable) else sharding

    def _check_axes(self, name: str, wanted: Entries) -> None:
        used = [axis for entry in wanted for axis in names_in(entry)]
        for axis in used:
            if axis not in self.mesh.shape:
                near = difflib.get_close_matches(axis, [*self.mesh.axis_names, *self.rules], n=1)
                raise ValueError(
                    f"{name!r} is sharded over {axis!r}, which is no axis of the mesh ({_sizes(self.mesh)}) "
                    f"and has no rule. {f'Is {near[0]!r} meant? ' if near else ''}Give "
                    f"rules=[({axis!r}, axis or None), ...]."
                )
            if used.count(axis) > 1:
                raise ValueError(
                    f"{name!r} is sharded over the mesh axis {axis!r} twice: {PartitionSpec(*wanted)}. Give "
                    "one of its axes' names another rule."
                )

    def _entry(self, path: tuple[str, ...], axis: int, entry: Any, shape: tuple[int, ...]) -> Any:
        """What the axis can have of the entry. Raises ValueError where that must be all of it."""
        kept, name = fitting(entry, shape[axis], self.mesh.shape), "/".join(path)
        if kept == entry or shape[axis] == 1:
            return kept
        count = shards(entry, self.mesh.shape)
        over = f"{count} shards of {entry!r} ({_sizes(self.mesh)})"
        if not self._is_part(path):
            raise ValueError(
                f"Axis {axis} of {name!r} has {shape[axis]} entries, which the {over} don't divide. Pad it, "
                "or shard another axis: rules=[(name, None), ...]."
            )
        length = self.sizes[path[: path.index("array") + 1]][axis]
        tile, run = length // shape[axis], length // count
        self.straddling.append(
            f"{name!r}: along axis {axis}, tiles of {tile} straddle the {over} of {run} values; tiles that "
            f"divide {run} don't, {math.gcd(tile, run)} for one"
        )
        return kept

    def _is_part(self, path: tuple[str, ...]) -> bool:
        return "array" in path and path[path.index("array") + 1] in _PARTS


def _sizes(mesh: Any) -> str:
    return ", ".join(f"{name}: {size}" for name, size in mesh.shape.items())


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
