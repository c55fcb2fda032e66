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

The ladder, measured on an H100 80GB HBM3 with jax 0.11.2 on 2026-11-22, in a form that differed in how it
stored rows at the right edge: w8a8, 8 groups of equal size, microseconds of this kernel. XLA's ops that find
the visits and lay out scales take 5 to 7 more. Rows x columns x K of a block, stages, computing warpgroups:

    4096 x 4096 x 14336    256 x 128 x 128, 3, 2    373     1291 TOP/s; 372 with panels of 16
                           128 x 256 x 128, 3, 2    375
                           128 x 192 x 128, 4, 3    375
                           128 x 128 x 128, 5, 2    384
                           128 x 256 x  64, 6, 2    513     copies of 64 bytes; uneven groups 547
    4096 x 2048 x 1408     128 x 128 x 128, 5, 2    25.4    931 TOP/s
                           256 x 128 x 128, 3, 2    29.8
                           128 x 256 x 128, 3, 2    30.8
                           128 x 192 x  64, 8, 3    31.1    uneven groups 41.6
                            64 x 128 x 128, 6, 2    35.0
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
from qwix_kernels.matmul.gpu_plan import MEMORY_REGISTERS, registers
from qwix_kernels.matmul.gpu_values import widened
from qwix_kernels.ragged_matmul.gpu_plan import GmmPlan, tile_columns
from qwix_kernels.ragged_matmul.gpu_visits import ALIGNED, FIELDS, FIRST, HI, LO, MATRIX


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
        "sums": plgpu.SMEM((c.warpgroups, c.block_m, c.tile_n), jnp.dtype(out), transforms=swizzled),
        "row": plgpu.SMEM((c.warpgroups, ALIGNED, c.tile_n), jnp.dtype(out)),
    }
    for name in plan.tiled:
        made[f"{name}_tiles"] = plgpu.SMEM((c.stages, *plan.tile_scales[name]), jnp.float32)
    made["full"] = plgpu.Barrier(num_arrivals=2 + len(plan.tiled), num_barriers=c.stages)
    made["free"] = plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=c.stages)
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
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        _items(plan, r, functools.partial(_copy, plan, r))
        for stage in range(c.stages):  # no barrier is left with an arrival that nothing has waited for
            plgpu.barrier_wait(r["free"].at[stage])

    @pl.when(me < c.warpgroups)
    def _():
        plgpu.set_max_registers(registers(c.warpgroups), action="increase")
        for stage in range(c.stages):
            plgpu.barrier_arrive(r["free"].at[stage])
        _items(plan, r, functools.partial(_compute, plan, r, me))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _items(plan: GmmPlan, r: dict[str, Any], item: Callable[..., Any]) -> None:
    """item(visit's fields, column block, stage) -> next stage, for each work item of this multiprocessor."""
    most, words = plan.most, r["words"]
    count = words[len(FIELDS) * most]

    def one(info: Any, carry: Any) -> Any:
        # Few column blocks at a time, for all visits: their weights stay in the cache while groups last.
        at, column = plgpu.planar_snake(info.index[0], (count, plan.columns), 1, plan.config.panel)
        fields = [words[field * most + at] for field in FIELDS]
        fields[FIRST] = pl.multiple_of(fields[FIRST], ALIGNED)
        return item(fields, column, carry)

    plgpu.nd_loop((count * plan.columns,), collective_axes="sm", init_carry=jnp.int32(0))(one)


def _steps(plan: GmmPlan, fields: list[Any]) -> Any:
    return jnp.where(fields[MATRIX] >= 0, plan.steps_k, 0)


def _next(plan: GmmPlan, stage: Any) -> Any:
    return jnp.where(stage == plan.config.stages - 1, 0, stage + 1)


def _copy(plan: GmmPlan, r: dict[str, Any], fields: list[Any], column: Any, stage: Any) -> Any:
    """Brings the operands of all steps of an item."""
    c = plan.config
    columns, rows = pl.ds(column * c.block_n, c.block_n), pl.ds(fields[FIRST], c.block_m)
    runs = c.block_k // plan.run_k

    def step(k: Any, stage: Any) -> Any:
        depth, full = pl.ds(k * c.block_k, c.block_k), r["full"].at[stage]
        plgpu.barrier_wait(r["free"].at[stage])
        plgpu.copy_gmem_to_smem(r["rhs"].at[fields[MATRIX], columns, depth], r["w"].at[stage], full)
        plgpu.copy_gmem_to_smem(r["lhs"].at[rows, depth], r["x"].at[stage], full)
        tiles = pl.ds(lax.div(k, plan.steps_per_tile) * runs, runs)
        scales = {"rhs": (fields[MATRIX], tiles, columns), "lhs": (tiles, rows)}
        for name in plan.tiled:
            source = r[f"{name}_scale"].at[scales[name]]
            plgpu.copy_gmem_to_smem(source, r[f"{name}_tiles"].at[stage, pl.ds(0, runs)], full)
        return _next(plan, stage)

    return lax.fori_loop(0, _steps(plan, fields), step, stage)


def _compute(plan: GmmPlan, r: dict[str, Any], me: Any, fields: list[Any], column: Any, stage: Any) -> Any:
    """Multiplies all steps of an item, and stores its rows."""
    c = plan.config
    sums = _sums_of_tiles if plan.tiled else _sums
    z, stage = sums(plan, r, me, _steps(plan, fields), stage)
    columns = pl.ds(column * c.block_n + me * c.tile_n, c.tile_n)
    z = _scaled(plan, r, z, fields, columns).astype(plan.core.out_dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    # In this layout a thread's values are neighbours in a row of the result.
    r["sums"].at[me].transpose((1, 0))[...] = plgpu.layout_cast(z, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    _store(plan, r, me, fields, columns)
    return stage


def _sums(plan: GmmPlan, r: dict[str, Any], me: Any, steps: Any, stage: Any) -> tuple[Any, Any]:
    """([columns, rows] sums over all of K, next stage)."""
    c = plan.config

    def scope(acc: Any) -> Any:
        def step(_: Any, stage: Any) -> Any:
            plgpu.barrier_wait(r["full"].at[stage])
            _multiply(plan, r, me, stage, acc)
            plgpu.wgmma_wait(0)
            _release(plan, r, stage)
            return _next(plan, stage)

        end = lax.fori_loop(0, steps, step, stage)
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


def _scaled(plan: GmmPlan, r: dict[str, Any], z: Any, fields: list[Any], columns: Any) -> Any:
    """The sums times the scales that do not change along K."""
    if plan.core.out_dtype == "int32":
        return z
    z = z.astype(jnp.float32)
    if "rhs_scale" in r and "rhs" not in plan.tiled:
        scale = r["rhs_scale"].at[jnp.maximum(fields[MATRIX], 0), columns]
        z = z * lax.broadcast_in_dim(plgpu.load(scale, optimized=False), z.shape, (0,))
    if "lhs_scale" in r and "lhs" not in plan.tiled:
        # Rows of no matrix get the zeros behind the last row's scale, whatever their own are.
        first = pl.multiple_of(jnp.where(fields[MATRIX] >= 0, fields[FIRST], plan.core.m), ALIGNED)
        scale = plgpu.load(r["lhs_scale"].at[pl.ds(first, z.shape[1])], optimized=False)
        z = z * lax.broadcast_in_dim(scale, z.shape, (1,))
    return z


def _store(plan: GmmPlan, r: dict[str, Any], me: Any, fields: list[Any], columns: Any) -> None:
    """Stores the visit's own rows of the warpgroup's sums."""
    c, sums, out = plan.config, r["sums"].at[me], r["out"]
    first, lo, hi = (fields[field] for field in (FIRST, LO, HI))
    whole = (lo == 0) & (hi == c.block_m)

    @pl.when(whole)
    def _():
        plgpu.copy_smem_to_gmem(sums, out.at[pl.ds(first, c.block_m), columns])

    @pl.when(~whole)
    def _():
        @pl.loop(0, lax.div(hi + (ALIGNED - 1), ALIGNED))
        def _(part: Any) -> None:
            at = pl.multiple_of(part * ALIGNED, ALIGNED)
            eight = sums.at[pl.ds(at, ALIGNED)]
            inside = (lo <= at) & (at + ALIGNED <= hi)

            @pl.when(inside)
            def _():
                plgpu.copy_smem_to_gmem(eight, out.at[pl.ds(first + at, ALIGNED), columns])

            @pl.when(~inside)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of rows stored before
                _store_rows(plan, eight, r["row"].at[me], out, columns.start, first + at, lo - at, hi - at)


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
    for i in range(ALIGNED):

        @pl.when((lo <= i) & (i < hi))
        def _(i: int = i) -> None:
            row.at[i][...] = jnp.sum(jnp.where(which == i, z, 0), axis=1).astype(p.out_dtype)
            plgpu.commit_smem()
            for size, fits in widths.items():

                @pl.when(fits)
                def _(size: int = size) -> None:
                    there = out.at[first + i, pl.ds(column, size)]
                    plgpu.copy_smem_to_gmem(row.at[i, pl.ds(0, size)], there)
