"""The programs that are priced: a scheme's matmul as dispatch would run it, and what XLA makes of the same.

Weights are [batch, K, N] with bfloat16 scales, as quantizing a bfloat16 checkpoint gives, or with the scales
of their block format; activations and results are bfloat16. Activations of a quantized type are quantized
dynamically, inside the op, and that is in the price; static ones come quantized, with the same scales.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from qwix_kernels import matmul
from qwix_kernels.problem import CODEBOOKS, ROW_SCALES, MatmulProblem, RowQuantize, Tensor

from bench.shapes import Scheme

_BOUND = {"int4": 7.5, "int8": 127.5, "float8_e4m3fn": 448.0, "float4_e2m1fn": 6.0}


def shapes_of(scheme: Scheme, m: int, k: int, n: int, batch: int = 1) -> list[jax.ShapeDtypeStruct]:
    """Of the activations [batch, M, K] and the weight [batch, K, N]: values, scale, zero point, where given.

    Raises ValueError for a tile that does not divide K or N.
    """
    if reason := scheme.misfit(k, n):
        raise ValueError(f"{scheme.name}: {reason}.")
    tiles = k // (scheme.tile or k)
    lhs = [jax.ShapeDtypeStruct((batch, m, k), jnp.bfloat16)]
    if scheme.static:
        lhs = [
            jax.ShapeDtypeStruct((batch, m, k), jnp.dtype(scheme.activation)),
            jax.ShapeDtypeStruct((batch, m, tiles), jnp.float32),
        ]
    stored = jnp.dtype("uint4" if scheme.weight in CODEBOOKS else scheme.weight)
    scales = (batch, tiles, n // scheme.tile_n)
    rhs = [
        jax.ShapeDtypeStruct((batch, k, n), stored),
        jax.ShapeDtypeStruct(scales, jnp.dtype(scheme.weight_scale)),
    ]
    if scheme.zero_point:
        rhs.append(jax.ShapeDtypeStruct(scales, stored))
    return lhs + rhs


def operands(
    scheme: Scheme, m: int, k: int, n: int, batch: int = 1
) -> tuple[jax.ShapeDtypeStruct | Tensor, Tensor]:
    """Activations [batch, M, K] and the weight [batch, K, N] as the kernels take them, without data."""
    return jax.eval_shape(lambda *arrays: tensors(scheme, arrays), *shapes_of(scheme, m, k, n, batch))


def tensors(scheme: Scheme, arrays: Sequence[jax.Array]) -> tuple[jax.Array | Tensor, Tensor]:
    """`operands` of the arrays of `shapes_of`."""
    codebook = scheme.weight if scheme.weight in CODEBOOKS else None
    lhs = Tensor(arrays[0], arrays[1]) if scheme.static else arrays[0]
    values, scale, *zero = arrays[1 + scheme.static :]
    return lhs, Tensor(values, scale, zero[0] if zero else None, codebook)


def row_quantize(scheme: Scheme) -> RowQuantize | None:
    """How the activations are quantized inside the op; None where they are not."""
    if scheme.is_weight_only or scheme.static:
        return None
    how = RowQuantize(scheme.activation, _BOUND[scheme.activation], scheme.tile)
    return dataclasses.replace(how, scale_dtype=scheme.row_scale) if scheme.row_scale in ROW_SCALES else how


def problem(scheme: Scheme, m: int, k: int, n: int, batch: int = 1) -> MatmulProblem:
    """The description that dispatch chooses by."""
    lhs, rhs = operands(scheme, m, k, n, batch)
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


def xla_bf16(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The same product, [batch, M, K] times [batch, K, N], without any quantization."""
    if lhs.shape[0] == 1:  # what a model would write, and what XLA then sees
        return jnp.dot(lhs[0], rhs[0])[None]
    return jnp.matmul(lhs, rhs)


def xla_same_op(scheme: Scheme):
    """The straightforward chain of XLA ops for the same scheme, as a function of `shapes_of`, one batch.

    Weight-only: dequantize, then multiply. Otherwise: quantize the rows, multiply tile by tile, scale the
    partial results, add them up.
    """

    def chain(*arrays):
        lhs, *arrays = (a[0] for a in arrays)
        given = arrays.pop(0) if scheme.static else None
        w, scale, *zero = arrays
        tiles = scale.shape[0]
        scale = jnp.repeat(scale, scheme.tile_n, axis=1).astype(jnp.bfloat16)
        w = _stored(scheme, w)
        if zero:
            zeros = jnp.repeat(zero[0], w.shape[0] // tiles, axis=0)
            w = w.astype(jnp.int8) - zeros.astype(jnp.int8)
        if scheme.is_weight_only:
            tiled = w.astype(scale.dtype).reshape(tiles, -1, w.shape[1])
            return jnp.dot(lhs, (tiled * scale[:, None, :]).reshape(w.shape))[None]
        if given is None:
            lhs, given = _quantize_rows(lhs, scheme, tiles)
        return _tile_by_tile(lhs.reshape(lhs.shape[0], tiles, -1), given, w, scale)[None]

    return chain


def _tile_by_tile(q: jax.Array, lhs_scale: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """[M, N] from [M, tiles, K/tiles], [M, tiles], [K, N] and [tiles, N]."""
    tiles, n = scale.shape
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
    if scheme.row_scale == "float8_e8m0fnu":  # RowQuantize's powers of two
        scale = jnp.exp2(jnp.floor(jnp.log2(scale * bound)) - math.floor(math.log2(bound)))
    scale = jnp.where(scale < math.sqrt(jnp.finfo(jnp.float32).tiny), 1.0, scale)
    q = tiled * (1 / scale)[:, :, None]
    dtype = jnp.dtype(scheme.activation)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        q = jnp.clip(jnp.round(q), info.min, info.max)
    else:
        q = jnp.clip(q, -bound, bound)
    return q.astype(dtype), scale
