"""The portable grouped matmuls: they run on every platform, refuse nothing, and are what a CPU uses.

A loop over the groups, some rows at a time, each turn a matmul by the matmul's own portable path; so
every scheme of that is a scheme of this, and the cost follows the rows that there are. (XLA's own ragged dot
multiplies every row with every matrix on a CPU.) Rows of the next group that a turn covers as well are
computed and thrown away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.matmul import elementwise, xla
from qwix_kernels.problem import Extras, MatmulProblem, Tensor
from qwix_kernels.ragged_matmul.groups import inclusive_sums, ranges
from qwix_kernels.ragged_matmul.problem import GmmProblem, Groups, TgmmProblem

_LEAST_ROWS, _MOST_ROWS = 16, 256
_BY_ROW = ("residual",)
_BY_GROUP = ("bias", "gate", "gate_bias")


def rows_at_once(m: int, groups: int) -> int:
    """Rows of one turn: those of a group of average size, or a power of two near that.

    >>> rows_at_once(4096, 8), rows_at_once(96, 64), rows_at_once(5, 2)
    (256, 16, 5)
    """
    each = -(-m // groups)
    return min(m, max(_LEAST_ROWS, min(_MOST_ROWS, 1 << (each - 1).bit_length())))


def gmm(problem: GmmProblem, lhs: Tensor, rhs: Tensor, extras: Extras, groups: Groups) -> jax.Array:
    """[M, N] of operands in the form of problem.py: lhs [1, M, K], rhs [matrices, K, N] or transposed."""
    p = problem.product
    lhs = elementwise.prepare(p, lhs, extras)
    block = rows_at_once(p.m, problem.matrices)
    one = dataclasses.replace(
        p,
        m=block,
        lhs=dataclasses.replace(p.lhs, free=block),
        rhs=dataclasses.replace(p.rhs, batch=1),
        norm=None,
        quantize_lhs=None,
    )

    turns, rows_of = _turns(groups, block, p.m)

    def turn(visit: jax.Array, out: jax.Array) -> jax.Array:
        matrix, start, mine = rows_of(visit)
        mine_of = lambda x: _pick(x, matrix)
        left, weight = _rows(lhs, start, block), mine_of(rhs)
        here = {f: _rows(getattr(extras, f), start, block) for f in _BY_ROW}
        here |= {f: mine_of(getattr(extras, f)) for f in _BY_GROUP}
        z = xla.multiply(one, left, weight, xla.ROWS_AT_ONCE)
        gate = None if here["gate"] is None else xla.multiply(one, left, here["gate"], xla.ROWS_AT_ONCE)
        result: Any = elementwise.finish(one, z, gate, Extras(**here))
        return _stored(out, result[0], start, mine[:, None])

    return jax.lax.fori_loop(0, turns, turn, jnp.zeros((p.m, p.n), p.out_dtype))


def tgmm(problem: TgmmProblem, lhs: Tensor, g: Tensor, groups: Groups) -> jax.Array:
    """[matrices, K, N] of lhs [1, M, K] and g [1, M, N]; scales [1, 1, K'] and [1, 1, N']."""
    p = problem
    block = rows_at_once(p.m, p.matrices)
    integers = p.lhs.is_integer and p.g.is_integer and p.out_dtype == "int32"
    wide = jnp.float64 if jnp.float64 in (lhs.values.dtype, g.values.dtype) else jnp.float32
    sums = jnp.int32 if integers else wide
    along = lambda x: dataclasses.replace(x, batch=1, tile_k=block if x.is_quantized else 0)
    one = MatmulProblem(p.k, block, p.n, along(p.lhs), along(p.g), p.out_dtype, precision=p.precision)

    turns, rows_of = _turns(groups, block, p.m)

    def turn(visit: jax.Array, out: jax.Array) -> jax.Array:
        matrix, start, mine = rows_of(visit)
        # Rows that count already, or are in another range, must not even be multiplied by zero.
        left, right = (_only(_rows(x, start, block), mine) for x in (lhs, g))
        left = jax.tree.map(lambda x: x.mT, left)
        z = xla.multiply(one, left, right, None).astype(sums)
        return jax.lax.dynamic_update_slice_in_dim(out, _pick(out, matrix) + z, matrix, 0)

    out = jax.lax.fori_loop(0, turns, turn, jnp.zeros((p.matrices, p.k, p.n), sums))
    return out.astype(p.out_dtype)


def _turns(groups: Groups, block: int, m: int) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """How many turns there are, and of one (matrix, first row, which of the `block` rows are its own).

    A turn starts where its group does, so that groups which end with a turn waste nothing.
    """
    begin, stop, matrix = ranges(groups, m)
    count = jnp.where(matrix >= 0, -(-(stop - begin) // block), 0)
    done = inclusive_sums(count)
    first = begin - (done - count) * block  # row of turn 0, if all turns were this group's

    def rows_of(turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        at = jnp.sum((done <= turn).astype(jnp.int32))
        pick = lambda a: jax.lax.dynamic_index_in_dim(a, at, keepdims=False)
        wanted = pick(first) + turn * block
        start = jnp.minimum(wanted, m - block)
        row = start + jnp.arange(block, dtype=jnp.int32)
        return pick(matrix), start, (row >= wanted) & (row < pick(stop))

    return done[-1], rows_of


def _pick(x: Any, index: jax.Array) -> Any:
    """Entry `index` of all that there is one of for each matrix."""
    one = lambda a: a if a.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(a, index, 1)
    return jax.tree.map(one, x)


def _rows(x: Any, start: jax.Array, count: int) -> Any:
    """Rows of [1, M, X]; what there is one row of serves all."""
    one = lambda a: a if a.shape[1] == 1 else jax.lax.dynamic_slice_in_dim(a, start, count, 1)
    return jax.tree.map(one, x)


def _only(x: Tensor, mine: jax.Array) -> Tensor:
    """Zeros, whatever the zero point, in the rows that do not count."""
    zero = jnp.zeros((), x.values.dtype) if x.zero_point is None else x.zero_point
    if x.zero_point is not None and x.zero_point.shape[2] != 1:
        zero = jnp.repeat(x.zero_point, x.values.shape[2] // x.zero_point.shape[2], axis=2)
    return dataclasses.replace(x, values=jnp.where(mine[None, :, None], x.values, zero))


def _stored(out: jax.Array, rows: jax.Array, start: jax.Array, mine: jax.Array) -> jax.Array:
    old = jax.lax.dynamic_slice_in_dim(out, start, rows.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, rows, old), start, 0)
