"""4-bit values of a rhs as bytes, for a compiler that has no 4-bit dot.

Two of them lie in a byte, the first in its low half. Both halves of all bytes are one vector operation, where
a conversion to int8 goes value by value. The first values of all bytes then come apart from the second ones,
which is undone in the result where they lie along N, and done to lhs, too, where they lie along K.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qwix_kernels.matmul.xla_side import Side


def in_halves(dtype: jnp.dtype, n: int, tile: int) -> bool:
    """Whether N columns are multiplied in two halves."""
    return dtype in (jnp.int4, jnp.uint4) and n % 2 == 0 and (tile % 2 == 0 or tile == 1)


def halves(right: Side) -> tuple[Side, Side] | None:
    """The even and the odd columns of a 4-bit rhs [batch, K, N] in bytes, or None where that does not apply.

    4-bit values lie two to a byte along N. Both halves of all bytes are one vector operation, where a
    conversion to int8 goes value by value (3x slower on a CPU); putting the columns of the result together
    again is cheaper.
    """
    values = right.values
    batch, k, n = values.shape
    tile = n // right.scale.shape[2] if right.scale is not None else 1
    if right.contracting == 2 or not in_halves(values.dtype, n, tile):
        return None
    byte = jnp.int8 if values.dtype == jnp.int4 else jnp.uint8
    both = jax.lax.bitcast_convert_type(values.reshape(batch, k, n // 2, 2), byte)
    strided = lambda a, i: a if a is None or tile > 1 else a[:, :, i::2]
    zero = right.tensor.zero_point
    zero = None if zero is None else zero.astype(byte)
    half = lambda x, i: right.with_arrays(x, strided(right.scale, i), strided(zero, i))
    return half((both << 4) >> 4, 0), half(both >> 4, 1)


def pairs(left: Side, right: Side) -> tuple[Side, Side]:
    """Both sides with the 4-bit values of rhs [batch, N, K] in bytes; as they are, where that does not apply.

    There two values of a byte are neighbours along K. On a CPU, all first ones of a tile come before all
    second ones, and lhs is ordered alike, which changes no sum of integers. (For few rows this takes a third
    of the time of a conversion value by value.) Compilers for other chips have 4-bit operands.
    """
    values, tile = right.values, math.gcd(left.tile, right.tile)
    if right.contracting != 2 or values.dtype not in (jnp.int4, jnp.uint4) or tile % 2:
        return left, right
    byte = jnp.int8 if values.dtype == jnp.int4 else jnp.uint8
    batch, n, k = values.shape

    def apart(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        both = jax.lax.bitcast_convert_type(w.reshape(batch, n, k // tile, tile // 2, 2), byte)
        w = jnp.stack([(both << 4) >> 4, both >> 4], 3).reshape(batch, n, k)
        if tile != k:  # else each step of a loop over the tiles unpacks all of it
            w = jax.lax.optimization_barrier(w)
        x_pairs = x.reshape(*x.shape[:2], k // tile, tile // 2, 2)
        return jnp.stack([x_pairs[..., 0], x_pairs[..., 1]], 3).reshape(x.shape), w

    as_they_lie = lambda x, w: (x, w.astype(byte))
    x, w = jax.lax.platform_dependent(left.values, values, cpu=apart, default=as_they_lie)
    zero = right.tensor.zero_point
    zero = None if zero is None else zero.astype(byte)
    return (
        left.with_arrays(x, left.scale, left.tensor.zero_point),
        right.with_arrays(w, right.scale, zero),
    )
