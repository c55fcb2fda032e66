"""Codebook look-ups by the vector unit: a permutation of sublanes is a table of eight entries for every lane.

A code's low three bits pick one of eight 32-bit words, each of which holds two entries of the table in
bfloat16; its highest bit picks the half. Lanes are columns of the weight, so every column can have a table of
its own, and the scale of a K tile is multiplied into its sixteen entries instead of into its values.

The ladder: static cycles per 1024 weights (what HBM needs for 4 bits: 1.0 on v5e, 0.7 on v5p, 0.6 on v6e, 0.3
on v7x), with the unit that binds:

    tree of selects on the bits of a code     4.9   vector unit: 15 selects and 4 tests of 1024 lanes
    gather along the lanes                    4.2   XLU: a permutation with a pattern of its own takes four
    permutation of sublanes (this file)       2.3   vector unit: 8 operations of 1024 lanes
    the same, every fourth column on the XLU  2.5   vector unit: the XLU's waits are not filled
    two 4-bit planes w = F + b * G, by logic        the best F and G of 15 levels each leave 0.73 % error, all
      on the bits of packed codes                   that the bound allows, and two planes take 0.6 to hand to
                                                    the matrix unit of v6e and v7x: not built

The third figure is that of `python -m bench.price --scheme wnf4a16_g64 --m 16 --k 4096
--n 14336`, divided by K * N / 1024.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from qwix_kernels.matmul.tpu_config import LANES
from qwix_kernels.problem import CODEBOOKS

_SUBLANES = 8


def signed_codes(codes: jax.Array) -> jax.Array:
    """uint4 codes as int32 that are negative where the highest bit is set: that needs no masking."""
    return pltpu.bitcast(codes, jnp.int4).astype(jnp.int32)


def look_up(codes: jax.Array, codebook: str, scale: jax.Array | None) -> jax.Array:
    """Entries of a table of 16 times `scale`, as float32 that are a rounding away from bfloat16.

    Args:
      codes: [rows, 128], from `signed_codes`; whole registers of 8 rows.
      codebook: a key of `CODEBOOKS`.
      scale: [1, 128] in float32, or None for 1.
    """
    table = _pairs(CODEBOOKS[codebook], scale)
    codes = codes.reshape(-1, _SUBLANES, LANES)
    table = jnp.broadcast_to(table[None], codes.shape)
    words = _permute_sublanes(table, codes & (_SUBLANES - 1))
    # What is left in the low half of a high entry rounds away: see `_pairs`.
    words = jnp.where(codes < 0, words, words << 16)
    return lax.bitcast_convert_type(words, jnp.float32).reshape(-1, LANES)


def _permute_sublanes(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[i, index[i, s, l], l]; `jnp.take_along_axis` would look for negative indices."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0, 2),
        start_indices_batching_dims=(0, 2),
    )
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(table, index[..., None], numbers, (1, 1, 1), mode=mode)


def _pairs(entries: tuple[float, ...], scale: jax.Array | None) -> jax.Array:
    """[8, 128] words: entry i in the low half, entry i + 8 in the high half less what rounding will add.

    A word read as float32 is then less than half a unit of bfloat16 away from its high entry. The low entry
    -0.0 would be a tie, so it becomes 0.0; and nothing is taken off a high entry of zero, which is its sign.
    """
    low, high = _column(entries[:_SUBLANES]), _column(entries[_SUBLANES:])
    if scale is not None:
        low, high = low * scale, high * scale
    high, low = _bits(high), _bits(low) >> 16
    low = jnp.where(low == -(1 << 15), 0, low)
    return high + jnp.where(high << 1 == 0, low & 0xFFFF, low)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.int32)


def _column(entries: tuple[float, ...]) -> jax.Array:
    """[8, 128], the entries down each lane."""
    row = lax.broadcasted_iota(jnp.int32, (_SUBLANES, LANES), 0)
    out = jnp.zeros((_SUBLANES, LANES), jnp.float32)
    for i, entry in enumerate(entries):
        out = jnp.where(row == i, jnp.float32(entry), out)
    return out
