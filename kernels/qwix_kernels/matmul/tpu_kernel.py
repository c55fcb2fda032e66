"""The body of the TPU matmul kernel: one grid step of a `tpu_plan.Plan`.

The grid is (batch, M blocks, N blocks, K blocks), K innermost. In one step:
    1. on the first column block, the rows are rewritten into VMEM where the plan says so (dynamic
       quantization, casts, dequantization) and stay there for all column blocks of the row block; as many as
       `Plan.overlapped_rows` between the dots of step 3, beside which they cost next to nothing; a low-rank
       update's part of the rows is found there too (tpu_low_rank);
    2. the weights of the step are rewritten where the plan says so (scale before the dot, codebooks, K
       tails; tpu_across for a weight turned round);
    3. partial dots run over the block's K, are corrected for zero points by row and column sums, scaled where
       the strategy is "after", and added up;
    4. on the last K block the per-row and per-column scales go on, then what the epilogue has (tpu_epilogue),
       and the result is stored.

A gate is a second weight: steps 2 and 3 are done for either.

Rows and columns past the operands hold whatever the DMA left there: they reach only outputs that are cut off.
K past the operands would reach everything, so both sides are zeroed there.

The ladder, prefill: static kilocycles for 1024 x 4096 x 4096, rows quantized inside the kernel where they are
at all, and what binds. `python -m bench.price --chip v6e --scheme w8a8 --m 1024 --k 4096 --n 4096` gives the
last figure of a line.

  w8a8        v6e  the matrix units need 32.8. Rows in front of the dots (their ladder: tpu_rows.py): 44.0 in
                   1024 x 256 -> 42.0 in 1024 x 512 (6 for the rows). Rejected, since it takes five times as
                   long to compile (`tpu_plan.OVERLAP_COLUMNS`): 40.7 half of the rows between the dots, 39.9
                   all of them, 39.7 in 1024 x 1024. Rejected: a loop over 256 rows and their dots, 41.9;
                   nothing overlaps across addresses that are not constants
  w8a8        v7x  the matrix units need 65.5. Rows in front: 75.4 in 512 x 512, 74.3 in 512 x 1024 (7 for
                   the rows) -> 71.9 a loop as above -> 67.0 between the dots, straight-line
  w8a8        v7x  8192 x 1024, where rows are a third of the work and the matrix units need 32.8: 49.2 in
                   front, 256 x 256 -> 37.5 between the dots of 256 x 512 (33.3 in 256 x 1024, whose first
                   fetch takes longer; 35.7 in that by parts of 128 rows)
  w8a8_g128   v5e  262 + 34 before -> 224 after, 128 x 256: the lane broadcast of row scales binds the XLU
                   -> 162 with row scales stored along the lanes, in register-sized parts of a block of rows
  w8a8_g128   v6e  182 after (vector unit) -> 85 before: the bfloat16 unit is worth more than the int8 one
                   -> 82 in 512 x 1024; the peak of the unit is 65.5. Rejected as above: 76.5 rows between
                   the dots (80.7 in 512 x 512)
  w8a8_g128   v7x  before, rows between the dots: 68.8; the peak is 65.5
  w4a16_g128  v5e  1024 x 1536 x 576, peak 13.8: 32.3 after, 256 x 128 -> 22.0 after, 512 x 128 -> 18.0
                   before, 256 x 576 (five blocks of 128 are a ninth more than 576, the matrix units' 15.3).
                   1024 x 2048 x 1408, peak 45.0: 56.2 after, 512 x 128 -> 45.2 before, 256 x 1408
  wf8af8      v6e  126 both sides cast to bfloat16 in VMEM -> 78 rows rounded by arithmetic (a cast
                   there and back costs twice that), weights handed over as they are
  wnf4a16_g64 v6e  149 tree of selects on the bits of a code -> 95 gather along the lanes -> 79 permutation
                   of sublanes (the ladder: tpu_codebook.py) -> 73 in 1024 x 512
  long K      v6e  w8a8 1024 x 28672 x 8192: 780 with the sum of seven parts of K in VMEM against 582 (HBM
                   time) with the whole K in one block, so parts are used only where the whole does not fit

The ladder, decode: static cycles for M x K x N with up to 64 rows, and what HBM needs.

  w4a16_g128  v6e  16 x 4096 x 4096: 23k in blocks of 128 columns (half of the unit's width) -> 8.5k in 512
  w4a16_g128  v7x  16 x 4096 x 4096, HBM 5.3k: 6.1k in 512 columns -> 5.1k in 1024, which have half as many
                   steps of some 230 cycles that no weight fills
  w4a16_g128  v7x  16 x 2048 x 1408, HBM 0.94k: 1688 in 512 -> 901 in one block. 16 x 1408 x 2048, HBM 0.95k:
                   1412 in two -> 899 in one; a step's own 230 cycles and the loop's 200 bind, not a unit
  w4a16_g128  v5p  16 x 4096 x 5376, HBM 7.4k: 9.8k in 21 blocks of 256 (one core has eleven) -> 7.7k in 6 of
                   896. The vector unit binds (90 %): 2.4 operations to widen 1024 weights. Scaled in float32
                   before the dot, 16 x 14336 x 4096 takes 38.7k instead of 20.3k
  w4a16_g128  v5p  16 x 1536 x 576, HBM 0.33k: 998 in one block of 576, which is one core's -> 702 in two of
                   384, a step each; before: 1.9 times the vector work, as above
  w4a16_g128  v7x  64 x 4096 x 4096, HBM 5.8k: 10.6k after, 512 columns: a K tile of 128 fills half the depth
                   of the matrix unit, which binds -> 9.5k before, 512 -> 9.0k before, 1024: handing over
                   weights in bfloat16 takes 0.45 cycles per 1024, and binds
  w4a16_g64   v6e  M=16, N=14336: 60k each tile scaled in float32 before the dot -> 33k (HBM needs 34k) in
                   bfloat16, before. v5e: 80k -> 58k (HBM time) after, two tiles as twice the rows of the lhs

XLA:CPU, which runs the interpreter's dots, multiplies neither int4 nor fp8: `emulate` widens dot operands to
int32 and float32, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from qwix_kernels.matmul import tpu_epilogue, tpu_low_rank, tpu_rows, tpu_weights
from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.tpu_config import LANES
from qwix_kernels.matmul.tpu_plan import Plan


def kernel(plan: Plan, emulate: bool, names: tuple[str, ...], *refs: Any) -> None:
    """One grid step. `names` says which refs there are: see `tpu.run`."""
    r = dict(zip(names, refs, strict=True))
    first, step = jnp.logical_or(plan.megacore_rows, pl.program_id(2) == 0), pl.program_id(3)
    if not plan.overlapped_rows:
        if plan.has_prologue:

            @pl.when(first)
            def _():
                tpu_rows.prepare(plan, r, step, plan.block_m)

        if plan.problem.low_rank:

            @pl.when(first)
            def _():
                tpu_low_rank.prepare(plan, emulate, r, step)

        _block_step(plan, emulate, r, step)
    elif plan.megacore_rows or plan.grid[2] == 1:
        _block_step(plan, emulate, r, step, with_rows=True)
    else:

        @pl.when(first)
        def _():
            _block_step(plan, emulate, r, step, with_rows=True)

        @pl.when(jnp.logical_not(first))
        def _():
            _block_step(plan, emulate, r, step)


def _block_step(
    plan: Plan, emulate: bool, r: dict[str, Any], step: jax.Array, with_rows: bool = False
) -> None:
    """Everything but the rows' prologue, or that too: straight-line code, which the compiler interleaves."""
    if plan.prepare_rhs:
        for weight in tpu_epilogue.weights(plan, r):
            tpu_weights.prepare(plan, weight, step)
    if with_rows:
        if plan.problem.low_rank:
            tpu_low_rank.prepare(plan, emulate, r, step)
        part = plan.overlapped_part
        ahead = plan.block_m - plan.overlapped_rows
        if ahead:
            tpu_rows.prepare(plan, r, step, ahead)
        for start in range(0, plan.block_m, part):
            if start + ahead < plan.block_m:
                tpu_rows.prepare_here(plan, r, step, slice(start + ahead, start + ahead + part))
            _rows_step(plan, emulate, r, step, slice(start, start + part))
        return
    if plan.block_m == plan.sub_m:
        _rows_step(plan, emulate, r, step, slice(0, plan.block_m))
        return

    @pl.loop(0, plan.block_m // plan.sub_m)
    def _(i):
        _rows_step(plan, emulate, r, step, pl.ds(pl.multiple_of(i * plan.sub_m, plan.sub_m), plan.sub_m))


def _rows_step(plan: Plan, emulate: bool, r: dict[str, Any], step: jax.Array, rows: Any) -> None:
    """Dots, running sums and result of some rows of the block."""
    weights = tpu_epilogue.weights(plan, r)
    if plan.steps_k == 1:
        sums = [dot_block(plan, emulate, w, step, rows) for w in weights]
        tpu_epilogue.finish(plan, r, rows, sums, emulate)
        return

    @pl.when(step == 0)
    def _():
        for w in weights:
            w["acc"][rows, :] = jnp.zeros((plan.sub_m, plan.block_n), plan.acc)

    for w in weights:
        w["acc"][rows, :] += dot_block(plan, emulate, w, step, rows)

    @pl.when(step == plan.steps_k - 1)
    def _():
        tpu_epilogue.finish(plan, r, rows, [w["acc"][rows, :] for w in weights], emulate)


# --- the dots


def dot_block(plan: Plan, emulate: bool, r: dict[str, Any], step: jax.Array, rows: Any) -> jax.Array:
    """Sum over this K block, [rows, block_n] in `plan.acc`, without the scales that are per row or column."""
    total: Any = None
    run = max(plan.run, LANES) if plan.strategy == "after" else plan.chunk
    for start in range(0, plan.block_k, run):
        stop = min(start + run, plan.block_k)
        part: Any = None
        for lo in range(start, stop, plan.chunk):
            dot = _partial(plan, emulate, r, step, rows, slice(lo, min(lo + plan.chunk, stop)))
            dot = dot.astype(plan.acc)
            part = dot if part is None else part + dot
        if plan.strategy == "after":
            part = _scale_tile(plan, r, step, rows, part, start)
        total = part if total is None else total + part
    return total if plan.rhs_gain == 1 or plan.rhs_tile else total * plan.rhs_gain


def _scale_tile(
    plan: Plan, r: dict[str, Any], step: jax.Array, rows: Any, part: jax.Array, start: int
) -> jax.Array:
    """The partial sums of the tiles from `start`, scaled and added up."""
    total: Any = None
    size = part.shape[0] // plan.stack
    for i in range(plan.stack):
        at = start + i * plan.run
        tile = part[i * size : (i + 1) * size, :]
        if plan.rhs_tile:
            tile = tile * tpu_weights.scale_row(plan, r, at // plan.rhs_tile)
        if plan.lhs_tile:
            tile = tile * tpu_epilogue.lhs_scale(plan, r, step, rows, at // plan.lhs_tile)
        total = tile if total is None else total + tile
    return total


def _partial(
    plan: Plan, emulate: bool, r: dict[str, Any], step: jax.Array, rows: Any, at: slice
) -> jax.Array:
    """The dot over `at`, a slice of this K block, with zero points taken off; tiles stacked as rows."""
    p = plan.problem
    lhs = r["lhs_ready"][step, rows, at] if plan.prepare_lhs else r["lhs"][0, rows, at]
    rhs_ref = r["rhs_ready"] if plan.prepare_rhs else r["rhs"].at[0]
    rhs = rhs_ref[:, at] if p.rhs_transposed else rhs_ref[at, :]
    if plan.rhs_gain != 1 and not plan.prepare_rhs:
        rhs = values.fp4_to_fp8(rhs)
    lhs, rhs = values.narrow(lhs, plan.lhs_dot), values.narrow(rhs, plan.rhs_dot)
    dot = _dot(plan, emulate)
    size = lhs.shape[0]
    lhs = values.stack_tiles(lhs, plan.stack)
    out = dot(lhs, rhs)
    zero_lhs = p.lhs.zero_point and not plan.folds_lhs
    z_rhs = None
    if p.rhs.zero_point and not plan.folds_rhs:
        ones = jnp.ones((LANES, lhs.shape[1]) if p.rhs_transposed else (lhs.shape[1], LANES), rhs.dtype)
        z_rhs = _zero_rows(plan, r, at, size)
        out = out - dot(lhs, ones)[:, :1].astype(out.dtype) * z_rhs.astype(out.dtype)
    if zero_lhs:
        z_lhs = r["lhs_zero"][0, 0, rows, _tile(at, plan.lhs_tile)].astype(out.dtype)
        sums = dot(jnp.ones((8, lhs.shape[1]), lhs.dtype), rhs)[:1, :]
        if z_rhs is not None:
            sums = sums - (at.stop - at.start) * z_rhs.astype(out.dtype)
        out = out - z_lhs * sums
    return out


def _tile(at: slice, tile: int) -> slice:
    t = at.start // tile if tile else 0
    return slice(t, t + 1)


def _zero_rows(plan: Plan, r: dict[str, Any], at: slice, size: int) -> jax.Array:
    """Zero points of the rhs: [1, block_n], or a row for each of the rows that are stacked by tile."""
    first = r["rhs_zero"][0, 0, _tile(at, plan.rhs_tile), :]
    if plan.stack == 1:
        return first
    tiles = [(at.start + i * plan.run) // plan.rhs_tile if plan.rhs_tile else 0 for i in range(plan.stack)]
    rows = [jnp.broadcast_to(r["rhs_zero"][0, 0, t : t + 1, :], (size, first.shape[1])) for t in tiles]
    return jnp.concatenate(rows, axis=0)


def _dot(plan: Plan, emulate: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    axis = 1 if plan.problem.rhs_transposed else 0

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        if emulate:
            a, b = a.astype(plan.partial), b.astype(plan.partial)
        precision = lax.Precision.HIGHEST if emulate else None
        dims = (((1,), (axis,)), ((), ()))
        return lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.dtype(plan.partial))

    return dot
