"""What the TPU convolution kernels share round their sums: small operands, an image's maximum, the result."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwix_kernels.conv.problem import ConvExtras, ConvProblem
from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.elementwise import activate
from qwix_kernels.matmul.tpu_config import LANES
from qwix_kernels.problem import Tensor

_ALIGNED = 16  # sublanes of a register of bfloat16


def operands(p: ConvProblem, lhs: Tensor, rhs: Tensor, extras: ConvExtras) -> dict[str, jax.Array]:
    """Scales and bias as kernels read them: [1, O], one for all images [1, 1], and of images [N, 1, 128].

    They are handed over as they are: an XLA op in front of the kernel takes a microsecond, however small.
    """
    n, outputs = p.batch, p.out_features
    found = {}
    if rhs.scale is not None:
        found["rhs_scale"] = _row(rhs.scale.reshape(1, -1), outputs)
    of_image = extras.lhs_scale if p.quantize_lhs else lhs.scale
    if of_image is not None and of_image.size == 1 and not p.quantize_lhs:
        found["one_scale"] = of_image.reshape(1, 1)
    elif of_image is not None:
        of_image = jnp.repeat(of_image.astype(jnp.float32).reshape(-1, 1, 1), n // of_image.shape[0], axis=0)
        found["lhs_scale"] = jnp.broadcast_to(of_image, (n, 1, LANES))
    if extras.bias is not None:
        found["bias"] = extras.bias.reshape(1, -1)
    if extras.out_scale is not None:
        found["out_scale"] = extras.out_scale.reshape(1, 1)
    return found


def _row(x: jax.Array, size: int) -> jax.Array:
    """[1, size] of [1, tiles]."""
    if x.shape[1] > 1:
        return jnp.repeat(x, size // x.shape[1], axis=1)
    return jnp.broadcast_to(x, (1, size))


def absmax(x: Any, image: int, height: int, width: int, *, packed: bool) -> jax.Array:
    """max |x| of an image of a block, [1, 1] in float32; what the block holds past the image does not count.

    `packed`: the vector unit computes on bfloat16, two values a lane.
    """
    each = next(n for n in (4, 2, 1) if height % n == 0)

    def step(i: Any, top: jax.Array) -> jax.Array:
        rows = [i * each + j for j in range(each)]
        return jnp.maximum(top, absmax_of_rows(x, image, rows, width, packed=packed))

    return lax.fori_loop(0, height // each, step, jnp.zeros((1, 1), jnp.float32))


def absmax_of_rows(x: Any, image: Any, rows: list[Any], width: int, *, packed: bool) -> jax.Array:
    """As `absmax`, of some rows, without a loop."""
    whole = width // _ALIGNED * _ALIGNED
    parts = [slice(0, whole)] * (whole > 0) + [slice(whole, x.shape[2])] * (width > whole)

    def size(row: Any, part: slice) -> jax.Array:
        v = x[image, row, part, :]
        v = jnp.abs(v if packed else v.astype(jnp.float32))
        if part.stop > width:
            column = lax.broadcasted_iota(jnp.int32, v.shape, 0) + part.start
            v = jnp.where(column < width, v.astype(jnp.float32), 0).astype(v.dtype)
        return v

    tops = [functools.reduce(jnp.maximum, [size(row, part) for row in rows]) for part in parts]
    found = [jnp.max(top.astype(jnp.float32), axis=(0, 1), keepdims=True) for top in tops]
    return found[0] if len(found) == 1 else jnp.maximum(found[0], found[1])


def finish(
    p: ConvProblem,
    r: dict[str, Any],
    z: jax.Array,
    of_image: jax.Array | None,
    lanes: slice = slice(None),
) -> jax.Array:
    """The result of some sums [places, lanes of O], in the output dtype.

    `of_image`: the scale of their image, [1, 1], or one for each place, [places, 1 or more].
    """
    e = p.epilogue
    scale = r["rhs_scale"][:, lanes].astype(jnp.float32) if "rhs_scale" in r else None
    shared = r["one_scale"][...].astype(jnp.float32) if "one_scale" in r else None
    if of_image is not None and of_image.shape[0] == 1:
        shared, of_image = of_image, None
    if shared is not None:
        scale = shared if scale is None else scale * shared
    if scale is not None:
        z = z.astype(jnp.float32) * scale
    if of_image is not None:
        z = z.astype(jnp.float32) * of_image
    if e is not None:
        z = z.astype(jnp.float32)
        if e.bias:
            z = z + r["bias"][:, lanes].astype(jnp.float32)
        z = activate(z, e.activation)
        if e.quantize is not None:
            z = values.quantize(z * (1.0 / r["out_scale"][...].astype(jnp.float32)), e.quantize)
    return values.narrow(z, p.out_dtype)
