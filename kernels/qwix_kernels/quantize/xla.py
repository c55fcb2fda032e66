"""Quantization by XLA: one pass for the maxima, one for the values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.quantize.problem import QuantizeProblem

# Up to here, x is likely to stay on the chip between the passes, or to be made by the op before them.
_KEPT_BYTES = 8 << 20


def run(
    problem: QuantizeProblem, x: jax.Array, *, chip: Chip | None = None, config: None = None
) -> tuple[jax.Array, jax.Array]:
    """(values, scale): see problem.py. `chip` is what it is lowered for."""
    del config
    axis = 1 if problem.scale_of == "columns" else 2
    maximum = _max_of_bits if chip is None or chip.platform == "cpu" else jnp.max
    top = maximum(jnp.abs(x), axis=axis, keepdims=True).astype(jnp.float32)
    scale = scale_of(top, problem).astype(x.dtype)
    return convert(x.astype(jnp.float32) * (1 / scale.astype(jnp.float32)), problem), scale


def _max_of_bits(x: jax.Array, **kwargs: Any) -> jax.Array:
    """The greatest of magnitudes. Their bits are in the same order, with NaN, which XLA:CPU loses, on top."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int16 if x.dtype.itemsize == 2 else jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(bits, **kwargs), x.dtype)


def scale_of(top: jax.Array, problem: QuantizeProblem) -> jax.Array:
    """The scale, in float32 and not yet rounded to the dtype of x, of what is `top` at most."""
    scale = top * np.float32(problem.how.reciprocal)
    scale = jnp.where(scale < np.sqrt(np.finfo(np.float32).tiny), np.float32(1), scale)
    largest = float(jnp.finfo(problem.x_dtype).max)
    return jnp.clip(scale, np.float32(2 / largest), np.float32(largest))


def convert(x: jax.Array, problem: QuantizeProblem) -> jax.Array:
    """Scaled float32 values in the dtype that is wanted."""
    low, high = problem.how.limits
    x = jnp.round(x) if jnp.issubdtype(problem.dtype, jnp.integer) else x
    return jnp.clip(x, low, high).astype(problem.dtype)


def estimate(problem: QuantizeProblem, chip: Chip, config: None = None) -> Estimate:
    """x is read twice, unless it stays on the chip."""
    del config
    read, written = problem.bytes
    per_us = chip.hbm_gbps * 1e3
    passes = 2 if read > _KEPT_BYTES else 0.5
    least = (read + written) / per_us
    moved = (passes * read + written) / per_us
    return Estimate(0.0, moved, moved, least, "a pass for the maxima and one for the values")
