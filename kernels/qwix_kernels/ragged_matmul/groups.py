"""From group sizes to the rows of each: ranges of rows, with a matrix or without one.

Sizes come as they are given. What has to be decided about them (rows past the last group, sizes that add up
to more rows than there are) is decided where the ranges are walked along: in scalar code on a TPU
(tpu_visits.py), here for loops of XLA ops. Each small XLA op costs a TPU a microsecond, as much as a tenth of
a decoding step's matmul.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix_kernels.ragged_matmul.problem import Groups


def local_groups(group_sizes: jax.Array, group_offset: Any, matrices: int) -> Groups:
    """The groups of one batch, of which those from `group_offset` have the `matrices`.

    >>> local_groups(jnp.array([2, 0, 3]), None, 3).matrix
    >>> local_groups(jnp.array([2, 0, 3]), jnp.array(1), 2).matrix.tolist()
    [[-1, 0, 1]]
    """
    sizes = group_sizes.astype(jnp.int32)[None]
    if group_offset is None:
        return Groups(sizes)
    local = np.arange(sizes.shape[1], dtype=np.int32)[None] - jnp.reshape(
        jnp.asarray(group_offset), ()
    ).astype(jnp.int32)
    return Groups(sizes, jnp.where((local >= 0) & (local < matrices), local, -1))


def ranges(groups: Groups, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(first rows, ends, matrices) of all groups of all batches; `rows` is M, that of all batches together.

    >>> [x.tolist() for x in ranges(Groups(jnp.array([[2, 9], [1, 1]]), jnp.array([[0, 1], [-1, 0]])), 10)]
    [[0, 2, 5, 6], [2, 5, 6, 7], [0, 1, -1, 0]]
    """
    batch = groups.sizes.shape[0]
    each = rows // batch
    ends = jnp.minimum(inclusive_sums(groups.sizes), each)
    starts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
    base = each * np.arange(batch, dtype=np.int32)[:, None]
    return (starts + base).reshape(-1), (ends + base).reshape(-1), matrix_of(groups).reshape(-1)


def matrix_of(groups: Groups) -> jax.Array:
    """`groups.matrix`, written out where it is None."""
    if groups.matrix is not None:
        return groups.matrix
    return jnp.asarray(np.arange(groups.sizes.size, dtype=np.int32).reshape(groups.sizes.shape))


def inclusive_sums(x: jax.Array) -> jax.Array:
    """Cumulative sums of short vectors along the last axis: quick to compile, unlike a scan."""
    index = np.arange(x.shape[-1])
    return jnp.sum(jnp.where(index[None, :] <= index[:, None], x[..., None, :], 0), axis=-1)


def alive(groups: Groups, rows: int) -> jax.Array:
    """[M] whether each row belongs to a matrix."""
    start, stop, matrix = ranges(groups, rows)
    row = np.arange(rows, dtype=np.int32)[:, None]
    return jnp.any((matrix >= 0) & (start <= row) & (row < stop), axis=1)
