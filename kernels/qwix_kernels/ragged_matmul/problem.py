"""What one grouped matmul is: the matmul that it is for each group, and how many groups there are.

The rows of lhs [M, K] lie in groups, one after the other. Their sizes are data; everything else is static.

    gmm    lhs [M, K] x rhs [G, K, N] -> [M, N]      each row with the matrix of its group
    tgmm   lhs [M, K] x g [M, N] -> [G, K, N]        the sum over each group's rows; gmm's weight gradient

Rows of no group give zeros and count for nothing, whatever they hold, NaN included.

A gmm is described by `product`, the `MatmulProblem` of [1, M, K] x [G, K, N], of which every row takes part
in one batch only. So what is fused round a matmul is fused round a gmm alike: a bias or a gate has the
group's entry, rows are quantized as ever. Groups that a program is given may be more than the matrices: a row
range can belong to no matrix (other devices', or past the last group), and under `vmap` several share one.
"""

from __future__ import annotations

import dataclasses

import jax

from qwix_kernels import tuning
from qwix_kernels.problem import MatmulProblem, Operand


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Where the rows go: the data of a grouped matmul beside its operands.

    Rows come in batches of equal size (more than one under `vmap`), each of which starts with its groups.

    sizes   [batches, P] int32: how many rows are in each group
    matrix  [batches, P] int32: which matrix each group has; -1 for none. None: the first group has the first
            one, and so on. In a tgmm each matrix has one group, in their order
    """

    sizes: jax.Array
    matrix: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class GmmProblem:
    """One gmm, described. `product.lhs.batch` is 1, `product.rhs.batch` the number of matrices."""

    product: MatmulProblem
    groups: int  # those of one batch, with and without a matrix
    batch: int = 1
    mapped: bool = False  # whether `Groups.matrix` is given

    @property
    def matrices(self) -> int:
        return self.product.rhs.batch

    @property
    def scheme(self) -> str:
        """The scheme's short name, for example `gmm_w8a8`."""
        return f"gmm_{self.product.scheme}"

    @property
    def tuning_key(self) -> str:
        return f"gmm{'*' * self.mapped} p{self.batch}x{self.groups} {tuning.key(self.product)}"


@dataclasses.dataclass(frozen=True)
class TgmmProblem:
    """One tgmm, described. Scales are those of columns of lhs and of g: they do not change along the rows."""

    m: int
    k: int
    n: int
    matrices: int
    groups: int  # those of one batch, with and without a matrix
    lhs: Operand  # free: K, contracting: M
    g: Operand  # free: N
    out_dtype: str
    precision: str | None = None
    batch: int = 1
    mapped: bool = False

    @property
    def scheme(self) -> str:
        """Types of lhs and g, for example `tgmm_int8_int8`."""
        return f"tgmm_{self.lhs.dtype}_{self.g.dtype}"

    @property
    def tuning_key(self) -> str:
        parts = f"m{self.m} k{self.k} n{self.n} {self.lhs.dtype} {self.g.dtype} {self.out_dtype}"
        return f"tgmm{'*' * self.mapped} g{self.matrices} p{self.batch}x{self.groups} {parts}"
