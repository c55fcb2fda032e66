"""The body of the TPU convolution kernel: one grid step of a `tpu_plan.Plan`.

The grid is (blocks of images, blocks of output features). In one step:
    1. on the first block of output features the images are staged: quantized where the plan says so, laid out
       flat phase by phase, with the shifted copies that the taps read (`stage`);
    2. chunk by chunk, the taps stand side by side along C and one dot gives the sums of all of them;
    3. scales, bias and activation go on; the result is rounded once, or quantized.

What lies in the result's block past the image, and columns past its width, is cut off by the store.

The ladder: static microseconds of 3 x 3, 8 x 56 x 56 x 256 -> 256, int8 in, bfloat16 out, and what binds.
`python -m bench.price --suite conv` gives the last figure of a line.

  v6e   XLA's bfloat16 70.2, its int8 193. The matrix units need 16.1; 18.4 with rows of 56 in a pitch of 64
            53.4  chunks of 128 places, a copy for each column shift made 64 places at a time
        ->  39.8 in 256 -> 33.9 in 512 -> 32.3 in 896 -> 30.9 in 1792: filling and emptying the matrix units
                  costs some 140 cycles a chunk. The dots are then at 94 % of the units' peak, in 19.9
        ->  25.8 copies made in one loop, 256 places at a time, which share loads and hide their latency
        rejected: a pitch of 56, which wastes nothing, but whose rows start within a native tile, so that
        every tap has a copy of its own: 42.6 against 39.8 in chunks of 256
  v6e   14 x 14 x 256: 3.3 -> 2.0 without XLA's op in front that multiplies two scales
  v6e   2 x 64 x 64 x 320: over two minutes to compile with features of taps side by side that fill no whole
        registers, each moved by half of one -> 12 seconds with taps of 384, rows of zeros in the weights
  v5e   XLA's bfloat16 221, its int8 372; the matrix units need 75.1: 94.7 in chunks of 448
  v7x   XLA's bfloat16 48.8; no int8 unit, so bfloat16, which needs 25.7: 40.4 in three dots whose sums of
        integers are exact in float32; sums that are scaled need not be -> one dot
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
