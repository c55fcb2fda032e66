"""What the GPU's gmm does in which order: visits of row blocks by groups, found by a few small XLA ops.

A visit's block starts at a multiple of 8 rows, which is what the copy engine can address in tiles that the
matrix instructions read; so it may hold up to 7 rows of the group before, and any number of rows of those
after. `lo` and `hi` say which rows are the group's own. Rows of no matrix are visited too, in blocks of their
own: they become zeros and read nothing. An empty group has no visit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qwix_kernels.ragged_matmul.groups import inclusive_sums, matrix_of
from qwix_kernels.ragged_matmul.problem import Groups

ALIGNED = 8  # rows
# The fields of a visit, each as many words as there may be visits, one field after the other; then the count.
#   matrix  the matrix that is read, -1 for none
#   first   the first row of the block
#   lo, hi  the rows of the block that are the visit's own
FIELDS = MATRIX, FIRST, LO, HI = range(4)


def most_visits(rows: int, block: int, ranges: int, batch: int) -> int:
    """How many visits there may be: a range has a rounding up, and at most 7 rows that are not its own.

    >>> most_visits(4096, 256, 8, 1), most_visits(5, 8, 64, 1)
    (25, 9)
    """
    nonempty = min(rows, ranges + batch)  # each batch may have rows left
    return (rows + nonempty * (block + ALIGNED - 2)) // block


def visits(groups: Groups, rows: int, block: int) -> jax.Array:
    """[4 * most_visits + 1] int32 words for blocks of M = `rows` rows.

    >>> words = visits(Groups(jnp.array([[3, 0, 6]])), 16, 8)
    >>> words[:-1].reshape(4, -1)[:, : words[-1]].T.tolist()
    [[0, 0, 0, 3], [2, 0, 3, 8], [2, 8, 0, 1], [-1, 8, 1, 8]]
    """
    batch, count = groups.sizes.shape
    most = most_visits(rows, block, batch * count, batch)
    start, stop, matrix = _ranges(groups, rows)
    first = start // ALIGNED * ALIGNED
    times = jnp.where(stop > start, -(-(stop - first) // block), 0)
    of_batch = inclusive_sums(times)
    before = inclusive_sums(of_batch[:, -1]) - of_batch[:, -1]
    done = (of_batch + before[:, None]).reshape(-1)
    visit = np.arange(most, dtype=np.int32)
    at = jnp.sum((done <= visit[:, None]).astype(jnp.int32), axis=1)
    pick = lambda x: jnp.take(x.reshape(-1), at, mode="clip")
    row = pick(first) + (visit - pick(done - times.reshape(-1))) * block
    fields = (pick(matrix), row, jnp.maximum(pick(start) - row, 0), jnp.minimum(pick(stop) - row, block))
    return jnp.concatenate([*fields, done[-1:]]).astype(jnp.int32)


def _ranges(groups: Groups, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(first rows, ends, matrices), [batches, P + 1], of all groups and of rows that a batch has left."""
    batch = groups.sizes.shape[0]
    each = rows // batch
    stop = jnp.minimum(inclusive_sums(groups.sizes), each)
    stop = jnp.pad(stop, ((0, 0), (0, 1)), constant_values=each)
    start = jnp.pad(stop[:, :-1], ((0, 0), (1, 0)))
    base = each * np.arange(batch, dtype=np.int32)[:, None]
    matrix = jnp.pad(matrix_of(groups), ((0, 0), (0, 1)), constant_values=-1)
    return start + base, stop + base, matrix
