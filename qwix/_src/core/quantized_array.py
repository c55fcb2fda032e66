"""QArray: quantized values with their scales. The canonical, op-agnostic form that checkpoints hold.

    value = (qvalue - zero_point) * scale          (nf4: table[qvalue] * scale)

Invariants (`validate_qarray`): scale has qvalue's rank and divides its shape; zero_point, if any, has the
scale's shape and qvalue's dtype; scale is a float. They are checked by every op and not on construction,
because a tree of shapes, shardings or block specs is a QArray too.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.nnx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwix._src.core import indexing, layout, numerics
from qwix._src.core.layout import call_with_generic_broadcast


@flax.struct.dataclass
class QArray:
    """Quantized values and their scales. A pytree: `jax.tree.map` maps over qvalue, scale and zero_point.

    Attributes:
      qvalue: the stored values, any shape.
      scale: float, of qvalue's rank; entry i along an axis covers the i-th run of neighbours there.
      zero_point: None, or the stored value that stands for 0, of scale's shape and qvalue's dtype.
      qtype: the format, canonical (`numerics.canonical_qtype`); qvalue's dtype if not given.

    >>> import qwix
    >>> q = qwix.quantize(jnp.ones((128, 8)), "int4", channelwise_axes=(1,), tiled_axes={0: 32})
    >>> q
    QArray(int4[128,8], scale=float32[4,8])
    >>> q.reshape(2, -1, 8)[0], q[32:96].scale.shape, q.nbytes
    (QArray(int4[64,8], scale=float32[2,8]), (2, 8), 640)
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    qtype: Any = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self):
        qtype = getattr(self.qvalue, "dtype", None) if self.qtype is None else self.qtype
        if qtype is not None:
            object.__setattr__(self, "qtype", _canonical_or_as_is(qtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        return len(self.qvalue.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the dequantized array: the scale's."""
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on a device, scale and zero point included; sub-byte values are packed there."""
        return sum(numerics.device_bytes(x.dtype, math.prod(x.shape)) for x in jax.tree.leaves(self))

    @property
    def scale_tile_shape(self) -> tuple[int, ...]:
        """Values per scale along each axis."""
        return _tile_shape(self.shape, self.scale.shape)

    @property
    def zero_point_tile_shape(self) -> tuple[int, ...] | None:
        """Values per zero point along each axis."""
        return None if self.zero_point is None else _tile_shape(self.shape, self.zero_point.shape)

    @property
    def T(self) -> QArray:
        return self.transpose()

    @property
    def mT(self) -> QArray:
        return self.swapaxes(-1, -2)

    def transpose(self, *axes: Any) -> QArray:
        if len(axes) == 1 and (axes[0] is None or not isinstance(axes[0], int)):
            axes = axes[0] or ()
        return jax.tree.map(lambda x: x.transpose(*axes), self)

    def swapaxes(self, axis1: int, axis2: int) -> QArray:
        return jax.tree.map(lambda x: x.swapaxes(axis1, axis2), self)

    def reshape(self, *new_shape: Any) -> QArray:
        """Like `jax.Array.reshape`; see `reshape` for which shapes the scales allow."""
        return reshape(self, *new_shape)

    def astype(self, dtype: DTypeLike) -> QArray:
        """Changes what it dequantizes to (the scale's dtype), not the format of the values."""
        return dataclasses.replace(self, scale=self.scale.astype(dtype))

    def dequantize(self) -> jax.Array:
        """The represented values, in the scale's dtype."""
        return dequantize(self)

    def __getitem__(self, idx: Any) -> QArray:
        return rewriting_take(self, idx)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an unsized object: a QArray of rank 0.")
        return self.shape[0]

    def __repr__(self) -> str:
        zero_point = "" if self.zero_point is None else f", zero_point={_short(self.zero_point)}"
        stored = getattr(self.qvalue, "dtype", None)
        qtype = "" if self.qtype is None or stored == self.qtype else f", qtype={self.qtype!s}"
        return f"QArray({_short(self.qvalue)}, scale={_short(self.scale)}{zero_point}{qtype})"


flax.nnx.register_data_type(QArray)

MaybeQArray = jax.Array | QArray


def _canonical_or_as_is(qtype: Any) -> Any:
    """The canonical qtype, or what was given: `validate_qarray` rejects it where values are used."""
    try:
        return numerics.canonical_qtype(qtype)
    except (ValueError, TypeError):
        return qtype


def _tile_shape(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n // s if s else 1 for n, s in zip(shape, scale_shape, strict=True))


def _short(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{jnp.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"
    return repr(x)


def is_quantized(x: Any) -> bool:
    """Whether this leaf of a model holds quantized values: a QArray, prepacked or not, or a box with one.

    >>> import qwix
    >>> is_quantized(qwix.quantize(jnp.ones(4), "int8")), is_quantized(jnp.ones(4))
    (True, False)
    """
    array = getattr(x, "array", x)
    return isinstance(array, QArray) or hasattr(array, "to_qarray")


def validate_qarray(array: QArray) -> None:
    """Raises ValueError when the fields of a QArray of arrays don't belong together."""
    q, scale, zero_point = array.qvalue, array.scale, array.zero_point
    if not isinstance(q, jax.Array):
        return
    if q.dtype.itemsize > 1 and q.dtype != jnp.int16:
        raise ValueError(f"{q.dtype} is not a valid type for qvalue: 1 byte at most, or int16. In {array!r}.")
    if not numerics.should_quantize(scale.dtype):
        raise ValueError(f"{scale.dtype} is not a valid type for scale: bf16, f16, f32 or f64. In {array!r}.")
    expected = numerics.storage_dtype(array.qtype)
    if expected != q.dtype:
        raise ValueError(f"qtype {array.qtype!s} is stored as {expected}, not {q.dtype}. In {array!r}.")
    _check_divides("Scale", scale.shape, array)
    if zero_point is not None:
        _check_divides("Zero point", zero_point.shape, array)
        if zero_point.dtype != q.dtype:
            raise ValueError(f"Zero point has dtype {zero_point.dtype}, but qvalue {q.dtype}. In {array!r}.")
        if zero_point.shape != scale.shape:
            raise ValueError(f"Zero point must have the scale's shape {scale.shape}. In {array!r}.")


def _check_divides(name: str, shape: tuple[int, ...], array: QArray) -> None:
    if len(shape) != array.ndim:
        raise ValueError(f"{name} {shape} must have the same rank as qvalue {array.shape}. In {array!r}.")
    if any(n % s if s else n for n, s in zip(array.shape, shape, strict=True)):
        raise ValueError(
            f"{name} {shape} should be broadcastable to qvalue {array.shape}: each of its sizes must divide "
            f"the values'. In {array!r}."
        )


def reshape(array: QArray, *new_shape: Any) -> QArray:
    """Reshapes values and scales together; one size may be -1.

    Possible when, within each smallest group of axes that the reshape merges or splits, a scale covers a
    run of the flattened values before and after. Raises ValueError otherwise.
    """
    if len(new_shape) == 1 and not isinstance(new_shape[0], int):
        new_shape = tuple(new_shape[0])
    new_shape = _resolve(new_shape, array.shape)
    return jax.tree.map(lambda x: x.reshape(layout.reshape_shape(x.shape, array.shape, new_shape)), array)


def _resolve(new: tuple[int, ...], old: tuple[int, ...]) -> tuple[int, ...]:
    """Fills in a size of -1 and checks that the number of values stays."""
    known = math.prod(d for d in new if d != -1)
    if new.count(-1) == 1 and known and math.prod(old) % known == 0:
        new = tuple(math.prod(old) // known if d == -1 else d for d in new)
    if any(d < 0 for d in new) or math.prod(new) != math.prod(old):
        raise ValueError(f"Cannot reshape {old} into {new}: {math.prod(old)} values.")
    return new


def rewriting_take(array: QArray, idx: Any) -> QArray:
    """`array[idx]` on values and scales.

    Integers, slices, None, `...`, index arrays and masks of rank 1. On a tiled axis: any integer or index
    array, and slices whose bounds are multiples of the tile (or that stay within one tile).

    Raises:
      ValueError: a slice that cuts a tile; the message gives aligned bounds.
      IndexError: an integer out of range.
    """
    if idx is Ellipsis:
        return jax.tree.map(lambda x: x[...], array)
    index = indexing.child_index(idx, array.shape)
    return jax.tree.map(lambda x: x[index(x.shape)], array)


def get_tiled_axes(array: QArray) -> dict[int, int]:
    """{axis: tile} for axes whose scale is neither shared by all values nor one per value.

    >>> get_tiled_axes(QArray(jnp.zeros((10, 256, 16), jnp.int8), jnp.ones((10, 8, 2))))
    {1: 32, 2: 8}
    """
    sizes = enumerate(zip(array.shape, array.scale.shape, strict=True))
    return {axis: n // s for axis, (n, s) in sizes if s not in (1, n)}


def broadcast_to(operand: MaybeQArray, target_shape: tuple[int, ...]) -> MaybeQArray:
    """Generically broadcasts an array, or every child of a QArray, to `target_shape`."""
    if operand.shape == tuple(target_shape):
        return operand
    return jax.tree.map(lambda x: layout.broadcast_array(x, target_shape), operand)


def get_accumulator_and_result_type(
    *args: MaybeQArray, preferred_element_type: DTypeLike | None
) -> tuple[np.dtype, np.dtype]:
    """(accumulator, result) dtypes of a dot of these operands.

    The result is the preferred type, else what the dequantized types promote to, with stored types counted
    as int32 (integers) or bfloat16 (fp8, fp4). Integer values accumulate in int32, except that two int16
    operands accumulate in float32: two of their products already overflow int32.
    """
    stored = [jnp.dtype(a.qvalue.dtype if isinstance(a, QArray) else a.dtype) for a in args]
    if preferred_element_type is not None:
        result = jnp.dtype(preferred_element_type)
    else:
        wide = lambda d: d if d.itemsize > 1 else jnp.int32 if numerics.is_integer(d) else jnp.bfloat16
        result = jnp.dtype(jnp.result_type(*(wide(jnp.dtype(a.dtype)) for a in args)))
    if not all(numerics.is_integer(d) for d in stored):
        return result, result
    wide_values = sum(d == jnp.int16 for d in stored) > 1 and any(isinstance(a, QArray) for a in args)
    return jnp.dtype(jnp.float32 if wide_values else jnp.int32), result


def dequantize(array: QArray) -> jax.Array:
    """The values that a QArray represents, in its scale's dtype.

    The arithmetic is in float32 (float64 for a float64 scale) and rounded once.

    >>> dequantize(QArray(jnp.array([1, -2], jnp.int8), jnp.array([0.5])))
    Array([ 0.5, -1. ], dtype=float32)

    Raises:
      TypeError: not a QArray.
      ValueError: fields that don't belong together.
    """
    if not isinstance(array, QArray):
        raise TypeError(
            f"dequantize takes a QArray, as qwix.quantize returns it, got {type(array).__name__}."
        )
    validate_qarray(array)
    compute = numerics.compute_dtype(array.scale.dtype)
    x = numerics.convert_from(array.qvalue, array.qtype).astype(compute)
    if array.zero_point is not None:
        x = call_with_generic_broadcast(jnp.subtract, x, array.zero_point.astype(compute))
    return call_with_generic_broadcast(jnp.multiply, x, array.scale.astype(compute)).astype(array.scale.dtype)
