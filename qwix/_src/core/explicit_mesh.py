"""Arrays whose types say how they are laid out: those on a mesh with explicit axes.

There an op must be told where its result goes as soon as that doesn't follow from its operands, and every
reshape and transpose on the way, too. `reshape` finds it for what merges and splits axes; inside of
`laid_out` the compiler decides about all of them, and only the result is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def sharding_of(x: Any) -> NamedSharding | None:
    """How an array is laid out, if its type says so; else None.

    >>> import jax.numpy as jnp
    >>> sharding_of(jnp.ones(4)) is None
    True
    """
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def laid_out(fn: Callable[..., Any], out_sharding: Any) -> Callable[..., Any]:
    """`fn`, of arrays only, partitioned by the compiler, whose result is laid out as `out_sharding` says.

    Args:
      out_sharding: one for the whole result or a tree of them, as for `jax.sharding.auto_axes`.
    """
    return jax.sharding.auto_axes(fn, out_sharding=out_sharding)


def reshape(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """`x.reshape(shape)`; an array whose type says how it's laid out stays so along the axes that lead.

    Axes that are merged are cut as the first of them was, and so is the first of those that one is split
    into; what cut the others is gathered.

    >>> import jax.numpy as jnp
    >>> reshape(jnp.zeros((4, 6)), (2, 12)).shape
    (2, 12)
    """
    sharding = sharding_of(x)
    if sharding is None:
        return x.reshape(shape)
    return jax.lax.reshape(x, tuple(shape), out_sharding=reshaped(sharding, x.shape, shape))


def reshaped(sharding: NamedSharding, old: Sequence[int], new: Sequence[int]) -> NamedSharding:
    """How an array laid out as `sharding` is after a reshape."""
    spec = (*sharding.spec, *(None,) * (len(old) - len(sharding.spec)))
    entries: list[Any] = [None] * len(new)
    for group, target in _groups(old, new):
        leading = next((axis for axis in group if old[axis] != 1), None)
        entry = spec[leading] if leading is not None else None
        first = next((axis for axis in target if new[axis] != 1), None)
        axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        if first is not None and new[first] % math.prod(sharding.mesh.shape[a] for a in axes) == 0:
            entries[first] = entry
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def leads(x: Any, groups: Sequence[Sequence[int]]) -> bool:
    """Whether an array is cut along the first long axis of each group of axes at most: merging moves nothing.

    Args:
      x: an array whose type says how it's laid out, or anything that has the shape and the sharding.
      groups: of its axes.
    """
    spec = (*x.sharding.spec, *(None,) * (len(x.shape) - len(x.sharding.spec)))
    return not any(spec[a] for group in groups for a in [a for a in group if x.shape[a] != 1][1:])


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes of equal products, of both shapes."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        group, target = [i], [j]
        i, j = i + 1, j + 1
        while (p := math.prod(old[a] for a in group)) != (q := math.prod(new[a] for a in target)):
            if p < q:
                group.append(i)
                i += 1
            else:
                target.append(j)
                j += 1
        groups.append((group, target))
    return groups
