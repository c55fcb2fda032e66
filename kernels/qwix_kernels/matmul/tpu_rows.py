"""The prologue of the TPU matmul kernel: rows of the lhs, rewritten in VMEM once per row block.

Casts, dequantization and dynamic quantization. What is written stays for all column blocks of the row block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.tpu_plan import LANES, Plan


def prepare(plan: Plan, r: dict[str, Any], step: jax.Array) -> None:
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
    limit = plan.k_limit(step)
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
    limit = plan.k_limit(step)
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
