"""What a convolution must cost on a chip, and what XLA's costs there: static microseconds on one core.

The floor is what no implementation can beat: the multiplications on the fastest unit that does them exactly
(padding counted, as in the published operation counts of models), and each operand and the result once
through HBM.
"""

from __future__ import annotations

import math

from qwix_kernels.chips import Chip
from qwix_kernels.conv.problem import ConvProblem, is_stored_integer
from qwix_kernels.dispatch import Estimate
from qwix_kernels.problem import dtype_bits

_LANES = 128
# Read from the TPU compiler's own estimates of layers of ResNet-50, MobileNetV2 and the canonical 56 x 56 x
# 256 on v5e, v6e and v7x, where they agree within a third: its convolutions against the peak of the bfloat16
# unit, over whole registers of features; copies into the layouts that it likes, as times the images and the
# result could be moved; a maximum over images and their quantization, as times they could be read; cycles
# for 1024 results of a depthwise convolution; and what any program takes.
_FLOATS = 1.15
_INTEGERS = {"v5e": 2.1, "v5p": 2.1, "v6e": 4.9, "v7x": 1.7}
_COPIES = 1.5
_QUANTIZE = 7.0
_DEPTHWISE_CYCLES = 22.0
_START_US = 2.5


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


def tiled_bytes(p: ConvProblem) -> float:
    """HBM bytes that any kernel moves: operands and result row by row, in registers of 8 x 128 places.

    64 features are moved as 128, and 14 columns as 16: no smaller piece of a row-major array can be read.
    """
    up = lambda size, unit: -(-size // unit) * unit
    padded = lambda size, features: up(size, 8) / max(size, 1) * up(features, _LANES) / max(features, 1)
    size, out = (p.spatial[-1], p.out[-1]) if p.windows else (1, 1)
    images = lhs_bytes(p) * padded(size, p.features)
    return images + rhs_bytes(p) + result_bytes(p) * padded(out, p.out_features)


def floor(problem: ConvProblem, chip: Chip) -> tuple[float, float]:
    """(compute, memory) in microseconds; the floor is the greater one."""
    p = problem
    work = 2 * math.prod(p.out_shape) * p.k
    rate = chip.unit(*multiplied(p))[1]
    moved = lhs_bytes(p) + rhs_bytes(p) + result_bytes(p)
    return work / (rate * 1e6), moved / (chip.hbm_gbps * 1e3)


def xla_estimate(problem: ConvProblem, chip: Chip) -> Estimate:
    """The portable path on an accelerator: XLA's convolution, and the passes that it does not fuse into it.

    On a CPU the floor stands for it: there is nothing else to choose.
    """
    p = problem
    compute, memory = floor(p, chip)
    least = max(compute, memory)
    if chip.platform != "tpu":
        return Estimate(compute, memory, least, least)
    lanes = lambda size: -(-size // _LANES) * _LANES
    places = math.prod(p.out_shape[:-1])
    integers = is_stored_integer(p.lhs, p.quantize_lhs) and is_stored_integer(p.rhs)
    if p.is_depthwise:
        convolution = _DEPTHWISE_CYCLES * places * lanes(p.out_features) / 1024 / (chip.ghz * 1e3)
    else:
        work = 2 * places * p.taps * lanes(p.inputs) * lanes(p.out_features) * p.groups
        slow = _INTEGERS.get(chip.name, _FLOATS) if integers else _FLOATS
        convolution = slow * work / (chip.bf16 * 1e6)
    per_byte = 1 / (chip.hbm_gbps * 1e3)
    images = p.batch * math.prod(p.spatial) * lanes(p.features) * 2 * per_byte
    after = places * lanes(p.out_features) * 2 * per_byte
    copies = 0.0 if p.is_depthwise else _COPIES * (images + after)
    quantized = _QUANTIZE * images if p.quantize_lhs else 0.0
    static = max(convolution, memory) + copies + quantized + _START_US
    return Estimate(convolution, memory, static, least, "after the compiler's schedules")
