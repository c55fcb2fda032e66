"""The axes of a ragged dot, checked: which one is ragged, what it is, where axes go in the result."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jax.lax import RaggedDotDimensionNumbers

from qwix._src.core import dot_plan, layout
from qwix._src.core.transposed_qarray import DotDimensionNumbers

BASIC_DIMENSION_NUMBERS = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
)


@dataclasses.dataclass(frozen=True)
class Ragged:
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


def describe(lhs: Any, rhs: Any, sizes: Any, given: RaggedDotDimensionNumbers, has_offset: bool) -> Ragged:
    """The axes of these operands (anything with a shape), counted from the front.

    Raises ValueError for axes, sizes or groups that disagree.
    """
    numbers = dot_plan.canonical_numbers(given.dot_dimension_numbers, lhs.shape, rhs.shape)
    if len(given.lhs_ragged_dimensions) != 1:
        raise ValueError(f"Exactly one axis of lhs is ragged, got {given.lhs_ragged_dimensions}.")
    axis = layout.canonical_axis(given.lhs_ragged_dimensions[0], len(lhs.shape))
    (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = [(tuple(left), tuple(right)) for left, right in numbers]
    free = [a for a in range(len(lhs.shape)) if a not in lhs_ca + lhs_ba]
    mode = "contracting" if axis in lhs_ca else "batch" if axis in lhs_ba else "free"
    groups = layout.canonical_axes(given.rhs_group_dimensions, len(rhs.shape))
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
    if len(sizes.shape) != 1 and sizes.shape[:-1] != expected:
        raise ValueError(f"group_sizes must be [groups] or {[*expected, 'groups']}, got {sizes.shape}.")
    if has_offset and len(sizes.shape) != 1:
        raise ValueError(f"group_offset needs group_sizes of one axis, got {sizes.shape}.")
    if groups and not has_offset and rhs.shape[groups[0]] != sizes.shape[-1]:
        raise ValueError(
            f"rhs {rhs.shape} has {rhs.shape[groups[0]]} groups along axis {groups[0]}, group_sizes "
            f"{sizes.shape[-1]}. Give group_offset if rhs holds some of the groups only."
        )
    group = groups[0] if groups else -1
    return Ragged(mode, numbers, (len(lhs.shape), len(rhs.shape)), axis, rhs_axis, group, prefix)
