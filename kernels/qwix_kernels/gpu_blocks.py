"""What the Mosaic GPU kernels of all ops share: how a block lies in shared memory, and how kernels compile.

A block that the copy engine (TMA) brings and a matrix instruction reads is cut into tiles of 8 rows x the
swizzle's bytes, whose 16-byte parts are permuted so that no two rows meet in one bank of shared memory.
"""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from qwix_kernels.problem import dtype_bits

# A block may use this much shared memory on Hopper and Blackwell.
SMEM_BYTES = 232448 - 1024  # barriers and the copies' descriptors take the rest
WARPGROUP = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def transforms(columns: int, dtype: str) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """How blocks [..., rows, columns] lie: the widest swizzle that divides a row.

    >>> transforms(64, "int8")
    (TilingTransform(tiling=(8, 64)), SwizzleTransform(swizzle=64))
    """
    bits = dtype_bits(dtype)
    swizzle = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def interpreted(interpret: Any) -> dict[str, Any]:
    """The argument of `plgpu.kernel` for a `plgpu.InterpretGPUParams`; none for False."""
    return {"interpret": interpret} if interpret else {}
