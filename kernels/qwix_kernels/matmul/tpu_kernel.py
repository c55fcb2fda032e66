"""The body of the TPU matmul kernel: one grid step of a `tpu_plan.Plan`.

The grid is (batch, M blocks, N blocks, K blocks), K innermost. In one step:
    1. on the first column block, the rows are rewritten into VMEM where the plan says so (dynamic
       quantization, casts, dequantization) and stay there for all column blocks of the row block;
    2. the weights of the step are rewritten where the plan says so (scale before the dot, codebooks, K
       tails);
    3. partial dots run over the block's K, are corrected for zero points by row and column sums, scaled where
       the strategy is "after", and added up;
    4. on the last K block the per-row and per-column scales go on, and the result is stored.

Rows and columns past the operands hold whatever the DMA left there: they reach only outputs that are cut off.
K past the operands would reach everything, so both sides are zeroed there.

The ladder: static kilocycles for 1024 x 4096 x 4096, rows quantized inside the kernel where they are at all.
`python -m bench.price --chip v6e --scheme w8a8 --m 1024 --k 4096 --n 4096` gives the last figure of a line.

    w8a8        v6e  47 in blocks of 1024 x 256 x K: 36 for the dots, 9 for the rows, once per row block
    w8a8_g128   v5e  262 + 34 before -> 224 after, 128 x 256: the lane broadcast of row scales binds the XLU
                     -> 166 with row scales stored along the lanes, in register-sized parts of a block of rows
    w8a8_g128   v6e  182 after (vector unit) -> 94 before: the bfloat16 unit is worth more than the int8 one
    wf8af8      v6e  126 both sides cast to bfloat16 in VMEM -> 89 rows rounded by integer arithmetic (a cast
                     there and back costs twice that), weights handed over as they are
    w4a16_g128  v6e  M=16: 23 in blocks of 128 columns (half of the unit's width) -> 8.5 in blocks of 512
    wnf4a16_g64 v6e  149 tree of selects on the bits of a code -> 95 gather along the lanes. M=16: 64,
                     bound by the XLU at one gather per cycle: six times what HBM needs
    long K      v6e  w8a8 1024 x 28672 x 8192: 780 with the sum of seven parts of K in VMEM against 582 (HBM
                     time) with the whole K in one block, so parts are used only where the whole does not fit

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

from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.tpu_plan import LANES, Plan


def kernel(plan: Plan, emulate: bool, names: tuple[str, ...], *refs: Any) -> None:
    """One grid step. `names` says which refs there are: see `tpu.run`."""
    r = dict(zip(names, refs, strict=True))
    column, step = pl.program_id(2), pl.program_id(3)

    if plan.prepare_lhs:
        first = jnp.logical_or(plan.megacore_rows, column == 0)

        @pl.when(first)
        def _():
            _prepare_lhs(plan, r, step)

    if plan.prepare_rhs:
        _prepare_rhs(plan, r, step)
    if plan.block_m == plan.sub_m:
        _rows_step(plan, emulate, r, step, slice(0, plan.block_m))
        return

    @pl.loop(0, plan.block_m // plan.sub_m)
    def _(i):
        _rows_step(plan, emulate, r, step, pl.ds(pl.multiple_of(i * plan.sub_m, plan.sub_m), plan.sub_m))


def _rows_step(plan: Plan, emulate: bool, r: dict[str, Any], step: jax.Array, rows: Any) -> None:
    """Dots, running sum and result of some rows of the block."""
    if plan.steps_k == 1:
        _finish(plan, r, rows, _dot_block(plan, emulate, r, step, rows))
        return

    @pl.when(step == 0)
    def _():
        r["acc"][rows, :] = jnp.zeros((plan.sub_m, plan.block_n), plan.acc)

    r["acc"][rows, :] += _dot_block(plan, emulate, r, step, rows)

    @pl.when(step == plan.steps_k - 1)
    def _():
        _finish(plan, r, rows, r["acc"][rows, :])


# --- the operands, rewritten in VMEM


def _prepare_lhs(plan: Plan, r: dict[str, Any], step: jax.Array) -> None:
    rewrite = _convert_rows if plan.problem.quantize_lhs is None else _quantize_rows
    if plan.block_m <= plan.row_step:
        rewrite(plan, r, step, slice(0, plan.block_m))
        return

    @pl.loop(0, plan.block_m // plan.row_step)
    def _(i):
        rewrite(plan, r, step, pl.ds(pl.multiple_of(i * plan.row_step, plan.row_step), plan.row_step))


def _convert_rows(plan: Plan, r: dict[str, Any], step: jax.Array, at: Any) -> None:
    """Casts, and dequantizes where the scale goes before the dot, the rows `at` of the lhs."""
    p = plan.problem
    limit = _k_limit(plan, step)
    for lanes, tiles in values.lane_groups(plan.block_k, plan.lhs_tile if plan.folds_lhs else 0):
        x = values.widen(r["lhs"][0, at, lanes], p.lhs.codebook)
        if plan.folds_lhs:
            if p.lhs.zero_point:
                x = x - values.spread(r["lhs_zero"], (0, 0, at), tiles, lanes)
            x = x * values.spread(r["lhs_scale"], (0, 0, at), tiles, lanes)
        x = values.zero_past(x, limit, lanes.start, axis=1)
        r["lhs_ready"][step, at, lanes] = values.narrow(x, plan.lhs_dot)


def _quantize_rows(plan: Plan, r: dict[str, Any], step: jax.Array, at: Any) -> None:
    """Dynamic quantization of the rows `at`, by row or by row and K tile: see `problem.RowQuantize`."""
    q = plan.problem.quantize_lhs
    assert q is not None
    limit = _k_limit(plan, step)
    load = lambda lanes: values.zero_past(
        r["lhs"][0, at, lanes].astype(jnp.float32), limit, lanes.start, axis=1
    )
    groups = values.lane_groups(plan.block_k, plan.lhs_tile)
    whole = None
    if plan.rows_given:
        whole = r["lhs_scale"][0, 0, at, :]
    elif not plan.lhs_tile:
        whole = values.row_scale(values.row_absmax([load(lanes) for lanes, _ in groups]), q)
        r["row_scale"][step, at, :] = whole
    for lanes, tiles in groups:
        x = load(lanes)
        if whole is None:
            scales = values.tile_scales(x, tiles, lanes, q)
            for (t, _, _), s in zip(tiles, scales, strict=True):
                if plan.spreads_row_scale:
                    r["row_scale"][step, t, at, :] = jnp.broadcast_to(s, (s.shape[0], LANES))
                elif not plan.folds_lhs:
                    r["row_scale"][step, at, t : t + 1] = s
            scale = values.select_lanes(scales, tiles, lanes)
        else:
            scale = whole
        stored = values.quantize(x * (1.0 / scale), q)
        if plan.lhs_dot != q.dtype and not jnp.issubdtype(q.dtype, jnp.integer):
            stored = values.on_grid(stored, q.dtype)
        if plan.folds_lhs:
            stored = stored * scale
        r["lhs_ready"][step, at, lanes] = values.narrow(stored, plan.lhs_dot)


def _prepare_rhs(plan: Plan, r: dict[str, Any], step: jax.Array) -> None:
    """Weights of this step in the matrix unit's dtype: dequantized, looked up, zero past the end of K."""
    p = plan.problem
    limit = _k_limit(plan, step)
    if p.rhs_transposed:
        for lanes, tiles in values.lane_groups(plan.block_k, plan.rhs_tile if plan.folds_rhs else 0):
            w = values.widen(r["rhs"][0, :, lanes], p.rhs.codebook)
            if plan.folds_rhs:
                if p.rhs.zero_point:
                    w = w - values.spread(r["rhs_zero"], (0, 0, slice(None)), tiles, lanes)
                w = w * values.spread(r["rhs_scale"], (0, 0, slice(None)), tiles, lanes)
            w = values.zero_past(w, limit, lanes.start, axis=1)
            r["rhs_ready"][:, lanes] = values.narrow(w, plan.rhs_dot)
        return
    for rows, tiles in values.row_groups(plan.block_k, plan.rhs_tile if plan.folds_rhs else 0):
        w = values.widen(r["rhs"][0, rows, :], p.rhs.codebook)
        w = values.zero_past(w, limit, rows.start, axis=0)
        for t, lo, hi in tiles:
            part = w[lo - rows.start : hi - rows.start, :]
            if plan.folds_rhs:
                if p.rhs.zero_point:
                    part = part - r["rhs_zero"][0, 0, t : t + 1, :]
                part = part * r["rhs_scale"][0, 0, t : t + 1, :].astype(jnp.float32)
                part = values.zero_past(part, limit if p.rhs.zero_point else None, lo, axis=0)
            r["rhs_ready"][lo:hi, :] = values.narrow(part, plan.rhs_dot)


def _k_limit(plan: Plan, step: jax.Array) -> jax.Array | None:
    """How much of this K block lies inside the operands, or None where all blocks do."""
    return plan.problem.k - step * plan.block_k if plan.k_tail else None


# --- the dots


def _dot_block(plan: Plan, emulate: bool, r: dict[str, Any], step: jax.Array, rows: Any) -> jax.Array:
    """Sum over this K block, [rows, block_n] in `plan.acc`, without the scales that are per row or column."""
    total: Any = None
    run = plan.chunk
    if plan.strategy == "after":
        run = min(t for t in (plan.lhs_tile, plan.rhs_tile) if t)
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
    return total


def _scale_tile(
    plan: Plan, r: dict[str, Any], step: jax.Array, rows: Any, part: jax.Array, start: int
) -> jax.Array:
    if plan.rhs_tile:
        t = start // plan.rhs_tile
        part = part * r["rhs_scale"][0, 0, t : t + 1, :].astype(jnp.float32)
    if plan.lhs_tile:
        part = part * _lhs_scale(plan, r, step, rows, start // plan.lhs_tile)
    return part


def _lhs_scale(plan: Plan, r: dict[str, Any], step: Any, rows: Any, t: int) -> jax.Array:
    """One float32 scale per row: [rows, 1], or as wide as the block where it was stored along the lanes."""
    if plan.spreads_row_scale:
        return values.tile_lanes(r["row_scale"][step, t, rows, :], plan.block_n)
    if plan.problem.quantize_lhs is not None and not plan.rows_given:
        return r["row_scale"][step, rows, t : t + 1]
    return r["lhs_scale"][0, 0, rows, t : t + 1].astype(jnp.float32)


def _partial(
    plan: Plan, emulate: bool, r: dict[str, Any], step: jax.Array, rows: Any, at: slice
) -> jax.Array:
    """The dot over `at`, a slice of this K block, with zero points taken off."""
    p = plan.problem
    lhs = r["lhs_ready"][step, rows, at] if plan.prepare_lhs else r["lhs"][0, rows, at]
    rhs_ref = r["rhs_ready"] if plan.prepare_rhs else r["rhs"].at[0]
    rhs = rhs_ref[:, at] if p.rhs_transposed else rhs_ref[at, :]
    lhs, rhs = values.narrow(lhs, plan.lhs_dot), values.narrow(rhs, plan.rhs_dot)
    dot = _dot(plan, emulate)
    out = dot(lhs, rhs)
    zero_lhs = p.lhs.zero_point and not plan.folds_lhs
    z_rhs = None
    if p.rhs.zero_point and not plan.folds_rhs:
        ones = jnp.ones((LANES, lhs.shape[1]) if p.rhs_transposed else (lhs.shape[1], LANES), rhs.dtype)
        z_rhs = _zero_row(plan, r, at)
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


def _zero_row(plan: Plan, r: dict[str, Any], at: slice) -> jax.Array:
    return r["rhs_zero"][0, 0, _tile(at, plan.rhs_tile), :]


def _dot(plan: Plan, emulate: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    axis = 1 if plan.problem.rhs_transposed else 0

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        if emulate:
            a, b = a.astype(plan.partial), b.astype(plan.partial)
        precision = lax.Precision.HIGHEST if emulate else None
        dims = (((1,), (axis,)), ((), ()))
        return lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.dtype(plan.partial))

    return dot


def _finish(plan: Plan, r: dict[str, Any], rows: Any, total: jax.Array) -> None:
    """Applies what is left of the scales and stores the rows."""
    p = plan.problem
    if p.rhs.is_quantized and not plan.rhs_tile:
        total = total.astype(jnp.float32) * r["rhs_scale"][0, 0, :1, :].astype(jnp.float32)
    if plan.scales_lhs and not plan.lhs_tile:
        total = total.astype(jnp.float32) * _lhs_scale(plan, r, plan.steps_k - 1, rows, 0)
    r["out"][0, rows, :] = total.astype(p.out_dtype)
