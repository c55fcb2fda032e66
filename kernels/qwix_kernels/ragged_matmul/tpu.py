"""The gmm on a TPU, by one Pallas kernel: the matmul's kernel (matmul/tpu.py) on the grid of visited tiles.

The operands of a visit are those that the matmul would be given for the batch of its matrix and the row block
of its tile; so their blocks are the matmul's, at a place that scalar memory says.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwix_kernels.chips import Chip
from qwix_kernels.matmul import tpu as matmul_tpu
from qwix_kernels.problem import Extras, Tensor, dtype_bits
from qwix_kernels.ragged_matmul import tpu_kernel, tpu_visits
from qwix_kernels.ragged_matmul.problem import GmmProblem, Groups
from qwix_kernels.ragged_matmul.tpu_estimate import check, estimate, heuristic_config
from qwix_kernels.ragged_matmul.tpu_plan import Config, GmmPlan, resolve

__all__ = ["Config", "check", "estimate", "heuristic_config", "run"]


def run(
    problem: GmmProblem,
    lhs: Tensor,
    rhs: Tensor,
    extras: Extras,
    groups: Groups,
    *,
    config: Config,
    chip: Chip,
    interpret: Any = False,
) -> jax.Array:
    """[M, N] of lhs [1, M, K] and rhs [matrices, K, N] (or transposed); `check(problem, chip)` has passed.

    Args: as for `qwix_kernels.matmul.tpu.run`, and `groups`.

    Raises NotImplementedError where the config does not fit the problem or the chip.
    """
    plan = resolve(problem, chip, config)
    p = problem.product
    names, arrays, specs = zip(*matmul_tpu.operands(plan.matmul, lhs, rhs, extras), strict=True)
    scratch = _scratch(plan)
    count, words = tpu_visits.visits(groups, p.m, plan.matmul.block_m, interpret=interpret)
    field = functools.partial(tpu_visits.field, plan.most)
    out = pl.BlockSpec(
        (1, plan.matmul.block_m, plan.matmul.block_n),
        lambda j, v, k, words: (0, field(words, tpu_visits.TILE, v), j),
    )
    call = pl.pallas_call(
        functools.partial(tpu_kernel.kernel, plan, bool(interpret), (*names, "out", *scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(plan.columns, count, plan.matmul.steps_k),
            in_specs=[_at_visit(plan, name, spec) for name, spec in zip(names, specs, strict=True)],
            out_specs=out,
            scratch_shapes=tuple(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct((1, p.m, p.n), p.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if plan.keep else "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=int(0.95 * chip.vmem_bytes),
        ),
        cost_estimate=_cost(problem, arrays),
        interpret=interpret,
        name=f"qwix_{problem.scheme}",
    )
    return call(words, *arrays)[0]


def _at_visit(plan: GmmPlan, name: str, spec: pl.BlockSpec) -> pl.BlockSpec:
    """The block that the matmul would have for the visit's matrix and tile."""
    where: Any = spec.index_map

    def index(j, v, k, words):
        if plan.keep and name == "lhs":
            # Rows that are kept are not read again: stay on the last ones.
            v = jnp.where(j == 0, v, tpu_visits.count(plan.most, words) - 1)
            k = jnp.where(j == 0, k, plan.matmul.steps_k - 1)
        get = functools.partial(tpu_visits.field, plan.most, words, visit=v)
        return where(get(tpu_visits.MATRIX), get(tpu_visits.FETCH), j, k)

    return pl.BlockSpec(spec.block_shape, index, pipeline_mode=spec.pipeline_mode)


def _scratch(plan: GmmPlan) -> dict[str, Any]:
    """The matmul's; with an axis of tiles in front for rows that are kept."""
    scratch = matmul_tpu.scratch_shapes(plan.matmul)
    for name in ("lhs_ready", "row_scale"):
        if plan.keep and name in scratch:
            scratch[name] = pltpu.VMEM((plan.tiles, *scratch[name].shape), scratch[name].dtype)
    return scratch


def _cost(problem: GmmProblem, arrays: tuple[jax.Array, ...]) -> pl.CostEstimate:
    p = problem.product
    moved = sum(a.size * dtype_bits(a.dtype.name) // 8 for a in arrays)
    moved += p.m * p.n * dtype_bits(p.out_dtype) // 8
    flops = 2 * p.products * p.m * p.n * p.k
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)
