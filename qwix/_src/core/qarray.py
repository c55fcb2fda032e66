"""Quantizing arrays: calibrate, compute a scale, round. And one name for all that concerns a QArray.

The class itself is in quantized_array.py, statistics in calibration.py, shapes of scales in layout.py; what
other modules and users need of them is importable from here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwix._src.core import numerics
from qwix._src.core.calibration import (
    Calibration,
    HowToQuantize,
    calibrate,
    clip_gradient_to_calibration,
    clip_to_calibration,
    compute_scale_zero_point,
    get_scale_shape,
)
from qwix._src.core.layout import call_with_generic_broadcast, split_axis, transpose_array
from qwix._src.core.quantized_array import (
    MaybeQArray,
    QArray,
    broadcast_to,
    dequantize,
    get_accumulator_and_result_type,
    get_tiled_axes,
    is_quantized,
    reshape,
    rewriting_take,
    validate_qarray,
)
from qwix._src.core.sparsity import SparsityRule, get_rule_mask

__all__ = [
    "Calibration",
    "HowToQuantize",
    "MaybeQArray",
    "QArray",
    "SparsityRule",
    "broadcast_to",
    "calibrate",
    "call_with_generic_broadcast",
    "check_finite",
    "clip_gradient_to_calibration",
    "clip_to_calibration",
    "compute_scale_zero_point",
    "dequantize",
    "get_accumulator_and_result_type",
    "get_scale_shape",
    "get_tiled_axes",
    "is_quantized",
    "quantize",
    "quantize_api",
    "quantize_with_scale_zero_point",
    "reshape",
    "rewriting_take",
    "sparsify",
    "split_axis",
    "transpose_array",
    "validate_qarray",
]

# Multiply by 1 / scale instead of dividing by scale: one rounding more, as AQT does it.
USE_RECIPROCAL_FOR_QUANTIZATION = False


def _require_float(array: jax.Array) -> None:
    if not numerics.should_quantize(array.dtype):
        raise ValueError(
            f"Refuse to quantize: {array.dtype} of shape {array.shape}. Quantization starts from bfloat16, "
            "float16, float32 or float64; if these are numbers, call .astype(jnp.float32) first."
        )


def quantize_with_scale_zero_point(
    array: jax.Array,
    qtype: DTypeLike | str,
    scale: jax.Array,
    zero_point: jax.Array | None,
    noise_fn: numerics.NoiseFn | None = None,
) -> QArray:
    """Quantizes with a given scale (and zero point), each generically broadcast over the array."""
    _require_float(array)
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(f"Expect zero_point shape {scale.shape}, but got {zero_point.shape}.")
    scale = scale.astype(array.dtype)
    compute = numerics.compute_dtype(array.dtype)
    x, wide_scale = array.astype(compute), scale.astype(compute)
    if USE_RECIPROCAL_FOR_QUANTIZATION:
        x = call_with_generic_broadcast(jnp.multiply, x, 1 / wide_scale)
    else:
        x = call_with_generic_broadcast(jnp.divide, x, wide_scale)
    if zero_point is not None:
        x = call_with_generic_broadcast(jnp.add, x, zero_point.astype(compute))
    return QArray(numerics.convert_to(x, qtype, noise_fn), scale, zero_point, numerics.canonical_qtype(qtype))


def quantize(array: jax.Array, how: HowToQuantize) -> QArray:
    """Calibrates, then quantizes. `qwix.quantize` is the public form."""
    _require_float(array)
    calibration = calibrate(array, how)
    scale, zero_point = compute_scale_zero_point(calibration, how.qtype)
    return quantize_with_scale_zero_point(array, how.qtype, scale, zero_point, how.noise_fn)


def check_finite(array: jax.Array, name: str = "The array") -> None:
    """Raises ValueError if a concrete array holds NaN or infinity. A traced array passes.

    In a trace NaN propagates instead: every value that shares the scale dequantizes to NaN.
    """
    if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
        return
    if bool(jnp.isfinite(array).all()):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(array, np.float64)))
    first = tuple(int(i) for i in bad[0])
    raise ValueError(
        f"{name} of shape {array.shape} holds {len(bad)} values that aren't finite, the first at {first}: "
        f"{array[first]}. Every value that shares a scale with one would be lost; replace them first."
    )


def quantize_api(
    array: jax.Array,
    qtype: DTypeLike | str,
    *,
    channelwise_axes: Any = (),
    tiled_axes: Mapping[int, int | float] | None = None,
    calibration_method: str = "absmax",
    scale_dtype: DTypeLike | None = None,
) -> QArray:
    """Quantizes an array.

    Args:
      array: a float array (bfloat16, float16, float32, float64) of any shape, also empty. qtype: the
      format, such as 'int8', jnp.float8_e4m3fn or 'nf4'; see `numerics.QTYPE_NAMES`. channelwise_axes: axes
      with a scale per index. Negative axes count from the back. tiled_axes: {axis: size}: a scale per run
      of `size` neighbours; a float is the tile's fraction of the axis. calibration_method: 'absmax',
      'minmax' (zero point), 'rms,7', 'fixed,-1,2', ... scale_dtype: the scale's dtype, and so what it
      dequantizes to; the array's own by default.

    Raises:
      ValueError: an unknown qtype (the message names the nearest), an array that isn't float, NaN or
      infinity in a
        concrete array (under `jit` they become NaN scales), a tile that doesn't divide its axis, axes
        listed twice.

    >>> import qwix
    >>> w = jnp.arange(8.0).reshape(2, 4)
    >>> q = qwix.quantize(w, "int8", channelwise_axes=(0,))
    >>> q.qvalue.dtype, q.scale.shape, bool(jnp.allclose(q.dequantize(), w, atol=float(q.scale.max()) / 2))
    (dtype('int8'), (2, 1), True)
    """
    how = HowToQuantize(
        qtype=qtype,
        channelwise_axes=channelwise_axes,
        tiled_axes=tiled_axes or {},
        calibration_method=calibration_method,
    )
    array = jnp.asarray(array)
    _require_float(array)
    check_finite(array)
    result = _quantize_compiled(array, how, USE_RECIPROCAL_FOR_QUANTIZATION)
    return result if scale_dtype is None else result.astype(scale_dtype)


@functools.partial(jax.jit, static_argnames=("how", "reciprocal"))
def _quantize_compiled(array: jax.Array, how: HowToQuantize, reciprocal: bool) -> QArray:
    del reciprocal  # part of the cache's key
    return quantize(array, how)


def sparsify(
    array: jax.Array, rule: SparsityRule, of: Literal["weight", "activation"] = "weight"
) -> jax.Array:
    """Zeroes what the rule's pattern for weights, or for activations, prunes."""
    if not getattr(rule, f"{of}_sparsity_m"):
        return array
    return jnp.where(get_rule_mask(array, rule, of), array, 0)
