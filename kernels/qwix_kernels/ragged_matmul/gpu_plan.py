"""What a gmm on a Hopper GPU takes, and how a block configuration becomes a plan.

The kernel multiplies prepared rows by weights [matrices, N, K] and scales the sums. What comes before
(normalising and quantizing rows) and after (bias, gate, activation, residual) is XLA's, see gpu.py; `core` is
what is left for the kernel: the dense kernel's product (matmul/gpu_plan.py), whose rules are this one's too.
"""

from __future__ import annotations

import dataclasses
import math

from qwix_kernels.chips import Chip
from qwix_kernels.gpu_blocks import SMEM_BYTES
from qwix_kernels.matmul import gpu_plan as dense
from qwix_kernels.problem import MatmulProblem, Operand, dtype_bits
from qwix_kernels.ragged_matmul.gpu_visits import ALIGNED, most_visits
from qwix_kernels.ragged_matmul.problem import GmmProblem

# How many sums a thread may hold, by the warpgroups that compute: the compiler goes by the equal part of
# 65536 registers that each thread has at launch.
_MOST_SUMS = {1: 128, 2: 128, 3: 64}


@dataclasses.dataclass(frozen=True)
class Config:
    """Blocks of one work item: rows, columns, K; and who computes.

    stages: steps of K that wait in shared memory
    warpgroups: they share the columns
    panel: column blocks that are worked on before the next ones, for all rows
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warpgroups: int = 2
    panel: int = 8

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        if not all(isinstance(s, int) and s > 0 for s in sizes.values()):
            raise ValueError(f"Sizes must be positive integers, got {sizes}.")

    @property
    def tile_n(self) -> int:
        """Columns of one warpgroup."""
        return self.block_n // self.warpgroups


@dataclasses.dataclass(frozen=True)
class GmmPlan:
    """A config that fits a problem."""

    problem: GmmProblem
    config: Config

    @property
    def core(self) -> MatmulProblem:
        """What the kernel computes, for all matrices."""
        return core(self.problem)

    @property
    def dot(self) -> str:
        """The dtype that both operands are multiplied in."""
        return dense.dot_dtype(self.core)

    @property
    def widens(self) -> bool:
        """Whether weights go through registers."""
        return widens(self.core)

    @property
    def acc(self) -> str:
        return "int32" if self.dot == "int8" else "float32"

    @property
    def most(self) -> int:
        """How many visits there may be."""
        p = self.problem
        return most_visits(p.product.m, self.config.block_m, p.batch * p.groups, p.batch)

    @property
    def columns(self) -> int:
        """Column blocks."""
        return -(-self.problem.product.n // self.config.block_n)

    @property
    def steps_k(self) -> int:
        return -(-self.problem.product.k // self.config.block_k)

    @property
    def run_k(self) -> int:
        """K that is summed before a scale is applied, within a step."""
        return min(self.config.block_k, dense.scale_k(self.core))

    @property
    def tiled(self) -> tuple[str, ...]:
        """The operands whose scales change along K."""
        p = self.core
        return tuple(name for name, x in (("lhs", p.lhs), ("rhs", p.rhs)) if dense.varies(x, p))

    @property
    def steps_per_tile(self) -> int:
        """Steps of K that share all scales; 1 where a step has several."""
        return max(1, dense.scale_k(self.core) // self.config.block_k)

    @property
    def tile_scales(self) -> dict[str, tuple[int, int]]:
        """[runs of K, rows or columns] of the scales that a stage has room for, of each operand in `tiled`.

        The copy engine writes to multiples of 128 bytes, 32 scales: more runs than a step has fill that up.
        """
        runs, out = self.config.block_k // self.run_k, {}
        for name, size in (("lhs", self.config.block_m), ("rhs", self.config.block_n)):
            if name in self.tiled:
                whole = 32 // math.gcd(size, 32)
                out[name] = (-(-runs // whole) * whole, size)
        return out

    @property
    def smem_bytes(self) -> int:
        """Shared memory that the kernel allocates."""
        p, c = self.core, self.config
        stage = c.block_k * (c.block_n * p.rhs.bits + c.block_m * dtype_bits(self.dot)) // 8
        stage += 4 * sum(math.prod(shape) for shape in self.tile_scales.values())
        out = (c.block_m + ALIGNED) * c.block_n * dtype_bits(p.out_dtype) // 8
        return c.stages * stage + out


def tile_columns(size: int, dtype: str) -> int:
    """The widest tile of 128 bytes or less that divides rows of `size` elements.

    >>> tile_columns(4096, "int8"), tile_columns(1440, "bfloat16")
    (128, 32)
    """
    return math.gcd(size, 1024 // dtype_bits(dtype))


def widens(p: MatmulProblem) -> bool:
    """Whether the weights of a `core` are multiplied in another dtype than they are stored in."""
    dot = dense.dot_dtype(p)
    return p.rhs.codebook is not None or p.rhs.dtype not in (dot, *(dense.FP8 if dot in dense.FP8 else ()))


def core(problem: GmmProblem) -> MatmulProblem:
    """The product that is left without what comes before and after it: rows as they are multiplied.

    Rows are as many as the copy engine can tile.
    """
    p, lhs = problem.product, problem.product.lhs
    if p.quantize_lhs:
        q = p.quantize_lhs
        lhs = Operand(q.dtype, 1, p.m, "float32", 1, q.tile_k or p.k)
    if lhs.dtype in ("int4", "int2"):
        lhs = dataclasses.replace(lhs, dtype="int8")
    rows = -(-p.m // ALIGNED) * ALIGNED
    return dataclasses.replace(
        p,
        m=rows,
        lhs=dataclasses.replace(lhs, free=rows),
        out_dtype="float32" if p.epilogue else p.out_dtype,
        rhs_transposed=True,
        quantize_lhs=None,
        norm=None,
        epilogue=None,
    )


def check(problem: GmmProblem, chip: Chip) -> None:
    """Raises NotImplementedError, naming the constraint, for what the kernel does not run."""
    p = core(problem)
    if p.lhs.dtype == p.rhs.dtype and p.rhs.dtype in dense.WIDE and not p.rhs.is_quantized:
        scaled = dataclasses.replace(p.rhs, scale_dtype="float32", tile_free=1, tile_k=p.k)
        p = dataclasses.replace(p, rhs=scaled)  # the dense product of such is XLA's, a grouped one is not
    dense.check(p, chip)
    if p.rhs.zero_point:
        raise NotImplementedError("the grouped kernel has no zero points of the rhs")
    if dense.varies(p.rhs, p) and p.n % 4:
        raise NotImplementedError(f"N is {p.n}; the copy engine reads multiples of 4 scales")


def resolve(problem: GmmProblem, chip: Chip, config: Config) -> GmmPlan:
    """The plan, or NotImplementedError where the config does not fit the problem or the chip."""
    check(problem, chip)
    plan, c = GmmPlan(problem, config), config
    if c.block_n % c.warpgroups or c.tile_n not in (64, 128):
        raise NotImplementedError(f"{c}: 64 or 128 columns a warpgroup, not {c.block_n / c.warpgroups:g}")
    if c.block_m % 8 or not 8 <= c.block_m <= 256:
        raise NotImplementedError(f"{c}: 8 to 256 rows a block, in multiples of 8")
    if c.block_k % 64:
        raise NotImplementedError(f"{c}: steps of K are multiples of 64")
    tile = dense.scale_k(plan.core)
    if plan.tiled and math.gcd(tile, c.block_k) != min(tile, c.block_k):
        raise NotImplementedError(f"{c}: steps of {c.block_k} do not fit tiles of {tile}")
    if c.warpgroups not in _MOST_SUMS:
        raise NotImplementedError(f"{c}: {c.warpgroups} warpgroups compute; 3 can")
    sums = c.tile_n * c.block_m // 128 * (2 if plan.tiled else 1)
    if sums > _MOST_SUMS[c.warpgroups]:
        raise NotImplementedError(f"{c}: {sums} sums a thread do not fit its registers")
    if plan.smem_bytes > SMEM_BYTES:
        raise NotImplementedError(f"{c} takes {plan.smem_bytes} bytes of shared memory of {SMEM_BYTES}")
    return plan
