"""The weights of one grid step of the TPU matmul kernel, rewritten in VMEM where the plan says so.

The ladder: static kilocycles for 16 x 4096 x 4096 with weights in float4_e2m1fn. The vector unit binds in all
of them, with 89 to 96 % of its slots taken.

  wmxfp4a16  v6e  HBM needs 9.8. Scaled before the dot: 18.8 in blocks of 512 columns, 18.3 in 1024
                  -> after it, four tiles of 32 as four times the rows: 13.9 in 512
  wmxfp4a16  v7x  HBM needs 5.5. 10.6 after, 1024 columns (four times the rows hold the matrix units for 8.2)
                  -> 9.8 before
  wnvfp4a16  v6e  HBM needs 10.3. 22.9 before -> 21.6 after, eight tiles of 16, the matrix units held for 16.4
  wnvfp4a16  v7x  HBM needs 5.8. 10.5 before; a tile of 16 is one packed register of bfloat16
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.matmul import tpu_across, tpu_codebook
from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.tpu_config import LANES
from qwix_kernels.matmul.tpu_plan import Plan


def prepare(plan: Plan, r: dict[str, Any], step: jax.Array) -> None:
    """Weights of this step in the matrix unit's dtype: dequantized, looked up, zero past the end of K."""
    p = plan.problem
    if _looks_up(plan):
        _prepare_codes(plan, r, step)
        return
    if tpu_across.applies(p):
        tpu_across.prepare(plan, r, step)
        return
    limit = plan.k_limit(step)
    wide = "bfloat16" if plan.bf16_math else "float32"
    fp4 = plan.rhs_gain != 1
    if p.rhs_transposed:
        for lanes, tiles in values.lane_groups(plan.block_k, plan.rhs_tile if plan.folds_rhs else 0):
            w = values.widen(r["rhs"][0, :, lanes], p.rhs.codebook, wide, fp4)
            if plan.folds_rhs:
                if p.rhs.zero_point:
                    w = w - values.spread(r["rhs_zero"], (0, 0, slice(None)), tiles, lanes).astype(wide)
                scale = values.spread(r["rhs_scale"], (0, 0, slice(None)), tiles, lanes) * plan.rhs_gain
                w = w * scale.astype(wide)
            w = values.zero_past(w, limit, lanes.start, axis=1)
            r["rhs_ready"][:, lanes] = values.narrow(w, plan.rhs_dot)
        return
    for rows, tiles in values.row_groups(plan.block_k, plan.rhs_tile if plan.folds_rhs else 0):
        w = values.widen(r["rhs"][0, rows, :], p.rhs.codebook, wide, fp4)
        w = values.zero_past(w, limit, rows.start, axis=0)
        for t, lo, hi in tiles:
            part = w[lo - rows.start : hi - rows.start, :]
            if plan.folds_rhs:
                if p.rhs.zero_point:
                    part = part - _rows(r["rhs_zero"][0, 0, t : t + 1, :], part)
                part = part * _rows(scale_row(plan, r, t), part)
                part = values.zero_past(part, limit if p.rhs.zero_point else None, lo, axis=0)
            r["rhs_ready"][lo:hi, :] = values.narrow(part, plan.rhs_dot)


def _looks_up(plan: Plan) -> bool:
    """Whether codes fill whole registers of columns, so that permutations of sublanes look them up.

    Their scales are by rows of the block: K tiles of a weight that is not transposed, or the reverse.
    """
    p = plan.problem
    rows, lanes = _stored_block(plan)
    by_rows = p.rhs_transposed == tpu_across.applies(p)
    return (
        p.rhs.codebook is not None and p.rhs.dtype == "uint4" and by_rows and not (rows % 8 or lanes % LANES)
    )


def _stored_block(plan: Plan) -> tuple[int, int]:
    """Rows and lanes of a block of the weight."""
    return (plan.block_n, plan.block_k) if plan.problem.rhs_transposed else (plan.block_k, plan.block_n)


def _prepare_codes(plan: Plan, r: dict[str, Any], step: jax.Array) -> None:
    """Weights of a codebook, with the scales of tiles of rows where those go before the dot."""
    codebook, limit = plan.problem.rhs.codebook, plan.k_limit(step)
    assert codebook is not None
    size, width = _stored_block(plan)
    tile = plan.rhs_tile if plan.folds_rhs else 0
    if tpu_across.applies(plan.problem):
        tile = tpu_across.local_tile(plan)
    for rows, tiles in values.row_groups(size, tile):
        for left in range(0, width, LANES):
            lanes = slice(left, left + LANES)
            codes = tpu_codebook.signed_codes(r["rhs"][0, rows, lanes])
            for t, lo, hi in tiles:
                scale = scale_row(plan, r, t)[:, lanes] if plan.folds_rhs else None
                w = tpu_codebook.look_up(codes[lo - rows.start : hi - rows.start, :], codebook, scale)
                start, axis = (left, 1) if plan.problem.rhs_transposed else (lo, 0)
                w = values.zero_past(w, limit, start, axis)
                r["rhs_ready"][lo:hi, lanes] = values.narrow(w, plan.rhs_dot)


def scale_row(plan: Plan, r: dict[str, Any], t: int) -> jax.Array:
    """Scales of K tile `t`, [1, block_n] in float32, for weights as the matrix unit is given them."""
    scale = r["rhs_scale"][0, 0, t : t + 1, :].astype(jnp.float32)
    return scale if plan.rhs_gain == 1 else scale * plan.rhs_gain


def _rows(row: jax.Array, like: jax.Array) -> jax.Array:
    """A row for every row of `like`, in its dtype."""
    return jnp.broadcast_to(row, like.shape).astype(like.dtype)
