"""What happens to whole images before a convolution and to its sums after it, in jnp, float32 throughout.

The portable path is made of these, and gradients are taken through them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix_kernels.conv.problem import NO_EXTRAS, ConvExtras, ConvProblem
from qwix_kernels.matmul.elementwise import activate, row_scale
from qwix_kernels.problem import RowQuantize, Tensor


def absmax(x: jax.Array, tile: int) -> jax.Array:
    """max |x| of each image and run of `tile` features (0: all), [N, 1, ..., tiles] in float32."""
    n, features = x.shape[0], x.shape[-1]
    tiles = features // (tile or features)
    size = jnp.abs(x).reshape(n, -1, tiles, features // tiles)
    return jnp.max(size, axis=(1, 3)).astype(jnp.float32).reshape(n, *(1,) * (x.ndim - 2), tiles)


def quantize(x: jax.Array, how: RowQuantize, scale: jax.Array | None = None) -> Tensor:
    """[N, *spatial, C] quantized as `RowQuantize` says, an image (and tile of C) being a row.

    Args:
      x: floats.
      how: what to quantize to. 4-bit values are given in int8, which is what they would be widened to.
      scale: [N or 1, 1, ..., tiles], where it is static.

    Returns: values and their float32 scale, [N or 1, 1, ..., tiles].

    >>> q = quantize(jnp.array([[[-1.0], [0.5]]]), RowQuantize("int8", 127.5))
    >>> q.values[0, :, 0].tolist(), q.scale.shape
    ([-127, 64], (1, 1, 1))
    """
    if not x.size:
        shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1] // (how.tile_k or x.shape[-1] or 1))
        return Tensor(x.astype(how.dtype), jnp.ones(shape, jnp.float32))
    if scale is None:
        scale = row_scale(absmax(x, how.tile_k), how)
    scale = scale.astype(jnp.float32)
    low, high = (np.float32(v) for v in how.limits)
    scaled = x.astype(jnp.float32) * per_feature(1 / scale, x.shape[-1])
    if jnp.issubdtype(how.dtype, jnp.integer):
        scaled = jnp.round(scaled)
    stored = jnp.int8 if how.dtype in ("int2", "int4") else jnp.dtype(how.dtype)
    return Tensor(jnp.clip(scaled, low, high).astype(stored), scale)


def per_feature(x: jax.Array, features: int) -> jax.Array:
    """The last axis with one entry per feature, unless one serves all."""
    tiles = x.shape[-1]
    return x if tiles in (1, features) else jnp.repeat(x, features // tiles, axis=-1)


def finish(problem: ConvProblem, z: jax.Array, extras: ConvExtras = NO_EXTRAS) -> Any:
    """The result of the scaled sums [N, *out, O]: in the output dtype, or quantized, with its scales."""
    e = problem.epilogue
    if e is None:
        return z.astype(problem.out_dtype)
    z = z.astype(jnp.float32)
    if extras.bias is not None:
        z = z + extras.bias.astype(jnp.float32)
    z = activate(z, e.activation)
    if e.quantize is None:
        return z.astype(problem.out_dtype)
    stored = quantize(z, e.quantize, extras.out_scale)
    return Tensor(stored.values.astype(e.quantize.dtype), stored.scale)
