"""Turned: a quantized weight whose axes lie in another order than the model's code sees them.

A weight that is stored K-major is not transposed back for the ops that eat it: a dot names its axes by
numbers, and gets the numbers of the axes as they lie. So no program has a transpose of the weight, and what
scans cut, slices take and transposes move is the array as it lies, too.

Only the last axes are out of place, and `order` counts them from the back. So it says the same of a weight
and of what a scan or a vmap over its first axes makes of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import flax.struct
import numpy as np
from jax.lax import RaggedDotDimensionNumbers

from qwix._src.core import qarray
from qwix._src.core.transposed_qarray import DotDimensionNumbers, TransposedQArray


@flax.struct.dataclass
class Turned:
    """A weight as it lies.

    Attributes:
      array: its values and scales.
      order: the axes of the weight that the last ones of `array` are, counted from the back.

    >>> import jax.numpy as jnp, qwix
    >>> turned = Turned.of(qwix.quantize(jnp.ones((2, 4, 8)), "int8", channelwise_axes=(0, 1)), (0, 2, 1))
    >>> turned.order, turned.shape, turned.canonical()
    ((-1, -2), (2, 8, 4), QArray(int8[2,8,4], scale=float32[2,1,4]))
    """

    array: qarray.QArray
    order: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, array: qarray.QArray, axes: Sequence[int]) -> Turned:
        """`axes`: which axis of the weight each one of `array` is, counted from the front."""
        moved = [i for i, axis in enumerate(axes) if i != axis]
        first = moved[0] if moved else len(axes)
        return cls(array, tuple(axis - len(axes) for axis in axes[first:]))

    @property
    def axes(self) -> tuple[int, ...]:
        """Which axis of the weight each one of `array` is, counted from the front."""
        ndim = self.array.ndim
        return (*range(ndim - len(self.order)), *(ndim + axis for axis in self.order))

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return tuple(self.array.shape[place] for place in np.argsort(self.axes))

    @property
    def dtype(self) -> np.dtype:
        """Of the float weight."""
        return self.array.dtype

    def canonical(self) -> qarray.QArray:
        """The QArray with its axes as the weight has them."""
        return self.array.transpose(tuple(int(place) for place in np.argsort(self.axes)))

    def transpose(self, perm: Sequence[int]) -> Turned:
        """The transposed weight, which lies as this one does."""
        return Turned.of(self.array, [list(perm).index(axis) for axis in self.axes])

    def seen_by(self, named: Collection[int]) -> tuple[qarray.QArray, tuple[int, ...]]:
        """What an op gets that names some axes, and has the others in its result in the order they come in.

        Returns: the QArray, and where in it each axis of the weight is.
        """
        others = [axis for axis in self.axes if axis not in named]
        if others != sorted(others):
            return self.canonical(), tuple(range(self.array.ndim))
        return self.array, tuple(self.axes.index(axis) for axis in range(self.array.ndim))


def as_it_lies(stored: TransposedQArray) -> Turned:
    """A prepacked weight, split into its axes and not transposed."""
    stacked = stored.qvalue.ndim - 3
    return Turned.of(stored.in_order(), (*range(stacked), *(stacked + axis for axis in stored.layout.order)))


def canonical(payload: Any) -> Any:
    """The QArray of a weight; anything else as it is."""
    return payload.canonical() if isinstance(payload, Turned) else payload


def dot_rhs(weight: Turned, numbers: DotDimensionNumbers) -> tuple[qarray.QArray, DotDimensionNumbers]:
    """The weight on the right of a dot as it lies, and the numbers of that dot."""
    (left, right), (left_batch, right_batch) = numbers
    array, place = weight.seen_by({*right, *right_batch})
    there = lambda axes: tuple(place[axis] for axis in axes)
    return array, ((tuple(left), there(right)), (tuple(left_batch), there(right_batch)))


def ragged_rhs(
    weight: Turned, numbers: RaggedDotDimensionNumbers
) -> tuple[qarray.QArray, RaggedDotDimensionNumbers]:
    """The same of a ragged dot."""
    (left, right), (left_batch, right_batch) = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    array, place = weight.seen_by({*right, *right_batch, *groups})
    there = lambda axes: tuple(place[axis] for axis in axes)
    dot = ((tuple(left), there(right)), (tuple(left_batch), there(right_batch)))
    return array, RaggedDotDimensionNumbers(dot, numbers.lhs_ragged_dimensions, there(groups))
