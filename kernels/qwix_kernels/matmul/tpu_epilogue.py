"""The epilogue of the TPU matmul kernel: from the running sum of some rows to the stored result."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.tpu_plan import Plan


def lhs_scale(plan: Plan, r: dict[str, Any], step: Any, rows: Any, t: int) -> jax.Array:
    """One float32 scale per row: [rows, 1], or as wide as the block where it was stored along the lanes."""
    if plan.spreads_row_scale:
        return values.tile_lanes(r["row_scale"][step, t, rows, :], plan.block_n)
    if plan.problem.quantize_lhs is not None and not plan.rows_given:
        return r["row_scale"][step, rows, t : t + 1]
    return r["lhs_scale"][0, 0, rows, t : t + 1].astype(jnp.float32)


def finish(plan: Plan, r: dict[str, Any], rows: Any, total: jax.Array) -> None:
    """Applies what is left of the scales and stores the rows."""
    p = plan.problem
    if p.rhs.is_quantized and not plan.rhs_tile:
        total = total.astype(jnp.float32) * r["rhs_scale"][0, 0, :1, :].astype(jnp.float32)
    if plan.scales_lhs and not plan.lhs_tile:
        total = total.astype(jnp.float32) * lhs_scale(plan, r, plan.steps_k - 1, rows, 0)
    r["out"][0, rows, :] = total.astype(p.out_dtype)
