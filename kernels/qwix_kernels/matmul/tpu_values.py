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
from jax.experimental.pallas import tpu as pltpu

from qwix_kernels.matmul.tpu_config import LANES, pl_cdiv
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


def fp4_to_fp8(x: jax.Array) -> jax.Array:
    """float4_e2m1fn as float8_e5m2 that are 2^-14 times as great.

    The three bits below the sign mean the same in both formats, subnormals included, but for the bias of the
    exponent. One operation of the vector unit per 1024 values, besides the compiler's own unpacking.
    """
    bytes_ = pltpu.bitcast(x, jnp.int4).astype(jnp.int8)  # five times the sign, e, e, m
    words = pltpu.bitcast(bytes_, jnp.int32)
    words = (words & jnp.int32(-0x7F7F7F80)) | ((words << 1) & jnp.int32(0x0E0E0E0E))
    return pltpu.bitcast(words, jnp.float8_e5m2)


def widen(x: jax.Array, codebook: str | None, dtype: str = "float32", fp4: bool = False) -> jax.Array:
    """The represented numbers in `dtype`: in bfloat16 exact but for a codebook's. `fp4`: see `fp4_to_fp8`."""
    if fp4:
        return fp4_to_fp8(x).astype(dtype)
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
    size = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000, jnp.float32)
    # The last place of x plus this is the last place of the dtype's value next to x.
    shift = jnp.maximum(size, jnp.float32(info.smallest_normal)) * jnp.float32(1.5 * 2.0 ** (23 - info.nmant))
    return (x + shift) - shift


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


def given_rows(ref: Any, at: Any) -> Any:
    """Rows `at` of scales that were given by row, or the only one where one row of scales serves all."""
    return at if ref.shape[2] > 1 else slice(0, 1)


def quantized_runs(size: int, tile: int) -> list[tuple[slice, list[slice]]]:
    """Slices of `size` lanes that are quantized at a time, each with the runs in it that are handled as one.

    A run is a tile; or all the lanes of the slice, where a tile is less than a register or there are none.
    Slices are wide, because a load of few lanes fills half a register.

    >>> quantized_runs(512, 256)
    [(slice(0, 512, None), [slice(0, 256, None), slice(256, 512, None)])]
    """
    width = max(tile, 4 * LANES // tile * tile) if tile >= LANES else 4 * LANES
    groups = []
    for lo in range(0, size, width):
        hi = min(lo + width, size)
        run = tile if tile >= LANES else hi - lo
        groups.append((slice(lo, hi), [slice(t, t + run) for t in range(lo, hi, run)]))
    return groups


def row_absmax(pieces: list[jax.Array]) -> jax.Array:
    """max |x| of each row over all pieces, float32 [rows, 1]: across registers first, then over the lanes.

    bfloat16 pieces stay packed, two values a lane, until one register is left.
    """
    widest: dict[int, jax.Array] = {}
    for piece in pieces:
        x, width = jnp.abs(piece), piece.shape[1]
        widest[width] = jnp.maximum(widest[width], x) if width in widest else x
    lanes: dict[int, jax.Array] = {}
    for x in widest.values():
        for lo in range(0, x.shape[1], LANES):
            part = x[:, lo : lo + LANES].astype(jnp.float32)
            width = part.shape[1]
            lanes[width] = jnp.maximum(lanes[width], part) if width in lanes else part
    tops = [jnp.max(x, axis=1, keepdims=True) for x in lanes.values()]
    return tops[0] if len(tops) == 1 else jnp.maximum(tops[0], tops[1])


def run_absmax(size: jax.Array, tile: int) -> jax.Array:
    """The greatest of the magnitudes of each row and tile of one of `quantized_runs`, in float32.

    [rows, 1] for a run of one tile. Tiles of less than a register: [rows, 128], where lane l holds the
    greatest of the tile round lane l of register l % 4 of the run. Each exchange of lanes between registers
    halves their number, so that the last exchanges, and what follows, are done once for four registers.
    """
    size = size.astype(jnp.float32)
    if tile >= LANES:
        return jnp.max(size, axis=1, keepdims=True)
    if size.shape[1] < 4 * LANES:
        size = jnp.pad(size, ((0, 0), (0, 4 * LANES - size.shape[1])))
    lane = lax.broadcasted_iota(jnp.int32, (size.shape[0], LANES), 1)
    tops = [size[:, lo : lo + LANES] for lo in range(0, 4 * LANES, LANES)]
    for bit in range(tile.bit_length() - 1):
        if len(tops) > 1:
            odd = (lane >> bit) & 1 == 1
            mine = [jnp.where(odd, y, x) for x, y in zip(tops[::2], tops[1::2], strict=True)]
            others = [jnp.where(odd, x, y) for x, y in zip(tops[::2], tops[1::2], strict=True)]
        else:
            mine = others = tops
        tops = [jnp.maximum(m, _take_lanes(o, lane ^ (1 << bit))) for m, o in zip(mine, others, strict=True)]
    return tops[0]


def over_run(x: jax.Array, width: int) -> jax.Array:
    """What was made of `run_absmax` for tiles of less than a register, spread over all lanes of the run."""
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    parts = [_take_lanes(x, (lane & ~3) | j) for j in range(pl_cdiv(width, LANES))]
    return (parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1))[:, :width]


def _take_lanes(x: jax.Array, lanes: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


def inverse(scale: jax.Array, how: RowQuantize) -> jax.Array:
    """1 / scale. Of the cases that a division looks after, dynamic scales leave none but NaN."""
    if how.static:
        return 1.0 / scale
    if how.scale_dtype == "float32":
        return pltpu.reciprocal(scale, full_range=False)
    # Of a power of two: the exponent's sign turned.
    turned = jnp.int32(0x7F000000) - lax.bitcast_convert_type(scale, jnp.int32)
    return lax.bitcast_convert_type(turned, jnp.float32)


def quantize(x: jax.Array, how: RowQuantize, noise: jax.Array | None = None) -> jax.Array:
    """Scaled float32 values, clipped and, where `how.dtype` is of integers, rounded to int32.

    `noise`, [rows or 1, 1], is added before rounding.

    An end of the range that they cannot reach, scaled by the greatest of their run, is not clipped.
    """
    integer = jnp.issubdtype(how.dtype, jnp.integer)
    low, high = how.limits
    most = how.bound if how.scale_dtype == "float32" else 2.0 ** (how.emax + 1)
    reach = 1.0 if how.noise else 0.5  # noise takes half a step more
    most = math.inf if how.static else math.floor(most * (1 + 2.0**-20) + reach) if integer else most
    x = x if noise is None else x + noise.astype(jnp.float32)
    if most > high:
        x = jnp.minimum(x, jnp.float32(high))
    if -most < low:
        x = jnp.maximum(x, jnp.float32(low))
    return jnp.round(x).astype(jnp.int32) if integer else x
