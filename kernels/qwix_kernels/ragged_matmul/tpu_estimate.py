"""What the TPU gmm takes, what it costs, and the blocks that cost least: analytic, from static facts.

As for the matmul (matmul/tpu_estimate.py), whose figures these are; for groups of equal size, which are the
only ones that can be planned for. A group that does not end with a tile costs one visit and one part more.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul import cost as matmul_cost
from qwix_kernels.matmul import tpu_estimate as matmul_estimate
from qwix_kernels.matmul.tpu_config import LANES, pl_cdiv
from qwix_kernels.matmul.tpu_plan import SUB_M, Plan, k_tile
from qwix_kernels.ragged_matmul import cost
from qwix_kernels.ragged_matmul.problem import GmmProblem
from qwix_kernels.ragged_matmul.tpu_plan import Config, GmmPlan, resolve

# Scalar memory holds five words of each visit.
_MOST_VISITS = 16384
_MERGE = 2.5  # vector operations per 1024 results, to leave the rows of others alone
_VISITS_US = 0.5  # to find the visits
# What more of would take minutes to compile: columns of a block, and results of a part.
_MOST_COLUMNS = 2048
_MOST_SUMS = {"once": 1 << 20, "before": 1 << 20, "after": 1 << 17}
_PART_CYCLES = 300  # of a part, whatever its size: the first dots wait for rows, the last stores for dots


def check(problem: GmmProblem, chip: Chip) -> None:
    """Raises NotImplementedError, naming the constraint and the shapes, for what the kernel does not run."""
    matmul_estimate.check_kinds(problem.product, chip)
    if not any(True for _ in _fitting(problem, chip)):
        p = problem.product
        raise NotImplementedError(
            f"the TPU kernel finds no blocks of [{p.m}, {p.k}] x [{problem.matrices}, {p.k}, {p.n}] that fit "
            f"the VMEM of {chip.name}"
        )


def heuristic_config(problem: GmmProblem, chip: Chip) -> Config:
    """The blocks and the strategy with the least static time. Raises NotImplementedError as `check` does."""
    return _best(problem, chip)


@functools.lru_cache(maxsize=4096)
def _best(problem: GmmProblem, chip: Chip) -> Config:
    priced = [(_us(plan, chip), -config.part, config) for config, plan in _fitting(problem, chip)]
    if not priced:
        check(problem, chip)
    return min(priced, key=lambda x: x[:2])[2]


def estimate(problem: GmmProblem, chip: Chip, config: Config) -> Estimate:
    """Static cost on one core. Raises NotImplementedError where `config` does not fit."""
    plan = resolve(problem, chip, config)
    compute, memory = _compute_us(plan, chip), _memory_us(plan, chip)
    static = max(compute, memory) + matmul_estimate.before_us(plan.matmul, chip) + _VISITS_US
    note = f"{config.strategy}, {plan.matmul.lhs_dot} x {plan.matmul.rhs_dot}" + ", rows kept" * plan.keep
    return Estimate(compute, memory, static, max(cost.gmm_floor(problem, chip)), note)


def configs(problem: GmmProblem, chip: Chip) -> Iterator[Config]:
    """All blocks that may be tried."""
    return (config for config, _ in _fitting(problem, chip))


def _us(plan: GmmPlan, chip: Chip) -> float:
    """As `estimate`, with the first fetch and the last store, which nothing overlaps."""
    p, m = plan.problem.product, plan.matmul
    first = p.products * m.block_n * m.block_k * p.rhs.bits + m.block_m * m.block_k * p.lhs.bits
    ramp = (first / 8 + m.block_m * m.block_n * 2) / (chip.hbm_gbps * 1e3)
    return max(_compute_us(plan, chip), _memory_us(plan, chip)) + matmul_estimate.RAMP * ramp


def _shares(plan: GmmPlan) -> tuple[int, int]:
    """(visits, parts that are multiplied) for groups of equal size."""
    groups, m, block = cost.touched(plan.problem), plan.problem.product.m, plan.matmul.block_m
    each = m / groups
    whole = lambda unit: each % unit == 0
    visits = plan.tiles if whole(block) else plan.tiles + groups - 1
    parts = pl_cdiv(m, plan.part) + (0 if whole(plan.part) else groups - 1)
    return visits, parts


def _compute_us(plan: GmmPlan, chip: Chip) -> float:
    p, m = plan.problem.product, plan.matmul
    visits, parts = _shares(plan)
    steps = visits * m.steps_k
    one = dataclasses.replace(m, block_m=plan.part)
    # Of what one step takes, the vector work on weights is done for a matrix and not for a part.
    weights = matmul_estimate.weight_ops(m, chip) / 4 if m.prepare_rhs else 0.0
    part = _without_weights(one, chip) if m.prepare_rhs else matmul_estimate.step_cycles(one, chip)
    cycles = parts * m.steps_k * p.products * part
    cycles += p.products * weights * (cost.touched(plan.problem) if m.steps_k == 1 else steps)
    cycles += steps * matmul_estimate.STEP_CYCLES[chip.mxu] + matmul_estimate.LOOP_CYCLES
    last = (matmul_estimate.END + _MERGE + matmul_estimate.epilogue_ops(p)) / 4
    cycles += parts * _PART_CYCLES
    cycles += parts * last * plan.part * pl_cdiv(m.block_n, LANES) * LANES / 1024
    cycles *= plan.columns
    if m.has_prologue:
        again = 1 if plan.keep else plan.columns
        cycles += again * plan.tiles * m.steps_k * matmul_estimate.row_ops(m) / 4
    cores = min(chip.cores, plan.columns) if chip.name == "v5p" else 1
    return cycles * pl_cdiv(plan.columns, cores) / plan.columns / (chip.ghz * 1e3)


def _without_weights(plan: Plan, chip: Chip) -> float:
    """Cycles of one step whose weights are there as the matrix unit takes them."""
    rhs = dataclasses.replace(plan.problem.rhs, dtype=plan.rhs_dot, codebook=None, zero_point=False)
    if plan.folds_rhs:
        rhs = dataclasses.replace(rhs, scale_dtype=None, tile_free=0, tile_k=0)
    product = dataclasses.replace(plan.problem, rhs=rhs)
    return matmul_estimate.step_cycles(dataclasses.replace(plan, problem=product, prepare_rhs=False), chip)


def _memory_us(plan: GmmPlan, chip: Chip) -> float:
    """Bytes that the blocks move over the bandwidth."""
    p, m = plan.problem.product, plan.matmul
    visits, _ = _shares(plan)
    one = dataclasses.replace(p, rhs=dataclasses.replace(p.rhs, batch=1))
    each = matmul_cost.operand_bytes(one.rhs, p.k) * p.products
    rhs = each * (cost.touched(plan.problem) if m.steps_k == 1 else visits)
    lhs = matmul_cost.operand_bytes(p.lhs, p.k) * (1 if plan.keep else plan.columns)
    if m.steps_k > 1 and not plan.keep:
        lhs *= visits / plan.tiles
    out = matmul_cost.result_bytes(one) + matmul_cost.epilogue_bytes(one)
    return (lhs + rhs + out) / (chip.hbm_gbps * 1e3)


def _fitting(problem: GmmProblem, chip: Chip) -> Iterator[tuple[Config, GmmPlan]]:
    found = False
    for whole_k in (True, False):
        for config in _candidates(problem, chip, whole_k):
            try:
                plan = resolve(problem, chip, config)
            except NotImplementedError:
                continue
            if plan.most > _MOST_VISITS:
                continue
            found = True
            yield config, plan
        if found:
            return


def _candidates(problem: GmmProblem, chip: Chip, whole_k: bool) -> Iterator[Config]:
    p = problem.product
    tiles = [t for t in (k_tile(p.lhs, p.k), k_tile(p.rhs, p.k)) if t]
    if p.quantize_lhs and p.quantize_lhs.tile_k % p.k:
        tiles.append(p.quantize_lhs.tile_k)
    depths = [p.k] if whole_k else matmul_estimate.k_parts(p.k, math.lcm(LANES, *tiles))
    for strategy in ("after", "before") if tiles else ("once",):
        for bm, part in _row_blocks(p.m, cost.touched(problem)):
            if strategy == "after" and part > SUB_M:
                continue
            for bn in _column_blocks(p.n, chip):
                if bn <= LANES or part * bn <= _MOST_SUMS[strategy]:
                    for bk in depths:
                        yield Config(bm, bn, bk, strategy, part)


def _row_blocks(m: int, groups: int) -> list[tuple[int, int]]:
    """Rows of a tile and of a part of it; those too that hold a group of average size."""
    unit = 8 if m <= 32 else 64
    sizes = {min(size, pl_cdiv(m, unit) * unit) for size in (1024, 512, 256, 128, 64, 32, 8)}
    parts = {32, 64, 128, 256, 512}
    if (each := m // groups) % 32 == 0 and 32 <= each <= 512:
        sizes |= {each, 2 * each}
        parts |= {each}
    pairs = {(size, min(size, part)) for size in sizes for part in parts}
    return sorted(pair for pair in pairs if pair[0] % pair[1] == 0)


def _column_blocks(n: int, chip: Chip) -> list[int]:
    """All columns or an even share of them, in whole registers."""
    least = 2 if chip.name == "v5p" and n >= 2 * LANES else 1
    shares = {pl_cdiv(n, parts * LANES) * LANES for parts in range(least, least + 8)} | {256, 512, 1024, 2048}
    return sorted({w if w < n else n for w in shares if w <= _MOST_COLUMNS})
