"""The epilogue of the TPU matmul kernel: from the running sums of some rows to the stored result.

Everything is float32 here. Scales go on, then bias, activation or gate, residual; the result is rounded once,
or quantized as the lhs of the next matmul.

The ladder: static microseconds for silu(x @ gate) * (x @ up) of 1024 x 4096 x 14336, bfloat16 in and out.

                                            v5e     v5p     v6e     v7x
    w8a8        the chain of XLA ops          -       -       -     309
                two kernels, then XLA       858     345     259       -  (on v6e 75 + 75 + 108)
                one kernel, two weights     639     276     151     214
    w4a16_g128  two kernels, then XLA      1443       -     380       -
                one kernel, two weights    1222       -     268     210

What is saved is the second quantization of the rows and a pass over two products and the result. With 16 rows
HBM binds and the pass is small: w4a16_g128 79.0 -> 74.7 on v5e, 39.5 -> 37.3 on v6e.

One weight after the other, each over the whole K of the block, so that only one running sum has to stay in
registers; the first one waits in VMEM.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.matmul import elementwise, tpu_low_rank
from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.tpu_plan import Plan

Refs = dict[str, Any]


def weights(plan: Plan, r: Refs) -> list[Refs]:
    """The refs as each weight of the problem is to see them: its own under the names of the rhs."""
    if plan.problem.products == 1:
        return [r]
    own = {name: r[other] for name in r if (other := _of_gate(name)) in r}
    return [r, r | own]


def _of_gate(name: str) -> str:
    return "gate_acc" if name == "acc" else "gate" + name.removeprefix("rhs") if name[:3] == "rhs" else ""


def lhs_scale(plan: Plan, r: Refs, step: Any, rows: Any, t: int) -> jax.Array:
    """One float32 scale per row: [rows, 1], or as wide as the block where it was stored along the lanes."""
    if plan.spreads_row_scale:
        return values.tile_lanes(r["row_scale"][step, t, rows, :], plan.block_n)
    if plan.problem.quantize_lhs is not None and not plan.rows_given:
        return r["row_scale"][step, rows, t : t + 1]
    return r["lhs_scale"][0, 0, values.given_rows(r["lhs_scale"], rows), t : t + 1].astype(jnp.float32)


def finish(plan: Plan, r: Refs, rows: Any, sums: list[jax.Array], emulate: bool) -> None:
    """Makes the result of the sums with each weight, and stores the rows."""
    e, z = plan.problem.epilogue, result(plan, r, rows, sums, emulate)
    if e and e.quantize:
        _store_quantized(plan, r, rows, z)
    else:
        r["out"][0, rows, :] = z.astype(plan.problem.out_dtype)


def result(plan: Plan, r: Refs, rows: Any, sums: list[jax.Array], emulate: bool = False) -> jax.Array:
    """What is stored, before it is rounded or quantized: of the sums with each weight."""
    e = plan.problem.epilogue
    sums = [_scaled(plan, w, rows, s) for w, s in zip(weights(plan, r), sums, strict=True)]
    if plan.problem.low_rank:
        sums[0] = sums[0].astype(jnp.float32) + tpu_low_rank.added(emulate, r, rows)
    if e is None:
        return sums[0]
    z, *gate = [s.astype(jnp.float32) for s in sums]
    if e.bias:
        z = z + r["bias"][0].astype(jnp.float32)
    if gate and e.gate_bias:
        gate = [gate[0] + r["gate_bias"][0].astype(jnp.float32)]
    z = elementwise.activate(gate[0], e.activation) * z if gate else elementwise.activate(z, e.activation)
    return z + r["residual"][0, rows, :].astype(jnp.float32) if e.residual else z


def _scaled(plan: Plan, r: Refs, rows: Any, total: jax.Array) -> jax.Array:
    """What is left of the scales: those per row and per column."""
    if plan.problem.rhs.is_quantized and not plan.rhs_tile:
        total = total.astype(jnp.float32) * r["rhs_scale"][0, 0, :1, :].astype(jnp.float32)
    if plan.scales_lhs and not plan.lhs_tile:
        total = total.astype(jnp.float32) * lhs_scale(plan, r, plan.steps_k - 1, rows, 0)
    return total


def _store_quantized(plan: Plan, r: Refs, rows: Any, z: jax.Array) -> None:
    """Values, and the scales that were found, by row or by row and tile of N."""
    assert plan.problem.epilogue and plan.problem.epilogue.quantize
    q = plan.problem.epilogue.quantize
    groups = values.lane_groups(plan.block_n, plan.out_tile)
    whole = None
    if q.static:
        given = r["out_scale"][0, rows if r["out_scale"].shape[1] > 1 else slice(None), :]
        whole = 1.0 / given.astype(jnp.float32)
    elif not plan.out_tile:
        scale = elementwise.row_scale(values.row_absmax([z[:, lanes] for lanes, _ in groups]), q)
        r["out_scales"][0, 0, rows, :] = scale
        whole = 1.0 / scale
    for lanes, tiles in groups:
        if whole is None:
            scale = elementwise.row_scale(values.row_absmax([z[:, lanes]]), q)
            t = tiles[0][0]
            r["out_scales"][0, 0, rows, t : t + 1] = scale
            factor = 1.0 / scale
        else:
            factor = whole[:, lanes] if whole.shape[1] > 1 else whole
        stored = values.quantize(z[:, lanes] * factor, q)
        r["out"][0, rows, lanes] = values.narrow(stored, q.dtype)
