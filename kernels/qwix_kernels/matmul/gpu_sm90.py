"""Quantized matmul on Hopper: one Pallas Mosaic GPU kernel for every scheme.

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
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwix_kernels.chips import Chip
from qwix_kernels.gpu_blocks import WARPGROUP, interpreted, transforms
from qwix_kernels.matmul import gpu_values
from qwix_kernels.matmul.gpu_estimate import estimate, heuristic_config
from qwix_kernels.matmul.gpu_plan import MEMORY_REGISTERS, Config, Plan, check, resolve, varies
from qwix_kernels.problem import MatmulProblem, Tensor, dtype_bits

__all__ = ["Config", "check", "estimate", "heuristic_config", "run"]

# Blocks of rows that are worked on together, so that what they share stays in the L2 cache.
_TOGETHER = 8
# Up to so many rows, scales are fetched before the sum: they take few registers then.
_EARLY = 64
Scales = tuple[jax.Array | None, jax.Array | None]


def run(
    problem: MatmulProblem, lhs: Tensor, rhs: Tensor, *, config: Config, chip: Chip, interpret: Any = False
) -> jax.Array:
    """[batch, M, N] in `problem.out_dtype`, of lhs [batch or 1, M, K] and rhs [batch or 1, N, K].

    Raises NotImplementedError where the config does not fit the problem.
    """
    plan = resolve(problem, chip, config)
    named = operands(plan, lhs, rhs)
    scratch = scratch_types(plan, bool(interpret))
    sms = min(chip.sms, plan.items)
    made = plgpu.kernel(
        lambda *refs: _kernel(plan, sms, dict(zip((*named, "out", *scratch), refs, strict=True))),
        out_type=_out_type(plan),
        grid=(sms,),
        grid_names=("sm",),
        num_threads=plan.warpgroups + 1,
        thread_name="wg",
        scratch_types=list(scratch.values()),
        compiler_params=WARPGROUP,
        **interpreted(interpret),
    )(*named.values())
    return _finished(plan, made, named) if plan.partial else made


def operands(plan: Plan, lhs: Tensor, rhs: Tensor) -> dict[str, jax.Array]:
    """What the kernel reads, by name. Scales are float32, and have an entry for each row that a block has."""
    p, c = plan.problem, plan.config
    rows, columns = plan.blocks[0] * c.block_m, plan.blocks[1] * c.block_n
    values = lhs.values.astype(jnp.int8) if lhs.values.dtype == jnp.int4 else lhs.values
    out = {"lhs": values, "rhs": rhs.values}
    tiles = p.k // plan.scale_k
    if p.rhs.is_quantized:
        out["rhs_scale"] = _along(rhs.scale, p.rhs.free, columns, tiles)
    if p.lhs.is_quantized:
        out["lhs_scale"] = _along(lhs.scale, p.m, rows, tiles if varies(p.lhs, p) else 1)
    if rhs.zero_point is not None:
        out["rhs_zero"] = _along(rhs.zero_point.astype(jnp.int32), p.rhs.free, columns, tiles)
    return out


def _along(x: jax.Array, size: int, padded: int, tiles: int) -> jax.Array:
    """[batch, free', K'] scales or zero points as float32 [batch, tiles, padded]."""
    x = jnp.repeat(x.astype(jnp.float32), size // x.shape[1], axis=1)
    x = jnp.repeat(jnp.swapaxes(x, 1, 2), tiles // x.shape[2], axis=1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, padded - size)))


def _out_type(plan: Plan) -> jax.ShapeDtypeStruct:
    p, c = plan.problem, plan.config
    if not plan.partial:
        return jax.ShapeDtypeStruct((p.batch, p.m, p.n), p.out_dtype)
    rows = plan.blocks[0] * c.block_m  # so that the copy engine takes any M
    dtype = "float32" if c.strategy != "once" else plan.acc
    return jax.ShapeDtypeStruct((c.splits, p.batch, p.n, rows), dtype)


def _finished(plan: Plan, parts: jax.Array, named: dict[str, jax.Array]) -> jax.Array:
    """The result of the parts [splits, batch, N, M]: added up, scaled, in the dtype that is asked for."""
    p = plan.problem
    z = jnp.swapaxes(jnp.sum(parts, 0, dtype=parts.dtype)[:, :, : p.m], 1, 2)
    if p.out_dtype == "int32":
        return z
    z = z.astype(jnp.float32)
    if "rhs_scale" in named and plan.config.strategy == "once":
        z = z * named["rhs_scale"][:, 0, None, : p.n]
    if "lhs_scale" in named and not varies(p.lhs, p):
        z = z * named["lhs_scale"][:, 0, : p.m, None]
    return z.astype(p.out_dtype)


def scratch_types(plan: Plan, interpret: bool) -> dict[str, Any]:
    """Shared memory and barriers, by name."""
    c = plan.config
    out: dict[str, Any] = {}
    for name, (block, dtype) in plan.streams.items():
        small = name not in ("lhs", "rhs")
        how = () if small else transforms(math.gcd(plan.run_k, plan.problem.k), dtype)
        shape = block if small or c.warpgroups_k == 1 else (c.warpgroups_k, block[0], plan.tile_k)
        out[f"{name}_stages"] = plgpu.SMEM((c.stages, *shape), jnp.dtype(dtype), transforms=how)
    out["arrived"] = plgpu.Barrier(num_arrivals=_copies(plan), num_barriers=c.stages)
    out["free"] = plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=c.stages)
    made = _out_type(plan).dtype
    chunk = (plan.tile_n, plan.epilogue_m) if plan.partial else (plan.epilogue_m, plan.tile_n)
    across = chunk[1] if plan.partial else math.gcd(chunk[1], plan.problem.n)
    how = transforms(min(across, 1024 // dtype_bits(made.name)), made.name)
    out["leaving"] = plgpu.SMEM((c.warpgroups_n, 2, *chunk), made, transforms=how)
    if c.warpgroups_k > 1:
        dtype = "float32" if c.strategy != "once" else plan.acc
        shape = (c.warpgroups_n, c.warpgroups_k - 1, plan.tile_n, c.block_m)
        out["parts"] = plgpu.SMEM(shape, jnp.dtype(dtype), transforms=transforms(min(c.block_m, 32), dtype))
        out["parts_full"] = plgpu.Barrier(num_arrivals=c.warpgroups_k - 1, num_barriers=c.warpgroups_n)
        out["parts_free"] = plgpu.Barrier(num_barriers=c.warpgroups_n)
    if interpret and plan.widens:
        # The interpreter's WGMMA has no operand in registers: it goes through here.
        shape = (plan.warpgroups, plan.tile_n, plan.tile_k)
        out["registers"] = plgpu.SMEM(
            shape, jnp.dtype(plan.dot), transforms=transforms(plan.tile_k, plan.dot)
        )
    return out


def _copies(plan: Plan) -> int:
    big = 2 * plan.config.warpgroups_k
    return big + len(plan.streams) - 2


# --- the kernel


def _kernel(plan: Plan, sms: int, refs: dict[str, Any]) -> None:
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
            start = (j if name.startswith("rhs") else i) * size[-1 if "_" in name else 0]
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
    mine = Mine(plan, refs, warpgroup, which)
    scales = _scales(mine, batch, i, j) if c.block_m <= _EARLY else None
    if c.strategy == "after":
        z = _sum_after(mine)
    else:
        shape = (plan.tile_n, c.block_m)
        z = pl.run_scoped(functools.partial(_sum, mine), plgpu.ACC(shape, jnp.dtype(plan.acc)))
    _leave(mine, split, batch, i, j, z, scales)


class Mine:
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
        ref = (
            self.refs[name].at[stage, self.part]
            if plan.config.warpgroups_k > 1
            else self.refs[name].at[stage]
        )
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
        if "rhs_zero_stages" in self.refs:
            w = w - lax.broadcast_in_dim(
                self._of_columns("rhs_zero", stage, run).astype(w.dtype), w.shape, (0,)
            )
        if plan.config.strategy == "before":
            w = w * lax.broadcast_in_dim(
                self._of_columns("rhs_scale", stage, run).astype(w.dtype), w.shape, (0,)
            )
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
            stored = self.refs["registers"].at[
                self.warpgroup, :, pl.ds(run * self.plan.run_k, self.plan.run_k)
            ]
            stored[...] = w
            plgpu.commit_smem()
            w = stored
        plgpu.wgmma(acc, w, self._run("lhs_stages", stage, run).transpose((1, 0)))

    def scaled(self, z: jax.Array, stage, run: int) -> jax.Array:
        """The sum of one run of K, times its scales, in float32."""
        z = z.astype(jnp.float32)
        z = z * lax.broadcast_in_dim(self._of_columns("rhs_scale", stage, run), z.shape, (0,))
        if "lhs_scale_stages" in self.refs:
            scale = plgpu.load(self.refs["lhs_scale_stages"].at[stage, self.tile(run)], optimized=False)
            z = z * lax.broadcast_in_dim(scale, z.shape, (1,))
        return z


def _sum(mine: Mine, acc: Any) -> jax.Array:
    """The sum over K, one stage after the other."""

    @pl.loop(0, mine.plan.steps)
    def _(k):
        stage = mine.arrived(k)
        for run in range(mine.plan.tile_k // mine.plan.run_k):
            mine.multiply(acc, mine.weights(stage, run), stage, run)
        plgpu.wgmma_wait(0)
        mine.release(stage)

    return acc[...]


def _sum_after(mine: Mine) -> jax.Array:
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


def _leave(mine: Mine, split, batch, i, j, z: jax.Array, scales: Scales | None) -> None:
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


def _scales(mine: Mine, batch, i, j) -> Scales:
    """What the whole sum is multiplied with: the columns' scales, and the rows'."""
    plan, refs, c = mine.plan, mine.refs, mine.plan.config

    def of(name: str, first, size: int) -> jax.Array:
        ref = refs[name]
        return plgpu.load(ref.at[_batch_of(ref, batch), 0, pl.ds(first, size)], optimized=False)

    columns = rows = None
    if "rhs_scale" in refs and c.strategy == "once" and not plan.partial:
        columns = of("rhs_scale", j * c.block_n + mine.column * plan.tile_n, plan.tile_n)
    if "lhs_scale" in refs and "lhs_scale_stages" not in refs and not plan.partial:
        rows = of("lhs_scale", i * c.block_m, c.block_m)
    return columns, rows


def _store(mine: Mine, split, batch, i, j, z: jax.Array, scales: Scales | None) -> None:
    """Scales the sum and copies it out, some rows of the result at a time."""
    plan, refs, column = mine.plan, mine.refs, mine.column
    p, c = plan.problem, plan.config
    columns = pl.ds(j * c.block_n + column * plan.tile_n, plan.tile_n)
    if not plan.partial:
        z = z.astype(jnp.float32)
        for axis, scale in enumerate(_scales(mine, batch, i, j) if scales is None else scales):
            z = z if scale is None else z * lax.broadcast_in_dim(scale, z.shape, (axis,))
        z = z.astype(p.out_dtype)
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
