"""The plainest quantization, in numpy: what tests trust."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from qwix_kernels.quantize.problem import QuantizeProblem


def quantize(problem: QuantizeProblem, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, scale) of [batch, rows, columns]: see problem.py."""
    axis = 1 if problem.scale_of == "columns" else 2
    wide, dtype = x.astype(np.float32), np.dtype(problem.x_dtype)
    scale = np.max(np.abs(wide), axis=axis, keepdims=True) * np.float32(problem.how.reciprocal)
    scale = np.where(scale < np.sqrt(np.finfo(np.float32).tiny), np.float32(1), scale)
    largest = float(jnp.finfo(dtype).max)
    scale = np.clip(scale, np.float32(2 / largest), np.float32(largest)).astype(dtype)
    q = wide * (np.float32(1) / scale.astype(np.float32))
    low, high = problem.how.limits
    if problem.dtype.startswith("int"):
        with np.errstate(invalid="ignore"):
            return np.clip(np.round(q), low, high).astype(problem.dtype), scale
    return np.clip(q, low, high).astype(problem.dtype), scale
