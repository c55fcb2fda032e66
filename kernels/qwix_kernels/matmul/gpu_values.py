"""Stored weights as a matrix instruction takes them, in registers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qwix_kernels.problem import CODEBOOKS

_FP8 = ("float8_e4m3fn", "float8_e5m2")


def widened(x: jax.Array, dtype: str, codebook: str | None) -> jax.Array:
    """The values of a block of weights in the dtype that they are multiplied in, exactly but for a codebook.

    A codebook's entries are rounded to `dtype`.
    """
    if codebook is not None:
        return looked_up(x, dtype, CODEBOOKS[codebook])
    if x.dtype.name in _FP8 and dtype == "bfloat16":
        # Hopper converts 8-bit floats to float16 only, which holds them all.
        return x.astype(jnp.float16).astype(jnp.float32).astype(dtype)
    return x.astype(dtype)


def looked_up(index: jax.Array, dtype: str, table: tuple[float, ...]) -> jax.Array:
    """table[index] by a tree of selects over the bits of the index."""
    index = index.astype(jnp.int32)
    values = [np.asarray(v, jnp.dtype(dtype)) for v in table]
    for bit in range(4):
        odd = (index & (1 << bit)) != 0
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]
