"""From group sizes to what a kernel walks along: row ranges, and visits of row tiles by ranges.

A row tile is visited once by each range that has rows in it, in the order of the rows; so two visits of one
tile follow each other, and so do those of one matrix. Ranges of no matrix are visited too, where every tile
has to be: their rows become zero.

All of it is a few sums of comparisons of [visits, ranges], which XLA fuses into a handful of small ops: on a
TPU each costs a microsecond however small it is, so a scan or a histogram would cost as much as a matmul.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix_kernels.ragged_matmul.problem import Groups


def local_groups(group_sizes: jax.Array, group_offset: Any, matrices: int, rows: int) -> Groups:
    """The ranges of M = `rows` rows for `matrices` matrices of which the first is that of `group_offset`.

    Rows before it and after the last are in ranges of no matrix. Sizes that add up to more than `rows` are
    cut off there; a matrix without a group gets no rows.

    >>> local_groups(jnp.array([2, 0, 3]), None, 3, 8).sizes.tolist()
    [2, 0, 3, 3]
    >>> groups = local_groups(jnp.array([2, 0, 3]), jnp.array(1), 2, 8)
    >>> groups.sizes.tolist(), groups.matrix.tolist()
    ([2, 0, 3, 3], [-1, 0, 1, -1])
    """
    sizes = group_sizes.astype(jnp.int32)
    matrix = np.arange(matrices)
    if group_offset is None:
        ends = jnp.minimum(inclusive_sums(sizes), rows)
        ends = jnp.concatenate([ends, jnp.full((1,), rows, jnp.int32)])
        return Groups(differences(ends), jnp.asarray([*matrix, -1], jnp.int32))
    first = jnp.reshape(jnp.asarray(group_offset), ()).astype(jnp.int32)
    # ends[i]: of all groups before matrix i, those of other devices included.
    before = np.arange(sizes.shape[0]) < first + np.arange(matrices + 1)[:, None]
    ends = jnp.minimum(jnp.sum(jnp.where(before, sizes, 0), axis=1), rows)
    ends = jnp.concatenate([ends, jnp.full((1,), rows, jnp.int32)])
    return Groups(differences(ends), jnp.asarray([-1, *matrix, -1], jnp.int32))


def inclusive_sums(x: jax.Array) -> jax.Array:
    """Cumulative sums of a short vector, as one op."""
    index = np.arange(x.shape[0])
    return jnp.sum(jnp.where(index[None, :] <= index[:, None], x[None, :], 0), axis=1)


def differences(ends: jax.Array) -> jax.Array:
    """What `inclusive_sums` was made of."""
    return ends - jnp.concatenate([jnp.zeros((1,), ends.dtype), ends[:-1]])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """What is done in which order: `count` visits. All arrays are [most visits] of int32.

    tile    the row tile
    fetch   the tile whose rows are read: `tile`, or for a range of no matrix the last one that was read
    matrix  the matrix that is read, alike
    lo, hi  the rows of the tile that are in the range; equal where there is nothing to compute
    """

    count: jax.Array
    tile: jax.Array
    fetch: jax.Array
    matrix: jax.Array
    lo: jax.Array
    hi: jax.Array


def most_visits(tiles: int, ranges: int) -> int:
    """How many visits there can be: consecutive ranges share a tile at most."""
    return tiles + ranges - 1


def tile_visits(groups: Groups, rows: int, block: int, matrices: int, *, per_matrix: bool = False) -> Visits:
    """The visits of the tiles of `block` rows.

    Every tile is visited at least once; or with `per_matrix` every matrix, and ranges of no matrix are not.

    >>> visits = tile_visits(Groups(jnp.array([3, 0, 6, 7]), jnp.array([0, 1, 2, -1])), 16, 4, 3)
    >>> n = int(visits.count)
    >>> visits.tile[:n].tolist(), visits.matrix[:n].tolist()
    ([0, 0, 1, 2, 2, 3], [0, 2, 2, 2, 2, 2])
    >>> visits.lo[:n].tolist(), visits.hi[:n].tolist()
    ([0, 3, 0, 0, 0, 0], [3, 4, 4, 1, 0, 0])
    """
    ranges = groups.sizes.shape[0]
    stop = inclusive_sums(groups.sizes)
    start = stop - groups.sizes
    alive, some = groups.matrix >= 0, groups.sizes > 0
    first, last = start // block, jnp.maximum(stop - 1, start) // block
    count = jnp.where(some, last - first + 1, 0)
    if per_matrix:
        count = jnp.where(alive, jnp.maximum(count, 1), 0)
    done = inclusive_sums(count)  # visits up to and with the range
    begun = done - count
    most = most_visits(-(-rows // block), ranges) + (ranges if per_matrix else 0)
    visit = jnp.arange(most, dtype=jnp.int32)[:, None]
    here = (begun <= visit) & (visit < done)
    pick = lambda values: jnp.sum(jnp.where(here, values, 0), axis=1)
    tile_of = jnp.minimum(first + visit - begun, last)
    lo = jnp.clip(start - tile_of * block, 0, block)
    hi = jnp.clip(stop - tile_of * block, 0, block)
    # What was read last stays where it is.
    read = alive & some & (begun <= visit)
    latest = lambda values: jnp.max(jnp.where(read, values, 0), axis=1)
    order = np.arange(ranges, dtype=np.int32) * matrices
    matrix = pick(groups.matrix) if per_matrix else latest(order + groups.matrix) % matrices
    lo, hi = pick(jnp.where(alive, lo, 0)), pick(jnp.where(alive, hi, 0))
    return Visits(done[-1], pick(tile_of), latest(tile_of), matrix, lo, hi)


def row_visits(groups: Groups, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[P]: (how often up to `block` rows of the range are taken, the sums of that, its first row).

    For loops that may start at any row: no tile is visited twice, and ranges of no matrix not at all.
    """
    count = jnp.where(groups.matrix >= 0, -(-groups.sizes // block), 0)
    return count, inclusive_sums(count), inclusive_sums(groups.sizes) - groups.sizes
