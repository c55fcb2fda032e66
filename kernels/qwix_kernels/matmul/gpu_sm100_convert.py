"""Blackwell matmul: the warpgroups that convert weights, from shared memory through registers to TMEM."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwix_kernels.matmul.gpu_sm100_plan import LANES, Plan
from qwix_kernels.matmul.gpu_sm100_work import Item, each_item, item_count, loop, settle
from qwix_kernels.problem import dtype_bits


def convert(plan: Plan, r: Any, part: int) -> None:
    """Every `converters`-th chunk, from `part`."""

    def item(at: Item) -> None:
        def step(i: Any) -> None:
            count = at.turn * plan.blocks + i
            slot = lax.rem(count, plan.steps)
            plgpu.barrier_wait(r.w_full.at[slot])
            for c in range(plan.chunks):
                chunk = functools.partial(_convert_chunk, plan, r, slot, c, count * plan.chunks + c)
                mine = lax.rem(count * plan.chunks + c, plan.converters) == part
                pl.when(mine)(chunk) if plan.converters > 1 else chunk()

        loop(plan.blocks, step)

    each_item(plan, item)
    uses = item_count(plan) * plan.blocks * plan.chunks
    for ring in _rings(plan, r):
        settle(ring, uses, range(part, plan.chunk_slots, plan.converters))


def _rings(plan: Plan, r: Any) -> tuple[Any, ...]:
    """What is awaited before a slot is written again.

    In the second of a pair no other thread looks at `ready`, though both arrive there; and a barrier must not
    complete twice unseen.
    """
    return (r.read, r.ready) if plan.pair else (r.read,)


def _convert_chunk(plan: Plan, r: Any, slot: Any, c: int, number: Any) -> None:
    """Chunk `c` of the block in `slot`, `number`-th of this block of threads."""
    chunk_slot = lax.rem(number, plan.chunk_slots)
    for ring in _rings(plan, r):
        pl.when(number >= plan.chunk_slots)(functools.partial(plgpu.barrier_wait, ring.at[chunk_slot]))
    columns = pl.ds(chunk_slot * plan.chunk_k, plan.chunk_k)
    plgpu.async_store_tmem(r.a_t.at[:, columns], _converted(plan, r, slot, c))
    plgpu.commit_tmem()
    plgpu.commit_smem()  # what was read here is written next by a copy
    plgpu.barrier_arrive(r.ready.at[chunk_slot])


def _converted(plan: Plan, r: Any, slot: Any, c: int) -> jax.Array:
    """Chunk `c` of the weights in `slot`, a row to a thread.

    They are loaded 16 bytes at a time, which swizzling keeps free of bank conflicts, and then told apart into
    registers that conversions take and those that TMEM takes.
    """
    layout = plgpu.Layout.TCGEN05_TMEM_NATIVE
    stored, columns = 128 // dtype_bits(plan.w_dtype), pl.ds(c * plan.chunk_k, plan.chunk_k)
    w = plgpu.load(r.w_s.at[slot, :, columns], layout=layout(stored), optimized=False)
    w = widen(plgpu.layout_cast(w, layout(min(stored, 8))), plan.multiplied)
    if plan.converts_scales:
        w = w * _chunk_scales(plan, r, slot, c)
    return plgpu.layout_cast(w, layout(32 // dtype_bits(plan.multiplied)))


def _chunk_scales(plan: Plan, r: Any, slot: Any, c: int) -> jax.Array:
    """The scales of a chunk, spread out.

    A thread's columns are known when it is compiled, so that nothing is left of the selects.
    """
    shape, tile = (LANES, plan.chunk_k), min(plan.w_tile_k, plan.chunk_k)
    spread: Any = None
    for first in reversed(range(0, plan.chunk_k, tile)):
        row = (c * plan.chunk_k + first) // plan.w_tile_k
        scale = plgpu.load(r.w_scale_s.at[slot, row], optimized=False)
        scale = lax.broadcast_in_dim(scale, shape, (0,))
        if spread is None:
            spread = scale
        else:
            layout = plgpu.Layout.TCGEN05_TMEM_NATIVE(8)
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
            spread = jnp.where(column < first + tile, scale, spread)
    return spread


def widen(x: jax.Array, dtype: str) -> jax.Array:
    """x as `dtype`, by conversions that the GPU has."""
    if jnp.issubdtype(x.dtype, jnp.floating) and dtype == "bfloat16":
        x = x.astype(jnp.float16).astype(jnp.float32)
    return x.astype(dtype)
