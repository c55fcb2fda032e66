"""Quantization by XLA: one pass for the maxima, one for the values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix_kernels.absmax import absmax
from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.quantize.problem import QuantizeProblem

# Up to here, x is likely to stay on the chip between the passes, or to be made by the op before them.
_KEPT_BYTES = 4 << 20
GPU_KERNEL_US = 1.5  # of any kernel on a GPU, beside its work


def run(problem: QuantizeProblem, x: jax.Array, **_: Any) -> tuple[jax.Array, jax.Array]:
    """(values, scale): see problem.py."""
    return by_absmax(problem, x, absmax(x, 1 if problem.scale_of == "columns" else 2, keepdims=True))


def by_absmax(problem: QuantizeProblem, x: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(values, scale) of what is `top` at most in its column or row."""
    top = top.astype(jnp.float32)
    scale = scale_of(top, problem).astype(x.dtype)
    return convert(x.astype(jnp.float32) * (1 / scale.astype(jnp.float32)), problem), scale


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
    """x is read twice, unless it stays on the chip, which it does not between two kernels of a GPU."""
    del config
    read, written = problem.bytes
    per_us = chip.hbm_gbps * 1e3
    on_gpu = chip.platform == "cuda"
    passes = 2 if on_gpu or read > _KEPT_BYTES else 0.5
    least = (read + written) / per_us
    moved = (passes * read + written) / per_us
    return Estimate(
        0.0, moved, moved + 2 * GPU_KERNEL_US * on_gpu, least, "a pass for the maxima and one for the values"
    )
