"""`ragged_dot` and `ragged_dot_general` of arrays and QArrays.

The rows (or the contracted, or the batch indices) of lhs lie in groups of sizes that are known at run time
only; each group has its own matrix of rhs, or gives its own product. With a quantized operand the first two
modes are grouped matmuls of `qwix_kernels.ragged_matmul`, which know every scheme that a dot knows
(ragged_kernel.py). What is none of them (it says why) is done by XLA: two symmetric 8-bit integer operands
whose scales are constant along the contracting axes are multiplied as integers and scaled afterwards,
everything else is dequantized first, which is right for every pair of formats.

What belongs to no group counts as zero, whatever is stored there: rows beyond the sum of the group sizes, and
with `group_offset` those of groups before it and after the last of rhs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers
from jax.typing import DTypeLike

from qwix._src.core import dot_general as dot_lib
from qwix._src.core import layout, numerics, qarray, ragged_kernel
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.qarray import QArray
from qwix._src.core.ragged_kernel import RaggedFused
from qwix._src.core.ragged_plan import BASIC_DIMENSION_NUMBERS as BASIC_DIMENSION_NUMBERS
from qwix._src.core.ragged_plan import Ragged, describe

Operand = jax.Array | QArray


def ragged_dot(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: jax.Array | None = None,
    *,
    act_how: HowToQuantize | None = None,
    implementation: str | Sequence[str] | None = None,
    **fused: Unpack[RaggedFused],
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
      act_how, implementation, **fused: as for `ragged_dot_general`.

    Returns: [M, N]; zeros in rows that belong to no group of rhs.

    >>> import qwix
    >>> w = qwix.quantize(jnp.ones((2, 8, 4)), "int8", channelwise_axes=(0, 2))
    >>> out = ragged_dot(jnp.ones((5, 8)), w, jnp.array([3, 1]))
    >>> [round(float(v)) for v in out[:, 0]]
    [8, 8, 8, 8, 0]
    """
    options: Any = {"act_how": act_how, "implementation": implementation, **fused}
    numbers = BASIC_DIMENSION_NUMBERS
    return ragged_dot_general(
        lhs, rhs, group_sizes, numbers, precision, preferred_element_type, group_offset, **options
    )


def ragged_dot_general(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    dimension_numbers: RaggedDotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: jax.Array | None = None,
    *,
    act_how: HowToQuantize | None = None,
    implementation: str | Sequence[str] | None = None,
    **fused: Unpack[RaggedFused],
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
      act_how: quantize a float lhs on the way, inside the kernel where it can (absmax per row).
      implementation: name of a kernel implementation, or names in order; None takes the best that runs.
      **fused: see `RaggedFused`; where each group has a matrix.

    Raises:
      ValueError: operands, axes or groups that disagree.
      NotImplementedError: a named implementation, or something fused, where this is no grouped matmul.
    """
    for x in (lhs, rhs):
        if isinstance(x, QArray):
            qarray.validate_qarray(x)
    ragged = describe(lhs, rhs, group_sizes, dimension_numbers, group_offset is not None)
    ragged_kernel.check_options(lhs, ragged, act_how, fused)
    accumulator, dtype = qarray.get_accumulator_and_result_type(
        lhs, rhs, preferred_element_type=preferred_element_type
    )
    reason = ragged_kernel.refusal(lhs, rhs, ragged, precision, act_how)
    if not reason and ragged.mode == "free":
        call, shape = ragged_kernel.free_call(lhs, rhs, group_sizes, ragged, precision, dtype, act_how, fused)
        return ragged_kernel.free(call, group_offset, implementation).reshape(shape).astype(dtype)
    if implementation is not None or fused:
        what = f"{implementation!r}" if implementation is not None else ", ".join(fused)
        raise NotImplementedError(f"{what} needs a grouped matmul, which this ragged dot is not: {reason}.")
    if act_how is not None:
        assert not isinstance(lhs, QArray)  # checked
        lhs = qarray.quantize(lhs, act_how)
    if ragged.mode == "batch":
        out = dot_lib.dot_general(lhs, rhs, ragged.numbers, precision, dtype)
        return _zero_dead(out, ragged.numbers[1][0].index(ragged.axis), ragged, group_sizes, group_offset)
    if ragged.mode == "contracting":
        if not reason:
            return _outer(lhs, rhs, group_sizes, ragged, precision, dtype, group_offset)
        return _contracting(lhs, rhs, group_sizes, ragged, precision, accumulator, dtype, group_offset)
    start = None
    if group_offset is not None:
        start, group_sizes = _local_groups(group_sizes, group_offset, rhs.shape[ragged.group])
        lhs = _roll(lhs, -start, ragged.axis)
    out = _free(lhs, rhs, group_sizes, ragged, precision, accumulator, dtype)
    row_axis = ragged.lhs_in_out()[ragged.axis]
    out = _zero_dead(out, row_axis, ragged, group_sizes, None)
    return out if start is None else _roll(out, start, row_axis)


def per_group(
    lhs: Operand,
    rhs: Operand,
    sizes: jax.Array,
    dimension_numbers: RaggedDotDimensionNumbers,
    precision: Any,
    dtype: Any,
    offset: Any,
    groups: int,
) -> jax.Array:
    """Where the ragged axis is contracting: the products of `groups` groups from `offset` (None: all)."""
    ragged = describe(lhs, rhs, sizes, dimension_numbers, offset is not None)
    if offset is None or ragged_kernel.refusal(lhs, rhs, ragged, precision, None):
        out = ragged_dot_general(lhs, rhs, sizes, dimension_numbers, precision, dtype)
        if offset is None:
            return out
        local = jnp.reshape(offset, ()) + jnp.arange(groups)
        return out.at[local].get(mode="fill", fill_value=0)
    call, columns = ragged_kernel.contracting_call(lhs, rhs, sizes, ragged, precision, dtype)
    out = ragged_kernel.contracting(call, offset, groups, None)
    return out.reshape(groups, *columns).astype(dtype)


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


def _zero_dead(out: jax.Array, axis: int, ragged: Ragged, sizes: jax.Array, offset: Any) -> jax.Array:
    """Zeros where the result's `axis`, the ragged one, is in no group."""
    return jnp.where(
        _alive(ragged, sizes, out.ndim, out.shape[axis], axis, ragged.lhs_in_out(), offset), out, 0
    )


def _alive(
    ragged: Ragged,
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
    ragged: Ragged,
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


def _outer(
    lhs: Operand, rhs: Operand, sizes: jax.Array, ragged: Ragged, precision: Any, dtype: Any, offset: Any
) -> jax.Array:
    """As `_contracting`, by a grouped matmul."""
    call, columns = ragged_kernel.contracting_call(lhs, rhs, sizes, ragged, precision, dtype)
    out = jnp.moveaxis(ragged_kernel.contracting(call, None, None, None), len(call.batch), 0)
    out = out.reshape(*out.shape[:-2], *columns).astype(dtype)
    return out if offset is None else _from_group(out, offset)


def _from_group(out: jax.Array, offset: Any) -> jax.Array:
    """Zeros for the groups before `offset`."""
    groups = jnp.arange(out.shape[0]).reshape(-1, *[1] * (out.ndim - 1))
    return jnp.where(groups >= jnp.reshape(jnp.asarray(offset), ()), out, 0)


def _contracting(
    lhs: Operand,
    rhs: Operand,
    sizes: jax.Array,
    ragged: Ragged,
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
    return out if offset is None else _from_group(out, offset)


# Products of bytes that int32 is sure to hold the sum of.
_MAX_SUM = 1 << 16


def _can_scale_after(lhs: Operand, rhs: Operand, ragged: Ragged, accumulator: Any) -> bool:
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


def _shared(rhs: Operand, ragged: Ragged) -> bool:
    """Whether all groups have the same scale."""
    return not isinstance(rhs, QArray) or rhs.scale.shape[ragged.group] == 1


def _integers(lhs: Operand, rhs: Operand, sizes: jax.Array, ragged: Ragged) -> jax.Array:
    left, right = ((x.qvalue if isinstance(x, QArray) else x).astype(jnp.int8) for x in (lhs, rhs))
    return jax.lax.ragged_dot_general(left, right, sizes, ragged.for_lax(), preferred_element_type=jnp.int32)


def _scaled(out: jax.Array, scale: jax.Array, places: Mapping[int, int]) -> jax.Array:
    """The result times a scale whose axis a is the result's axis places[a]; others have size 1."""
    wide = numerics.compute_dtype(scale.dtype)
    axis_of = {place: a for a, place in places.items() if a < scale.ndim}
    scale = layout.transpose_array(scale.astype(wide), [axis_of.get(i) for i in range(out.ndim)])
    return layout.call_with_generic_broadcast(jnp.multiply, out.astype(wide), scale)


def _dequantized(
    lhs: Operand, rhs: Operand, sizes: jax.Array, ragged: Ragged, precision: Any, dtype: Any
) -> jax.Array:
    lhs, rhs = (x.dequantize() if isinstance(x, QArray) else x for x in (lhs, rhs))
    both = jnp.promote_types(lhs.dtype, rhs.dtype)
    return jax.lax.ragged_dot_general(
        lhs.astype(both), rhs.astype(both), sizes, ragged.for_lax(), precision, dtype
    )
