"""The Blackwell matmul kernel: out^T = W x^T on tcgen05, by threads that each do one thing and never stop.

Weights are the left operand of the instruction: 128 of their rows are the 128 lanes of tensor memory (TMEM),
and rows of the activations are its columns, so that a decode step of 16 rows wastes nothing. A block of
threads goes through its share of the work items (batch, part of K, tile of the result), and

    load      one warp: copies (TMA) of blocks of both operands, `steps` ahead, and of scales along K
    multiply  one warp: MMAs from shared memory into a ring of accumulators in TMEM
    convert   one or two warpgroups, for weights that are narrower than the activations: shared memory ->
              registers -> the activations' dtype, times scales along K -> TMEM, from where the MMA reads them
    drain     one or two warpgroups: accumulators -> float32 -> scales -> result, turned by the matrix store
              (STSM.T) -> copy (TMA) to HBM

What hands over what, all of them rings of barriers:

    full      load -> multiply      a block is in shared memory (of weights that are converted: w_full)
    empty     multiply -> load      ... and was read
    ready     convert -> multiply   converted weights are in TMEM
    read      multiply -> convert   ... and were read
    done      multiply -> drain     an accumulator is complete
    free      drain -> multiply     ... and was read
    scales_full, scales_free        load -> drain -> load

A pair of multiprocessors has one tile of 256 columns: each holds half of the weights' rows and half of the
activations', the first one issues the MMAs of both (2CTA), and `full` and `free` are awaited by it for both.

Edges need little: copies from outside an operand fill with zeros, which adds nothing, and copies to the
result are clipped; but the copy engine counts in tiles of 8 rows x 32 bytes, and the caller pads rows and
scales. Each ring's last arrivals are awaited before a block ends: nothing writes to shared memory that is no
longer the block's.

What was tried, in static facts of 4096 x 4096 x 4096 for sm_100a (jax 0.12.0; the same in 0.11.2). Nothing
here was measured on a GPU.

    int8, 128 x 256 tiles       66 registers a thread, no spills, 4 UTCIMMA of K 32 a block of 128
    ... storing as TCGEN05_TRANSPOSED   129 byte permutations and 130 stores a tile; the layout that the
                                compiler chooses by itself has 32 STSM.T: kept
    ... waits in one loop of all roles  each role has a loop of its own, or rings cannot be settled: 0.11.2's
                                interpreter refuses that
    a pair, 256 x 256 tiles     a multiprocessor copies 64 bytes a cycle of MMA where one alone copies 96,
                                and L2 gives it 64: kept wherever it is cheaper by the estimate
    runs of K in registers      block_m 256: 136 bytes spilled; 128 and two drains: 156 registers, none
    weights of 4 bits           2 UTCHMMA chunks of 128 of K: 4 LDS.128 a thread, 1.4 instructions a weight.
                                Chunks of 64 cut rows of 32 bytes for the copies; slices of a block for
                                scales of 32 along K need rows of 16 bytes. Selects between scales instead
                                cost nothing: they are gone from the machine code (64 HMUL2, 8 a scale)
    a fence per chunk           what threads have read the copy engine writes next: without it the
                                interpreter finds a race

The main loop (the MMA warp's) has 49 to 156 instructions for 4 or 8 MMAs, most of them uniform ones that make
descriptors.
"""

from __future__ import annotations

import functools
import math
import types
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwix_kernels.gpu_blocks import WARPGROUP, interpreted, transforms
from qwix_kernels.matmul import gpu_sm100_scaled
from qwix_kernels.matmul.gpu_sm100_convert import convert
from qwix_kernels.matmul.gpu_sm100_drain import drain
from qwix_kernels.matmul.gpu_sm100_plan import LANES, PAIR, Plan
from qwix_kernels.matmul.gpu_sm100_work import Item, each_item, item_count, loop, own_column, settle


def run(plan: Plan, operands: dict[str, jax.Array], interpret: Any = False) -> jax.Array:
    """[splits, batch, M, N], N rounded up to `out_n`.

    `operands`: x [x_batch, M, K], w [w_batch, N, K]; x_scale and w_scale, float32 and padded to whole tiles:
    [batch, rows] per row, [batch, tiles of K, rows] along K; x_block_scale and w_block_scale as
    `gpu_sm100_scaled.arranged` puts them.
    """
    names = tuple(operands)
    shape = (plan.splits, plan.batch, plan.m, plan.out_n)

    def kernel(*refs: Any, **scratch: Any) -> None:
        inputs, out = refs[: len(names)], refs[len(names)]
        named = dict(zip(names, inputs, strict=True))
        _block(plan, types.SimpleNamespace(**named, out=out, **scratch), bool(interpret))

    threads = 1 + plan.drains + plan.converters
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, plan.out_dtype),
        grid=(plan.units,),
        grid_names=("sm",),
        **_cluster(plan),
        num_threads=threads,
        thread_name="role",
        compiler_params=WARPGROUP,
        scratch_types=_scratch(plan, bool(interpret)),
        **interpreted(interpret),
    )(*operands.values())


def _cluster(plan: Plan) -> dict[str, Any]:
    return {"cluster": (2,), "cluster_names": (PAIR,)} if plan.pair else {}


def _scratch(plan: Plan, interpret: bool) -> dict[str, Any]:
    smem, steps = plgpu.SMEM, plan.steps
    tensor = functools.partial(plgpu.Barrier, num_arrivals=1, orders_tensor_core=True)
    out = transforms(math.gcd(plan.out_n, LANES // 2), plan.out_dtype)
    x, w = (
        transforms(k, dtype) for k, dtype in zip(plan.copied_k, (plan.x_dtype, plan.w_dtype), strict=True)
    )
    copies = 1 if plan.converters else 4 if plan.block_scale else 2
    scratch = {
        "w_s": smem((steps, LANES, plan.block_k), jnp.dtype(plan.w_dtype), transforms=w),
        "x_s": smem((steps, plan.x_rows, plan.block_k), jnp.dtype(plan.x_dtype), transforms=x),
        "out_s": smem((plan.drains, 2, plan.drain_m, LANES), jnp.dtype(plan.out_dtype), transforms=out),
        "acc": plgpu.TMEM((LANES, plan.acc_slots * plan.block_m), plan.acc_dtype, collective=plan.pair),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=steps),
        "empty": tensor(num_barriers=steps),
        "done": tensor(num_barriers=plan.acc_slots),
        "free": _of_pair(plan, plan.acc_slots, plan.drains),
    }
    if plan.converters:
        columns = plan.chunk_slots * plan.chunk_k
        scratch["a_t"] = plgpu.TMEM(
            (LANES, columns), jnp.dtype(plan.multiplied), packed=True, collective=plan.pair
        )
        weights = 1 + plan.converts_scales
        scratch["w_full"] = plgpu.Barrier(num_arrivals=weights, num_barriers=steps)
        scratch["ready"] = _of_pair(plan, plan.chunk_slots)
        scratch["read"] = tensor(num_barriers=plan.chunk_slots)
    if plan.converts_scales:
        scratch["w_scale_s"] = smem((steps, plan.w_scale_tiles, LANES), plan.w_scale_dtype)
    if plan.scales_in_runs:
        for name, tile, size in (("x", plan.x_tile_k, plan.copied_scales), ("w", plan.w_tile_k, LANES)):
            if tile:
                scratch[f"{name}_scale_s"] = smem((plan.acc_slots, size), jnp.float32)
        copies = bool(plan.x_tile_k) + bool(plan.w_tile_k)
        scratch["scales_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=plan.acc_slots)
        scratch["scales_free"] = plgpu.Barrier(num_arrivals=plan.drains, num_barriers=plan.acc_slots)
    if plan.block_scale:
        scratch |= _block_scales(plan, interpret)
    return scratch


def _of_pair(plan: Plan, slots: int, arrivals: int = 1) -> Any:
    """Barriers at which both of a pair arrive: before TMEM of both is read, or written, by one MMA."""
    facts: dict[str, Any] = {"num_arrivals": arrivals, "num_barriers": slots, "orders_tensor_core": True}
    if plan.pair:
        return plgpu.ClusterBarrier(collective_axes=(PAIR,), **facts)
    return plgpu.Barrier(**facts)


def _block_scales(plan: Plan, interpret: bool) -> dict[str, Any]:
    dtype, scratch, steps = jnp.dtype(plan.block_scale), {}, plan.steps
    for name, rows in (("x", plan.block_m), ("w", LANES)):
        tiles = pl.cdiv(rows, gpu_sm100_scaled.ROWS)
        scratch[f"{name}_block_scale_s"] = plgpu.SMEM((steps, tiles, plan.scale_words, 32, 16), dtype)
        if interpret:
            wide = (steps, rows, plan.block_k)
            scratch[f"{name}_wide_s"] = plgpu.SMEM(wide, jnp.float32)
        else:
            shape = (tiles * gpu_sm100_scaled.ROWS, plan.scale_words * gpu_sm100_scaled.ALONG)
            layout: Any = plgpu.TMEMLayout.SCALES_LAYOUT()
            scratch[f"{name}_scale_t"] = plgpu.TMEM(shape, dtype, layout=layout, collective=plan.pair)
    return scratch


def _block(plan: Plan, r: Any, interpret: bool) -> None:
    """What one block does: `r` are its refs, by name."""
    role = lax.axis_index("role")

    @pl.when(role == 0)
    def _issue():
        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(functools.partial(_load, plan, r))
            pl.when(warp == 1)(functools.partial(_multiply, plan, r, interpret))

    for part in range(plan.drains):
        pl.when(role == 1 + part)(functools.partial(drain, plan, r, part))
    for part in range(plan.converters):
        pl.when(role == 1 + plan.drains + part)(functools.partial(convert, plan, r, part))


def _load(plan: Plan, r: Any) -> None:
    def item(at: Item) -> None:
        def one_run(run: Any) -> None:
            if plan.scales_in_runs:
                _load_scales(plan, r, at, run)
            loop(plan.run_blocks, lambda i: _load_block(plan, r, at, run * plan.run_blocks + i))

        loop(plan.runs, one_run)

    each_item(plan, item)
    items = item_count(plan)
    settle(r.empty, items * plan.blocks, range(plan.steps))
    if plan.scales_in_runs:
        settle(r.scales_free, items * plan.runs, range(plan.acc_slots))


def _load_block(plan: Plan, r: Any, at: Item, i: Any) -> None:
    """Block `i` along K of both operands, with scales that go with blocks."""
    halves: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    if plan.pair:  # each of a pair gets half of the rows of both, and the first one awaits it all
        halves = {"collective_axes": PAIR, "leader_tracked": plgpu.CopyPartition.PARTITIONED(0)}
        whole = {"collective_axes": PAIR, "leader_tracked": plgpu.CopyPartition.REPLICATED}
    count, x, w = at.turn * plan.blocks + i, *_batches(plan, at)
    slot = lax.rem(count, plan.steps)
    pl.when(count >= plan.steps)(lambda: plgpu.barrier_wait(r.empty.at[slot]))
    full, block = r.full.at[slot], at.split * plan.blocks + i
    rows, columns = pl.ds(at.row, plan.block_m), pl.ds(at.column, plan.columns)
    along = pl.ds(block * plan.block_k, plan.block_k)
    plgpu.copy_gmem_to_smem(r.x.at[x, rows, along], r.x_s.at[slot], full, **halves)
    own = pl.ds(own_column(plan, at), LANES)
    if plan.converters:
        plgpu.copy_gmem_to_smem(r.w.at[w, own, along], r.w_s.at[slot], r.w_full.at[slot])
    else:
        plgpu.copy_gmem_to_smem(r.w.at[w, columns, along], r.w_s.at[slot], full, **halves)
    if plan.converts_scales:
        tiles = pl.ds(lax.div(block * plan.block_k, plan.w_tile_k), plan.w_scale_tiles)
        plgpu.copy_gmem_to_smem(r.w_scale.at[w, tiles, own], r.w_scale_s.at[slot], r.w_full.at[slot])
    if plan.block_scale:
        words = pl.ds(block * plan.scale_words, plan.scale_words)
        source = r.w_block_scale.at[w, lax.div(at.column, plan.columns), :, words]
        plgpu.copy_gmem_to_smem(source, r.w_block_scale_s.at[slot], full, **halves)
        source = r.x_block_scale.at[x, lax.div(at.row, plan.block_m), :, words]
        plgpu.copy_gmem_to_smem(source, r.x_block_scale_s.at[slot], full, **whole)


def _load_scales(plan: Plan, r: Any, at: Item, run: Any) -> None:
    """The scales of a run of K."""
    count, x, w = at.turn * plan.runs + run, *_batches(plan, at)
    slot = lax.rem(count, plan.acc_slots)
    pl.when(count >= plan.acc_slots)(lambda: plgpu.barrier_wait(r.scales_free.at[slot]))
    first = (at.split * plan.blocks + run * plan.run_blocks) * plan.block_k
    full = r.scales_full.at[slot]
    if plan.x_tile_k:
        source = r.x_scale.at[x, lax.div(first, plan.x_tile_k), pl.ds(at.row, plan.copied_scales)]
        plgpu.copy_gmem_to_smem(source, r.x_scale_s.at[slot], full)
    if plan.w_tile_k:
        source = r.w_scale.at[w, lax.div(first, plan.w_tile_k), pl.ds(at.column, LANES)]
        plgpu.copy_gmem_to_smem(source, r.w_scale_s.at[slot], full)


def _batches(plan: Plan, at: Item) -> tuple[Any, Any]:
    """Indices of the rows' and of the weights' batch."""
    return at.batch if plan.x_batch > 1 else 0, at.batch if plan.w_batch > 1 else 0


def _multiply(plan: Plan, r: Any, interpret: bool) -> None:
    def item(at: Item) -> None:
        def one_run(run: Any) -> None:
            turn = at.turn * plan.runs + run
            slot = lax.rem(turn, plan.acc_slots)
            pl.when(turn >= plan.acc_slots)(lambda: plgpu.barrier_wait(r.free.at[slot]))
            multiply = functools.partial(_multiply_run, plan, r, turn, slot, interpret)
            pl.when(lax.axis_index(PAIR) == 0)(multiply) if plan.pair else multiply()

        loop(plan.runs, one_run)

    each_item(plan, item)
    settle(r.free, item_count(plan) * plan.runs, range(plan.acc_slots))


def _multiply_run(plan: Plan, r: Any, turn: Any, acc_slot: Any, interpret: bool) -> None:
    """One run of K. Of a pair of multiprocessors the first one issues it, and both learn when it is done."""
    acc = r.acc.at[:, pl.ds(acc_slot * plan.block_m, plan.block_m)]
    both: dict[str, Any] = {"collective_axis": PAIR} if plan.pair else {}

    def step(i: Any) -> None:
        count = turn * plan.run_blocks + i
        slot = lax.rem(count, plan.steps)
        plgpu.barrier_wait(r.full.at[slot])
        if plan.block_scale:
            gpu_sm100_scaled.multiply(r, acc, slot, i > 0, interpret, **both)
        elif plan.converters:
            _multiply_chunks(plan, r, acc, count, slot, i > 0, **both)
        else:
            x = r.x_s.at[slot].transpose((1, 0))
            plgpu.tcgen05_mma(acc, r.w_s.at[slot], x, r.empty.at[slot], accumulate=i > 0, **both)

    loop(plan.run_blocks, step)
    plgpu.tcgen05_commit_arrive(r.done.at[acc_slot], **both)


def _multiply_chunks(
    plan: Plan, r: Any, acc: Any, count: Any, slot: Any, accumulate: Any, **both: Any
) -> None:
    for c in range(plan.chunks):
        chunk_slot = lax.rem(count * plan.chunks + c, plan.chunk_slots)
        plgpu.barrier_wait(r.ready.at[chunk_slot])
        a = r.a_t.at[:, pl.ds(chunk_slot * plan.chunk_k, plan.chunk_k)]
        x = r.x_s.at[slot, :, pl.ds(c * plan.chunk_k, plan.chunk_k)].transpose((1, 0))
        more = accumulate if c == 0 else True
        plgpu.tcgen05_mma(acc, a, x, r.read.at[chunk_slot], accumulate=more, **both)
    plgpu.tcgen05_commit_arrive(r.empty.at[slot], **both)
