"""Block-scaled operands on Blackwell: mxfp8, mxfp4, nvfp4. The matrix unit multiplies by the scales itself.

A scale covers 32 neighbours along K (float8_e8m0fnu; OCP Microscaling Formats v1.0) or 16 (float8_e4m3fn,
with float4_e2m1fn values: NVFP4). The unit reads scales from tensor memory, where four along K lie in a word
and a row's word lies in lane (row mod 32), the four groups of 32 rows in adjacent words (PTX ISA,
tcgen05.mma.block_scale, layout of scale factors). In shared memory, from where `tcgen05.cp` brings them, that
is [rows / 128, scales / 4, 32, 16], and in this order they are put before the kernel: see `arranged`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

ROWS = 128  # of a tile of scales
ALONG = 4  # scales along K in a word
# What is multiplied, and what scales how many: the formats of the unit that Mosaic issues.
FORMATS = {
    ("float8_e4m3fn", "float8_e8m0fnu", 32): "mxfp8",
    ("float8_e5m2", "float8_e8m0fnu", 32): "mxfp8",
    ("float4_e2m1fn", "float8_e8m0fnu", 32): "mxfp4",
    ("float4_e2m1fn", "float8_e4m3fn", 16): "nvfp4",
}


def arranged(scale: jax.Array, block: int) -> jax.Array:
    """[batch, rows, scales] as the unit wants the scales of each block of `block` rows.

    -> [batch, blocks, tiles of 128 rows in a block, scales / 4, 32, 16], filled up with zeros: in blocks that
    are no multiples of 128 rows, in the last block, and along K.

    >>> arranged(jnp.zeros((1, 300, 6), jnp.float8_e8m0fnu), 192).shape
    (1, 2, 2, 2, 32, 16)
    """
    batch, rows, along = scale.shape
    blocks, words = pl.cdiv(rows, block), pl.cdiv(along, ALONG)
    tiles = pl.cdiv(block, ROWS)
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint8)  # padding float8_e8m0fnu with a 0 means 2**-127
    bits = jnp.pad(bits, ((0, 0), (0, blocks * block - rows), (0, words * ALONG - along)))
    bits = bits.reshape(batch, blocks, block, words, ALONG)
    bits = jnp.pad(bits, ((0, 0), (0, 0), (0, tiles * ROWS - block), (0, 0), (0, 0)))
    bits = bits.reshape(batch, blocks, tiles, ROWS // 32, 32, words, ALONG)
    bits = bits.transpose(0, 1, 2, 5, 4, 3, 6).reshape(batch, blocks, tiles, words, 32, 16)
    return jax.lax.bitcast_convert_type(bits, scale.dtype)


def multiply(r: Any, acc: Any, slot: Any, accumulate: Any, interpret: bool, **both: Any) -> None:
    """acc [+]= (w_s * scales) (x_s * scales)^T of the blocks in `slot`; `r` are the kernel's refs.

    Copies of scales and the multiplication that reads them run in the order in which they are issued. `both`:
    the options of a pair of multiprocessors, each of which has its half of the weights' scales, and all of
    the rows'.
    """
    if interpret:
        _multiply_interpreted(r, acc, slot, accumulate)
        return
    plgpu.async_copy_scales_to_tmem(r.w_block_scale_s.at[slot], r.w_scale_t, **both)
    plgpu.async_copy_scales_to_tmem(r.x_block_scale_s.at[slot], r.x_scale_t, **both)
    plgpu.tcgen05_mma(
        acc,
        r.w_s.at[slot],
        r.x_s.at[slot].transpose((1, 0)),
        r.empty.at[slot],
        a_scale=r.w_scale_t,
        b_scale=r.x_scale_t,
        accumulate=accumulate,
        **both,
    )


def _multiply_interpreted(r: Any, acc: Any, slot: Any, accumulate: Any) -> None:
    """The interpreter has no block scales: they are multiplied in first, from where the unit reads them."""
    for name in ("w", "x"):
        values, scales = getattr(r, f"{name}_s"), getattr(r, f"{name}_block_scale_s")
        wide = getattr(r, f"{name}_wide_s")
        rows, k = values.shape[1:]
        s = scales[slot].astype(jnp.float32)
        tiles, words = s.shape[:2]
        s = s.reshape(tiles, words, 32, ROWS // 32, ALONG).transpose(0, 3, 2, 1, 4)
        s = s.reshape(tiles * ROWS, words * ALONG)[:rows]
        wide[slot] = values[slot].astype(jnp.float32) * jnp.repeat(s, k // s.shape[1], axis=1)
    plgpu.commit_smem()
    x = r.x_wide_s.at[slot].transpose((1, 0))
    plgpu.tcgen05_mma(acc, r.w_wide_s.at[slot], x, r.empty.at[slot], accumulate=accumulate)
