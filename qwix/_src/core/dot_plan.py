"""What a dot of arrays and QArrays becomes, decided from shapes and dtypes alone.

A `Plan` is made once and then run (`dot_general.dot_general`), described (`dot_general.matmul_problem`) or
reported. Four things can happen, in this order of preference:

    float           no side is quantized: `lax.dot_general`, unchanged
    scaled_matmul   both sides are in the same block format: `jax.nn.scaled_matmul`
    kernel          `qwix_kernels.matmul`
    dequantize      what no kernel takes (the plan says why): dequantize, then `lax.dot_general`
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from qwix_kernels.problem import RowQuantize

from qwix._src.core import calibration, layout, mxfp_dot, numerics, qarray
from qwix._src.core.transposed_qarray import DotDimensionNumbers, Layout, TransposedQArray, layout_of

Operand = jax.Array | jax.ShapeDtypeStruct | qarray.QArray | TransposedQArray


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one dot will be computed.

    Attributes:
      kind: see the module's header.
      reason: why it isn't the kernel; empty if it is.
      rows: how the kernel quantizes the rows of a float lhs, if it does.
      lhs, rhs: the layouts of the operands.
      result: dtype of the result.
    """

    kind: Literal["float", "scaled_matmul", "kernel", "dequantize"]
    reason: str
    rows: RowQuantize | None
    lhs: Layout
    rhs: Layout
    result: np.dtype

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Batch axes, free axes of the lhs, free axes of the rhs."""
        lhs, rhs = self.lhs, self.rhs
        return tuple([lhs.shape[a] for a in lhs.batch + lhs.free] + [rhs.shape[a] for a in rhs.free])


def canonical_numbers(numbers: Any, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> DotDimensionNumbers:
    """Checks dimension numbers against the shapes and counts axes from the front."""
    try:
        (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = numbers
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"dimension_numbers is {numbers!r}; it must be ((lhs contracting, rhs contracting), "
            "(lhs batch, rhs batch))."
        ) from e
    fixed = [layout.canonical_axes(tuple(axes), len(lhs)) for axes in (lhs_ca, lhs_ba)]
    fixed += [layout.canonical_axes(tuple(axes), len(rhs)) for axes in (rhs_ca, rhs_ba)]
    lhs_ca, lhs_ba, rhs_ca, rhs_ba = fixed
    if len(lhs_ca) != len(rhs_ca) or len(lhs_ba) != len(rhs_ba):
        raise ValueError(f"dimension_numbers must pair the axes of both sides: {numbers!r}.")
    for axes, shape in ((lhs_ca + lhs_ba, lhs), (rhs_ca + rhs_ba, rhs)):
        if len(set(axes)) != len(axes):
            raise ValueError(f"dimension_numbers {numbers!r} list an axis of {shape} twice.")
    for a, b in zip(lhs_ca + lhs_ba, rhs_ca + rhs_ba, strict=True):
        if lhs[a] != rhs[b]:
            raise ValueError(
                f"Sizes disagree: axis {a} of lhs {lhs} is {lhs[a]}, axis {b} of rhs {rhs} is {rhs[b]}."
            )
    return (lhs_ca, rhs_ca), (lhs_ba, rhs_ba)


def make_plan(
    lhs: Operand,
    rhs: Operand,
    numbers: DotDimensionNumbers,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    act_how: calibration.HowToQuantize | None = None,
) -> Plan:
    """Decides how to compute a dot. `numbers` must be canonical; `act_how` quantizes a float lhs."""
    left, right = layout_of(lhs, numbers, "lhs"), layout_of(rhs, numbers, "rhs")
    _, result = qarray.get_accumulator_and_result_type(
        *(_typed(x) for x in (lhs, rhs)), preferred_element_type=preferred_element_type
    )
    make = lambda kind, reason="", rows=None: Plan(kind, reason, rows, left, right, result)
    if act_how is None and not any(map(_is_quantized, (lhs, rhs))) and not all(map(_is_stored, (lhs, rhs))):
        return make("float", "neither operand is quantized")
    reason = no_kernel(lhs, rhs, precision)
    if reason:
        return make("dequantize", reason)
    if act_how is None and mxfp_dot.can_use(lhs, rhs, numbers, precision):
        return make(
            "scaled_matmul", "both are in one block format, which jax.nn.scaled_matmul takes as it is"
        )
    return make("kernel", rows=None if act_how is None else row_quantize(act_how, left))


def row_quantize(how: calibration.HowToQuantize, lhs: Layout) -> RowQuantize | None:
    """`how` as what a kernel does to float rows on the way, or None if it is anything else.

    Kernels know plain 'absmax' per row, with one tile size along K, to int4, int8 and float8.
    """
    ndim = len(lhs.shape)
    tiles = layout.canonical_tiles(how.tiled_axes, lhs.shape)
    rows = set(layout.canonical_axes(tuple(how.channelwise_axes), ndim)) == set(lhs.batch + lhs.free)
    plain = how.noise_fn is None and calibration.parse_method(how.calibration_method) in _PLAIN_ABSMAX
    if isinstance(how.qtype, str) or not rows or not plain or not _is_row_dtype(how.qtype):
        return None
    tile_k = 0
    if tiles:
        ((axis, tile_k),) = list(tiles.items()) if len(tiles) == 1 else [(-1, 0)]
        k = math.prod(lhs.shape[a] for a in lhs.contracting)
        if axis not in lhs.contracting or lhs.shape[axis] != k:
            return None  # the tile's values are not neighbours along K
    return RowQuantize(how.qtype.name, numerics.get_symmetric_bound(how.qtype), tile_k)


_PLAIN_ABSMAX = (("absmax", ()), ("absmax", (1.0,)))


def _is_row_dtype(dtype: np.dtype) -> bool:
    return dtype.name in ("int8", "int4") or (dtype.name.startswith("float8") and dtype.itemsize == 1)


def no_kernel(lhs: Operand, rhs: Operand, precision: Any) -> str:
    """Why these operands can't go to a kernel; empty if they can."""
    if not (precision is None or isinstance(precision, str | jax.lax.Precision | tuple)):
        return f"precision {precision!r} names an algorithm of XLA"
    for name, x in (("lhs", lhs), ("rhs", rhs)):
        if not all(isinstance(d, int) for d in x.shape):
            return f"{name} {x.shape} has symbolic sizes"
        if 0 in x.shape:
            return f"{name} {x.shape} is empty"
        stored, value = _stored_dtype(x), jnp.dtype(x.dtype)
        if jnp.dtype(jnp.float64) in (stored, value):
            return f"{name} is float64, which kernels would round to float32"
        wide = jnp.iinfo(stored).bits > 16 if jnp.issubdtype(stored, jnp.integer) else False
        if wide or jnp.issubdtype(stored, jnp.complexfloating):
            return f"{name} is {stored}; kernels take floats and integers of at most 16 bits"
    return ""


def _stored_dtype(x: Operand) -> np.dtype:
    return jnp.dtype(x.qvalue.dtype if isinstance(x, qarray.QArray | TransposedQArray) else x.dtype)


def _typed(x: Operand) -> Any:
    """What `get_accumulator_and_result_type` reads."""
    return qarray.QArray(x.qvalue, x.scale, x.zero_point, x.qtype) if isinstance(x, TransposedQArray) else x


def _is_quantized(x: Operand) -> bool:
    return isinstance(x, qarray.QArray | TransposedQArray)


def _is_stored(x: Operand) -> bool:
    """Whether these are values of a storage type (int8, float8, ...), scaled or not."""
    return _is_quantized(x) or jnp.dtype(x.dtype).itemsize == 1
