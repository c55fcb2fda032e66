"""What a grouped matmul must cost on a chip, and what the portable path costs there.

Microseconds of one core; static, and for groups of equal size: what sizes a program will be given is not
known when it is compiled.
"""

from __future__ import annotations

import dataclasses

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul import cost
from qwix_kernels.problem import MatmulProblem, dtype_bits
from qwix_kernels.ragged_matmul.problem import GmmProblem, TgmmProblem

# One turn of a loop of XLA ops, however small.
_TURN_US = 1.0


def touched(problem: GmmProblem | TgmmProblem) -> int:
    """How many matrices have rows, where rows are dealt out evenly."""
    return min(problem.matrices, problem.product.m if isinstance(problem, GmmProblem) else problem.m)


def gmm_floor(problem: GmmProblem, chip: Chip) -> tuple[float, float]:
    """(compute, memory): every row once through the fastest unit; each matrix that has rows moved once."""
    p = problem.product
    one = _with_matrices(p, 1)
    compute = cost.floor(one, chip)[0]
    weights = cost.operand_bytes(dataclasses.replace(p.rhs, batch=touched(problem)), p.k)
    moved = cost.operand_bytes(p.lhs, p.k) + p.products * weights
    moved += cost.result_bytes(one) + cost.epilogue_bytes(one)
    return compute, moved / (chip.hbm_gbps * 1e3)


def tgmm_floor(problem: TgmmProblem, chip: Chip) -> tuple[float, float]:
    """(compute, memory): as for `gmm_floor`, and every matrix written."""
    p = problem
    _, rate = chip.unit(p.lhs.dtype, p.g.dtype)
    moved = p.m * (p.k * p.lhs.bits + p.n * p.g.bits) / 8
    moved += p.matrices * p.k * p.n * dtype_bits(p.out_dtype) / 8
    return 2 * p.m * p.k * p.n / (rate * 1e6), moved / (chip.hbm_gbps * 1e3)


def gmm_xla_estimate(problem: GmmProblem, chip: Chip, rows: int) -> Estimate:
    """A loop of matmuls of up to `rows` rows, one range after the other."""
    p = problem.product
    groups = touched(problem)
    turns = groups * -(-p.m // (groups * rows)) if groups else 0
    lhs = dataclasses.replace(p.lhs, free=rows)
    one = dataclasses.replace(_with_matrices(p, 1), m=rows, lhs=lhs, quantize_lhs=None, norm=None)
    each = cost.xla_estimate(one, chip).static_us + _TURN_US
    floor = gmm_floor(problem, chip)
    return Estimate(
        turns * each, floor[1], turns * each, max(floor), f"{turns} matmuls of {rows} rows in a loop"
    )


def tgmm_xla_estimate(problem: TgmmProblem, chip: Chip, rows: int) -> Estimate:
    """A loop of matmuls over up to `rows` rows, whose results are added up in HBM."""
    p = problem
    turns = p.matrices * max(1, -(-p.m // (p.matrices * rows)))
    _, rate = chip.unit("bfloat16", "bfloat16")
    sums = 2 * p.k * p.n * 4 / (chip.hbm_gbps * 1e3)
    each = max(2 * rows * p.k * p.n / (rate * 1e6), sums) + _TURN_US
    floor = tgmm_floor(problem, chip)
    return Estimate(
        turns * each, floor[1], turns * each, max(floor), f"{turns} matmuls over {rows} rows in a loop"
    )


def _with_matrices(p: MatmulProblem, count: int) -> MatmulProblem:
    return dataclasses.replace(p, rhs=dataclasses.replace(p.rhs, batch=count))
