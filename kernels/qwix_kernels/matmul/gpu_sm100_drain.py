"""Blackwell matmul: the warpgroups that turn accumulators into results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwix_kernels.matmul.gpu_sm100_plan import LANES, Plan
from qwix_kernels.matmul.gpu_sm100_work import Item, each_item, own_column


def drain(plan: Plan, r: Any, part: int) -> None:
    """The rows of part `part` of each block."""
    own = plan.block_m // plan.drains

    def item(at: Item) -> None:
        columns = pl.ds(own_column(plan, at), LANES)
        x, w = (at.batch if b > 1 else 0 for b in (plan.x_batch, plan.w_batch))
        per_row = {}
        if plan.w_scaled and not plan.w_tile_k:
            per_row["w"] = plgpu.load(r.w_scale.at[w, columns], optimized=False)

        def store(step: int, z: jax.Array) -> None:
            """`z`: the sums [128 columns, drain_m rows] of a step."""
            rows = pl.ds(at.row + part * own + step * plan.drain_m, plan.drain_m)
            buffer = lax.rem(at.turn * (own // plan.drain_m) + step, 2)
            if "w" in per_row:
                z = z * lax.broadcast_in_dim(per_row["w"], z.shape, (0,))
            if plan.x_scaled and not plan.x_tile_k:
                x_scale = plgpu.load(r.x_scale.at[x, rows], optimized=False)
                z = z * lax.broadcast_in_dim(x_scale, z.shape, (1,))
            staged = r.out_s.at[part, buffer]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            staged.transpose((1, 0))[...] = z.astype(plan.out_dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, r.out.at[at.split, at.batch, rows, columns])

        if plan.scales_in_runs:
            _drain_runs(plan, r, at, part, store)
            return
        slot = lax.rem(at.turn, plan.acc_slots)
        plgpu.barrier_wait(r.done.at[slot])
        for step in range(own // plan.drain_m):
            first = part * own + step * plan.drain_m
            z = plgpu.async_load_tmem(r.acc.at[:, pl.ds(slot * plan.block_m + first, plan.drain_m)])
            if step == own // plan.drain_m - 1:
                plgpu.wait_load_tmem()
                plgpu.barrier_arrive(r.free.at[slot])
            store(step, z if plan.out_dtype == "int32" else z.astype(jnp.float32))

    each_item(plan, item)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _drain_runs(plan: Plan, r: Any, at: Item, part: int, store: Callable[..., None]) -> None:
    """Sums runs of K in registers, each times its scales."""
    own = plan.block_m // plan.drains
    count = own // plan.drain_m

    def one_run(run: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        turn = at.turn * plan.runs + run
        slot = lax.rem(turn, plan.acc_slots)
        plgpu.barrier_wait(r.scales_full.at[slot])
        w_scale = plgpu.load(r.w_scale_s.at[slot], optimized=False) if plan.w_tile_k else None
        plgpu.barrier_wait(r.done.at[slot])
        new = []
        for step, total in enumerate(sums):
            first = part * own + step * plan.drain_m
            z = plgpu.async_load_tmem(r.acc.at[:, pl.ds(slot * plan.block_m + first, plan.drain_m)])
            z = z.astype(jnp.float32)
            if w_scale is not None:
                z = z * lax.broadcast_in_dim(w_scale, z.shape, (0,))
            if plan.x_tile_k:
                x_scale = plgpu.load(r.x_scale_s.at[slot, pl.ds(first, plan.drain_m)], optimized=False)
                z = z * lax.broadcast_in_dim(x_scale, z.shape, (1,))
            new.append(total + z)
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(r.free.at[slot])
        plgpu.commit_smem()  # what was read here is written next by a copy
        plgpu.barrier_arrive(r.scales_free.at[slot])
        return tuple(new)

    zeros = tuple(jnp.zeros((LANES, plan.drain_m), jnp.float32) for _ in range(count))
    for step, total in enumerate(lax.fori_loop(0, plan.runs, one_run, zeros)):
        store(step, total)
