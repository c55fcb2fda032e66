"""Fake quantization as LiteRT's converter knows it: what it marks becomes integer in the `.tflite` file.

To JAX `fake_quant` is the function that quantizes and dequantizes. In an exported program it is a composite
called `quant.fake_quant`, whose attributes tell the converter the scale, the zero point and the type; ops
between two of them become integer ops. So scales are concrete numbers, known when the program is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# qtype -> (the converter's name, lowest and highest value)
_TYPES = {"int4": ("i4", -8, 7), "int8": ("i8", -128, 127), "int16": ("i16", -32768, 32767)}


def fake_quant(
    x: jax.Array,
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    *,
    qtype: str = "int8",
    axis: int | None = None,
    narrow_range: bool = False,
) -> jax.Array:
    """(clip(round(x / scale) + zero_point, low, high) - zero_point) * scale, in x's dtype.

    Args:
      x: floats, any shape.
      scale: positive: one number, or with `axis` one for each index of it. The step between two values.
      zero_point: the integers that stand for 0, as many as scales; None: 0, which is called symmetric.
      qtype: "int4", "int8" or "int16".
      axis: of the channels that have scales of their own.
      narrow_range: leave out the lowest integer, as LiteRT's kernels want of weights.

    Raises:
      ValueError: a qtype that LiteRT lacks, scales that are not positive and finite, zero points that are out
        of range, or a number of either that does not fit the shape.
      TypeError: scales or zero points that are traced: they are part of the program.

    >>> fake_quant(jnp.array([0.26, 1.0, -90.0]), 0.5).tolist()
    [0.5, 1.0, -64.0]
    """
    if qtype not in _TYPES:
        raise ValueError(f"LiteRT has no {qtype!r}; qtype is one of {', '.join(map(repr, _TYPES))}.")
    name, low, high = _TYPES[qtype]
    low += narrow_range
    axis = None if axis is None else range(x.ndim)[axis]
    steps = _concrete("scale", scale, x.shape, axis).astype(np.float32)
    if not (np.isfinite(steps).all() and (steps > 0).all()):
        raise ValueError(f"Invalid scale: each must be positive and finite, got {steps}.")
    attributes: dict[str, Any] = {"scale": steps, "dtype": name, "narrow_range": narrow_range}
    zeros = np.zeros(steps.shape, np.int64)
    if zero_point is not None:
        zeros = _concrete("zero_point", zero_point, x.shape, axis).astype(np.int64)
        if zeros.shape != steps.shape or (zeros < low).any() or (zeros > high).any():
            raise ValueError(f"Invalid zero_point: {steps.size} of {low} to {high} are needed, got {zeros}.")
        attributes["zero_point"] = zeros
    if axis is not None:
        attributes["quantization_dimension"] = axis
    along = [-1 if a == axis else 1 for a in range(x.ndim)]

    def body(x: jax.Array, **_: Any) -> jax.Array:
        step, zero = (jnp.asarray(v.reshape(along), jnp.float32) for v in (steps, zeros))
        values = jnp.clip(jnp.round(x.astype(jnp.float32) / step) + zero, low, high)
        return ((values - zero) * step).astype(x.dtype)

    return jax.lax.composite(body, name="quant.fake_quant")(x, **attributes)


def dynamic_fake_quant(x: jax.Array, quantize: Callable[[jax.Array], jax.Array], qtype: str) -> jax.Array:
    """Marks x, which is float, to be quantized by its own range by the kernel that reads it.

    Args:
      quantize: what that comes to, where JAX computes it.
    """
    attributes = {"scale": np.zeros(0, np.float32), "dtype": _TYPES[qtype][0], "narrow_range": False}
    return jax.lax.composite(lambda x, **_: quantize(x), name="quant.fake_quant")(x, **attributes)


def _concrete(name: str, given: ArrayLike, shape: tuple[int, ...], axis: int | None) -> np.ndarray:
    """[1] or [channels] of what was given."""
    if isinstance(given, jax.core.Tracer):
        raise TypeError(
            f"{name} is traced, but it is part of the program: give numbers, or compute it inside of "
            "jax.ensure_compile_time_eval()."
        )
    array = np.asarray(given).reshape(-1)
    wanted = 1 if axis is None else shape[axis]
    if array.size != wanted:
        where = f"axis {axis} of {shape}" if axis is not None else "an x without axis"
        raise ValueError(f"{name} has {array.size} numbers; {where} needs {wanted}.")
    return array
