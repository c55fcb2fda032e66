"""What the TPU gmm will do for one problem on one chip: the matmul's plan, and what is the groups' own.

A gmm is planned as the matmul [1, M, K] x [G, K, N] (matmul/tpu_plan.py): the same dtypes on the matrix unit,
the same place for the scales, the same scratch. Its grid is another: columns outside, then the visits of row
tiles (tpu_visits.py), then K. So a block of weights stays where it is while the tiles of its group go by, and
is dequantized once for all of them; and two visits of one tile follow each other, so that the second
completes what the first one stored.
"""

from __future__ import annotations

import dataclasses

from qwix_kernels.chips import Chip
from qwix_kernels.matmul import tpu_config
from qwix_kernels.matmul.tpu_config import STRATEGIES, pl_cdiv
from qwix_kernels.matmul.tpu_plan import VMEM_SHARE, Plan, vmem_bytes
from qwix_kernels.matmul.tpu_plan import resolve as resolve_matmul
from qwix_kernels.problem import dtype_bits
from qwix_kernels.ragged_matmul.problem import GmmProblem
from qwix_kernels.ragged_matmul.tpu_visits import most_visits


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes (elements of M, N and K), where K-wise scales go, and rows that are multiplied at a time.

    `part` divides `block_m`. Of a tile that several groups share, each multiplies only the parts that have
    rows of it.
    """

    block_m: int
    block_n: int
    block_k: int
    strategy: str = "once"
    part: int = 128

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {self.strategy!r}.")
        sizes = (self.block_m, self.block_n, self.block_k, self.part)
        if not all(isinstance(s, int) and s > 0 for s in sizes):
            raise ValueError(f"Block sizes must be positive integers, got {sizes}.")


@dataclasses.dataclass(frozen=True)
class GmmPlan:
    """See the module's header."""

    problem: GmmProblem
    matmul: Plan
    part: int
    keep: bool  # rows that were prepared for the first block of columns stay for the others

    @property
    def tiles(self) -> int:
        return pl_cdiv(self.problem.product.m, self.matmul.block_m)

    @property
    def columns(self) -> int:
        return pl_cdiv(self.problem.product.n, self.matmul.block_n)

    @property
    def most(self) -> int:
        """How many visits there may be."""
        p = self.problem
        return most_visits(p.product.m, self.matmul.block_m, p.batch * p.groups, p.batch)


def resolve(problem: GmmProblem, chip: Chip, config: Config) -> GmmPlan:
    """The plan of `config`; NotImplementedError where it does not fit the problem or the chip's VMEM."""
    blocks = tpu_config.Config(config.block_m, config.block_n, config.block_k, config.strategy)
    matmul = resolve_matmul(problem.product, chip, blocks)
    # Rows are not tied to the first block of columns, as they are where the grid has rows outside.
    matmul = dataclasses.replace(matmul, megacore_rows=True, overlap=0)
    small = config.part < config.block_m
    if config.block_m % config.part or (small and config.part % matmul.row_step):
        raise NotImplementedError(
            f"part must be block_m, or a multiple of {matmul.row_step} that divides it, got {config}"
        )
    plan = GmmPlan(problem, matmul, config.part, False)
    several = plan.columns > 1 and matmul.has_prologue and chip.name != "v5p"  # its cores share no VMEM
    kept = dataclasses.replace(plan, keep=True)
    if several and vmem_of(kept) <= VMEM_SHARE * chip.vmem_bytes:
        return kept
    return plan


def vmem_of(plan: GmmPlan) -> int:
    """VMEM in bytes: the matmul's, and prepared rows of all tiles where they are kept."""
    m = plan.matmul
    if not plan.keep:
        return vmem_bytes(m)
    each = m.steps_k * m.block_m * pl_cdiv(m.block_k, 128) * 128 * dtype_bits(m.lhs_dot) // 8
    each = each if m.prepare_lhs else 0
    if m.spreads_row_scale:
        each += m.steps_k * m.lhs_tiles() * m.block_m * 128 * 4
    else:
        each += m.steps_k * m.block_m * pl_cdiv(m.lhs_tiles(), 128) * 128 * 4
    return vmem_bytes(m) + (plan.tiles - 1) * each
