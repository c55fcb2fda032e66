"""The body of the TPU convolution kernel: one grid step of a `tpu_plan.Plan`.

The grid is (blocks of images, blocks of output features). In one step:
    1. on the first block of output features the images are staged (tpu_stage.py): quantized where the plan
       says so, laid out flat phase by phase, with the shifted copies that the taps read;
    2. chunk by chunk, the taps stand side by side along C and one dot gives the sums of all of them;
    3. scales, bias and activation go on; the result is rounded once, or quantized.

Where a block has several `turns`, all its output features are in one block, and each turn's chunks have the
staging of the next turn's images in between. Where a plan has `bands`, so many neighbouring rows of the
result stand side by side in the columns of the matrix unit; the weights are laid out for that, with zeros.

What lies in the result's block past the image, and columns past its width, is cut off by the store.

The ladder: static microseconds, int8 in, bfloat16 out, and what binds. "HBM" is what operands and result take
as they are tiled there. `python -m bench.price --suite conv` gives the last figure of a line.

  3 x 3, 8 x 56 x 56 x 256 -> 256
  v6e   XLA's bfloat16 70.2, its int8 193. The matrix units need 16.1; 18.4 with rows of 56 in a pitch of 64
            53.4  chunks of 128 places, a copy for each column shift made 64 places at a time
        ->  39.8 in 256 -> 33.9 in 512 -> 32.3 in 896 -> 30.9 in 1792: filling and emptying the matrix units
                  costs some 140 cycles a chunk. The dots are then at 94 % of the units' peak, in 19.9
        ->  25.8 copies made in one loop, 256 places at a time, which share loads and hide their latency
        ->  23.8 in eight turns, chunks of 896; 24.3 in 1792, 27.3 in 512
        rejected: a pitch of 56, which wastes nothing, but whose rows start within a native tile, so that
        every tap has a copy of its own: 42.6 against 39.8 in chunks of 256
  v6e   quantized on the way: 35.2 staged alone -> 34.6 in turns -> 32.0 with maxima found two turns ahead,
        rounding by an addition; 30.3 in chunks of 1792. The vector unit binds: of its operations half add up
        the sums of nine passes of 256 products, and those of quantization come on top
  v5e   XLA's bfloat16 221, its int8 372; the matrix units need 75.1: 94.7 in chunks of 448
  v7x   XLA's bfloat16 48.8; no int8 unit, so bfloat16, which needs 25.7: 40.4 in three dots whose sums of
        integers are exact in float32; sums that are scaled need not be -> one dot. Quantized on the way
        42.7 -> 38.1 in turns -> 35.4 with rounding by an addition

  3 x 3, 8 x 56 x 56 x 64 -> 64: HBM 11.8, 5.9 and 2.6 (v5e, v6e, v7x), as half of the lanes are empty
  v5e   17.7 alone -> 9.6 in eight turns and two bands; two images a turn 12.3; a pitch of 56 12.2: HBM binds
  v6e   12.1 alone -> 5.4 in eight turns and two bands, four bands 6.3: HBM binds
  v7x   14.5 alone -> 6.7 two bands -> 6.3 four bands, of which the matrix units need 4.9 and 4.1: zeros in
        the weights, and moving every other tap by half a register; two rows by two columns would need 3.3

  3 x 3, 8 x 28 x 28 x 128 -> 128
  v6e   3.3 alone -> 2.8 in turns -> 2.2 and two bands. Quantized on the way: 6.2 -> 5.2 in turns and two
        bands -> 3.3 with maxima found two turns ahead: the vector unit binds
  v7x   4.7 alone -> 2.7 in turns and two bands, held by the matrix units for 2.4, in a pitch of 32. They need
        4.1 without bands and 3.7 with four. Quantized on the way 6.8 alone, 7.0 in turns -> 3.5 with maxima
        ahead and rounding by an addition

  3 x 3, stride 2, 8 x 56 x 56 x 128 -> 128
  v5e   13.1 columns taken apart in 32 bits -> 12.6 in turns: stores bind -> 7.7 four bytes at a time
        (6.1 where the scratch of a line is left out, which the interpreter cannot run)
  v6e   6.4 -> 5.6 in turns -> 4.3 four bytes at a time
  v7x   7.2 -> 5.1 in turns and two bands -> 4.2 four bytes at a time (3.6 without the line): the matrix units
        need 3.3, as bands of two take five rows, which are 1920 products of 2048; 4.1 without bands

  3 x 3, 8 x 14 x 14 x 256 -> 256
  v6e   3.3 -> 2.0 without XLA's op in front that multiplies two scales -> 1.83 in two turns of four images;
        1.85 in four of two: the matrix units need 1.3 with rows of 14 in a pitch of 16 and rows of zeros

  3 x 3, 2 x 64 x 64 x 320 -> 320
  v5e   60.4 taps of 384, rows of zeros in the weights -> 58.9 in turns -> 50.0 whole registers of all taps
        first, then their 64 other features two taps to a register
  v6e   20.1 -> 20.0 -> 17.7: 320 columns fill two of the matrix unit's 256 by 63 %, and the units need 14.0.
        Over two minutes to compile with features of taps side by side, each moved by half a register
  v7x   29.6 -> 26.1 -> 24.0 in chunks of 320, for 256: the same, and the units need 22.3
  3 x 3, 2 x 32 x 32 x 640 -> 640, quantized on the way
  v6e   14.7 -> 14.0 in turns -> 13.5 alone with rounding by an addition: half of two images is staged before
        there is a dot to hide it behind

  1 x 1   by this kernel where the matmul kernel (tpu_pointwise.py) has XLA multiply the scales, in 1.1
  8 x 56 x 56 x 24 -> 144: HBM 19.6, 9.8 and 4.4, as 24 lanes of 128 and 144 of 256 are filled. The matmul
        kernel 20.8, 11.0 and 7.5 -> in eight turns 6.4, 3.9 and 3.7 of compute: HBM binds
  8 x 14 x 14 x 576 -> 96: 3.7, 2.5 and 1.9 -> 2.0, 1.0 and 0.7 with weights read as XLA lays them out, inputs
        along the lanes, which it turned round in 1.5. v7x 0.71 in two turns, 0.72 alone, 1.01 so in chunks
        of 896: 96 columns of 256, a depth of 576 of 768, and the matrix units need 0.61 of that
  8 x 28 x 28 x 512 -> 128: v7x 2.9 alone -> 2.14 in eight turns, 2.10 in four of two images, 4.4 of these in
        chunks of 896: the matrix units need 1.6, half of their columns empty, and int8 is widened besides
  8 x 7 x 7 x 512 -> 2048: v7x 2.0 in blocks of 256 columns, 1.26 of 512, 1.13 of 1024; 1.7 in two turns
  8 x 7 x 7 x 320 -> 1280: v7x 0.97 in blocks of 640 columns, 0.61 in one; 0.58 in two turns
  8 x 14 x 14 x 1024 -> 256, quantized on the way: v7x 2.97 alone, 3.8 in turns, 3.9 with two images in each
        -> 2.96 with maxima ahead: 1024 features are quantized for 256, and the matrix units need 0.8
  2 x 64 x 64 x 320 -> 320: v7x 5.4 the matmul kernel -> 4.7 in turns, chunks of 512 -> 4.0 of 1024 -> 3.9 of
        2048: a depth and columns of 320 in 512 need 3.7
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwix_kernels.conv import tpu_epilogue, tpu_stage
from qwix_kernels.conv.tpu_plan import Plan
from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.tpu_config import LANES

Refs = dict[str, Any]
_WEIGHT_ROWS = 256  # widened at a time


def kernel(plan: Plan, emulate: bool, names: tuple[str, ...], *refs: Any) -> None:
    """One grid step. `names` says which refs there are: see `tpu.run`."""
    r = dict(zip(names, refs, strict=True))
    if plan.turns > 1:
        _turns(plan, emulate, r)
        return

    @pl.when(pl.program_id(1) == 0)
    def _():
        tpu_stage.clear(plan, r)
        tpu_stage.look(plan, r, 0)
        tpu_stage.scales(plan, r)
        tpu_stage.stage(plan, r)

    if plan.widens_rhs:
        _widen_rhs(plan, r)

    @pl.loop(0, plan.chunks)
    def _(i):
        _chunk(plan, emulate, r, 0, 0, i)


def _turns(plan: Plan, emulate: bool, r: Refs) -> None:
    """Each turn's chunks, with the staging of the next turn's images in between."""
    for which in (0, 1):
        tpu_stage.clear(plan, r, which)
    if plan.widens_rhs:
        _widen_rhs(plan, r)
    tpu_stage.look(plan, r, 0)
    tpu_stage.look(plan, r, 1)
    tpu_stage.scales(plan, r)
    tpu_stage.stage(plan, r)

    @pl.loop(0, plan.turns // 2)
    def _(pair):
        for which in (0, 1):
            turn = 2 * pair + which
            after = jnp.minimum(turn + 1, plan.turns - 1)
            tpu_stage.scales(plan, r, 1 - which, after)
            if plan.chunks == 1:
                _chunk(plan, emulate, r, which, turn, 0)
                tpu_stage.stage_piece(plan, r, 1 - which, after, 0)
                tpu_stage.look_at_piece(plan, r, jnp.minimum(turn + 2, plan.turns - 1), 0)
                continue

            @pl.loop(0, plan.chunks)
            def _(i, which=which, turn=turn, after=after):
                _chunk(plan, emulate, r, which, turn, i)
                tpu_stage.stage_piece(plan, r, 1 - which, after, i)
                tpu_stage.look_at_piece(plan, r, jnp.minimum(turn + 2, plan.turns - 1), i)


# --- the dots


def _widen_rhs(plan: Plan, r: Refs) -> None:
    """The weights in the matrix unit's dtype, each tap's in whole registers of rows."""
    size, ready = plan.problem.features, r["rhs_ready"]
    (h, w), columns = plan.problem.windows, plan.block_n
    if plan.turned:
        for lo in range(0, size, LANES):
            part = values.widen(r["rhs"][:, lo : min(lo + LANES, size)], None).T
            ready[lo : lo + part.shape[0], :] = values.narrow(part, plan.rhs_dot)
        return
    if plan.bands > 1 or plan.pads:
        ready[...] = jnp.zeros(ready.shape, ready.dtype)
    for tap in range(len(plan.taps)):
        for band in range(plan.bands):
            row, column = tap // w.kernel - band * h.stride, tap % w.kernel
            if not 0 <= row < h.kernel:
                continue
            at = (row * w.kernel + column) * size
            cuts = sorted({*range(0, plan.full, _WEIGHT_ROWS), plan.full, size})
            for lo, hi in itertools.pairwise(cuts):
                part = r["rhs"][at + lo : at + hi, :]
                if part.dtype != ready.dtype:
                    part = values.narrow(values.widen(part, None), plan.rhs_dot)
                to = plan.weight_row(tap, lo)
                ready[to : to + hi - lo, band * columns : (band + 1) * columns] = part


def _chunk(plan: Plan, emulate: bool, r: Refs, which: int, turn: Any, i: Any) -> None:
    """The sums, and the result, of one chunk of a turn's places."""
    per = plan.per_word
    start = plan.lead // per + (i if isinstance(i, int) else pl.multiple_of(i * (plan.chunk // per), 8))
    weights = r["rhs_ready"] if plan.widens_rhs else r["rhs"]
    total: Any = None
    for first in range(0, len(plan.taps), plan.exact_taps):
        taps = range(first, min(first + plan.exact_taps, len(plan.taps)))
        parts, rests = [], []
        for tap in taps:
            copy, at = plan.reads[tap]
            for group, lanes in enumerate(plan.lanes):
                words = r[tpu_stage.name_of(plan, copy, which)][
                    group, pl.ds(start + at // per, plan.chunk // per), :
                ]
                part = pltpu.bitcast(words, jnp.dtype(plan.lhs_dot))
                if lanes.stop - lanes.start == LANES:
                    parts.append(part)
                else:
                    rests.append(part[:, : plan.rest])
        parts += rests
        lhs = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        rhs = weights[first * plan.tap_rows : (taps[-1] + 1) * plan.tap_rows, :]
        part = _dot(plan, emulate, lhs, rhs)
        if plan.problem.out_dtype == "int32":
            part = part.astype(jnp.int32)
        total = part if total is None else total + part
    _finish(plan, r, which, turn, i, total)


def _dot(plan: Plan, emulate: bool, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    dtype = jnp.dtype(plan.partial)
    if emulate:  # XLA:CPU multiplies neither int4 nor fp8
        lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    precision = lax.Precision.HIGHEST if emulate else None
    return lax.dot_general(lhs, rhs, (((1,), (0,)), ((), ())), precision, preferred_element_type=dtype)


def _finish(plan: Plan, r: Refs, which: int, turn: Any, i: Any, total: jax.Array) -> None:
    """Scales, bias, activation, and the result of a chunk."""
    of_image = None
    if "lhs_scale" in r or plan.finds_scale:
        if plan.images > 1:
            of_image = _lanes(r[f"row_scale{which}"][pl.ds(i * plan.chunk, plan.chunk), :], total.shape[1])
        else:
            of_image = r["found" if plan.finds_scale else "lhs_scale"][turn, :1, :1]
    side_by_side = {name: _repeat(r[name][...], plan.bands) for name in ("rhs_scale", "bias") if name in r}
    z = tpu_epilogue.finish(plan.problem, r | side_by_side, total, of_image)
    z = z.reshape(plan.chunk_rows, plan.pitch, plan.columns)
    for band in range(plan.bands):
        _store(plan, r, turn, i, band, z[:, :, band * plan.block_n : (band + 1) * plan.block_n])


def _store(plan: Plan, r: Refs, turn: Any, i: Any, band: int, z: jax.Array) -> None:
    """A band of some rows of an image, or of all rows of some images."""
    rows, first = plan.chunk_rows, turn * plan.images
    if plan.images == 1:
        r["out"][first, pl.ds(i * rows, rows), band] = z
    elif rows <= plan.rows:
        each = plan.rows // rows
        r["out"][first + i // each, pl.ds(i % each * rows, rows), band] = z
    else:
        some = rows // plan.rows
        z = z.reshape(some, plan.rows, plan.pitch, z.shape[2])
        r["out"][pl.ds(first + i * some, some), :, band] = z


def _repeat(x: jax.Array, times: int) -> jax.Array:
    return x if times == 1 else jnp.concatenate([x.astype(jnp.float32)] * times, axis=1)


def _lanes(x: jax.Array, width: int) -> jax.Array:
    """[rows, 128], the same in every lane, as [rows, width]."""
    if width <= LANES:
        return x[:, :width]
    whole = jnp.concatenate([x] * -(-width // LANES), axis=1)
    return whole[:, :width]
