"""What is computed in place of pooling and resizing. See odml_forms.py.

LiteRT pools two axes of [batch, height, width, channels]: one axis gets an axis of 1 beside it, and three are
pooled one after two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwix._src.odml_forms import Compute, Inner, Params

Pool = Callable[[Any, Sequence[int], Sequence[int], Sequence[tuple[int, int]]], Any]


def max_pool(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """The largest of each window."""

    def pool(
        x: Any, window: Sequence[int], strides: Sequence[int], padding: Sequence[tuple[int, int]]
    ) -> Any:
        low = jnp.asarray(-jnp.inf, x.dtype)
        return lax.reduce_window(x, low, lax.max, tuple(window), tuple(strides), list(padding))

    return [_by_two_axes(inner, pool, params, x)]


def avg_pool(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """The mean of each window: of what is inside, or with the zeros around."""

    def pool(
        x: Any, window: Sequence[int], strides: Sequence[int], padding: Sequence[tuple[int, int]]
    ) -> Any:
        sums = lambda x: lax.reduce_window(
            x, jnp.zeros((), x.dtype), lax.add, tuple(window), tuple(strides), list(padding)
        )
        return sums(x) / (sums(jnp.ones_like(x)) if params["inside"] else math.prod(window))

    if not params["inside"] and any(low or high for low, high in params["padding"]):
        edges = [(low, high, 0) for low, high in params["padding"]]
        x = inner.again(lax.pad(x, jnp.zeros((), x.dtype), edges))
        params = {**params, "padding": ((0, 0),) * x.ndim}
    return [_by_two_axes(inner, pool, params, x)]


def _by_two_axes(inner: Inner, pool: Pool, params: Params, x: Any) -> Any:
    window, strides, padding = (list(params[k]) for k in ("window_dimensions", "window_strides", "padding"))
    axes = [a for a in range(x.ndim) if window[a] != 1 or strides[a] != 1 or any(padding[a])]
    inward = range(1, x.ndim - 1)
    if not axes or not all(a in inward for a in axes) or x.ndim == 4 or len(axes) > 3:
        return pool(x, window, strides, padding)
    if x.ndim == 3:
        wide = lambda items, one: [*items[:2], one, items[2]]
        out = pool(x[:, :, None], wide(window, 1), wide(strides, 1), wide(padding, (0, 0)))
        return out[:, :, 0]
    if x.ndim != 5:
        return pool(x, window, strides, padding)
    n, d, h, w, c = x.shape
    first = jnp.reshape(x, (n, d, h * w, c))
    x = pool(first, [1, window[1], 1, 1], [1, strides[1], 1, 1], [(0, 0), padding[1], (0, 0), (0, 0)])
    d = x.shape[1]
    x = jnp.reshape(inner.again(x), (n * d, h, w, c))
    x = pool(x, [1, *window[2:]], [1, *strides[2:]], [(0, 0), *padding[2:]])
    return jnp.reshape(x, (n, d, *x.shape[1:]))


def resize(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """A product with a matrix for each axis, which resizing is; by nearest neighbours a gather."""
    shape, method, antialias = params["shape"], params["method"], params["antialias"]
    changed = [a for a in range(x.ndim) if shape[a] != x.shape[a]]
    for i, axis in enumerate(changed):
        with jax.ensure_compile_time_eval():
            eye = jnp.eye(x.shape[axis], dtype=jnp.float32)
            matrix = jax.image.resize(eye, (x.shape[axis], shape[axis]), method, antialias=antialias)
        out = jnp.moveaxis(x, axis, -1) @ inner.constant(np.asarray(matrix)).astype(x.dtype)
        x = jnp.moveaxis(out, -1, axis)
        x = inner(f"axis{axis}", x) if i + 1 < len(changed) else x
    return [x]
