"""`qconv_general_dilated`, the convolution of the direct API, and what `explain` says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
from jax.typing import DTypeLike
from qwix_kernels.conv import ConvProblem

from qwix._src.core import conv_general as _conv
from qwix._src.core import numerics
from qwix._src.core.conv_general import ConvFused
from qwix._src.core.qarray import QArray


def qconv_general_dilated(
    lhs: jax.Array | QArray,
    rhs: jax.Array | QArray,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    *,
    act_qtype: DTypeLike | str | None = None,
    act_tile_size: int | float | None = None,
    act_calibration_method: str = "absmax",
    implementation: str | Sequence[str] | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **fused: Unpack[ConvFused],
) -> jax.Array | QArray:
    """`jax.lax.conv_general_dilated` where either side may be quantized.

    Args:
      lhs, rhs: arrays or QArrays, in any layout.
      window_strides, ..., batch_group_count: as for `jax.lax.conv_general_dilated`.
      act_qtype: quantize a float lhs to this before the convolution, each image by a scale of its own.
      act_tile_size: input features per scale; all of an image's by default.
      act_calibration_method: how its range is found; see `qwix.quantize`.
      implementation, precision, preferred_element_type: as for `qdot_general`.
      **fused: what else is computed in the same pass: see `ConvFused`.

    Returns:
      The result in the layout of `dimension_numbers`; a QArray with `out_qtype`, which has no gradient.

    Raises:
      ValueError: operands or geometry that disagree, with the numbers; `act_qtype` with an lhs that isn't
        float.
      NotImplementedError: a named implementation can't run this; the message says why.

    >>> import qwix
    >>> import jax.numpy as jnp
    >>> from qwix.ops import qconv_general_dilated
    >>> numbers = ("NHWC", "HWIO", "NHWC")
    >>> w = qwix.quantize(jnp.ones((3, 3, 8, 16)), "int8", channelwise_axes=(3,))
    >>> options = {"dimension_numbers": numbers, "bias": jnp.ones(16), "activation": "relu"}
    >>> hidden = qconv_general_dilated(jnp.ones((1, 6, 6, 8)), w, (1, 1), "SAME", out_qtype="int8", **options)
    >>> hidden
    QArray(int8[1,6,6,16], scale=float32[1,1,1,1])
    """
    geometry = (window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers)
    act = {"qtype": act_qtype, "tile_size": act_tile_size, "calibration_method": act_calibration_method}
    return _conv.conv_general_dilated(
        lhs,
        rhs,
        *geometry,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
        act_how=_conv_act(lhs, rhs, dimension_numbers, **act),
        implementation=implementation,
        fused=fused,
    )


def _conv_act(lhs: Any, rhs: Any, dimension_numbers: Any, *, qtype: Any, tile_size: Any, **act: Any) -> Any:
    """How a float lhs is quantized on the way."""
    if qtype is None:
        return None
    if isinstance(lhs, QArray) or not numerics.should_quantize(lhs.dtype):
        raise ValueError(f"act_qtype quantizes a float lhs, got {lhs!r}.")
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    tiles = {numbers.lhs_spec[1]: tile_size} if tile_size else {}
    return _conv.get_how_to_quantize(
        dimension_numbers=numbers, for_lhs=True, qtype=qtype, tiled_axes=tiles, **act
    )


def conv_problem(
    lhs: Any,
    rhs: Any,
    geometry: Mapping[str, Any] | None,
    fused: ConvFused,
    *,
    qtype: Any,
    tile_size: Any,
    calibration_method: str,
    **options: Any,
) -> ConvProblem | None:
    """What a convolution is for dispatch; None where nothing is quantized. Arrays may be shapes.

    Raises ValueError without the geometry.
    """
    if geometry is None or not {"window_strides", "padding"} <= set(geometry):
        raise ValueError(
            "explain('conv_general_dilated', ...) needs geometry={'window_strides': ..., "
            "'padding': ..., ...}."
        )
    act = {"qtype": qtype, "tile_size": tile_size, "calibration_method": calibration_method}
    how = _conv_act(lhs, rhs, geometry.get("dimension_numbers"), **act)
    return _conv.conv_problem(lhs, rhs, **geometry, act_how=how, fused=fused, **options)
