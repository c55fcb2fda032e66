"""`conv_general_dilated` of arrays and QArrays, by XLA's convolution.

Two symmetric integer operands with scales per image and per output channel are convolved as integers and
scaled afterwards. Everything else (weight-only, zero points, tiles, nf4, fp8) is dequantized first, so that
padding is a real zero and any pair of formats works.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwix._src.core import numerics, qarray
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.qarray import QArray


def get_how_to_quantize(
    *, dimension_numbers: jax.lax.ConvDimensionNumbers, for_lhs: bool, **kwargs: Any
) -> HowToQuantize:
    """How to quantize one operand of a convolution: a scale per image (lhs) or per output channel (rhs).

    >>> numbers = jax.lax.conv_dimension_numbers((1, 8, 8, 3), (3, 3, 3, 16), ("NHWC", "HWIO", "NHWC"))
    >>> get_how_to_quantize(dimension_numbers=numbers, for_lhs=False, qtype="int8").channelwise_axes
    (3,)
    """
    spec = dimension_numbers.lhs_spec if for_lhs else dimension_numbers.rhs_spec
    return HowToQuantize(channelwise_axes=(spec[0],), **kwargs)


def conv_general_dilated(
    lhs: jax.Array | QArray,
    rhs: jax.Array | QArray,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` where either operand may be quantized.

    Args: those of `jax.lax.conv_general_dilated`. Scales and zero points of any shape may be on both sides.

    Returns: as JAX's, in `preferred_element_type`; by default what the represented values promote to.

    >>> import qwix
    >>> w = qwix.quantize(jnp.ones((3, 3, 2, 4)), "int8", channelwise_axes=(3,))
    >>> x = jnp.ones((1, 8, 8, 2))
    >>> conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).shape
    (1, 8, 8, 4)
    """
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    for x in (lhs, rhs):
        if isinstance(x, QArray):
            qarray.validate_qarray(x)
    accumulator, result = qarray.get_accumulator_and_result_type(
        lhs, rhs, preferred_element_type=preferred_element_type
    )

    def conv(x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            w,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=dtype,
            out_sharding=out_sharding,
        )

    if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
        return conv(lhs, rhs, result if accumulator == jnp.int32 else preferred_element_type)
    left = _scale_in_output(lhs, numbers.lhs_spec[0], numbers.out_spec[0], batch_group_count)
    right = _scale_in_output(rhs, numbers.rhs_spec[0], numbers.out_spec[1], 1)
    if left is None or right is None:
        x, w = (v.dequantize() if isinstance(v, QArray) else v for v in (lhs, rhs))
        both = jnp.promote_types(x.dtype, w.dtype)
        return conv(x.astype(both), w.astype(both), result)
    out = conv(_int8(lhs), _int8(rhs), jnp.int32)
    return (out.astype(left.dtype) * left * right).astype(result)


def _scale_in_output(x: Any, axis: int, out_axis: int, groups: int) -> jax.Array | None:
    """The scale (float32) where it belongs in the output, or None unless integers can be scaled there."""
    if not isinstance(x, QArray):
        is_int = jnp.issubdtype(x.dtype, jnp.signedinteger) and jnp.dtype(x.dtype).itemsize == 1
        return jnp.ones((1,) * x.ndim, jnp.float32) if is_int else None
    signed = jnp.issubdtype(x.qvalue.dtype, jnp.signedinteger) and x.qvalue.dtype.itemsize == 1
    others = any(s != 1 for a, s in enumerate(x.scale.shape) if a != axis)
    per_index = x.scale.shape[axis] in (1, x.shape[axis])
    if (
        not signed
        or x.zero_point is not None
        or others
        or not per_index
        or (groups != 1 and x.scale.size != 1)
    ):
        return None
    shape = [x.scale.size if a == out_axis else 1 for a in range(x.ndim)]
    return x.scale.reshape(shape).astype(numerics.compute_dtype(x.scale.dtype))


def _int8(x: Any) -> jax.Array:
    """XLA's convolutions take int8 everywhere and int4 nowhere."""
    values = x.qvalue if isinstance(x, QArray) else x
    return values.astype(jnp.int8)
