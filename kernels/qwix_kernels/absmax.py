"""The greatest magnitude, which is NaN where there is one on every platform.

XLA:CPU may lose a NaN in a maximum of float32 (`xla_cpu_enable_fast_min_max`, which is on), and a scale that
should be NaN would be that of the numbers beside it. So NaN is looked for besides; TPUs and GPUs keep it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def absmax(x: jax.Array, axis: int | Sequence[int], *, keepdims: bool = False) -> jax.Array:
    """max|x| along some axes, in the dtype of x; 0 where there is nothing.

    >>> absmax(jnp.array([[1.0, -3.0], [jnp.nan, 0.5]]), 1).tolist()
    [3.0, nan]
    """
    along = {"axis": axis if isinstance(axis, int) else tuple(axis), "keepdims": keepdims}
    greatest = jnp.max(jnp.abs(x), initial=0, **along)
    look = functools.partial(_with_nan, **along)
    return jax.lax.platform_dependent(x, greatest, cpu=look, default=lambda x, greatest: greatest)


def _with_nan(x: jax.Array, greatest: jax.Array, **along) -> jax.Array:
    return jnp.where(jnp.isnan(x).any(**along), jnp.nan, greatest)
