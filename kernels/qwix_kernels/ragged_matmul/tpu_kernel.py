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
