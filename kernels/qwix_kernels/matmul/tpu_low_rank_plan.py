"""How a low-rank update is computed in the TPU matmul kernel, and what it takes there, from static facts.

The functions that give bytes or cycles give zero for a problem without an update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwix_kernels.chips import Chip
from qwix_kernels.matmul.tpu_config import LANES, pl_cdiv
from qwix_kernels.problem import LowRank, dtype_bits

if TYPE_CHECKING:
    from qwix_kernels.matmul.tpu_plan import Plan


def rank(plan: Plan) -> int:
    """The rank in whole native tiles of bfloat16; 0 without an update."""
    return _padded_rank(plan.problem.low_rank)


def _padded_rank(low_rank: LowRank | None) -> int:
    return 16 * pl_cdiv(low_rank.rank, 16) if low_rank else 0


def turns(plan: Plan) -> bool:
    """Whether a.T @ lhs.T is found, the rows being what the matrix units hold, and turned afterwards.

    With whole native tiles of rows that takes fewer passes than lhs @ a, where the rank fills a part of them.
    """
    return plan.block_m % LANES == 0


def vmem_bytes(low_rank: LowRank | None, block_m: int, block_n: int, block_k: int) -> int:
    """VMEM of two blocks of each array of the update, of what is kept of it for all column blocks, and of its
    part of the result."""
    if low_rank is None:
        return 0
    size = _padded_rank(low_rank)
    mask = dtype_bits(low_rank.mask_dtype) // 8 if low_rank.mask_dtype else 0
    blocks = size * (_lanes(block_k) + _lanes(block_n)) * 2 + block_m * _lanes(size) * mask
    kept = block_m * _lanes(size) * (2 + 4)
    return 2 * blocks + kept + block_m * _lanes(block_n) * 4


def cycles(plan: Plan, chip: Chip, push: float) -> tuple[float, float]:
    """Of the matrix units: for a block of rows, and for a block of the result.

    `push`: cycles to hand 1024 values in bfloat16 to the matrix units as weights.
    """
    if plan.problem.low_rank is None:
        return 0.0, 0.0
    per_mac = 2 / (chip.bf16 * 1e12) * chip.ghz * 1e9
    whole = lambda size: pl_cdiv(size, chip.mxu) * chip.mxu
    depth, rows, k = whole(rank(plan)), plan.block_m, plan.steps_k * plan.block_k
    held, streamed = (whole(rows), rank(plan)) if turns(plan) else (depth, rows)
    first = max(streamed * held * k * per_mac, push * held * k / 1024)
    columns = whole(plan.block_n)
    return first, max(rows * columns * depth * per_mac, push * columns * depth / 1024)


def moved_bytes(plan: Plan) -> float:
    """Bytes of HBM: one factor and the mask once for each block of rows, the other for each of the result."""
    low_rank, p = plan.problem.low_rank, plan.problem
    if low_rank is None:
        return 0.0
    batch, rows, _, _ = plan.grid
    factors = batch * rows * rank(plan) * (p.k + p.n) * 2
    mask = dtype_bits(low_rank.mask_dtype) / 8 if low_rank.mask_dtype else 0
    return factors + batch * p.m * rank(plan) * mask


def _lanes(size: int) -> int:
    return pl_cdiv(size, LANES) * LANES
