"""The work items of the Blackwell matmul kernel, and the rings of barriers between its threads.

All threads of a block go through the same items in the same order, so that a count of what came before says
which slot of a ring is next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from qwix_kernels.matmul.gpu_sm100_plan import LANES, PAIR, Plan


@dataclasses.dataclass(frozen=True)
class Item:
    """One tile of one partial result; indices are traced."""

    turn: Any  # how many items this block has had before
    batch: Any
    split: Any
    row: Any  # the first one
    column: Any  # likewise, of the tile: a pair of multiprocessors has one tile


def each_item(plan: Plan, body: Callable[[Item], None]) -> None:
    @plgpu.nd_loop(plan.items, collective_axes="sm")
    def _(info):
        batch, split, tile = info.index
        i, j = plgpu.planar_snake(tile, plan.tiles, 0, 8)
        body(Item(info.local_index, batch, split, i * plan.block_m, j * plan.columns))


def own_column(plan: Plan, at: Item) -> Any:
    """The first column of this multiprocessor."""
    return at.column + lax.axis_index(PAIR) * LANES if plan.pair else at.column


def item_count(plan: Plan) -> Any:
    """Items of this thread block."""
    total = plan.items[0] * plan.items[1] * plan.items[2]
    return lax.div(total - lax.axis_index("sm") + plan.units - 1, plan.units)


def settle(barriers: Any, uses: Any, slots: range) -> None:
    """Waits for the last arrival at each slot of a ring that was used `uses` times."""
    for slot in slots:
        pl.when(uses > slot)(functools.partial(plgpu.barrier_wait, barriers.at[slot]))


def loop(count: int, body: Callable[[Any], None]) -> None:
    lax.fori_loop(0, count, lambda i, _: body(i), None)
