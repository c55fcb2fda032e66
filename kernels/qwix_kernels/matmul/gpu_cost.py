"""What XLA makes of a matmul on a GPU: cuBLAS, and passes round it that overlap nothing. A static model.

The shares of the peak are those that were measured of 4096 x 4096 x 4096 on an H100 80GB HBM3 (jax 0.11.2,
2026-11-22): 797 TFLOP/s in bfloat16, 1415 TOP/s in int8, 1088 TFLOP/s in 8-bit floats. The whole op took 215
us in w8a8, 171 in fp8, 201 with int8 weights, 202 with int4 ones and 1588 in w8a8 with tiles of 128; this
model says 178, 160, 200, 200 and 2443.
"""

from __future__ import annotations

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul import cost
from qwix_kernels.problem import MatmulProblem, dtype_bits

_PEAK_SHARE = {"bf16": 0.80, "int8": 0.71, "fp8": 0.55, "int4": 0.71}
_HBM_SHARE = 0.90
_KERNEL_US = 2.0  # of any kernel, beside its work


def xla_estimate(p: MatmulProblem, chip: Chip) -> Estimate:
    """The portable path: passes that prepare and widen, the dot, and what is fused behind it."""
    least = cost.floor(p, chip)
    per_us = chip.hbm_gbps * 1e3 * _HBM_SHARE
    left, right = cost.multiplied(p)
    native = chip.is_native(left, right) and not p.rhs.codebook
    unit = chip.unit(left, right)[0] if native else "bf16"
    wide = 2 * p.products * p.batch * p.m * p.n * p.k / (chip.bf16 * 1e6)
    compute = (least[0] if native else wide) / _PEAK_SHARE[unit]
    memory = least[1] / _HBM_SHARE
    passes, moved = 1, 0.0
    if p.norm or p.quantize_lhs:
        stored = dtype_bits(p.quantize_lhs.dtype) if p.quantize_lhs else p.lhs.bits
        passes += 2  # the maxima, and the values
        moved += p.lhs.batch * p.m * p.k * (2 * p.lhs.bits + stored) / 8
    weights = p.products * p.rhs.batch * p.n * p.k
    tiles = [t for t in (p.lhs.tile_k, p.rhs.tile_k, p.quantize_lhs.tile_k if p.quantize_lhs else 0) if t]
    turns = p.k // min(tiles) if tiles else 1
    if native and unit == "int8":
        passes += 1  # its int32 result is scaled by another kernel
        moved += 2 * p.products * cost.result_bytes(p, "float32")
    if not native:
        passes += 1
        moved += weights * 2 * 2  # written in bfloat16, and read
    elif turns > 1:
        passes += 2 * turns  # a dot and an addition for each tile
        moved += turns * 3 * cost.result_bytes(p, "float32")
    before = passes * _KERNEL_US + moved / per_us + cost.low_rank_us(p, chip)
    static = max(compute, memory) + before
    return Estimate(compute, memory + moved / per_us, static, max(least), "cuBLAS and passes round it")
