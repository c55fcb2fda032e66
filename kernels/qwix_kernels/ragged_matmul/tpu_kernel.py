"""The body of the TPU gmm: one grid step of a `tpu_plan.GmmPlan`.

The grid is (N blocks, visits, K blocks), K innermost; how many visits there are is known when the program
runs. Everything that a step does to its blocks is the matmul's (matmul/tpu_kernel.py): the preparation of
rows and of weights, the dots, the epilogue. What is the groups' own is when:

    rows      are prepared when a tile is visited for the first time (or once for all N blocks, where VMEM
              holds them all)
    weights   are prepared when the matrix changes
    dots      run over the parts of the tile that have rows of the group
    stores    leave the other rows of a part alone; the first visit of a tile that it does not fill makes the
              rest zero

Rows past the operands, and those of no group, hold whatever is there: they reach only rows that are not
stored.

The ladder: static kilocycles, and what binds. Canonical is 4096 x 2048 x 1408 in 8 groups of 512 rows, where
google/qwix takes 405 (v5e) and 194 (v6e) in w8a8, 276 and 171 in w8a16. `python -m bench.price --suite
ragged` gives the last figure of a line. "512/128" are tiles of 512 rows, 128 of them multiplied at a time.

  w8a8        v6e  canonical, HBM needs 55: 67 in 256/128 (each part waits for its first dot and its last
                   store, some 300 cycles) -> 58 in 256/256, 512/256 and 512/512, HBM
  w8a8        v5e  canonical, HBM needs 94: 119 in 256/64 -> 113 in 512/512, the matrix units need 90
  w8a8        v7x  canonical, the matrix units need 45 (49, as 1408 columns take 1536): 70. Rows are prepared
                   in front of the dots, which wait; between them (see matmul/tpu_kernel.py) takes a second
                   body, of straight-line code for tiles of one group, that is not built
  w4a16_g128  v6e  canonical, peak 45: 99 after, 512/128 -> 70 before, 512/128 -> 65 in 512/256 -> 63 in
                   512/512; 67 in 256/256. Weights are dequantized once for all tiles of their group
  w4a16_g128  v5e  canonical, peak 180: 194 after, 256/64; 204 before, 512/512, which the estimate prefers
  w4a16_g128  v6e  64 groups of 96 rows, HBM needs 147: 274 in 512/128, where half of the rows that are
                   multiplied are not the group's -> 203 in 96/96. The vector unit then has 2.9M weights of
                   each group to dequantize for 96 rows; v7x, with HBM at 82, takes 176 for the same reason
  w8a8        v6e  2048 x 4096 x 14336 in 8 groups: 589, HBM 582, in all blocks of columns. Rejected: rows
                   outside and columns inside, as in the matmul: a group that starts within a tile fetches
                   its weights twice, and the tile's result cannot be completed once other columns were
                   stored
  visits           see tpu_visits.py: 13 us as XLA ops -> 0.3
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from qwix_kernels.matmul import tpu_epilogue, tpu_rows, tpu_weights
from qwix_kernels.matmul.tpu_config import pl_cdiv
from qwix_kernels.matmul.tpu_kernel import dot_block
from qwix_kernels.ragged_matmul.tpu_plan import GmmPlan
from qwix_kernels.ragged_matmul.tpu_visits import FETCH, HI, LO, MATRIX, TILE, field

Refs = dict[str, Any]


def kernel(plan: GmmPlan, emulate: bool, names: tuple[str, ...], visits: Any, *refs: Any) -> None:
    """One grid step. `names` says which refs there are: see `tpu.run`."""
    r, p = dict(zip(names, refs, strict=True)), plan.matmul
    column, visit, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    get = lambda which: field(plan.most, visits, which, visit)
    before = jnp.maximum(visit - 1, 0)
    new = lambda which: (visit == 0) | (get(which) != field(plan.most, visits, which, before))
    if plan.keep:
        kept = {name: r[name].at[get(FETCH)] for name in ("lhs_ready", "row_scale") if name in r}
        r |= kept
    if p.has_prologue:
        first = new(FETCH) & (column == 0) if plan.keep else new(FETCH)

        @pl.when(first)
        def _():
            tpu_rows.prepare(p, r, step, p.block_m)

    if p.prepare_rhs:

        @pl.when(new(MATRIX) if p.steps_k == 1 else True)
        def _():
            for weight in tpu_epilogue.weights(p, r):
                tpu_weights.prepare(p, weight, step)

    lo, hi = get(LO), get(HI)
    last = step == p.steps_k - 1

    @pl.when(new(TILE) & last & ((lo > 0) | (hi < p.block_m)))
    def _():
        r["out"][0] = jnp.zeros((p.block_m, p.block_n), r["out"].dtype)

    if plan.part == p.block_m:

        @pl.when(lo < hi)
        def _():
            _rows_step(plan, emulate, r, step, slice(0, plan.part), 0, lo, hi)

        return

    @pl.loop(lo // plan.part, pl_cdiv(hi, plan.part))
    def _(i):
        start = pl.multiple_of(i * plan.part, plan.part)
        _rows_step(plan, emulate, r, step, pl.ds(start, plan.part), start, lo, hi)


def _rows_step(
    plan: GmmPlan,
    emulate: bool,
    r: Refs,
    step: jax.Array,
    rows: Any,
    start: Any,
    lo: jax.Array,
    hi: jax.Array,
) -> None:
    """Dots, running sums and result of the part of the tile from row `start`."""
    p = plan.matmul
    weights = tpu_epilogue.weights(p, r)
    if p.steps_k == 1:
        _store(plan, r, rows, start, [dot_block(p, emulate, w, step, rows) for w in weights], lo, hi)
        return

    @pl.when(step == 0)
    def _():
        for w in weights:
            w["acc"][rows, :] = jnp.zeros((plan.part, p.block_n), p.acc)

    for w in weights:
        w["acc"][rows, :] += dot_block(p, emulate, w, step, rows)

    @pl.when(step == p.steps_k - 1)
    def _():
        _store(plan, r, rows, start, [w["acc"][rows, :] for w in weights], lo, hi)


def _store(
    plan: GmmPlan, r: Refs, rows: Any, start: Any, sums: list[jax.Array], lo: jax.Array, hi: jax.Array
) -> None:
    """Stores those rows of the part that are the group's."""
    z, out = tpu_epilogue.result(plan.matmul, r, rows, sums), r["out"]
    row = lax.broadcasted_iota(jnp.int32, z.shape, 0) + start
    z = jnp.where((row >= lo) & (row < hi), z, out[0, rows, :].astype(z.dtype))
    out[0, rows, :] = z.astype(out.dtype)
