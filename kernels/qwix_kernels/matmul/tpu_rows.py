"""The prologue of the TPU matmul kernel: rows of the lhs, rewritten in VMEM once per row block.

RMSNorm, casts, dequantization and quantization. What is written stays for all column blocks of the row block.

Nothing overlaps it: the matrix units wait. So what counts is vector operations per 1024 values, and that
enough rows are under way to hide the 130 cycles that a maximum over the lanes takes. The ladder, in static
kilocycles for the rows of 1024 x 4096:

    w8a8        v6e  9.3, 7.8 operations: maximum in float32, both ends clipped
                     -> 6.7 the maximum taken on packed bfloat16, over whole loads (a load of 128 lanes fills
                     half a register); only the end clipped that the greatest value of a row can reach
                     -> 6.2 two native tiles of rows at a time: the latency of one hides behind the other
    w8a8_g128   v5e  25 scales by a full division, 24 operations -> 15 by the reciprocal without special cases
                     rejected: scales of 32 tiles side by side in one register, so that their arithmetic is
                     done once. 1/3 of the operations, but spreading them again binds the XLU: 30
    w8a8_g128   v6e  22 (rounding in float32 takes six operations) -> 15 through int32 and back -> 12.9 with
                     two native tiles of rows, bound by the vector unit at 12 operations.
                     rejected: the side by side scales, 31 (XLU); maxima on packed bfloat16, 15.4 (relayouts);
                     scales kept in VMEM between a pass of maxima and one of products, 14.5
    w8a8_g32    v6e  50 every register finds its own maxima in five exchanges of lanes, bound by the XLU
                     -> 29 registers merged on the way, so that the last exchanges are shared by four
    wf8af8      v6e  18 rounding by integer arithmetic on the bits -> 9.1 by adding and subtracting a number
                     whose last place is that of the narrow float

Over the same kernel with rows that are quantized already: w8a8 v5e 7 %, w8a8_g128 v5e 6 % and v6e 5 %,
wf8af8 v5e 1 % and v6e 2 %; v7x, where they are prepared between the dots, at most 2 %. One stays over 10 %:
w8a8 v6e at 19 % (42.0 against 35.2; 3 % over static scales of float rows; 16 % with half of the rows
between the dots, see tpu_kernel.py). The vector unit binds: of its slots 92 % are taken, by 6 operations
per 1024 values of which none is left to leave out: half a magnitude and half a maximum of packed values,
then unpack, scale, clip, convert and 3/4 of a pack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.elementwise import row_scale
from qwix_kernels.matmul.tpu_config import LANES
from qwix_kernels.matmul.tpu_plan import Plan

_AT_A_TIME = 2  # native tiles of rows
Refs = dict[str, Any]
Load = Callable[[slice], jax.Array]


def prepare(plan: Plan, r: Refs, step: jax.Array, count: int) -> None:
    """The first `count` rows of this K block as the matrix unit gets them, with their scales.

    Some native tiles at a time.
    """
    rewrite = _convert_rows if plan.problem.quantize_lhs is None else _quantize_rows
    rows = plan.row_step * _AT_A_TIME
    if count % rows:
        rows = min(plan.row_step, count)
    if count == rows:
        rewrite(plan, r, step, slice(0, rows))
        return

    @pl.loop(0, count // rows)
    def _(i):
        rewrite(plan, r, step, pl.ds(pl.multiple_of(i * rows, rows), rows))


def prepare_here(plan: Plan, r: Refs, step: jax.Array, rows: slice) -> None:
    """As `prepare` for some rows, as straight-line code in the place of the call.

    A loop would keep the compiler from running these operations of the vector unit beside the dots around
    them; so would offsets that are not constants, since it then cannot tell the rows apart.
    """
    rewrite = _convert_rows if plan.problem.quantize_lhs is None else _quantize_rows
    some = min(plan.row_step, plan.block_m)
    for start in range(rows.start, rows.stop, some):
        rewrite(plan, r, step, slice(start, start + some))


def _convert_rows(plan: Plan, r: Refs, step: jax.Array, at: Any) -> None:
    """Normalises, casts, and dequantizes where the scale goes before the dot, the rows `at` of the lhs.

    Scales that go after it are spread over the lanes, or the XLU would have to in every column block.
    """
    p = plan.problem
    if plan.spreads_row_scale:
        for t in range(plan.lhs_tiles()):
            column = values.spread(r["lhs_scale"], (0, 0, at), [(t, 0, 0)], slice(0, 0))
            r["row_scale"][step, t, at, :] = jnp.broadcast_to(column, (column.shape[0], LANES))
    if not plan.prepare_lhs:
        return
    limit = plan.k_limit(step)
    load = _loader(plan, r, step, at) if p.norm else None
    for lanes, tiles in values.lane_groups(plan.block_k, plan.lhs_tile if plan.folds_lhs else 0):
        x = load(lanes) if load else values.widen(r["lhs"][0, at, lanes], p.lhs.codebook)
        if plan.folds_lhs:
            if p.lhs.zero_point:
                x = x - values.spread(r["lhs_zero"], (0, 0, at), tiles, lanes)
            x = x * values.spread(r["lhs_scale"], (0, 0, at), tiles, lanes)
        x = values.zero_past(x, limit, lanes.start, axis=1)
        r["lhs_ready"][step, at, lanes] = values.narrow(x, plan.lhs_dot)


def _quantize_rows(plan: Plan, r: Refs, step: jax.Array, at: Any) -> None:
    """Quantization of the rows `at`, by row or by row and K tile: see `problem.RowQuantize`."""
    q = plan.problem.quantize_lhs
    assert q is not None
    load = _loader(plan, r, step, at)
    groups = values.quantized_runs(plan.block_k, plan.lhs_tile)
    noise = r["lhs_noise"][0, 0, values.given_rows(r["lhs_noise"], at), :] if q.noise else None
    whole = None
    if not plan.lhs_tile:
        scale = _whole_scale(plan, r, step, at, load, [lanes for lanes, _ in groups])
        whole = scale, values.inverse(scale, q)
    for lanes, runs in groups:
        x, done = load(lanes), []
        size = jnp.abs(x) if plan.lhs_tile and not q.static else x
        for run in runs:
            part = slice(run.start - lanes.start, run.stop - lanes.start)
            if whole:
                scale, inverse = whole
            else:
                scale = _run_scale(plan, r, step, at, size[:, part], run)
                inverse = values.inverse(scale, q)
            stored = values.quantize(x[:, part].astype(jnp.float32) * inverse, q, noise)
            if plan.lhs_dot != q.dtype and not jnp.issubdtype(q.dtype, jnp.integer):
                stored = values.on_grid(stored, q.dtype)
            done.append(stored.astype(jnp.float32) * scale if plan.folds_lhs else stored)
        out = done[0] if len(done) == 1 else jnp.concatenate(done, axis=1)
        r["lhs_ready"][step, at, lanes] = values.narrow(out, plan.lhs_dot)


def _whole_scale(plan: Plan, r: Refs, step: jax.Array, at: Any, load: Load, pieces: list[slice]) -> jax.Array:
    """The scale of whole rows: [rows, 1], or [1, 1] where it was given for all rows."""
    q = plan.problem.quantize_lhs
    assert q is not None
    if plan.rows_given:
        return r["lhs_scale"][0, 0, values.given_rows(r["lhs_scale"], at), :].astype(jnp.float32)
    scale = row_scale(values.row_absmax([load(lanes) for lanes in pieces]), q)
    r["row_scale"][step, at, :] = scale
    return scale


def _run_scale(plan: Plan, r: Refs, step: jax.Array, at: Any, size: jax.Array, run: slice) -> jax.Array:
    """The scales of one of `quantized_runs`, given its magnitudes; stored where the tiles' sums need them.

    [rows, 1] for a run of one tile; as wide as the run where its tiles are less than a register.
    """
    q, tile = plan.problem.quantize_lhs, plan.lhs_tile
    assert q is not None
    tiles = [(lo // tile, lo, lo + tile) for lo in range(run.start, run.stop, tile)]
    if plan.rows_given:
        rows = values.given_rows(r["lhs_scale"], at)
        scale = values.spread(r["lhs_scale"], (0, 0, rows), tiles, run)
    else:
        scale = row_scale(values.run_absmax(size, tile), q)
        scale = scale if tile >= LANES else values.over_run(scale, size.shape[1])
    if plan.spreads_row_scale:
        for t, lo, _ in tiles:
            column = scale if len(tiles) == 1 else scale[:, lo - run.start : lo - run.start + 1]
            r["row_scale"][step, t, at, :] = jnp.broadcast_to(column, (size.shape[0], LANES))
    return scale


def _loader(plan: Plan, r: Refs, step: jax.Array, at: Any) -> Load:
    """Reads lanes of the rows `at`, normalised, zero past the end of K.

    What is not normalised comes in bfloat16 where it is so in VMEM and the vector unit computes in it.
    """
    p, limit = plan.problem, plan.k_limit(step)
    columns = p.quantize_lhs is not None and p.quantize_lhs.columns
    packed = plan.bf16_math and p.lhs.dtype == "bfloat16" and not (p.norm or columns) and limit is None

    def load(lanes: slice) -> jax.Array:
        x = r["lhs"][0, at, lanes]
        return x if packed else values.zero_past(x.astype(jnp.float32), limit, lanes.start, axis=1)

    def scaled(lanes: slice) -> jax.Array:
        x = normed(lanes)
        # Past the end of K the block of `lhs_columns` holds whatever its DMA left there.
        return values.zero_past(x * r["lhs_columns"][0, :, lanes].astype(jnp.float32), limit, lanes.start, 1)

    normed = load
    if p.norm is None:
        return scaled if columns else load
    squares = [jnp.sum(jnp.square(load(lanes)), axis=1, keepdims=True) for lanes in _pieces(p.k)]
    root = lax.rsqrt(sum(squares) * jnp.float32(1 / p.k) + jnp.float32(p.norm.eps))
    normed = lambda lanes: load(lanes) * root * r["norm_weight"][0, :, lanes].astype(jnp.float32)
    return scaled if columns else normed


def _pieces(k: int) -> list[slice]:
    return [lanes for lanes, _ in values.quantized_runs(k, 0)]
