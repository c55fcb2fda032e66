"""The low-rank update in the TPU matmul kernel: t = lhs @ a once for a block of rows, t @ b in each step.

On the first column block the rows in VMEM are multiplied with a, over all K blocks; scaled, masked and
rounded to bfloat16, t then stays for the other column blocks, as prepared rows do. t @ b joins the float32
sums once their scales are on, before bias, activation and the one rounding. Past the end of K are zeros.

The ladder: static microseconds with a rank of 16, and what that is over the same matmul without an update.
`python -m bench.price --suite lora` gives the last line of each. Matrix units bind in all of them.

    w4a16_g128, 512 x 4096 x 4096                v5e            v6e            v7x
      no update                                  87.5           19.6           15.2
      both products and the sum by XLA          116.5  33 %     35.4  81 %     26.0  71 %
      XLA's lhs @ a alone, rejected for it        6.9   8 %      4.1  21 %      3.1  21 %
      lhs @ a here, a in the matrix units        93.1   7 %     21.7  11 %     17.2  13 %
      a.T @ lhs.T, the rows in the units         90.8   4 %     21.1   8 %     16.3   7 %
    w8a8, 2048 x 4096 x 4096
      no update                                 188.4           46.8           60.7
      both products and the sum by XLA          331.1  76 %    115.2 146 %     94.3  55 %
      lhs @ a here, a in the matrix units       209.1  11 %     56.5  21 %     68.7  13 %
      a.T @ lhs.T, the rows in the units        202.1   7 %     54.3  16 %     67.3  11 %

a of 16 columns takes the passes of a whole unit's 128 or 256; the rows take one push, and 16 rows pass by.
t @ b cannot be had for less: each pass gives a unit's width of the result, however little of its depth is
used. That is 6 % of K = 4096 where the unit is 256 deep, and 10 % of w8a8 on v6e, whose other products are
in int8.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from qwix_kernels.matmul import tpu_low_rank_plan
from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.tpu_config import LANES
from qwix_kernels.matmul.tpu_plan import Plan

Refs = dict[str, Any]
_PIECE = 16 * LANES  # lanes of rows that are multiplied at a time


def prepare(plan: Plan, emulate: bool, r: Refs, step: jax.Array) -> None:
    """Adds this K block's part of lhs @ a; the last one leaves the rows' t for all column blocks."""
    total: Any = None
    for lo in range(0, plan.block_k, _PIECE):
        lanes = slice(lo, min(lo + _PIECE, plan.block_k))
        a = values.zero_past(r["low_rank_a"][0, :, lanes], plan.k_limit(step), lo, axis=1)
        x = _rows(plan, r, step, lanes)
        pair = (a, x) if tpu_low_rank_plan.turns(plan) else (x, a)
        part = _dot(emulate, *pair, ((1,), (1,)))
        total = part if total is None else total + part
    if plan.steps_k == 1:
        _keep(plan, r, total)
        return

    @pl.when(step == 0)
    def _():
        r["low_rank_sum"][...] = total

    @pl.when(step > 0)
    def _():
        r["low_rank_sum"][...] += total

    @pl.when(step == plan.steps_k - 1)
    def _():
        _keep(plan, r, r["low_rank_sum"][...])


def _keep(plan: Plan, r: Refs, total: jax.Array) -> None:
    low_rank = plan.problem.low_rank
    assert low_rank
    t = (total.T if tpu_low_rank_plan.turns(plan) else total) * jnp.float32(low_rank.scaling)
    if low_rank.mask_dtype:
        t = t * r["low_rank_mask"][0].astype(jnp.float32)
    r["low_rank_t"][...] = t.astype(jnp.bfloat16)


def added(emulate: bool, r: Refs, rows: Any) -> jax.Array:
    """The update's part of the result of some rows, [rows, block_n] in float32."""
    return _dot(emulate, r["low_rank_t"][rows, :], r["low_rank_b"][0], ((1,), (0,)))


def _rows(plan: Plan, r: Refs, step: jax.Array, lanes: slice) -> jax.Array:
    """The rows as they were given, in bfloat16, zero past the end of K."""
    if plan.prepare_lhs and plan.problem.quantize_lhs is None:
        return r["lhs_ready"][step, :, lanes]
    x = values.zero_past(r["lhs"][0, :, lanes], plan.k_limit(step), lanes.start, axis=1)
    return x.astype(jnp.bfloat16)


def _dot(emulate: bool, a: jax.Array, b: jax.Array, axes: Any) -> jax.Array:
    precision = lax.Precision.HIGHEST if emulate else None
    a, b = (x.astype(jnp.float32) if emulate else x for x in (a, b))
    return lax.dot_general(a, b, (axes, ((), ())), precision, jnp.float32)
