"""The Hopper matmul kernel: who does what, and what was tried.

    out^T [N, M] = W [N, K] x^T [K, M]        gpu_plan.py says why it is transposed, and the strategies

A thread block is one memory warpgroup and several that compute. The memory warpgroup runs ahead over all the
blocks of K of all the blocks of the result that are this thread block's: it waits for a stage to be free and
starts the copies into it. So the pipeline never drains: while one block of the result is scaled and stored,
the next one's operands arrive. The computing warpgroups multiply what has arrived by WGMMA, each its own
columns or its own part of K, and say that the stage is free.

The result leaves the registers transposed, through shared memory, in chunks of rows. 32-bit results and parts
of a sum (`Plan.partial`) leave as they are, [splits, batch, N, M], and are finished by XLA.

What was tried, in microseconds of the kernel alone, measured on an H100 80GB HBM3 (jax 0.11.2, 2026-11-22):

    4096 x 4096 x 4096                                     w8a8  wf8af8  w4a16  w8a16  wf8a16
    XLA: 173 in bfloat16; its own dot of these types         97     126
    128 columns x 128 rows a warpgroup                       93      98    208    214     194
    64 columns x 256 rows                                    92      96    177    185     178
    the pipeline runs over the blocks of the result          90      93    181    186     179
    a stage is released one step later                      103     105
    weights are read a step before they are widened                                216     205
    192 rows; three warpgroups of 64 x 128                  104            233    250     219

    scales of tiles of 128: w8a8 139 (128 x 128 a block), 136 (128 x 192), 132 (256 of K a step); wf8af8 119;
    w4a16 224 (after the dot), 186 (before)
    nf4: a tree of selects 446; byte permutations, rows reordered so that threads need not exchange weights
    516 (330 of them for the rows); byte permutations after the exchange 205

    16 x 4096 x 14336, weights from HBM (a copy of 1 GiB moves 3.03 TB/s)       w4a16   share of the copy
    one warpgroup, 64 columns, 128 of K a step                                   24.5        40 %
    two warpgroups                                                               18.2        54
    four, 2 x 2 over columns and K, 512 of K a step                              16.0        62
    4-bit weights read 32 bits at a time (64 byte loads before)                  16.2        61
    ... and rows reordered, so that none are exchanged                           16.6        59
    each thread block begins elsewhere in K                                      17.0        58
    K split over thread blocks                                           18.4 to 21.8
    the same kernel on 16 x 8192 x 28672                                         51.0        77
    int8 and 8-bit float weights, two warpgroups: w8a8 22.1 (89 %), w8a16 24.7 (79 %), wf8a16 24.8 (79 %)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwix_kernels.matmul import gpu_values
from qwix_kernels.matmul.elementwise import activate
from qwix_kernels.matmul.gpu_plan import MEMORY_REGISTERS, Plan
from qwix_kernels.problem import Epilogue

# Blocks of rows that are worked on together, so that what they share stays in the L2 cache.
_TOGETHER = 8
# Up to so many rows, scales are fetched before the sum: they take few registers then.
_EARLY = 64
Scales = tuple[jax.Array | None, jax.Array | None, jax.Array | None]


def kernel(plan: Plan, sms: int, refs: dict[str, Any]) -> None:
    """What one warpgroup of one thread block does; `refs` are operands, result and scratch by name."""
    warpgroup = lax.axis_index("wg")

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        _for_each_block(plan, functools.partial(_bring, plan, refs))
        _drain(plan, refs, sms)

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        plgpu.set_max_registers(plan.registers, action="increase")
        _for_each_block(plan, functools.partial(_compute, plan, refs, warpgroup))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if plan.config.warpgroups_k > 1:
            column, part = lax.rem(warpgroup, plan.config.warpgroups_n), warpgroup // plan.config.warpgroups_n

            @pl.when(part > 0)
            def _():
                plgpu.barrier_wait(refs["parts_free"].at[column])


def _drain(plan: Plan, refs: dict[str, Any], sms: int) -> None:
    """Waits until all stages are free: a barrier must not be left in the middle of a phase."""
    mine = (plan.items - lax.axis_index("sm") + sms - 1) // sms
    turns = mine * plan.steps

    @pl.loop(lax.max(turns - plan.config.stages, jnp.int32(0)), turns)
    def _(turn):
        plgpu.barrier_wait(refs["free"].at[lax.rem(turn, plan.config.stages)])


def _for_each_block(plan: Plan, do: Any) -> None:
    """do(which, split, batch, block of M, block of N) for each that is this thread block's.

    `which`: how many came before.
    """
    blocks, splits = plan.blocks, plan.config.splits
    each = blocks[0] * blocks[1]

    @plgpu.nd_loop((plan.items,), collective_axes="sm")
    def _(loop: plgpu.NDLoopInfo):
        (item,) = loop.index
        place = plgpu.planar_snake(item % each, blocks, 1, _TOGETHER)
        outer = item // each
        do(loop.local_index, outer % splits, outer // splits, *place)


def _bring(plan: Plan, refs: dict[str, Any], which, split, batch, i, j) -> None:
    """Starts the copies of one block's operands, each as soon as its stage is free."""
    c = plan.config

    @pl.loop(0, plan.steps)
    def _(k):
        turn = which * plan.steps + k
        stage = lax.rem(turn, c.stages)

        @pl.when(turn >= c.stages)
        def _():
            plgpu.barrier_wait(refs["free"].at[stage])

        block = split * plan.steps + k
        for name, (size, _dtype) in plan.streams.items():
            start = j * c.block_n if name.startswith("rhs") else i * c.block_m
            source = refs[name].at[_batch_of(refs[name], batch)]
            target, arrived = refs[f"{name}_stages"].at[stage], refs["arrived"].at[stage]
            if "_" in name:
                first = block * c.block_k // plan.scale_k
                source = source.at[pl.ds(first, size[0]), pl.ds(start, size[1])]
                plgpu.copy_gmem_to_smem(source, target, arrived)
                continue
            for part in range(c.warpgroups_k):
                first = block * c.block_k + part * plan.tile_k
                piece = source.at[pl.ds(start, size[0]), pl.ds(first, plan.tile_k)]
                into = target.at[part] if c.warpgroups_k > 1 else target
                plgpu.copy_gmem_to_smem(piece, into, arrived)


def _batch_of(ref: Any, batch) -> Any:
    return batch if ref.shape[0] > 1 else 0


def _compute(plan: Plan, refs: dict[str, Any], warpgroup, which, split, batch, i, j) -> None:
    """One warpgroup's part of one block: the sum over K, and what follows it."""
    c = plan.config
    mine = _Mine(plan, refs, warpgroup, which)
    scales = _scales(mine, batch, i, j) if c.block_m <= _EARLY else None
    if c.strategy == "after":
        z = _sum_after(mine)
    else:
        shape = (plan.tile_n, c.block_m)
        z = pl.run_scoped(functools.partial(_sum, mine), plgpu.ACC(shape, jnp.dtype(plan.acc)))
    _leave(mine, split, batch, i, j, z, scales)


class _Mine:
    """What one warpgroup reads for one block of the result."""

    def __init__(self, plan: Plan, refs: dict[str, Any], warpgroup, which):
        self.plan, self.refs, self.warpgroup, self.which = plan, refs, warpgroup, which
        self.column = lax.rem(warpgroup, plan.config.warpgroups_n)
        self.part = warpgroup // plan.config.warpgroups_n
        self.emulated = "registers" in refs

    def arrived(self, k) -> Any:
        """The stage of the k-th block of K, once it is there."""
        stage = lax.rem(self.which * self.plan.steps + k, self.plan.config.stages)
        plgpu.barrier_wait(self.refs["arrived"].at[stage])
        return stage

    def release(self, stage) -> None:
        """Says that a stage has been read; what went into registers, before the next copy into it."""
        if self.plan.widens or len(self.plan.streams) > 2:
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.refs["free"].at[stage])

    def _run(self, name: str, stage, run: int) -> Any:
        plan = self.plan
        parts = (self.part,) if plan.config.warpgroups_k > 1 else ()
        ref = self.refs[name].at[(stage, *parts)]
        within = pl.ds(run * plan.run_k, plan.run_k) if plan.run_k < plan.tile_k else slice(None)
        if name == "rhs_stages" and plan.config.warpgroups_n > 1:
            return ref.at[pl.ds(self.column * plan.tile_n, plan.tile_n), within]
        return ref.at[:, within]

    def weights(self, stage, run: int = 0) -> Any:
        """One run of K of the weight as it is multiplied: in shared memory, or widened in registers."""
        plan = self.plan
        w = self._run("rhs_stages", stage, run)
        if not plan.widens:
            return w
        w = gpu_values.widened(w, plan.dot, plan.problem.rhs.codebook, emulated=self.emulated)
        along_k = lambda x: lax.broadcast_in_dim(x.astype(w.dtype), w.shape, (0,))
        if "rhs_zero_stages" in self.refs:
            w = w - along_k(self._of_columns("rhs_zero", stage, run))
        if plan.config.strategy == "before":
            w = w * along_k(self._of_columns("rhs_scale", stage, run))
        return w

    def _of_columns(self, name: str, stage, run: int) -> jax.Array:
        tile = self.tile(run)
        mine = pl.ds(self.column * self.plan.tile_n, self.plan.tile_n)
        return plgpu.load(self.refs[f"{name}_stages"].at[stage, tile, mine], optimized=False)

    def tile(self, run: int) -> Any:
        """Which of a stage's scales a run of K has."""
        return (self.part * self.plan.tile_k + run * self.plan.run_k) // self.plan.scale_k

    def multiply(self, acc, w: Any, stage, run: int = 0) -> None:
        """acc += w x^T over one run of K; not waited for."""
        if self.plan.widens and self.emulated:
            within = pl.ds(run * self.plan.run_k, self.plan.run_k)
            stored = self.refs["registers"].at[self.warpgroup, :, within]
            stored[...] = w
            plgpu.commit_smem()
            w = stored
        plgpu.wgmma(acc, w, self._run("lhs_stages", stage, run).transpose((1, 0)))

    def scaled(self, z: jax.Array, stage, run: int) -> jax.Array:
        """The sum of one run of K, times its scales, in float32."""
        z = z.astype(jnp.float32)
        z = z * lax.broadcast_in_dim(self._of_columns("rhs_scale", stage, run), z.shape, (0,))
        if "lhs_scale_stages" in self.refs:
            rows = pl.ds(0, self.plan.config.block_m)
            scale = plgpu.load(self.refs["lhs_scale_stages"].at[stage, self.tile(run), rows], optimized=False)
            z = z * lax.broadcast_in_dim(scale, z.shape, (1,))
        return z


def _sum(mine: _Mine, acc: Any) -> jax.Array:
    """The sum over K, one stage after the other."""

    @pl.loop(0, mine.plan.steps)
    def _(k):
        stage = mine.arrived(k)
        for run in range(mine.plan.tile_k // mine.plan.run_k):
            mine.multiply(acc, mine.weights(stage, run), stage, run)
        plgpu.wgmma_wait(0)
        mine.release(stage)

    return acc[...]


def _sum_after(mine: _Mine) -> jax.Array:
    """The sum over K in float32, of runs of K that are summed on their own and scaled."""
    plan = mine.plan
    shape = (plan.tile_n, plan.config.block_m)

    def step(k, z):
        stage = mine.arrived(k)
        for run in range(plan.tile_k // plan.run_k):

            def one(acc, run=run, stage=stage):
                mine.multiply(acc, mine.weights(stage, run), stage, run)
                plgpu.wgmma_wait(0)
                return acc[...]

            z = z + mine.scaled(pl.run_scoped(one, plgpu.ACC(shape, jnp.dtype(plan.acc))), stage, run)
        mine.release(stage)
        return z

    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, plan.steps, step, zeros)


def _leave(mine: _Mine, split, batch, i, j, z: jax.Array, scales: Scales | None) -> None:
    """What follows the sum: the parts of several warpgroups are added up, scaled and stored."""
    plan, refs, which, column, part = mine.plan, mine.refs, mine.which, mine.column, mine.part
    if plan.config.warpgroups_k == 1:
        _store(mine, split, batch, i, j, z, scales)
        return
    parts = refs["parts"].at[column]

    @pl.when(part > 0)
    def _():
        @pl.when(which > 0)
        def _():
            plgpu.barrier_wait(refs["parts_free"].at[column])

        parts[part - 1] = z
        plgpu.barrier_arrive(refs["parts_full"].at[column])

    @pl.when(part == 0)
    def _():
        plgpu.barrier_wait(refs["parts_full"].at[column])
        total = z
        for other in range(plan.config.warpgroups_k - 1):
            total = total + plgpu.load(parts.at[other], layout=plgpu.Layout.WGMMA)
        plgpu.barrier_arrive(refs["parts_free"].at[column])
        _store(mine, split, batch, i, j, total, scales)


def _scales(mine: _Mine, batch, i, j) -> Scales:
    """What the whole sum is multiplied with, the columns' scales and the rows', and the bias."""
    plan, refs, c = mine.plan, mine.refs, mine.plan.config

    def of(name: str, first, size: int) -> jax.Array:
        ref = refs[name]
        return plgpu.load(ref.at[_batch_of(ref, batch), 0, pl.ds(first, size)], optimized=False)

    columns = rows = bias = None
    first = j * c.block_n + mine.column * plan.tile_n
    if "rhs_scale" in refs and c.strategy == "once" and not plan.partial:
        columns = of("rhs_scale", first, plan.tile_n)
    if "lhs_scale" in refs and "lhs_scale_stages" not in refs and not plan.partial:
        rows = of("lhs_scale", i * c.block_m, c.block_m)
    if "bias" in refs and not plan.partial:
        bias = of("bias", first, plan.tile_n)
    return columns, rows, bias


def _store(mine: _Mine, split, batch, i, j, z: jax.Array, scales: Scales | None) -> None:
    """Scales the sum and copies it out, some rows of the result at a time."""
    plan, refs, column = mine.plan, mine.refs, mine.column
    p, c = plan.problem, plan.config
    columns = pl.ds(j * c.block_n + column * plan.tile_n, plan.tile_n)
    if not plan.partial:
        z = z.astype(jnp.float32)
        *factors, bias = _scales(mine, batch, i, j) if scales is None else scales
        for axis, scale in enumerate(factors):
            z = z if scale is None else z * lax.broadcast_in_dim(scale, z.shape, (axis,))
        z = z if bias is None else z + lax.broadcast_in_dim(bias, z.shape, (0,))
        z = activate(z, (p.epilogue or Epilogue()).activation).astype(p.out_dtype)
    out = refs["out"].at[split, batch] if plan.partial else refs["out"].at[batch]
    for number, start in enumerate(range(0, c.block_m, plan.epilogue_m)):
        chunk = z[:, start : start + plan.epilogue_m]
        leaving = refs["leaving"].at[column, number % 2]
        rows = pl.ds(i * c.block_m + start, plan.epilogue_m)
        plgpu.wait_smem_to_gmem(1 if number else 0, wait_read_only=True)
        if plan.partial:
            leaving[...] = chunk
            target = out.at[columns, rows]
        else:
            leaving.transpose((1, 0))[...] = plgpu.layout_cast(chunk, plgpu.Layout.WGMMA_TRANSPOSED)
            target = out.at[rows, columns]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(leaving, target)
