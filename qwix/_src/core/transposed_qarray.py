"""TransposedQArray: a QArray in the form that a kernel eats, made for one operand of one dot, and reversible.

A dot's axes are batch, contracting and free. A kernel wants three axes, one for each group: [batch, M, K]
for the left side, [batch, K, N] or [batch, N, K] for the right. `Layout` holds what was done, and it is
static, so that `to_qarray` gives back the QArray bit for bit.

Invariants:
- Pairs of contracting axes are taken in the order of the rhs' axes, so that a weight on the right whose axes
  are grouped is never transposed. Both sides agree because the rule reads the dimension numbers alone.
- On the right K comes last exactly if the last axis (of those longer than 1) is contracting: what lies next
  to each other in memory stays so. Where the groups are already in order, the conversion is a reshape.
- `k_last` may be said otherwise, of a weight that is stored K-major for the kernels of a GPU.
- A scale merges like its values. Where that would leave runs of unequal neighbours (a tile on an outer axis
  and another scale on an inner one), the outer axis gets one entry per value; strides undo it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.nnx
import flax.struct
import jax
import numpy as np
from qwix_kernels.problem import Tensor

from qwix._src.core import explicit_mesh, layout, numerics, qarray

DotDimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
Side = Literal["lhs", "rhs"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array's axes became [batch, free, K] (`k_last`) or [batch, K, free].

    Attributes:
      shape: of the original values.
      batch, free, contracting: the axes of each group, in the order in which they were merged.
      k_last: whether K is the last of the three axes.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    contracting: tuple[int, ...]
    k_last: bool

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The axes of each of the three merged axes."""
        return (
            self.batch,
            *((self.free, self.contracting) if self.k_last else (self.contracting, self.free)),
        )

    @property
    def order(self) -> tuple[int, ...]:
        """All axes in the order of the merged array."""
        return tuple(axis for group in self.groups for axis in group)

    @property
    def moves(self) -> bool:
        """Whether merging moves axes past each other."""
        return list(self.order) != sorted(self.order)

    def merge(self, x: jax.Array) -> jax.Array:
        """[batch, free, K] or [batch, K, free] of an array with the original axes, or of its scale."""
        if x.shape != self.shape:
            x = layout.broadcast_array(x, self.mergeable(x.shape))
        sizes = [math.prod(x.shape[a] for a in group) for group in self.groups]
        return explicit_mesh.reshape(layout.transpose_array(x, self.order), sizes)

    def split(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Undoes `merge` for an array that had `shape`."""
        back = [self.order.index(a) for a in range(len(shape))]
        return layout.transpose_array(self.in_order(x, shape), back)

    def in_order(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """What `split` gives, with the axes as they lie in `x`, those of `order`: nothing is moved."""
        full = shape if shape == self.shape else self.mergeable(shape)
        x = x.reshape([full[a] for a in self.order])
        return x[tuple(slice(None, None, full[a] // shape[a] if shape[a] else None) for a in self.order)]

    def mergeable(self, scale_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The smallest shape a scale must be given so that every group covers runs once it is merged."""
        result = list(scale_shape)
        for group in self.groups:
            varying = [a for a in group if scale_shape[a] > 1]
            for axis in group[: group.index(varying[-1])] if varying else ():
                result[axis] = self.shape[axis]
        return tuple(result)


def make_layout(
    shape: tuple[int, ...],
    dimension_numbers: DotDimensionNumbers,
    side: Side,
    k_last: bool | None = None,
) -> Layout:
    """The layout of one operand of `lax.dot_general`. Axes must count from the front.

    `k_last`, of an rhs: None leaves it to the rule above.

    >>> make_layout((8, 2, 4), (((2, 1), (1, 0)), ((), ())), "lhs").contracting
    (1, 2)
    """
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    pairs = sorted(zip(rhs_contracting, lhs_contracting, strict=True))
    contracting = tuple(r if side == "rhs" else left for r, left in pairs)
    batch = tuple(rhs_batch if side == "rhs" else lhs_batch)
    free = tuple(a for a in range(len(shape)) if a not in contracting + batch)
    long_axes = [a for a, d in enumerate(shape) if d != 1]
    if k_last is None:
        k_last = side == "lhs" or not free or bool(long_axes and long_axes[-1] in contracting)
    return Layout(tuple(shape), batch, free, contracting, k_last)


@flax.struct.dataclass
class TransposedQArray:
    """A QArray laid out for one operand of one dot. Make it with `transpose_qarray`.

    A pytree whose leaves have three axes; everything needed to undo it is static and says nothing of axes
    before those. So several of one layout may be stacked along axes in front, as layers are, and be cut.

    Attributes:
      qvalue: [batch, free, K] or [batch, K, free].
      scale: the same axes; its sizes divide qvalue's.
      zero_point: None, or of scale's shape and qvalue's dtype.
      layout: what was merged, of one of a stack.
      scale_shape: the scale's original shape, of one of a stack.
      side: the operand that this is: "lhs" or "rhs".
      qtype: as in QArray.

    >>> import jax.numpy as jnp
    >>> import qwix
    >>> w = qwix.quantize(jnp.ones((4, 8, 16)), "int4", channelwise_axes=(2,), tiled_axes={1: 4})
    >>> packed = transpose_qarray(w, (((2, 3), (0, 1)), ((), ())), "rhs")
    >>> packed
    TransposedQArray(int4[1,32,16], scale=float32[1,8,16], rhs of (4, 8, 16))
    >>> packed.to_qarray()
    QArray(int4[4,8,16], scale=float32[1,2,16])
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    layout: Layout = flax.struct.field(pytree_node=False)
    scale_shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    side: Side = flax.struct.field(pytree_node=False)
    qtype: Any = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The original values' shape."""
        return (*self.qvalue.shape[:-3], *self.layout.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the dequantized array: the scale's."""
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on a device, scale and zero point included."""
        return sum(numerics.device_bytes(x.dtype, math.prod(x.shape)) for x in jax.tree.leaves(self))

    @classmethod
    def of(cls, array: qarray.QArray, arrangement: Layout, side: Side) -> TransposedQArray:
        """Lays out a QArray that is known to be valid.

        Axes that it has more than the layout are those of a stack, whose scales must not be shared.
        """

        def one(array: qarray.QArray) -> TransposedQArray:
            return cls(
                qvalue=arrangement.merge(array.qvalue),
                scale=arrangement.merge(array.scale),
                zero_point=None if array.zero_point is None else arrangement.merge(array.zero_point),
                layout=arrangement,
                scale_shape=tuple(array.scale.shape),
                side=side,
                qtype=array.qtype,
            )

        return _mapped(one, array.ndim - len(arrangement.shape))(array)

    def to_qarray(self) -> qarray.QArray:
        """The QArray that this was made from, bit for bit."""
        return self._undone(lambda x, shape: self.layout.split(x, shape))

    def in_order(self) -> qarray.QArray:
        """The same without moving anything: its axes are those of `layout.order`, after those of a stack."""
        return self._undone(lambda x, shape: self.layout.in_order(x, shape))

    def _undone(self, split: Callable[[jax.Array, tuple[int, ...]], jax.Array]) -> qarray.QArray:
        def one(x: TransposedQArray) -> qarray.QArray:
            return qarray.QArray(
                qvalue=split(x.qvalue, self.layout.shape),
                scale=split(x.scale, self.scale_shape),
                zero_point=None if x.zero_point is None else split(x.zero_point, self.scale_shape),
                qtype=self.qtype,
            )

        return _mapped(one, self.qvalue.ndim - 3)(self)

    def dequantize(self) -> jax.Array:
        """The represented values in their original shape."""
        return self.to_qarray().dequantize()

    def tensor(self) -> Tensor:
        """The operand as kernels take it; transposed, if it is an rhs with `layout.k_last`."""
        codebook = self.qtype if isinstance(self.qtype, str) and self.qtype == "nf4" else None
        return Tensor(self.qvalue, self.scale, self.zero_point, codebook)

    def __repr__(self) -> str:
        inner = repr(qarray.QArray(self.qvalue, self.scale, self.zero_point, self.qtype))
        return f"Transposed{inner[:-1]}, {self.side} of {self.shape})"


flax.nnx.register_data_type(TransposedQArray)


def _mapped(one: Callable[[Any], Any], stacked: int) -> Callable[[Any], Any]:
    """`one`, of a stack with so many axes in front."""
    for _ in range(stacked):
        one = jax.vmap(one)
    return one


def transpose_qarray(
    array: qarray.QArray,
    dimension_numbers: DotDimensionNumbers,
    side: Side,
    *,
    k_last: bool | None = None,
) -> TransposedQArray:
    """Lays a QArray out for one side of a dot. A reshape alone where the axes are already grouped in order.

    Args:
      array: any tiling, any number of tiled axes, with or without zero points.
      dimension_numbers: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)), as for lax.dot_general.
      side: which operand of that dot it is.
      k_last: of an rhs, whether K is the last axis. By default as the values lie in memory; True is what
        the matrix units of GPUs read, False what those of TPUs do.

    Raises:
      ValueError: fields of the QArray that disagree, or axes that it doesn't have.

    >>> import jax.numpy as jnp
    >>> import qwix
    >>> w, dense = qwix.quantize(jnp.ones((8, 4)), "int8", channelwise_axes=(1,)), (((1,), (0,)), ((), ()))
    >>> turned = transpose_qarray(w, dense, "rhs", k_last=True)
    >>> turned, qwix.dot_general(jnp.ones((2, 8)), turned, dense).shape
    (TransposedQArray(int8[1,4,8], scale=float32[1,4,1], rhs of (8, 4)), (2, 4))
    """
    if side not in ("lhs", "rhs"):
        raise ValueError(f"side is {side!r}; it must be 'lhs' or 'rhs'.")
    if side == "lhs" and k_last is False:
        raise ValueError("k_last is False; K is the last axis of every lhs. Leave k_last out.")
    qarray.validate_qarray(array)
    numbers = _canonical_side(dimension_numbers, array.ndim, side)
    return TransposedQArray.of(array, make_layout(array.shape, numbers, side, k_last), side)


def layout_of(x: Any, numbers: DotDimensionNumbers, side: Side) -> Layout:
    """The layout of an operand of a dot: its own, if it's a TransposedQArray made for such a one.

    Whether K comes last is then as it was stored.
    """
    arrangement = make_layout(tuple(x.shape), numbers, side)
    if isinstance(x, TransposedQArray) and x.side == side == "rhs":
        turned = dataclasses.replace(arrangement, k_last=not arrangement.k_last)
        return turned if x.layout == turned else arrangement
    return arrangement


def _canonical_side(dimension_numbers: DotDimensionNumbers, ndim: int, side: Side) -> DotDimensionNumbers:
    """Counts this side's axes from the front; the other's are only paired with them."""
    contracting, batch = dimension_numbers
    mine = 0 if side == "lhs" else 1

    def fix(pair: tuple[Sequence[int], Sequence[int]]) -> tuple[Sequence[int], Sequence[int]]:
        fixed = layout.canonical_axes(tuple(pair[mine]), ndim)
        return (fixed, pair[1]) if mine == 0 else (pair[0], fixed)

    return fix(contracting), fix(batch)
