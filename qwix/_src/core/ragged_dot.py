"""`ragged_dot` and `ragged_dot_general` of arrays and QArrays, by XLA.

The rows (or the contracted, or the batch indices) of lhs lie in groups of sizes that are known at run time
only; each group has its own matrix of rhs, or gives its own product. Two symmetric 8-bit integer operands
whose scales are constant along the contracting axes are multiplied as integers and scaled afterwards.
Everything else (weight-only, zero points, tiles along the sum, nf4, floats) is dequantized first, which is
right for every pair of formats.

What belongs to no group counts as zero, whatever is stored there: rows beyond the sum of the group sizes, and
with `group_offset` those of groups before it and after the last of rhs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers
from jax.typing import DTypeLike

from qwix._src.core import dot_general as dot_lib
from qwix._src.core import dot_plan, layout, numerics, qarray
from qwix._src.core.qarray import QArray
from qwix._src.core.transposed_qarray import DotDimensionNumbers

BASIC_DIMENSION_NUMBERS = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
)
Operand = jax.Array | QArray


def ragged_dot(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: jax.Array | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` where either operand may be quantized: rows of lhs times their group's matrix.

    Args:
      lhs: [M, K]. The first group_sizes[0] rows are group 0, and so on.
      rhs: [G, K, N].
      group_sizes: [G] integers; groups may be empty. More than G of them with `group_offset`.
      precision: of products of floats.
      preferred_element_type: dtype of the result; by default what the represented values promote to.
      group_offset: a scalar, or an array of one: rhs[0] belongs to this group. For a device that holds some
        of the groups' matrices.

    Returns: [M, N]; zeros in rows that belong to no group of rhs.

    >>> import qwix
    >>> w = qwix.quantize(jnp.ones((2, 8, 4)), "int8", channelwise_axes=(0, 2))
    >>> out = ragged_dot(jnp.ones((5, 8)), w, jnp.array([3, 1]))
    >>> [round(float(v)) for v in out[:, 0]]
    [8, 8, 8, 8, 0]
    """
    return ragged_dot_general(
        lhs, rhs, group_sizes, BASIC_DIMENSION_NUMBERS, precision, preferred_element_type, group_offset
    )


def ragged_dot_general(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    dimension_numbers: RaggedDotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: jax.Array | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot_general` where either operand may be quantized.

    Args:
      lhs, rhs: arrays or QArrays.
      group_sizes: [G] integers, or one such vector for each index of the axes before the ragged one.
      dimension_numbers: whose ragged axis of lhs is a free one (each group has a matrix of rhs), a
        contracting one (each group gives a product) or a batch axis.
      precision, preferred_element_type: as for `ragged_dot`.
      group_offset: as for `ragged_dot`, with [G] sizes. Where the ragged axis is contracting, products of the
        groups before it are zero.

    Raises:
      ValueError: operands, axes or groups that disagree.
    """
    for x in (lhs, rhs):
        if isinstance(x, QArray):
            qarray.validate_qarray(x)
    ragged = _describe(lhs, rhs, group_sizes, dimension_numbers, group_offset is not None)
    accumulator, dtype = qarray.get_accumulator_and_result_type(
        lhs, rhs, preferred_element_type=preferred_element_type
    )
    if ragged.mode == "batch":
        out = dot_lib.dot_general(lhs, rhs, ragged.numbers, precision, dtype)
        return _zero_dead(out, ragged.numbers[1][0].index(ragged.axis), ragged, group_sizes, group_offset)
    if ragged.mode == "contracting":
        return _contracting(lhs, rhs, group_sizes, ragged, precision, accumulator, dtype, group_offset)
    start = None
    if group_offset is not None:
        start, group_sizes = _local_groups(group_sizes, group_offset, rhs.shape[ragged.group])
        lhs = _roll(lhs, -start, ragged.axis)
    out = _free(lhs, rhs, group_sizes, ragged, precision, accumulator, dtype)
    row_axis = ragged.lhs_in_out()[ragged.axis]
    out = _zero_dead(out, row_axis, ragged, group_sizes, None)
    return out if start is None else _roll(out, start, row_axis)


@dataclasses.dataclass(frozen=True)
class _Ragged:
    """Checked axes of one ragged dot.

    Attributes:
      mode: what the ragged axis is in lhs.
      axis: the ragged axis of lhs.
      rhs_axis: that of rhs; -1 in mode "free", where it has none.
      group: the axis of rhs that holds its groups, in mode "free"; else -1.
      prefix: axes of lhs, for each of which the sizes may differ.
    """

    mode: Literal["free", "contracting", "batch"]
    numbers: DotDimensionNumbers
    ndims: tuple[int, int]
    axis: int
    rhs_axis: int
    group: int
    prefix: tuple[int, ...]

    def free_axes(self, side: int) -> list[int]:
        used = {*self.numbers[0][side], *self.numbers[1][side], *([self.group] if side else [])}
        return [a for a in range(self.ndims[side]) if a not in used]

    def lhs_in_out(self) -> dict[int, int]:
        """Axes of lhs that the result has, counted without the groups' axis of mode "contracting"."""
        return {a: i for i, a in enumerate((*self.numbers[1][0], *self.free_axes(0)))}

    def rhs_in_out(self) -> dict[int, int]:
        batch, start = self.numbers[1][1], len(self.numbers[1][1]) + len(self.free_axes(0))
        return {a: i for i, a in enumerate(batch)} | {a: start + i for i, a in enumerate(self.free_axes(1))}

    def for_lax(self) -> RaggedDotDimensionNumbers:
        groups = (self.group,) if self.mode == "free" else ()
        return RaggedDotDimensionNumbers(self.numbers, (self.axis,), groups)


def _describe(
    lhs: Operand, rhs: Operand, sizes: jax.Array, given: RaggedDotDimensionNumbers, has_offset: bool
) -> _Ragged:
    numbers = dot_plan.canonical_numbers(given.dot_dimension_numbers, lhs.shape, rhs.shape)
    if len(given.lhs_ragged_dimensions) != 1:
        raise ValueError(f"Exactly one axis of lhs is ragged, got {given.lhs_ragged_dimensions}.")
    axis = layout.canonical_axis(given.lhs_ragged_dimensions[0], lhs.ndim)
    (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = [(tuple(left), tuple(right)) for left, right in numbers]
    free = [a for a in range(lhs.ndim) if a not in lhs_ca + lhs_ba]
    mode = "contracting" if axis in lhs_ca else "batch" if axis in lhs_ba else "free"
    groups = layout.canonical_axes(given.rhs_group_dimensions, rhs.ndim)
    if len(groups) != (mode == "free") or set(groups) & {*rhs_ca, *rhs_ba}:
        raise ValueError(
            f"The ragged axis {axis} of lhs is a {mode} axis, so rhs has "
            f"{'one free axis' if mode == 'free' else 'no axis'} of groups; got {given!r}."
        )
    if mode == "contracting":
        prefix, rhs_axis = lhs_ba + lhs_ca[: lhs_ca.index(axis)], rhs_ca[lhs_ca.index(axis)]
    elif mode == "batch":
        prefix, rhs_axis = lhs_ba[: lhs_ba.index(axis)], rhs_ba[lhs_ba.index(axis)]
    else:
        prefix, rhs_axis = lhs_ba + tuple(free[: free.index(axis)]), -1
    expected = tuple(lhs.shape[a] for a in prefix)
    if sizes.ndim != 1 and sizes.shape[:-1] != expected:
        raise ValueError(f"group_sizes must be [groups] or {[*expected, 'groups']}, got {sizes.shape}.")
    if has_offset and sizes.ndim != 1:
        raise ValueError(f"group_offset needs group_sizes of one axis, got {sizes.shape}.")
    if groups and not has_offset and rhs.shape[groups[0]] != sizes.shape[-1]:
        raise ValueError(
            f"rhs {rhs.shape} has {rhs.shape[groups[0]]} groups along axis {groups[0]}, group_sizes "
            f"{sizes.shape[-1]}. Give group_offset if rhs holds some of the groups only."
        )
    group = groups[0] if groups else -1
    return _Ragged(mode, numbers, (lhs.ndim, rhs.ndim), axis, rhs_axis, group, prefix)


# --- groups


def group_of_rows(rows: int, group_sizes: jax.Array) -> jax.Array:
    """[rows] the group that each row belongs to, the number of groups for rows beyond the last.

    >>> group_of_rows(5, jnp.array([2, 0, 1])).tolist()
    [0, 0, 2, 3, 3]
    """
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")


def rows_in_groups(rows: int, group_sizes: jax.Array, group_offset: Any, groups: int) -> jax.Array:
    """[rows] whether a row belongs to one of `groups` groups from `group_offset` (None: from the first)."""
    start, sizes = _local_groups(group_sizes, 0 if group_offset is None else group_offset, groups)
    index = jnp.arange(rows)
    return (index >= start) & (index < start + sizes.sum())


def _local_groups(group_sizes: jax.Array, offset: Any, groups: int) -> tuple[jax.Array, jax.Array]:
    """(the first row, the sizes) of the groups from `offset`; groups that don't exist are empty."""
    offset = jnp.reshape(jnp.asarray(offset), ())
    start = jnp.sum(jnp.where(jnp.arange(group_sizes.shape[0]) < offset, group_sizes, 0))
    return start, group_sizes.at[offset + jnp.arange(groups)].get(mode="fill", fill_value=0)


def _zero_dead(out: jax.Array, axis: int, ragged: _Ragged, sizes: jax.Array, offset: Any) -> jax.Array:
    """Zeros where the result's `axis`, the ragged one, is in no group."""
    return jnp.where(
        _alive(ragged, sizes, out.ndim, out.shape[axis], axis, ragged.lhs_in_out(), offset), out, 0
    )


def _alive(
    ragged: _Ragged,
    sizes: jax.Array,
    ndim: int,
    length: int,
    axis: int,
    places: Mapping[int, int],
    offset: Any,
) -> jax.Array:
    """Which indices of `axis` are in a group, to be broadcast against an array of rank `ndim`.

    `places`: where the axes of lhs are in that array.
    """
    if sizes.ndim == 1:
        alive = rows_in_groups(length, sizes, offset, sizes.shape[0])
        return alive.reshape([length if a == axis else 1 for a in range(ndim)])
    total = sizes.sum(-1)
    # Axes of `total` are those of ragged.prefix; bring them where they stand in the array.
    where = [places[a] for a in ragged.prefix]
    total = layout.transpose_array(total, [where.index(a) if a in where else None for a in range(ndim)])
    index = jnp.arange(length).reshape([length if a == axis else 1 for a in range(ndim)])
    return index < total


def _roll(x: Any, shift: jax.Array, axis: int) -> Any:
    """Rolls values, and those scales that vary along the axis."""
    if not isinstance(x, QArray):
        return jnp.roll(x, shift, axis)
    if x.scale.shape[axis] not in (1, x.shape[axis]):
        full = [n if a == axis else s for a, (n, s) in enumerate(zip(x.shape, x.scale.shape, strict=True))]
        spread: Any = lambda v: None if v is None else layout.broadcast_array(v, full)
        x = dataclasses.replace(x, scale=spread(x.scale), zero_point=spread(x.zero_point))
    return jax.tree.map(lambda v: v if v.shape[axis] == 1 else jnp.roll(v, shift, axis), x)


# --- products


def _free(
    lhs: Operand,
    rhs: Operand,
    sizes: jax.Array,
    ragged: _Ragged,
    precision: Any,
    accumulator: Any,
    dtype: Any,
) -> jax.Array:
    """Each row of lhs with the matrix of its group."""
    if not (_can_scale_after(lhs, rhs, ragged, accumulator) and (sizes.ndim == 1 or _shared(rhs, ragged))):
        return _dequantized(lhs, rhs, sizes, ragged, precision, dtype)
    out = _integers(lhs, rhs, sizes, ragged)
    if isinstance(lhs, QArray):
        out = _scaled(out, lhs.scale, ragged.lhs_in_out())
    if isinstance(rhs, QArray):
        places, scale = ragged.rhs_in_out(), rhs.scale
        if not _shared(rhs, ragged):
            rows = group_of_rows(lhs.shape[ragged.axis], sizes)
            scale = jnp.take(scale, rows, axis=ragged.group, mode="clip")
        out = _scaled(out, scale, places | {ragged.group: ragged.lhs_in_out()[ragged.axis]})
    return out.astype(dtype)


def _contracting(
    lhs: Operand,
    rhs: Operand,
    sizes: jax.Array,
    ragged: _Ragged,
    precision: Any,
    accumulator: Any,
    dtype: Any,
    offset: Any,
) -> jax.Array:
    """The product of each group's run of the contracting axis: [groups, ...]."""
    if _can_scale_after(lhs, rhs, ragged, accumulator):
        out = _integers(lhs, rhs, sizes, ragged)
        for x, places in ((lhs, ragged.lhs_in_out()), (rhs, ragged.rhs_in_out())):
            if isinstance(x, QArray):
                out = _scaled(out, x.scale, {a: i + 1 for a, i in places.items()})
        out = out.astype(dtype)
    else:
        lhs, rhs = (x.dequantize() if isinstance(x, QArray) else x for x in (lhs, rhs))
        # What is in no group must not even be multiplied by zero: it may be nan.
        to_rhs = {a: b for pair in ragged.numbers for a, b in zip(*pair, strict=True)}
        n = lhs.shape[ragged.axis]
        here = {a: a for a in range(lhs.ndim)}
        lhs = jnp.where(_alive(ragged, sizes, lhs.ndim, n, ragged.axis, here, None), lhs, 0)
        if sizes.ndim == 1 or set(ragged.prefix) <= set(to_rhs):
            rhs = jnp.where(_alive(ragged, sizes, rhs.ndim, n, ragged.rhs_axis, to_rhs, None), rhs, 0)
        out = _dequantized(lhs, rhs, sizes, ragged, precision, dtype)
    if offset is None:
        return out
    groups = jnp.arange(sizes.shape[0]).reshape(-1, *[1] * (out.ndim - 1))
    return jnp.where(groups >= jnp.reshape(jnp.asarray(offset), ()), out, 0)


# Products of bytes that int32 is sure to hold the sum of.
_MAX_SUM = 1 << 16


def _can_scale_after(lhs: Operand, rhs: Operand, ragged: _Ragged, accumulator: Any) -> bool:
    """Whether both sides are whole numbers that can be summed before they are scaled."""
    if accumulator != jnp.int32:
        return False
    for side, x in enumerate((lhs, rhs)):
        stored = x.qvalue.dtype if isinstance(x, QArray) else x.dtype
        if not jnp.issubdtype(stored, jnp.signedinteger) or jnp.iinfo(stored).bits > 8:
            return False
        if not isinstance(x, QArray):
            continue
        contracting = ragged.numbers[0][side]
        if x.zero_point is not None or any(x.scale.shape[a] != 1 for a in contracting):
            return False
    return math.prod(lhs.shape[a] for a in ragged.numbers[0][0]) <= _MAX_SUM


def _shared(rhs: Operand, ragged: _Ragged) -> bool:
    """Whether all groups have the same scale."""
    return not isinstance(rhs, QArray) or rhs.scale.shape[ragged.group] == 1


def _integers(lhs: Operand, rhs: Operand, sizes: jax.Array, ragged: _Ragged) -> jax.Array:
    left, right = ((x.qvalue if isinstance(x, QArray) else x).astype(jnp.int8) for x in (lhs, rhs))
    return jax.lax.ragged_dot_general(left, right, sizes, ragged.for_lax(), preferred_element_type=jnp.int32)


def _scaled(out: jax.Array, scale: jax.Array, places: Mapping[int, int]) -> jax.Array:
    """The result times a scale whose axis a is the result's axis places[a]; others have size 1."""
    wide = numerics.compute_dtype(scale.dtype)
    axis_of = {place: a for a, place in places.items() if a < scale.ndim}
    scale = layout.transpose_array(scale.astype(wide), [axis_of.get(i) for i in range(out.ndim)])
    return layout.call_with_generic_broadcast(jnp.multiply, out.astype(wide), scale)


def _dequantized(
    lhs: Operand, rhs: Operand, sizes: jax.Array, ragged: _Ragged, precision: Any, dtype: Any
) -> jax.Array:
    lhs, rhs = (x.dequantize() if isinstance(x, QArray) else x for x in (lhs, rhs))
    both = jnp.promote_types(lhs.dtype, rhs.dtype)
    return jax.lax.ragged_dot_general(
        lhs.astype(both), rhs.astype(both), sizes, ragged.for_lax(), precision, dtype
    )
