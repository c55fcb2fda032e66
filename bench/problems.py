"""The programs that are priced: a scheme's matmul as dispatch would run it, and what XLA makes of the same.

Weights are [K, N] with bfloat16 scales, as quantizing a bfloat16 checkpoint gives; activations and results
are bfloat16. Activations of a quantized type are quantized dynamically, inside the op, and that is in the
price.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from qwix_kernels import matmul
from qwix_kernels.chips import Chip
from qwix_kernels.problem import CODEBOOKS, MatmulProblem, RowQuantize, Tensor, dtype_bits

from bench.shapes import Scheme
from bench.tpu_compile import device_bandwidth, device_rate

_BOUND = {"int4": 7.5, "int8": 127.5, "float8_e4m3fn": 448.0}


def shapes_of(scheme: Scheme, m: int, k: int, n: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Activations [M, K], the weight's values [K, N] and its scales [tiles, N], without data.

    Raises ValueError for a tile that does not divide K.
    """
    tile = scheme.tile or k
    if k % tile:
        raise ValueError(f"{scheme.name}: the tile {tile} does not divide K={k}.")
    stored = jnp.dtype("uint4" if scheme.weight in CODEBOOKS else scheme.weight)
    return (
        jax.ShapeDtypeStruct((m, k), jnp.bfloat16),
        jax.ShapeDtypeStruct((k, n), stored),
        jax.ShapeDtypeStruct((k // tile, n), jnp.bfloat16),
    )


def operands(scheme: Scheme, m: int, k: int, n: int) -> tuple[jax.ShapeDtypeStruct, Tensor]:
    """Activations [1, M, K] and the quantized weight [1, K, N], as the kernels take them, without data."""
    lhs, values, scale = (jax.ShapeDtypeStruct((1, *s.shape), s.dtype) for s in shapes_of(scheme, m, k, n))
    codebook = scheme.weight if scheme.weight in CODEBOOKS else None
    return lhs, jax.eval_shape(lambda v, s: Tensor(v, s, codebook=codebook), values, scale)


def row_quantize(scheme: Scheme) -> RowQuantize | None:
    """How the activations are quantized inside the op; None where they stay bfloat16."""
    if scheme.is_weight_only:
        return None
    return RowQuantize(scheme.activation, _BOUND[scheme.activation], scheme.tile)


def problem(scheme: Scheme, m: int, k: int, n: int) -> MatmulProblem:
    """The description that dispatch chooses by."""
    lhs, rhs = operands(scheme, m, k, n)
    return matmul.problem_of(lhs, rhs, quantize_lhs=row_quantize(scheme), out_dtype=jnp.bfloat16)


def kernel(scheme: Scheme, implementation: str | None = None, config: object = None):
    """The op itself, as a function of `operands`."""

    def op(lhs, rhs):
        return matmul.matmul(
            lhs,
            rhs,
            quantize_lhs=row_quantize(scheme),
            out_dtype=jnp.bfloat16,
            implementation=implementation,
            config=config,
        )

    return op


def floor_us(chip: Chip, scheme: Scheme, m: int, k: int, n: int) -> float:
    """What nothing can beat on one jax device: the best exact unit at its peak, each operand moved once."""
    weight = "bfloat16" if scheme.weight in CODEBOOKS else scheme.weight
    rate = device_rate(chip, chip.unit(scheme.activation, weight)[1])
    moved = sum(x.size * dtype_bits(x.dtype.name) / 8 for x in shapes_of(scheme, m, k, n)) + 2 * m * n
    return 1e6 * max(2 * m * k * n / rate, moved / device_bandwidth(chip))


def xla_bf16(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The same product without any quantization."""
    return jnp.dot(lhs, rhs)


def xla_same_op(scheme: Scheme):
    """The straightforward chain of XLA ops for the same scheme, as a function of `shapes_of`.

    Weight-only: dequantize, then multiply. Otherwise: quantize the rows, multiply tile by tile, scale the
    partial results, add them up.
    """

    def weight_only(lhs, values, scale):
        tiles, n = scale.shape
        tiled = _stored(scheme, values).astype(scale.dtype).reshape(tiles, -1, n)
        return jnp.dot(lhs, (tiled * scale[:, None, :]).reshape(-1, n))

    def both(lhs, values, scale):
        tiles, n = scale.shape
        q, lhs_scale = _quantize_rows(lhs, scheme, tiles)
        w = _stored(scheme, values)
        integer = jnp.issubdtype(w.dtype, jnp.integer) and jnp.issubdtype(q.dtype, jnp.integer)
        if q.dtype != w.dtype:
            q, w = (x.astype(jnp.int8 if integer else jnp.bfloat16) for x in (q, w))
        accumulator = jnp.int32 if integer else jnp.float32
        if tiles == 1:
            partial = jnp.dot(q[:, 0], w, preferred_element_type=accumulator)[None]
        else:
            w = w.reshape(tiles, -1, n)
            partial = jnp.einsum("mtk,tkn->tmn", q, w, preferred_element_type=accumulator)
        scaled = partial * lhs_scale.T[:, :, None] * scale[:, None, :].astype(jnp.float32)
        return scaled.sum(0).astype(jnp.bfloat16)

    return weight_only if scheme.is_weight_only else both


def _stored(scheme: Scheme, values: jax.Array) -> jax.Array:
    """The values that a weight's codes stand for, before they are scaled."""
    book = CODEBOOKS.get(scheme.weight)
    return values if book is None else jnp.asarray(book, jnp.bfloat16)[values]


def _quantize_rows(x: jax.Array, scheme: Scheme, tiles: int) -> tuple[jax.Array, jax.Array]:
    """[M, tiles, K/tiles] in the scheme's activation type, and the scales [M, tiles]."""
    m = x.shape[0]
    tiled = x.reshape(m, tiles, -1).astype(jnp.float32)
    bound = _BOUND[scheme.activation]
    scale = jnp.abs(tiled).max(2) / bound
    scale = jnp.where(scale < jnp.sqrt(jnp.finfo(jnp.float32).tiny), 1.0, scale)
    q = tiled * (1 / scale)[:, :, None]
    dtype = jnp.dtype(scheme.activation)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        q = jnp.clip(jnp.round(q), info.min, info.max)
    else:
        q = jnp.clip(q, -bound, bound)
    return q.astype(dtype), scale
