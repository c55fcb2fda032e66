"""Which rows of a ragged dot are in a group: what's in none must not move a scale that others share.

Rows past the last group hold whatever was there, nan included. The op's result doesn't depend on them, and
neither may its scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix._src.core import layout
from qwix._src.core.ragged_dot import rows_in_groups


def live(args: Sequence[Any], params: Mapping[str, Any], side: int) -> jax.Array | None:
    """What of one side of a ragged dot is in a group.

    Args:
      args: lhs, rhs and the sizes of the groups.
      params: of the primitive `ragged_dot_general`.
      side: 0 or 1.

    Returns:
      A mask to be broadcast against that side; None where the side has no ragged axis.

    >>> numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
    >>> params = {"ragged_dot_dimension_numbers": numbers, "group_offset": None}
    >>> args = jnp.ones((4, 8)), jnp.ones((2, 8, 3)), jnp.array([2, 1])
    >>> live(args, params, 0).tolist(), live(args, params, 1)
    ([[True], [True], [True], [False]], None)
    """
    lhs, rhs, sizes, *_ = args
    numbers = params["ragged_dot_dimension_numbers"]
    (axis,) = numbers.lhs_ragged_dimensions
    contracting, batch = numbers.dot_dimension_numbers
    to_rhs = {a: b for pair in (contracting, batch) for a, b in zip(*pair, strict=True)}
    if side == 1 and axis not in to_rhs:
        return None
    place = {a: a for a in range(lhs.ndim)} if side == 0 else to_rhs
    shape = [1] * args[side].ndim
    shape[place[axis]] = length = args[side].shape[place[axis]]
    if sizes.ndim == 1:
        groups = sizes.shape[0] if axis in to_rhs else rhs.shape[numbers.rhs_group_dimensions[0]]
        return rows_in_groups(length, sizes, params["group_offset"], groups).reshape(shape)
    # The sizes differ along the axes of lhs that come before the ragged one.
    free = [a for a in range(lhs.ndim) if a not in to_rhs]
    outer = [*batch[0]] if axis in batch[0] else [*batch[0], *(contracting[0] if axis in to_rhs else free)]
    where = [place[a] for a in outer[: outer.index(axis)]]
    total = layout.transpose_array(
        sizes.sum(-1), [where.index(a) if a in where else None for a in range(len(shape))]
    )
    return jnp.arange(length).reshape(shape) < total


def without_dead(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`x`, zero where the mask is false."""
    return x if mask is None else jnp.where(mask, x, 0)
