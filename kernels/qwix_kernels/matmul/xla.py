"""The portable matmul: runs on every platform, refuses nothing, and is what a CPU uses.

Three ways, by what the operands are.

    small integers    one int8 x int8 -> int32 dot (4-bit values widened first: XLA:CPU has no 4-bit dot),
                      zero points by row and column sums in int32. With scales along K a loop over the tiles
                      adds scaled partial results, so that no (tiles, M, N) array exists. Exact up to the
                      scaling.
    int16, unscaled   four dots of bytes, put together modulo 2**32: exact wherever int32 holds the result.
    everything else   a float dot with float32 accumulation, in bfloat16 where both sides' values are exact in
                      it. Scales that are shared along K are applied to the result, others to the values or,
                      where the values are exact in bfloat16, tile by tile.

All scaling is in float32, whatever dtype the scales have; the result is rounded once, to the output dtype.
What comes before the product and after it is in elementwise.py.

A model multiplies the same few shapes many times, and a compiler for CPUs spends most of its time on passes
over all instructions. With `apart`, the parts of a matmul that store their result anyway, because a dot reads
it or because it's put together from halves, are functions that are optimized once and not once a call.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qwix_kernels.matmul import elementwise, xla_four_bits
from qwix_kernels.matmul.xla_side import Side
from qwix_kernels.problem import NO_EXTRAS, Extras, MatmulProblem, Operand, Tensor

# Runs of K that share their scales and are shorter than this are scaled before the dot: each dot would do too
# little.
MIN_TILE = 32
# Up to here weights that are exact in bfloat16 are scaled tile by tile after the dot, else before it.
FEW_ROWS = 32
# Partial results of so many rows of integers stay in a CPU's cache between the tiles of K.
ROWS_AT_ONCE = 128
# The longest sum of products (a - za) * (b - zb) of bytes that is sure to fit int32.
MAX_RUN = 1 << 15


def run(
    problem: MatmulProblem,
    lhs: Tensor,
    rhs: Tensor,
    extras: Extras = NO_EXTRAS,
    *,
    one_by_one: bool = False,
    apart: bool = False,
) -> jax.Array | Tensor:
    """The result [batch, M, N] of operands in the form of problem.py, with its scales where it is quantized.

    `one_by_one`: integer matrices of a batch are multiplied one after the other, and in blocks of rows where
    they have tiles. XLA:CPU has a fast int8 dot for one pair of matrices and a loop over single values, 50x
    slower, for a batch of them; and 1024 rows at once take twice the time.
    `apart`: see the module's header. Not for programs that the compiler partitions over devices.
    """
    given = lhs.values
    lhs = _prepare_apart(problem, lhs, extras) if apart else elementwise.prepare(problem, lhs, extras)
    product = _multiply_apart if apart else multiply
    if one_by_one and problem.batch > 1:
        product = _one_by_one
    rows = ROWS_AT_ONCE if one_by_one else None
    z = product(problem, lhs, rhs, rows)
    if problem.low_rank:
        z = elementwise.add_low_rank(problem, z, given, extras)
    gate = None if extras.gate is None else product(problem, lhs, extras.gate, rows)
    return elementwise.finish(problem, z, gate, extras)


def multiply(problem: MatmulProblem, lhs: Tensor, rhs: Tensor, rows: int | None) -> jax.Array:
    """The product alone, in what it was accumulated in; integers with tiles `rows` rows at a time."""
    left = Side(lhs, is_left=True, free=1, contracting=2)
    n, k = (1, 2) if problem.rhs_transposed else (2, 1)
    right = Side(rhs, is_left=False, free=n, contracting=k)
    halves = xla_four_bits.halves(right)
    if halves is None:
        return _run(problem, *xla_four_bits.pairs(left, right), rows)
    even, odd = (_run(problem, left, half, rows) for half in halves)
    return jnp.stack([even, odd], -1).reshape(even.shape[0], problem.m, problem.n)


_apart = functools.partial(jax.jit, inline=jax.Inline.XLA_LATE)
_prepare_once = _apart(elementwise.prepare, static_argnums=0)
_multiply_once = _apart(multiply, static_argnums=(0, 3))


def _prepare_apart(problem: MatmulProblem, lhs: Tensor, extras: Extras) -> Tensor:
    if not (problem.norm or problem.quantize_lhs):
        return lhs
    # Nothing that the rows do not depend on, so that weights of different widths share the function.
    rows = dataclasses.replace(
        problem,
        n=1,
        rhs=Operand("float32", 1, 1),
        rhs_transposed=False,
        precision=None,
        epilogue=None,
        low_rank=None,
    )
    return _prepare_once(rows, lhs, extras.of_rows)


def _multiply_apart(problem: MatmulProblem, lhs: Tensor, rhs: Tensor, rows: int | None) -> jax.Array:
    # What is scaled after the dot is better fused with what the model does next.
    w = problem.rhs
    if problem.rhs_transposed or not xla_four_bits.in_halves(jnp.dtype(w.dtype), problem.n, w.tile_free or 1):
        return multiply(problem, lhs, rhs, rows)
    product = dataclasses.replace(problem, norm=None, quantize_lhs=None, epilogue=None, low_rank=None)
    return _multiply_once(product, lhs, rhs, rows)


def _one_by_one(problem: MatmulProblem, lhs: Tensor, rhs: Tensor, rows: int | None) -> jax.Array:
    alone = lambda x: dataclasses.replace(x, batch=1)
    single = dataclasses.replace(problem, lhs=alone(problem.lhs), rhs=alone(problem.rhs))

    def pick(x: Tensor, i) -> Tensor:
        return x if x.shape[0] == 1 else jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), x)

    one = lambda i: multiply(single, pick(lhs, i), pick(rhs, i), rows)[0]
    return jax.lax.map(one, jnp.arange(problem.batch))


def _run(problem: MatmulProblem, left: Side, right: Side, rows: int | None) -> jax.Array:
    if left.is_integer and right.is_integer:
        small = left.is_small and right.is_small
        if problem.out_dtype == "int32":
            return _byte_dot(left, right) if small else _wide_dot(left, right)
        tile = math.gcd(left.tile, right.tile)
        if small and tile >= min(MIN_TILE, problem.k):
            total = lambda left: _sum_over_tiles(problem.k, left, right, MAX_RUN, _byte_dot)
            return total(left) if rows is None or tile == problem.k else _by_rows(rows, left, total)
    return _float_dot(problem, left, right)


def _by_rows(count: int, left: Side, multiply: Callable[[Side], jax.Array]) -> jax.Array:
    """multiply(left), [1, M, N], of `count` rows at a time where there are many.

    The last block shares rows with the one before: a smaller one, compiled apart, may round differently.
    """
    m = left.values.shape[1]
    if m <= 2 * count or (left.scale is not None and left.scale.shape[1] not in (1, m)):
        return multiply(left)
    whole, rest = m // count * count, m % count
    starts = np.minimum(np.arange(0, m, count, dtype=np.int32), m - count)
    blocks = jax.lax.map(lambda start: multiply(left.rows(start, count))[0], jnp.asarray(starts))
    rows = blocks.reshape(1, -1, blocks.shape[2])
    return jnp.concatenate([rows[:, :whole], rows[:, -rest:]], 1) if rest else rows


def _dot(left: Side, right: Side, a: jax.Array, b: jax.Array, out, precision=None) -> jax.Array:
    batch = max(a.shape[0], b.shape[0])
    if a.dtype == jnp.bfloat16:
        # XLA:CPU moves a transpose of lhs into the dot, and then lacks the code for that one.
        a = jax.lax.platform_dependent(a, cpu=jax.lax.optimization_barrier, default=lambda a: a)
    a, b = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (a, b))
    axes = (((left.contracting,), (right.contracting,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=out)


def _sum_over_tiles(k: int, left: Side, right: Side, longest: int | None, dot) -> jax.Array:
    """The scaled result in float32: one dot for each run of K that shares its scales, added up in order."""
    inner_left, inner_right = (x if x.varies_along_k else None for x in (left, right))

    def part(start, length: int) -> jax.Array:
        a, b = left.cut(start, length), right.cut(start, length)
        return _scaled(dot(a, b), a if inner_left else None, b if inner_right else None)

    tile = math.gcd(left.tile, right.tile)
    if longest and tile > longest:
        starts = [s for t in range(0, k, tile) for s in range(t, t + tile, longest)]
        out = functools.reduce(jnp.add, [part(s, min(longest, tile - s % tile)) for s in starts])
    else:
        add = lambda i, out: out + part(i * tile, tile)
        out = part(0, tile) if tile == k else jax.lax.fori_loop(1, k // tile, add, part(0, tile))
    return _scaled(out, None if inner_left else left, None if inner_right else right)


def _scaled(out: jax.Array, *sides: Side | None) -> jax.Array:
    out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
    for side in sides:
        if side is not None and side.scale is not None:
            out = out * side.on_result(side.scale)
    return out


# --- integers


def _byte_dot(left: Side, right: Side) -> jax.Array:
    """sum over K of (a - za) * (b - zb) in int32, modulo 2**32; zero points are shared along K."""
    (a, za), (b, zb) = _bytes(left), _bytes(right)
    out = _dot(left, right, a, b, jnp.int32)
    if zb is not None:
        sums = jnp.sum(a, left.contracting, dtype=jnp.int32)[:, :, None]
        out = out - (sums if za is None else sums - za * a.shape[left.contracting]) * zb
    if za is not None:
        out = out - za * jnp.sum(b, right.contracting, dtype=jnp.int32)[:, None, :]
    return out


def _bytes(side: Side) -> tuple[jax.Array, jax.Array | None]:
    """(int8 values, int32 zero point or None) for at most 8 bits. uint8 is int8 with a shifted zero."""
    values, zero = side.values, side.tensor.zero_point
    zero = None if zero is None else side.on_result(zero, jnp.int32)
    if values.dtype != jnp.uint8:
        return values.astype(jnp.int8), zero
    zero = jnp.zeros((1, 1, 1), jnp.int32) if zero is None else zero
    return jax.lax.bitcast_convert_type(values ^ np.uint8(128), jnp.int8), zero - 128


def _wide_dot(left: Side, right: Side) -> jax.Array:
    """The same for up to 16 bits without zero points: x = 256 * high + low, both of them bytes."""
    parts = [
        _byte_dot(a, b) << (shift_a + shift_b) for a, shift_a in _split(left) for b, shift_b in _split(right)
    ]
    return functools.reduce(jnp.add, parts)


def _split(side: Side) -> list[tuple[Side, int]]:
    if side.is_small:
        return [(side, 0)]
    high = (side.values >> 8).astype(jnp.uint8 if side.values.dtype == jnp.uint16 else jnp.int8)
    low = (side.values & 255).astype(jnp.uint8)
    return [(side.with_arrays(high), 8), (side.with_arrays(low), 0)]


# --- floats


def _float_dot(problem: MatmulProblem, left: Side, right: Side) -> jax.Array:
    dtype = _compute_dtype(left, right)
    accumulator = jnp.promote_types(dtype, jnp.float32)

    def dot(a: Side, b: Side) -> jax.Array:
        a_values, b_values = (x.dequantized(dtype, scaled=False) for x in (a, b))
        return _dot(a, b, a_values, b_values, accumulator, problem.precision)

    if not (left.varies_along_k or right.varies_along_k):
        return _scaled(dot(left, right), left, right)
    weight_only = jnp.bfloat16 in (left.values.dtype, right.values.dtype)
    # 8-bit floats and codebooks take long to widen on a CPU, and much longer tile by tile; many rows make
    # partial results larger than the weight.
    many_rows = not isinstance(problem.m, int) or problem.m > FEW_ROWS  # a symbolic size may be large
    at_once = weight_only and (many_rows or any(x.is_slow_to_widen for x in (left, right)))
    if dtype == jnp.bfloat16 and math.gcd(left.tile, right.tile) >= MIN_TILE and not at_once:
        return _sum_over_tiles(problem.k, left, right, None, dot)
    if not weight_only:
        dtype = accumulator  # scaled values are exact in bfloat16 no longer
    a, b = (x.dequantized(dtype, scaled=True) for x in (left, right))
    return _dot(left, right, a, b, accumulator, problem.precision)


def _compute_dtype(left: Side, right: Side):
    """bfloat16 where it holds both sides' stored values, or one side is bfloat16; else float32."""
    dtypes = [x.values.dtype for x in (left, right)]
    if jnp.float64 in dtypes:
        return jnp.float64
    if jnp.bfloat16 in dtypes:
        wide = [d for d in dtypes if d != jnp.bfloat16 and d.itemsize > 1]
        return jnp.float32 if wide else jnp.bfloat16
    codebooks = [x for x in (left, right) if x.tensor.codebook]
    return jnp.float32 if codebooks or any(d.itemsize > 1 for d in dtypes) else jnp.bfloat16
