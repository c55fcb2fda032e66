"""Values inside the TPU kernel: widening, narrowing, codebooks, scales along lanes, quantization of rows.

Everything works on [rows, lanes] blocks in VMEM. A "group" is what is rewritten at a time: a slice of lanes
(or rows) and the scale tiles in it as (tile, start, stop) in the block's own coordinates.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwix_kernels.matmul.tpu_plan import LANES, pl_cdiv
from qwix_kernels.problem import CODEBOOKS, RowQuantize

Group = tuple[slice, list[tuple[int, int, int]]]


def lane_groups(size: int, tile: int) -> list[Group]:
    """Slices of `size` lanes with the tiles in each; without tiles, slices of 512 lanes.

    >>> lane_groups(256, 64)[0]
    (slice(0, 128, None), [(0, 0, 64), (1, 64, 128)])
    """
    width = 4 * LANES if not tile else tile if tile % LANES == 0 else LANES
    return _groups(size, tile, width)


def row_groups(size: int, tile: int) -> list[Group]:
    """Slices of `size` rows, of whole tiles and, where it can be, of whole native tiles of 4-bit values."""
    width = 2 * LANES if not tile else math.lcm(tile, LANES)
    return _groups(size, tile, width)


def _groups(size: int, tile: int, width: int) -> list[Group]:
    groups = []
    for lo in range(0, size, width):
        hi = min(lo + width, size)
        tile_of = lambda i: i // tile if tile else 0
        spans = range(tile_of(lo), tile_of(hi - 1) + 1)
        groups.append(
            (slice(lo, hi), [(t, max(lo, t * tile), min(hi, (t + 1) * tile) if tile else hi) for t in spans])
        )
    return groups


def widen(x: jax.Array, codebook: str | None, dtype: str = "float32") -> jax.Array:
    """The represented numbers in `dtype`: in bfloat16 exact but for a codebook's."""
    if codebook is not None:
        return look_up(x, codebook).astype(dtype)
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        x = x.astype(jnp.int32).astype(jnp.float32)
    return x.astype(dtype)


def stack_tiles(x: jax.Array, count: int) -> jax.Array:
    """[rows, K] as [count * rows, K]: block i keeps tile i of the `count` in K and is zero elsewhere."""
    if count == 1:
        return x
    tile = lax.broadcasted_iota(jnp.int32, x.shape, 1) // (x.shape[1] // count)
    wide = x.astype(jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32)
    rows = [jnp.where(tile == i, wide, jnp.zeros_like(wide)) for i in range(count)]
    return narrow(jnp.concatenate(rows, axis=0), x.dtype.name)


def narrow(x: jax.Array, dtype: str) -> jax.Array:
    """`x` in the matrix unit's dtype, which holds it exactly or is a float."""
    if x.dtype == jnp.dtype(dtype):
        return x
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger) or (
        jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.integer)
    ):
        x = x.astype(jnp.int32)
    return x.astype(dtype)


def look_up(codes: jax.Array, codebook: str) -> jax.Array:
    """The codebook's float32 values: a gather along the lanes of one register that holds the table.

    One permute per 1024 codes; a tree of selects on the bits takes fifteen operations of the vector unit.
    """
    codes = codes.astype(jnp.int32)
    if codes.shape[0] == 1:  # Mosaic gathers from at least two rows
        return look_up(jnp.broadcast_to(codes, (8, codes.shape[1])), codebook)[:1]
    rows, width = codes.shape
    table = _table(CODEBOOKS[codebook], rows)
    padded = pl_cdiv(width, LANES) * LANES
    if padded != width:
        codes = jnp.pad(codes, ((0, 0), (0, padded - width)))
    pieces = [
        jnp.take_along_axis(table, codes[:, lo : lo + LANES], axis=1, mode="promise_in_bounds")
        for lo in range(0, padded, LANES)
    ]
    return (pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1))[:, :width]


def _table(entries: tuple[float, ...], rows: int) -> jax.Array:
    """[rows, 128], each row the entries and zeros."""
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    out = jnp.zeros((rows, LANES), jnp.float32)
    for i, entry in enumerate(entries):
        out = jnp.where(lane == i, jnp.float32(entry), out)
    return out


def on_grid(x: jax.Array, dtype: str) -> jax.Array:
    """float32 in the range of a narrow float, rounded half to even to its values; NaN gives NaN or infinity.

    Where that dtype is not native, a cast there and back takes twice the operations.
    """
    info = jnp.finfo(dtype)
    cut = 23 - info.nmant
    bits = lax.bitcast_convert_type(x, jnp.int32)
    odd = (bits >> cut) & 1
    bits = (bits + ((1 << (cut - 1)) - 1) + odd) & -(1 << cut)
    normal = lax.bitcast_convert_type(bits, jnp.float32)
    # Adding a number whose last place is the smallest subnormal rounds to multiples of that.
    shift = jnp.float32(1.5 * 2.0**23 * float(info.smallest_subnormal))
    return jnp.where(jnp.abs(x) < jnp.float32(info.smallest_normal), (x + shift) - shift, normal)


def zero_past(x: jax.Array, limit: jax.Array | None, start: int, axis: int) -> jax.Array:
    """`x` with zeros where its index along `axis`, counted from `start`, reaches `limit`."""
    if limit is None:
        return x
    index = lax.broadcasted_iota(jnp.int32, x.shape, axis) + start
    return jnp.where(index < limit, x, jnp.zeros_like(x))


def select_lanes(columns: list[jax.Array], tiles: list[tuple[int, int, int]], lanes: slice) -> jax.Array:
    """[rows, 1] columns, one per tile, each repeated over its tile's lanes."""
    out = columns[-1]
    if len(tiles) == 1:
        return out
    rows = out.shape[0]
    index = lax.broadcasted_iota(jnp.int32, (rows, lanes.stop - lanes.start), 1) + lanes.start
    for (_, _, stop), column in reversed(list(zip(tiles[:-1], columns[:-1], strict=True))):
        out = jnp.where(index < stop, column, out)
    return out


def tile_lanes(x: jax.Array, width: int) -> jax.Array:
    """[rows, 128], the same in every lane, as [rows, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (width // LANES), axis=1) if width % LANES == 0 else x[:, :1]


def spread(ref: Any, at: tuple, tiles: list[tuple[int, int, int]], lanes: slice) -> jax.Array:
    """Scales ref[*at, tile] in float32, repeated over the lanes of the group."""
    columns = [ref[(*at, slice(t, t + 1))].astype(jnp.float32) for t, _, _ in tiles]
    return select_lanes(columns, tiles, lanes)


def row_absmax(pieces: list[jax.Array]) -> jax.Array:
    """max |x| of each row over all pieces, [rows, 1]: across the registers first, then over the lanes."""
    by_width: dict[int, jax.Array] = {}
    for piece in pieces:
        for lo in range(0, piece.shape[1], LANES):
            x = jnp.abs(piece[:, lo : lo + LANES])
            width = x.shape[1]
            by_width[width] = jnp.maximum(by_width[width], x) if width in by_width else x
    tops = [jnp.max(x, axis=1, keepdims=True) for x in by_width.values()]
    return tops[0] if len(tops) == 1 else jnp.maximum(tops[0], tops[1])


def tile_scales(
    x: jax.Array, tiles: list[tuple[int, int, int]], lanes: slice, how: RowQuantize
) -> list[jax.Array]:
    """One scale per row for each tile of the group."""
    if len(tiles) == 1:
        return [row_scale(row_absmax([x]), how)]
    size = jnp.abs(x)
    index = lax.broadcasted_iota(jnp.int32, x.shape, 1) + lanes.start
    inside = lambda lo, hi: jnp.where((index >= lo) & (index < hi), size, jnp.zeros_like(size))
    return [row_scale(jnp.max(inside(lo, hi), axis=1, keepdims=True), how) for _, lo, hi in tiles]


def row_scale(absmax: jax.Array, how: RowQuantize) -> jax.Array:
    """absmax / bound, by the reciprocal that every implementation uses; 1 where that is too small."""
    scale = absmax * jnp.float32(how.reciprocal)
    return jnp.where(scale < jnp.float32(math.sqrt(jnp.finfo(jnp.float32).tiny)), 1.0, scale)


def quantize(x: jax.Array, how: RowQuantize) -> jax.Array:
    """Scaled float32 values, rounded where `how.dtype` is of integers, and clipped to its range."""
    if jnp.issubdtype(how.dtype, jnp.integer):
        x = jnp.round(x)
    low, high = how.limits
    return jnp.clip(x, jnp.float32(low), jnp.float32(high))
