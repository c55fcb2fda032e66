"""Ragged dots of any layout in training, as the ones that core trains: rows in groups, without batch axes.

Axes are brought into order before the op and back after it, so gradients take the same way. Batches become
more groups; rows of a batch that are in none of its groups become one more, of a matrix of zeros. Where the
ragged axis is itself a batch axis, the op is a dot, of which a part doesn't count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix._src import ragged_rows
from qwix._src.core.dot_general_qt import dot_general_qt
from qwix._src.core.qt_config import QtConfig
from qwix._src.core.ragged_dot import BASIC_DIMENSION_NUMBERS
from qwix._src.core.ragged_dot_qt import ragged_dot_general_qt


def refusal(args: Sequence[Any], params: Mapping[str, Any], tile_size: Any) -> str | None:
    """Why a ragged dot isn't trained quantized; None if it is."""
    numbers = params["ragged_dot_dimension_numbers"]
    if numbers == BASIC_DIMENSION_NUMBERS:
        return None
    (axis,) = numbers.lhs_ragged_dimensions
    (contracting, _), (batch, _) = numbers.dot_dimension_numbers
    if axis in contracting:
        return "the ragged axis is summed over, and each group gives a product of its own"
    if isinstance(tile_size, Mapping) or (tile_size and len(contracting) > 1):
        return f"tiles of {tile_size} are for one axis that is summed over, there are {len(contracting)}"
    if axis not in batch and axis != _free(args[0].ndim, contracting, batch)[0]:
        return f"free axes come before the ragged axis {axis} of its left operand"
    if batch and params["group_offset"] is not None:
        return "a group_offset is for operands without batch axes"
    return None


def _free(ndim: int, *used: Sequence[int]) -> list[int]:
    taken = {a for axes in used for a in axes}
    return [a for a in range(ndim) if a not in taken]


def ragged_dot_of_any(
    operands: Sequence[Any], params: Mapping[str, Any], config: QtConfig, dtype: Any
) -> jax.Array:
    """`jax.lax.ragged_dot_general` that is quantized in training.

    Args:
      operands: lhs, rhs and the sizes of the groups, which `refusal` has no objection to.
      params: of the primitive.
      config: of the op as it is called.
      dtype: of the result.
    """
    numbers = params["ragged_dot_dimension_numbers"]
    lhs, rhs, sizes, *_ = operands
    options = {"precision": params["precision"], "preferred_element_type": dtype}
    if numbers.lhs_ragged_dimensions[0] in numbers.dot_dimension_numbers[1][0]:
        return _of_batches(operands, params, config, options)
    return _of_rows(lhs, rhs, sizes, params, config, options)


def _of_batches(
    operands: Sequence[Any], params: Mapping[str, Any], config: QtConfig, options: Mapping[str, Any]
) -> jax.Array:
    """The ragged axis is a batch axis: a dot, zero where no group is."""
    numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    masks = [ragged_rows.live(operands, params, side) for side in (0, 1)]
    lhs, rhs = (ragged_rows.without_dead(x, mask) for x, mask in zip(operands[:2], masks, strict=True))
    out = dot_general_qt(lhs, rhs, numbers, config, **options)
    (_, _), (batch, _) = numbers
    assert masks[0] is not None
    in_front = masks[0].transpose(*batch, *_free(lhs.ndim, batch))
    mask = in_front.reshape(*in_front.shape[: len(batch)], *[1] * (out.ndim - len(batch)))
    return ragged_rows.without_dead(out, mask)


def _of_rows(
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: jax.Array,
    params: Mapping[str, Any],
    config: QtConfig,
    options: Mapping[str, Any],
) -> jax.Array:
    """The ragged axis is the first free one of lhs."""
    numbers = params["ragged_dot_dimension_numbers"]
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    group = numbers.rhs_group_dimensions
    lhs_free, rhs_free = _free(lhs.ndim, lhs_sum, lhs_batch), _free(rhs.ndim, rhs_sum, rhs_batch, group)
    left = lambda x: _merged(x, [(*lhs_batch, *lhs_free), lhs_sum])
    right = lambda x: _merged(x, [(*rhs_batch, *group), rhs_sum, rhs_free])
    config = dataclasses.replace(
        config,
        lhs_collect_quant_stat=_collected(config.lhs_collect_quant_stat, left),
        rhs_collect_quant_stat=_collected(config.rhs_collect_quant_stat, right),
    )
    batch = [lhs.shape[a] for a in lhs_batch]
    rows = lhs.shape[lhs_free[0]]
    if batch:
        lhs = _merged(lhs, [(*lhs_batch, lhs_free[0]), *([a] for a in (*lhs_free[1:], *lhs_sum))])
        rhs = _merged(rhs, [rhs_batch, *([a] for a in (*group, *rhs_sum, *rhs_free))])
        rhs, sizes = _with_rest(rhs, jnp.broadcast_to(sizes, (*batch, sizes.shape[-1])), rows)
        first = len(lhs_free)
        sums = range(first, first + len(lhs_sum)), range(1, 1 + len(rhs_sum))
        numbers = jax.lax.RaggedDotDimensionNumbers((sums, ((), ())), (0,), (0,))
    offset = params["group_offset"]
    out = ragged_dot_general_qt(lhs, rhs, sizes, numbers, config, **options, group_offset=offset)
    return out.reshape(*batch, rows, *out.shape[1:])


def _with_rest(rhs: jax.Array, sizes: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Matrices `[batch, groups, ...]` and sizes `[..., groups]` with one group more for each batch, which the
    rest of its rows are in; then one axis of both.
    """
    rest = rows - sizes.sum(-1, keepdims=True)
    sizes = jnp.concatenate([sizes, rest.astype(sizes.dtype)], axis=-1).reshape(-1)
    rhs = jnp.pad(rhs, [(0, 0), (0, 1)] + [(0, 0)] * (rhs.ndim - 2))
    return rhs.reshape(-1, *rhs.shape[2:]), sizes


def _merged(x: jax.Array, runs: Sequence[Sequence[int]]) -> jax.Array:
    """`x` with its axes in the order of the runs, each of which becomes one axis."""
    shape = [math.prod(x.shape[a] for a in run) for run in runs]
    return x.transpose([a for run in runs for a in run]).reshape(shape)


def _collected(collect: Any, merge: Any) -> Any:
    """What gives the calibration, in the order of axes of the merged operand."""
    return None if collect is None else lambda found: jax.tree.map(merge, collect(found))
