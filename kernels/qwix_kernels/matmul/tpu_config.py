"""What can be chosen about the TPU matmul kernel: block sizes, and where scales that change along K go."""

from __future__ import annotations

import dataclasses

from qwix_kernels.problem import MatmulProblem

STRATEGIES = ("once", "after", "before")
LANES = 128


def pl_cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes (elements of M, N and K) and where K-wise scales are applied (one of `STRATEGIES`)."""

    block_m: int
    block_n: int
    block_k: int
    strategy: str = "once"

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {self.strategy!r}.")
        sizes = (self.block_m, self.block_n, self.block_k)
        if not all(isinstance(s, int) and s > 0 for s in sizes):
            raise ValueError(f"Block sizes must be positive integers, got {sizes}.")

    def refit(self, tuned: tuple[int, int, int], problem: MatmulProblem) -> Config | None:
        """This config of a problem with the sizes `tuned` (M, K, N) for a problem like it, or None.

        A block that covered an axis still does; no block reaches far past the operands.
        """
        p, (_, k, n) = problem, tuned
        if self.block_k < min(k, p.k) and p.k % self.block_k:
            return None  # a tail in K costs more than other blocks save
        unit = 8 if p.m <= 32 else 64
        return dataclasses.replace(
            self,
            block_m=min(self.block_m, pl_cdiv(p.m, unit) * unit),
            block_n=p.n if self.block_n >= min(n, p.n) else self.block_n,
            block_k=p.k if self.block_k >= min(k, p.k) else self.block_k,
        )
