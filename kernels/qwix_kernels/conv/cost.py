"""What a convolution must cost on a chip, and what XLA's costs there: static microseconds on one core.

The floor is what no implementation can beat: the multiplications on the fastest unit that does them exactly
(padding counted, as in the published operation counts of models), and each operand and the result once
through HBM.
"""

from __future__ import annotations

import math

from qwix_kernels.chips import Chip
from qwix_kernels.conv.problem import ConvProblem
from qwix_kernels.dispatch import Estimate
from qwix_kernels.problem import dtype_bits


def multiplied(problem: ConvProblem) -> tuple[str, str]:
    """The dtypes that are multiplied, after quantization; a codebook multiplies as bfloat16."""
    p = problem
    lhs = p.quantize_lhs.dtype if p.quantize_lhs else p.lhs.dtype
    return "bfloat16" if p.lhs.codebook else lhs, "bfloat16" if p.rhs.codebook else p.rhs.dtype


def lhs_bytes(p: ConvProblem) -> float:
    """Device bytes of the stored lhs."""
    return p.batch * math.prod(p.spatial) * p.features * p.lhs.bits / 8


def rhs_bytes(p: ConvProblem) -> float:
    """Device bytes of the stored kernel."""
    return p.k * p.out_features * p.rhs.bits / 8


def result_bytes(p: ConvProblem, dtype: str | None = None) -> float:
    """Device bytes of the result."""
    return math.prod(p.out_shape) * dtype_bits(dtype or p.out_dtype) / 8


def floor(problem: ConvProblem, chip: Chip) -> tuple[float, float]:
    """(compute, memory) in microseconds; the floor is the greater one."""
    p = problem
    work = 2 * math.prod(p.out_shape) * p.k
    rate = chip.unit(*multiplied(p))[1]
    moved = lhs_bytes(p) + rhs_bytes(p) + result_bytes(p)
    return work / (rate * 1e6), moved / (chip.hbm_gbps * 1e3)


def xla_estimate(problem: ConvProblem, chip: Chip) -> Estimate:
    """The portable path: XLA's convolution, and passes over the images and the sums that it does not fuse."""
    p = problem
    compute, memory = floor(p, chip)
    return Estimate(compute, memory, max(compute, memory), max(floor(p, chip)))
