"""Stored weights as a matrix instruction takes them, in registers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwix_kernels.matmul import gpu_registers
from qwix_kernels.problem import CODEBOOKS, dtype_bits

_FP8 = ("float8_e4m3fn", "float8_e5m2")


def widened(ref: Any, dtype: str, codebook: str | None, *, reorders: bool, emulated: bool) -> jax.Array:
    """A block of weights [rows, K] from shared memory, in the dtype that they are multiplied in.

    Exact, but that a codebook's entries are rounded to `dtype`. A thread's share of the matrix instruction's
    operand is pairs of neighbours, which would be read byte by byte. Threads read 32 bits instead, and either
    exchange what is not theirs while it is still narrow, or (`reorders`) keep it: then K is in the order of
    `gpu_registers.in_pair_order`.
    """
    if dtype == "int8":
        return ref[...].astype(dtype)
    bits = dtype_bits(ref.dtype.name)
    read = plgpu.Layout.WGMMA_UPCAST_4X if bits == 4 else plgpu.Layout.WGMMA_UPCAST_2X
    runs = plgpu.layout_cast(ref[...], read)
    if codebook is not None:
        return gpu_registers.looked_up(runs, CODEBOOKS[codebook], dtype, emulated=emulated)
    if reorders:
        return gpu_registers.runs_as_pairs(runs, emulated=emulated).astype(dtype)
    x = plgpu.layout_cast(runs, plgpu.Layout.WGMMA)
    if x.dtype.name in _FP8 and dtype == "bfloat16":
        # Hopper converts 8-bit floats to float16 only, which holds them all.
        x = x.astype(jnp.float16).astype(jnp.float32)
    return x.astype(dtype)
