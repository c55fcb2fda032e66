"""What a grouped matmul does on a TPU in which order: visits of row tiles by groups, found in scalar code.

A row tile is visited once by each group that has rows in it, in the order of the rows; so two visits of one
tile follow each other, and so do those of one matrix. Tiles in which no group with a matrix has rows are
visited too (their rows become zero), or with `per_matrix` instead every matrix is, even without rows.

One Pallas kernel without vectors: some cycles for each group and each visit. The ladder, for 8 groups and 16
tiles on v6e: 13 us as eleven XLA ops, of cumulative sums and comparisons [visits, groups] -> 0.3 us.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwix_kernels.matmul.tpu_config import pl_cdiv
from qwix_kernels.ragged_matmul.problem import Groups

# The fields of a visit, each as many words as there may be visits, one field after the other; then the count.
#   tile    the row tile
#   fetch   the tile whose rows are read: the same, or where there is nothing to compute the last one read
#   matrix  the matrix that is read, alike; with `per_matrix` the one that is written
#   lo, hi  the rows of the tile that are the group's; equal where there is nothing to compute
FIELDS = TILE, FETCH, MATRIX, LO, HI = range(5)


def most_visits(rows: int, block: int, ranges: int, batch: int, per_matrix: bool = False) -> int:
    """How many visits there may be: neighbours share a tile at most, and each batch may have rows left."""
    shared = pl_cdiv(rows, block) + ranges + batch - 1
    return shared + (ranges if per_matrix else 0)


def field(most: int, visits: Any, which: int, visit: Any) -> Any:
    """A field of a visit."""
    return visits[which * most + visit]


def count(most: int, visits: Any) -> Any:
    """How many visits there are."""
    return visits[len(FIELDS) * most]


def visits(
    groups: Groups, rows: int, block: int, *, per_matrix: bool = False, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """(how many, [] int32; words for scalar memory) of the tiles of `block` of M = `rows` rows."""
    batch, each = groups.sizes.shape
    most = most_visits(rows, block, batch * each, batch, per_matrix)
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    arrays = [a.reshape(-1) for a in (groups.sizes, groups.matrix) if a is not None]
    total, words = pl.pallas_call(
        functools.partial(_kernel, (batch, each, rows // batch), block, most, per_matrix),
        in_specs=[smem] * len(arrays),
        out_specs=(smem, smem),
        out_shape=[jax.ShapeDtypeStruct((size,), jnp.int32) for size in (1, len(FIELDS) * most + 1)],
        interpret=interpret,
        name="qwix_group_visits",
    )(*arrays)
    return total.reshape(()), words


def _kernel(
    shape: tuple[int, int, int], block: int, most: int, per_matrix: bool, sizes: Any, *refs: Any
) -> None:
    batch, each, rows = shape
    *given, total, out = refs

    def visit(start, stop, matrix, state):
        """The visits of the rows from `start` to `stop`. `state`: how many so far, and what was read last."""
        some = stop > start
        first = lax.div(start, block)
        last = lax.div(jnp.maximum(stop - 1, start), block)
        times = jnp.where(some, last - first + 1, 0)
        if per_matrix:
            times = jnp.where(matrix >= 0, jnp.maximum(times, 1), 0)
        reads = some & (matrix >= 0)

        def of_tile(i, state):
            done, fetch, held = state
            tile = first + i
            fetch = jnp.where(reads, tile, fetch)
            held = matrix if per_matrix else jnp.where(reads, matrix, held)
            lo = jnp.where(reads, jnp.maximum(start - tile * block, 0), 0)
            hi = jnp.where(reads, jnp.minimum(stop - tile * block, block), 0)
            for which, value in zip(FIELDS, (tile, fetch, held, lo, hi), strict=True):
                out[which * most + done] = value
            return done + 1, fetch, held

        return lax.fori_loop(0, times, of_tile, state)

    def of_batch(b, state):
        begin = b * rows

        def of_group(p, state):
            start, *state = state
            stop = jnp.minimum(start + sizes[b * each + p], begin + rows)
            matrix = given[0][b * each + p] if given else b * each + p
            return stop, *visit(start, stop, matrix, tuple(state))

        start, *state = lax.fori_loop(0, each, of_group, (begin, *state))
        return visit(start, begin + rows, jnp.int32(-1), tuple(state))

    zero = jnp.int32(0)
    total[0] = lax.fori_loop(0, batch, of_batch, (zero, zero, zero))[0]
    out[len(FIELDS) * most] = total[0]
