"""A weight is multiplied in the order in which a TPU keeps it.

A kernel reads its operands row by row. An array that a program is given, however, is kept in whichever order
of its last two axes pads to fewer tiles of 8 x 128: [1536, 576] column by column, as 576 would be padded to
640. Handing such a weight to a kernel makes XLA copy it in every call, which costs ten times what the matmul
of a decoding step does (1536 x 576 on v5e: 9.0 us and 0.75 us; in its own order 1.2 us, static; by
`tests/kernels/test_matmul_compiled.py` no copy is left). A weight that is kept the other way round is
therefore given to the kernel as its transpose, which moves nothing.

Sizes that are multiples of 128, those of nearly every large model, are kept row by row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul import tpu, tpu_split
from qwix_kernels.matmul.tpu_config import Config as Config
from qwix_kernels.problem import NO_EXTRAS, Extras, MatmulProblem, Tensor


def keeps_k_last(k: int, n: int) -> bool | None:
    """Whether K is the last axis of a [K, N] or [N, K] weight as a TPU keeps it; None where it makes no odds.

    The rule is that of XLA's default layouts for 4, 8 and 16 bits; a test holds it to the compiler.

    >>> keeps_k_last(1536, 576), keeps_k_last(576, 1536), keeps_k_last(4096, 14336)
    (True, False, None)
    """
    up = lambda size, to: -(-size // to) * to
    k_last, n_last = up(n, 8) * up(k, 128), up(k, 8) * up(n, 128)
    return None if k_last == n_last else k_last < n_last


def as_kept(problem: MatmulProblem, chip: Chip) -> MatmulProblem:
    """The same problem with the rhs in the order in which it is kept, where the kernel takes that."""
    k_last = keeps_k_last(problem.k, problem.n)
    if k_last is None or k_last == problem.rhs_transposed or 1 in (problem.k, problem.n):
        return problem
    turned = dataclasses.replace(problem, rhs_transposed=k_last)
    try:
        tpu_split.check(turned, chip)
    except NotImplementedError:
        return problem
    return turned


def check(problem: MatmulProblem, chip: Chip) -> None:
    """Raises NotImplementedError, naming the constraint, for what no kernel takes."""
    tpu_split.check(as_kept(problem, chip), chip)


def heuristic_config(problem: MatmulProblem, chip: Chip) -> tpu.Config:
    """Blocks of the kernel."""
    return tpu_split.heuristic_config(as_kept(problem, chip), chip)


def estimate(problem: MatmulProblem, chip: Chip, config: tpu.Config) -> Estimate:
    """Static cost."""
    return tpu_split.estimate(as_kept(problem, chip), chip, config)


def run(
    problem: MatmulProblem,
    lhs: Tensor,
    rhs: Tensor,
    extras: Extras = NO_EXTRAS,
    *,
    config: tpu.Config,
    chip: Chip,
    interpret: Any = False,
) -> jax.Array | Tensor:
    """As `tpu.run`; `config` is for the problem `as_kept`."""
    kept = as_kept(problem, chip)
    if kept != problem:
        rhs, gate = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), (rhs, extras.gate))
        extras = dataclasses.replace(extras, gate=gate)
    return tpu_split.run(kept, lhs, rhs, extras, config=config, chip=chip, interpret=interpret)
