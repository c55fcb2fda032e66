"""Dots of two operands in the same block format (mxfp8, mxfp4, nvfp4), for hardware that has them.

`jax.nn.scaled_matmul` takes [batch, free, K] values with [batch, free, K / block] scales. Scales go in as the
type that the format defines (e8m0 powers of two, e4m3 for nvfp4): exact for what `quantize` made, and what a
tensor core expects.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwix._src.core import layout, numerics, qarray
from qwix._src.core.transposed_qarray import DotDimensionNumbers, Layout, make_layout


def can_use(lhs: Any, rhs: Any, numbers: DotDimensionNumbers, precision: Any = None) -> bool:
    """Whether `jax.nn.scaled_matmul` takes these operands (arrays or shapes), with canonical axes."""
    if not all(isinstance(x, qarray.QArray) and x.zero_point is None for x in (lhs, rhs)):
        return False
    if lhs.qtype != rhs.qtype or not isinstance(lhs.qtype, str) or lhs.qtype not in numerics.BLOCK_FORMATS:
        return False
    if precision not in (None, "default", jax.lax.Precision.DEFAULT):
        return False
    block = numerics.BLOCK_FORMATS[lhs.qtype][1]
    return all(_blocks_along_k(x, numbers, side, block) for x, side in ((lhs, "lhs"), (rhs, "rhs")))


def _blocks_along_k(x: qarray.QArray, numbers: DotDimensionNumbers, side: Any, block: int) -> bool:
    """Whether every `block` neighbours along the merged K share a scale."""
    arrangement = make_layout(x.shape, numbers, side)
    long_axes = [a for a in arrangement.contracting if x.shape[a] != 1]
    if not long_axes or x.scale_tile_shape[long_axes[-1]] != block:
        return False
    return all(x.scale_tile_shape[a] == 1 for a in long_axes[:-1])


def mxfp_dot_general(
    lhs: jax.Array | qarray.QArray,
    rhs: jax.Array | qarray.QArray,
    dimension_numbers: DotDimensionNumbers,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array | None:
    """The dot by `jax.nn.scaled_matmul`, or None where it doesn't take the operands (see `can_use`)."""
    if not (isinstance(lhs, qarray.QArray) and isinstance(rhs, qarray.QArray)):
        return None
    if not can_use(lhs, rhs, dimension_numbers):
        return None
    _, result = qarray.get_accumulator_and_result_type(
        lhs, rhs, preferred_element_type=preferred_element_type
    )
    left, right = (
        make_layout(lhs.shape, dimension_numbers, "lhs"),
        make_layout(rhs.shape, dimension_numbers, "rhs"),
    )
    (x, x_scale), (w, w_scale) = _flatten(lhs, left), _flatten(rhs, right)
    out = jax.nn.scaled_matmul(x, w, x_scale, w_scale, preferred_element_type=result)
    free = [lhs.shape[a] for a in left.free] + [rhs.shape[a] for a in right.free]
    return out.reshape([lhs.shape[a] for a in left.batch] + free)


def _flatten(x: qarray.QArray, arrangement: Layout) -> tuple[jax.Array, jax.Array]:
    """(values [batch, free, K], scale [batch, free, blocks]): the scale is full except along K."""
    sizes = zip(x.shape, x.scale.shape, strict=True)
    full = tuple(s if a in arrangement.contracting else n for a, (n, s) in enumerate(sizes))
    scale_dtype = jnp.float8_e4m3fn if x.qtype == "nvfp4" else jnp.float8_e8m0fnu
    scale = arrangement.merge(layout.broadcast_array(x.scale, full)).astype(scale_dtype)
    values = arrangement.merge(x.qvalue)
    return (values, scale) if arrangement.k_last else (values.mT, scale.mT)
