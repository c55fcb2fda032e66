"""What a matmul must cost on a chip, and what the portable path costs there: static microseconds on one core.

The floor is what no implementation can beat: the multiplications on the fastest unit that does them exactly,
and each stored operand and the result once through HBM.
"""

from __future__ import annotations

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.problem import MatmulProblem, Operand, dtype_bits

# The TPU compiler's own bf16 matmul against the unit's peak, read from its static schedules (1024 x 4096 x
# 4096).
_XLA_MATMUL = 1.06
# One turn of a loop of XLA ops on an accelerator, however small.
_LOOP_TURN_US = 2.0


def multiplied(problem: MatmulProblem) -> tuple[str, str]:
    """The dtypes that are multiplied, after row quantization; a codebook multiplies as bfloat16.

    >>> from qwix_kernels.problem import Operand
    >>> multiplied(MatmulProblem(8, 64, 32, Operand("bfloat16", 1, 8), Operand("uint4", 1, 32,
    codebook="nf4"), "float32")) ('bfloat16', 'bfloat16')
    """
    lhs = problem.quantize_lhs.dtype if problem.quantize_lhs else problem.lhs.dtype
    return (
        "bfloat16" if problem.lhs.codebook else lhs,
        "bfloat16" if problem.rhs.codebook else problem.rhs.dtype,
    )


def operand_bytes(x: Operand, k: int) -> float:
    """Device bytes of a stored operand with its scales and zero points."""
    total = x.batch * x.free * k * x.bits
    if x.scale_dtype is not None:
        scales = x.batch * (x.free // x.tile_free) * (k // x.tile_k)
        total += scales * (dtype_bits(x.scale_dtype) + (x.bits if x.zero_point else 0))
    return total / 8


def floor(problem: MatmulProblem, chip: Chip) -> tuple[float, float]:
    """(compute, memory) in microseconds; the floor is the greater one."""
    p = problem
    unit, rate = chip.unit(*multiplied(p))
    passes = {"high": 3, "highest": 6}.get(p.precision or "", 1) if unit == "bf16" else 1
    compute = 2 * p.batch * p.m * p.n * p.k * passes / (rate * 1e6)
    moved = operand_bytes(p.lhs, p.k) + operand_bytes(p.rhs, p.k) + _result_bytes(p)
    return compute, moved / (chip.hbm_gbps * 1e3)


def xla_estimate(problem: MatmulProblem, chip: Chip) -> Estimate:
    """The portable path as the compiler runs it: one matmul, and passes over HBM that overlap nothing.

    Rows are quantized in a pass of their own. Scales along K cost either a dequantized copy of both operands
    or, tile by tile, partial results that are written and read once for each tile. It errs on the low side,
    so that a kernel has to be better than an optimistic figure.
    """
    p = problem
    compute, memory = floor(p, chip)
    per_byte = 1 / (chip.hbm_gbps * 1e3)
    extra = 0.0
    if p.quantize_lhs:  # read for the maxima, read again and written
        extra += operand_bytes(p.lhs, p.k) + p.lhs.batch * p.m * p.k * dtype_bits(p.quantize_lhs.dtype) / 8
    tiles = [t for t in (p.lhs.tile_k, p.rhs.tile_k, p.quantize_lhs.tile_k if p.quantize_lhs else 0) if t]
    turns = 0
    if tiles and min(tiles) < p.k:
        if _is_byte(p.lhs, p) and _is_byte(p.rhs, None):
            turns = p.k // min(tiles)
            extra += turns * 2 * _result_bytes(p, "float32")
        else:
            extra += sum(2 * 2 * x.batch * x.free * p.k for x in (p.lhs, p.rhs) if x.is_quantized)
    memory_us = memory + extra * per_byte
    static = max(compute * _XLA_MATMUL, memory) + max(extra * per_byte, turns * _LOOP_TURN_US)
    return Estimate(compute * _XLA_MATMUL, memory_us, static, max(compute, memory), "analytic, optimistic")


def _result_bytes(p: MatmulProblem, dtype: str | None = None) -> float:
    return p.batch * p.m * p.n * dtype_bits(dtype or p.out_dtype) / 8


def _is_byte(x: Operand, quantizing: MatmulProblem | None) -> bool:
    how = quantizing.quantize_lhs if quantizing else None
    return how.dtype in ("int8", "int4") if how else x.is_integer and x.bits <= 8
