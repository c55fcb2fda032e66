"""What a matmul must cost on a chip, and what the portable path costs there: static microseconds on one core.

The floor is what no implementation can beat: the multiplications on the fastest unit that does them exactly,
and each stored operand and the result once through HBM.
"""

from __future__ import annotations

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.problem import Epilogue, MatmulProblem, Operand, RowQuantize, dtype_bits

# Read from the TPU compiler's static schedules of 1024 x 4096 x 4096 on v5e, v6e and v7x, where they agree
# within a third: its own bf16 matmul against the unit's peak; row quantization, as the bytes per element that
# HBM could have moved in the time; dequantizing and widening weights, in cycles per element.
_MATMUL = 1.06
_QUANTIZE_BYTES = 17
_DEQUANTIZE_CYCLES = 0.009
_WIDEN_CYCLES = 0.005
# From 16 to 256 rows times 576 x 1536 to 2048 x 2048: how much less widening costs for few rows (once per
# block of rows); three ops more to quantize rows, however few; and what it takes to unpack 4-bit weights.
_WIDEN_ONCE = 0.1
_QUANTIZE_US = 3.6
_UNPACK_US = 12.0
_UNPACK_CYCLES = 0.012
_NO_BF16_MATH = 1.4
# Partial results of this many bytes stay on the chip between the tiles of K.
_KEPT_BYTES = 8 << 20
# What nothing overlaps: the first window of the operands, and the ops that convert and lay out the scales,
# 1.1 to 1.3 us each on these chips for K and N of 576 to 4096.
_WINDOW_BYTES = 4 << 20
_SCALES_US = 2.4
# The least that an XLA op takes on these chips.
_LEAST_OP_US = 1.2
# One turn of a loop of XLA ops on an accelerator, however small.
_LOOP_TURN_US = 1.0


def multiplied(problem: MatmulProblem) -> tuple[str, str]:
    """The dtypes that are multiplied, after row quantization; a codebook multiplies as bfloat16.

    >>> from qwix_kernels.problem import Operand
    >>> lhs, rhs = Operand("bfloat16", 1, 8), Operand("uint4", 1, 32, codebook="nf4")
    >>> multiplied(MatmulProblem(8, 64, 32, lhs, rhs, "float32"))
    ('bfloat16', 'bfloat16')
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
    compute = 2 * p.products * p.batch * p.m * p.n * p.k * passes / (rate * 1e6)
    moved = operand_bytes(p.lhs, p.k) + p.products * operand_bytes(p.rhs, p.k)
    moved += result_bytes(p) + epilogue_bytes(p)
    if p.low_rank:
        compute += 2 * p.batch * p.m * p.low_rank.rank * (p.k + p.n) / (chip.bf16 * 1e6)
        moved += 2 * p.low_rank.rank * (p.k + p.n)
    return compute, moved / (chip.hbm_gbps * 1e3)


def xla_estimate(problem: MatmulProblem, chip: Chip) -> Estimate:
    """The portable path as the compiler runs it: one matmul, and what comes before it and overlaps nothing.

    Rows are quantized in a pass of their own. Weights that the unit does not take as they are get widened,
    which hides behind the matmul. Scales along K cost either a dequantized copy of the weights or, tile by
    tile, partial results that are written and read once for each tile.
    """
    p = problem
    least = floor(p, chip)
    compute, memory = least[0] * _MATMUL, least[1]
    per_byte, per_cycle = 1 / (chip.hbm_gbps * 1e3), 1 / (chip.ghz * 1e3)
    weights = p.rhs.batch * p.n * p.k
    before = moved = 0.0
    if p.quantize_lhs:
        count = p.lhs.batch * p.m * p.k
        moved += operand_bytes(p.lhs, p.k) + count * dtype_bits(p.quantize_lhs.dtype) / 8
        before += count * _QUANTIZE_BYTES * per_byte + _QUANTIZE_US * (chip.platform == "tpu")
    tiles = [t for t in (p.lhs.tile_k, p.rhs.tile_k, p.quantize_lhs.tile_k if p.quantize_lhs else 0) if t]
    turns = p.k // min(tiles) if tiles else 1
    if turns > 1 and _is_byte(p.lhs, p.quantize_lhs) and _is_byte(p.rhs, None):
        kept = result_bytes(p, "float32") <= _KEPT_BYTES
        partial = 0 if kept else turns * 2 * result_bytes(p, "float32")
        moved += partial
        before += max(partial * per_byte, turns * _LOOP_TURN_US)
    elif turns > 1:
        moved += 2 * 2 * weights
        before += max(2 * 2 * weights * per_byte, weights * _DEQUANTIZE_CYCLES * per_cycle)
        if chip.platform == "tpu" and p.rhs.bits == 4 and not p.rhs_transposed:
            slow = 1 if chip.bf16_math else _NO_BF16_MATH
            before += _UNPACK_US + (_UNPACK_CYCLES * slow - _DEQUANTIZE_CYCLES) * weights * per_cycle
    elif not chip.is_native(*multiplied(p)):
        often = min(1.0, _WIDEN_ONCE + p.batch * p.m / 1024)
        compute = max(compute, weights * _WIDEN_CYCLES * often * per_cycle)
    before += low_rank_us(p, chip)
    before += min(compute, memory, _WINDOW_BYTES * per_byte)
    if p.lhs.is_quantized or p.rhs.is_quantized:
        before += _SCALES_US
    apart = _apart_bytes(p)
    moved += apart
    before += apart * per_byte
    static = max(compute, memory) + before
    return Estimate(compute, memory + moved * per_byte, static, max(least), "after the compiler's schedules")


def low_rank_us(p: MatmulProblem, chip: Chip) -> float:
    """XLA's two products of a low-rank update and their sum with the result: one after the other.

    The rank fills a part of a matrix unit, which takes as long as all of it.
    """
    if p.low_rank is None:
        return 0.0
    rank = -(-p.low_rank.rank // max(chip.mxu, 1)) * max(chip.mxu, 1)
    of = lambda size: 2 * p.batch * p.m * rank * size / (chip.bf16 * 1e6)
    read = operand_bytes(p.lhs, p.k) / (chip.hbm_gbps * 1e3)
    written = (result_bytes(p, "float32") + result_bytes(p)) / (chip.hbm_gbps * 1e3)
    least = _LEAST_OP_US * (chip.platform == "tpu")
    return max(of(p.k), read, least) + max(of(p.n), written, least)


def _apart_bytes(p: MatmulProblem) -> float:
    """Bytes that XLA's passes round its matmuls move: what they do not fuse into one of them.

    A row is normalised in two passes; the second product of a gate is fused with what follows, the first one
    waits in HBM; scales of a result need all of a row, so quantizing it reads it twice.
    """
    e, moved = p.epilogue or Epilogue(), 0.0
    if p.norm:
        moved += 3 * operand_bytes(p.lhs, p.k)
    if e.gate:
        moved += 2 * result_bytes(p, "float32")
    if e.quantize:
        moved += (3 if e.scales_out else 1) * result_bytes(p, "float32")
    return moved


def result_bytes(p: MatmulProblem, dtype: str | None = None) -> float:
    """Device bytes of the result."""
    return p.batch * p.m * p.n * dtype_bits(dtype or p.out_dtype) / 8


def epilogue_bytes(p: MatmulProblem) -> float:
    """Device bytes that the epilogue reads and writes besides the result; single rows count for nothing."""
    e = p.epilogue
    if e is None:
        return 0.0
    scales = p.batch * p.m * (p.n // (e.quantize.tile_k or p.n)) * 4 if e.quantize and e.scales_out else 0
    return scales + (result_bytes(p, e.residual) if e.residual else 0.0)


def _is_byte(x: Operand, how: RowQuantize | None) -> bool:
    return how.dtype in ("int8", "int4") if how else x.is_integer and x.bits <= 8
