"""The gmm's kernel for NVIDIA Hopper: one persistent, warp-specialised Pallas Mosaic GPU kernel.

Turned round: out^T = W x^T. The weights [N, K] are the matrix instruction's first operand, which may come
through registers; so what is stored in 4 or 8 bits is widened there and never written. Their columns fill
its 64 rows however few rows a group has, and a group's rows its second side, from 8 to 256.

A work item is a block of columns of one visit (gpu_visits.py). One warpgroup copies: it walks along all steps
of all items of its multiprocessor, ahead of the others by as many steps as there are buffers, whatever they
are doing. The others compute, each its own columns of the item, and store.

Scales along K go on the sum of each step, which lies within one tile: of integers in int32, exactly, then
added up in float32. All other scales go on the sum over all of K.

A block's rows of other groups are computed and never stored. What is stored of a whole block is one copy; of
other blocks 8 rows at a time, as they lie in shared memory, and where a group starts or ends within 8 rows,
row by row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwix_kernels.gpu_blocks import WARPGROUP, interpreted, transforms
from qwix_kernels.matmul.gpu_plan import registers
from qwix_kernels.matmul.gpu_values import widened
from qwix_kernels.ragged_matmul.gpu_plan import GmmPlan, tile_columns
from qwix_kernels.ragged_matmul.gpu_visits import ALIGNED, FIELDS, FIRST, HI, LO, MATRIX

_MEMORY_REGISTERS = 40
_TURNS = 2  # items whose scales wait in shared memory


def call(plan: GmmPlan, arrays: dict[str, jax.Array], *, sms: int, interpret: Any) -> jax.Array:
    """[M, N] of the arrays that gpu.py makes."""
    p = plan.core
    emulate = bool(interpret) and plan.widens
    scratch = _scratch(plan, emulate)
    names = (*arrays, "out", *scratch)

    def body(*refs: Any) -> None:
        _kernel(plan, dict(zip(names, refs, strict=True)))

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((p.m, p.n), jnp.dtype(p.out_dtype)),
        grid=(sms,),
        grid_names=("sm",),
        num_threads=plan.config.warpgroups + 1,
        thread_name="wg",
        compiler_params=WARPGROUP,
        scratch_types=tuple(scratch.values()),
        **interpreted(interpret),
    )
    return run(*arrays.values())


def _scratch(plan: GmmPlan, emulate: bool) -> dict[str, Any]:
    p, c, dot, out = plan.core, plan.config, plan.dot, plan.core.out_dtype
    rhs = p.rhs.dtype
    # What is copied or multiplied at a time is whole tiles.
    along_k = math.gcd(p.k, plan.run_k)
    block = lambda rows, dtype: plgpu.SMEM(
        (c.stages, rows, c.block_k),
        jnp.dtype(dtype),
        transforms=transforms(tile_columns(along_k, dtype), dtype),
    )
    swizzled = transforms(tile_columns(math.gcd(p.n, c.tile_n), out), out)
    made: dict[str, Any] = {
        "w": block(c.block_n, rhs),
        "x": block(c.block_m, dot),
        "leaving": plgpu.SMEM(
            (c.warpgroups, 2, plan.leaving_m, c.tile_n), jnp.dtype(out), transforms=swizzled
        ),
        "row": plgpu.SMEM((c.warpgroups, ALIGNED, c.tile_n), jnp.dtype(out)),
    }
    runs = c.block_k // plan.run_k
    for name, size in (("rhs", c.block_n), ("lhs", c.block_m)):
        if name in plan.tiled:
            made[f"{name}_tiles"] = plgpu.SMEM((c.stages, runs, size), jnp.float32)
        if name in plan.whole:
            made[f"{name}_whole"] = plgpu.SMEM((_TURNS, size), jnp.float32)
    made["full"] = plgpu.Barrier(num_arrivals=2 + len(plan.tiled), num_barriers=c.stages)
    made["free"] = plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=c.stages)
    if plan.whole:
        made["scales_full"] = plgpu.Barrier(num_arrivals=len(plan.whole), num_barriers=_TURNS)
        made["scales_free"] = plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=_TURNS)
    if emulate:  # the interpreter multiplies from shared memory only
        shape = (c.warpgroups, c.tile_n, c.block_k)
        made["widened"] = plgpu.SMEM(
            shape, jnp.dtype(dot), transforms=transforms(tile_columns(along_k, dot), dot)
        )
    return made


def _kernel(plan: GmmPlan, r: dict[str, Any]) -> None:
    c = plan.config
    me = lax.axis_index("wg")

    @pl.when(me == c.warpgroups)
    def _():
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
        _items(plan, r, functools.partial(_copy, plan, r))
        # No barrier is left with an arrival that nothing has waited for.
        _of_all(plan, r, plgpu.barrier_wait)

    @pl.when(me < c.warpgroups)
    def _():
        plgpu.set_max_registers(registers(c.warpgroups), action="increase")
        _of_all(plan, r, plgpu.barrier_arrive)
        _items(plan, r, functools.partial(_compute, plan, r, me))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _of_all(plan: GmmPlan, r: dict[str, Any], do: Callable[[Any], None]) -> None:
    """do(barrier) of each place in shared memory that is free or not."""
    for stage in range(plan.config.stages):
        do(r["free"].at[stage])
    for turn in range(_TURNS if plan.whole else 0):
        do(r["scales_free"].at[turn])


def _items(plan: GmmPlan, r: dict[str, Any], item: Callable[..., Any]) -> None:
    """item(visit's fields, column block, turn, stage) -> next stage, for each item of this multiprocessor."""
    most, words = plan.most, r["words"]
    count = words[len(FIELDS) * most]

    def one(info: Any, carry: Any) -> Any:
        # Few column blocks at a time, for all visits: their weights stay in the cache while groups last.
        at, column = plgpu.planar_snake(info.index[0], (count, plan.columns), 1, plan.config.panel)
        fields = [words[field * most + at] for field in FIELDS]
        fields[FIRST] = pl.multiple_of(fields[FIRST], ALIGNED)
        return item(fields, column, lax.rem(info.local_index, _TURNS), carry)

    plgpu.nd_loop((count * plan.columns,), collective_axes="sm", init_carry=jnp.int32(0))(one)


def _steps(plan: GmmPlan, fields: list[Any]) -> Any:
    return jnp.where(fields[MATRIX] >= 0, plan.steps_k, 0)


def _next(plan: GmmPlan, stage: Any) -> Any:
    return jnp.where(stage == plan.config.stages - 1, 0, stage + 1)


def _copy(plan: GmmPlan, r: dict[str, Any], fields: list[Any], column: Any, turn: Any, stage: Any) -> Any:
    """Brings the scales of an item and the operands of all its steps."""
    c = plan.config
    columns, rows = pl.ds(column * c.block_n, c.block_n), pl.ds(fields[FIRST], c.block_m)
    runs = c.block_k // plan.run_k
    if plan.whole:
        plgpu.barrier_wait(r["scales_free"].at[turn])
        # Rows of no matrix get the zeros behind the last row's scale, whatever their own are.
        first = pl.multiple_of(jnp.where(fields[MATRIX] >= 0, fields[FIRST], plan.core.m), ALIGNED)
        scales = {"rhs": (jnp.maximum(fields[MATRIX], 0), columns), "lhs": (pl.ds(first, c.block_m),)}
        for name in plan.whole:
            source = r[f"{name}_scale"].at[scales[name]]
            plgpu.copy_gmem_to_smem(source, r[f"{name}_whole"].at[turn], r["scales_full"].at[turn])

    def step(k: Any, stage: Any) -> Any:
        depth, full = pl.ds(k * c.block_k, c.block_k), r["full"].at[stage]
        plgpu.barrier_wait(r["free"].at[stage])
        plgpu.copy_gmem_to_smem(r["rhs"].at[fields[MATRIX], columns, depth], r["w"].at[stage], full)
        plgpu.copy_gmem_to_smem(r["lhs"].at[rows, depth], r["x"].at[stage], full)
        tiles = pl.ds(lax.div(k, plan.steps_per_tile) * runs, runs)
        of_tiles = {"rhs": (fields[MATRIX], tiles, columns), "lhs": (tiles, rows)}
        for name in plan.tiled:
            source = r[f"{name}_scale"].at[of_tiles[name]]
            plgpu.copy_gmem_to_smem(source, r[f"{name}_tiles"].at[stage], full)
        return _next(plan, stage)

    return lax.fori_loop(0, _steps(plan, fields), step, stage)


def _compute(
    plan: GmmPlan, r: dict[str, Any], me: Any, fields: list[Any], column: Any, turn: Any, stage: Any
) -> Any:
    """Multiplies all steps of an item, and stores its rows."""
    c = plan.config
    sums = _sums_of_tiles if plan.tiled else _sums
    z, stage = sums(plan, r, me, _steps(plan, fields), stage)
    z = _scaled(plan, r, me, z, turn).astype(plan.core.out_dtype)
    column = column * c.block_n + me * c.tile_n
    for number, start in enumerate(range(0, c.block_m, plan.leaving_m)):
        leaving = r["leaving"].at[me, number % 2]
        # One group of copies for each part: the last one may still be on its way, from the other place.
        plgpu.wait_smem_to_gmem(1 if number else 0, wait_read_only=True)
        part = z[:, start : start + plan.leaving_m]
        # In this layout a thread's values are neighbours in a row of the result.
        leaving.transpose((1, 0))[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        first, lo, hi = (fields[field] for field in (FIRST, LO, HI))
        _store(plan, leaving, r["row"].at[me], r["out"], column, first + start, lo - start, hi - start)
        plgpu.commit_smem_to_gmem_group()
    return stage


def _sums(plan: GmmPlan, r: dict[str, Any], me: Any, steps: Any, stage: Any) -> tuple[Any, Any]:
    """([columns, rows] sums over all of K, next stage)."""
    c = plan.config

    def scope(acc: Any) -> Any:
        def some(_: Any, stage: Any) -> Any:
            stages = [stage]
            for _ in range(c.together - 1):
                stages.append(_next(plan, stages[-1]))
            for stage in stages:
                plgpu.barrier_wait(r["full"].at[stage])
            for stage in stages:
                _multiply(plan, r, me, stage, acc)
            plgpu.wgmma_wait(0)
            for stage in stages:
                _release(plan, r, stage)
            return _next(plan, stages[-1])

        end = lax.fori_loop(0, lax.div(steps, c.together), some, stage)
        return acc[...], end

    return pl.run_scoped(scope, plgpu.ACC((c.tile_n, c.block_m), jnp.dtype(plan.acc)))


def _sums_of_tiles(plan: GmmPlan, r: dict[str, Any], me: Any, steps: Any, stage: Any) -> tuple[Any, Any]:
    """As `_sums`, of the sums of all runs of K times their scales, in float32."""
    c = plan.config
    shape = (c.tile_n, c.block_m)

    def step(_: Any, carry: Any) -> Any:
        total, stage = carry
        plgpu.barrier_wait(r["full"].at[stage])
        for run in range(c.block_k // plan.run_k):

            def scope(acc: Any, run: int = run, stage: Any = stage) -> Any:
                _multiply(plan, r, me, stage, acc, run)
                return acc[...]

            z = pl.run_scoped(scope, plgpu.ACC(shape, jnp.dtype(plan.acc))).astype(jnp.float32)
            if "rhs" in plan.tiled:
                scale = r["rhs_tiles"].at[stage, run, pl.ds(me * c.tile_n, c.tile_n)]
                z = z * lax.broadcast_in_dim(plgpu.load(scale, optimized=False), shape, (0,))
            if "lhs" in plan.tiled:
                scale = plgpu.load(r["lhs_tiles"].at[stage, run], optimized=False)
                z = z * lax.broadcast_in_dim(scale, shape, (1,))
            total = total + z
        _release(plan, r, stage)
        return total, _next(plan, stage)

    return lax.fori_loop(0, steps, step, (jnp.zeros(shape, jnp.float32), stage))


def _multiply(plan: GmmPlan, r: dict[str, Any], me: Any, stage: Any, acc: Any, run: int = 0) -> None:
    """Adds the products of one step, or of one run of it, of this warpgroup's columns and all rows."""
    c = plan.config
    length = plan.run_k if plan.tiled else c.block_k
    within = pl.ds(run * length, length)
    weights = r["w"].at[stage, pl.ds(me * c.tile_n, c.tile_n), within]
    if plan.widens:
        codebook, emulated = plan.core.rhs.codebook, "widened" in r
        values = widened(weights, plan.dot, codebook, emulated=emulated)
        weights = values
        if emulated:
            weights = r["widened"].at[me, :, within]
            weights[...] = values
            plgpu.commit_smem()
    plgpu.wgmma(acc, weights, r["x"].at[stage, :, within].transpose((1, 0)))


def _release(plan: GmmPlan, r: dict[str, Any], stage: Any) -> None:
    """Says that a stage has been read. What went into registers is ordered before the next copy into it."""
    if plan.widens or plan.tiled:
        plgpu.commit_smem()
    plgpu.barrier_arrive(r["free"].at[stage])


def _scaled(plan: GmmPlan, r: dict[str, Any], me: Any, z: Any, turn: Any) -> Any:
    """The sums times the scales that do not change along K."""
    if not plan.whole:
        return z
    c, z = plan.config, z.astype(jnp.float32)
    plgpu.barrier_wait(r["scales_full"].at[turn])
    for name in plan.whole:
        mine = pl.ds(me * c.tile_n, c.tile_n) if name == "rhs" else slice(None)
        scale = plgpu.load(r[f"{name}_whole"].at[turn, mine], optimized=False)
        z = z * lax.broadcast_in_dim(scale, z.shape, (0,) if name == "rhs" else (1,))
    plgpu.commit_smem()
    plgpu.barrier_arrive(r["scales_free"].at[turn])
    return z


def _store(plan: GmmPlan, part: Any, row: Any, out: Any, column: Any, first: Any, lo: Any, hi: Any) -> None:
    """Stores rows lo to hi of a part of the warpgroup's sums, of which row 0 is row `first` of the result."""
    rows = plan.leaving_m
    columns = pl.ds(column, plan.config.tile_n)
    whole = (lo <= 0) & (rows <= hi)

    @pl.when(whole)
    def _():
        plgpu.copy_smem_to_gmem(part, out.at[pl.ds(first, rows), columns], commit_group=False)

    @pl.when(~whole)
    def _():
        @pl.loop(0, rows // ALIGNED)
        def _(eighth: Any) -> None:
            at = pl.multiple_of(eighth * ALIGNED, ALIGNED)
            eight = part.at[pl.ds(at, ALIGNED)]
            inside = (lo <= at) & (at + ALIGNED <= hi)

            @pl.when(inside)
            def _():
                there = out.at[pl.ds(first + at, ALIGNED), columns]
                plgpu.copy_smem_to_gmem(eight, there, commit_group=False)

            @pl.when(~inside & (lo < at + ALIGNED) & (at < hi))
            def _():
                plgpu.commit_smem_to_gmem_group()
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of rows stored before
                _store_rows(plan, eight, row, out, column, first + at, lo - at, hi - at)


def _store_rows(
    plan: GmmPlan, eight: Any, row: Any, out: Any, column: Any, first: Any, lo: Any, hi: Any
) -> None:
    """Stores rows lo to hi of 8. A copy of fewer than 8 takes rows that lie one after the other, so each is
    picked out of the 8, by a sum of it and zeros, and laid there."""
    p, width = plan.core, plan.config.tile_n
    z = plgpu.load(eight.transpose((1, 0)), layout=plgpu.Layout.WGMMA, optimized=False)
    z = z if p.out_dtype == "int32" else z.astype(jnp.float32)
    which = lax.broadcasted_iota(jnp.int32, z.shape, 1)
    # A copy of one row is not cut off at the end of the result's row: it would go on in the next one.
    widths = {width: column + width <= p.n}
    if p.n % width:
        widths[p.n % width] = column == p.n // width * width

    @pl.loop(jnp.maximum(lo, 0), jnp.minimum(hi, ALIGNED))
    def _(i: Any) -> None:
        row.at[i][...] = jnp.sum(jnp.where(which == i, z, 0), axis=1).astype(p.out_dtype)
        plgpu.commit_smem()
        for size, fits in widths.items():

            @pl.when(fits)
            def _(size: int = size) -> None:
                there = out.at[first + i, pl.ds(column, size)]
                plgpu.copy_smem_to_gmem(row.at[i, pl.ds(0, size)], there, commit_group=False)
