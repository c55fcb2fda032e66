"""What the GPU's gmm costs, and the blocks that cost least: static, for groups of equal size.

Work items go to the multiprocessors in turns. A step of one takes as long as its matrix instructions, or as
widening its weights, whichever is longer; an item besides what it takes to scale and store it. All bytes that
the blocks move share the bandwidth. What XLA does before and after adds its own bytes.

Steps and items are set by the times in gpu_kernel.py's header, which this gives within 10 % for steps of 128
bytes; widening by the dense kernel's times (matmul/gpu_estimate.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.gpu_blocks import SMEM_BYTES
from qwix_kernels.matmul import cost as matmul_cost
from qwix_kernels.matmul import gpu_plan as dense
from qwix_kernels.problem import dtype_bits
from qwix_kernels.ragged_matmul import cost
from qwix_kernels.ragged_matmul.gpu_plan import Config, GmmPlan, check, resolve
from qwix_kernels.ragged_matmul.gpu_visits import ALIGNED
from qwix_kernels.ragged_matmul.problem import GmmProblem

__all__ = ["check", "estimate", "heuristic_config"]

_UTILISATION = 0.89  # of the matrix unit's peak, where nothing else holds it up
_SHARED_BYTES = 128  # that a multiprocessor reads from its shared memory in a cycle
_BANDWIDTH = 0.85  # of the memory's, likewise
_WIDEN_US = 0.22  # of a warpgroup, for 64 x 128 weights
_SCALE_US = 0.05  # of a warpgroup, for 64 x 128 sums that are scaled and added up
_STEP_US = 0.08  # of a step: to wait for what it needs, and for its products
_ITEM_US, _SUMS_US = 1.2, 1.2  # of an item, and for 128 x 256 sums that are scaled and stored
_LAUNCH_US = 3.0
_SMALL = 64  # rows of a group
_VISITS_US = 5.0  # XLA's ops that find the visits
_OP_US = 2.0  # an XLA op more


def heuristic_config(problem: GmmProblem, chip: Chip) -> Config:
    """The blocks with the least static time. Raises NotImplementedError as `check` does."""
    return _best(problem, chip)


@functools.lru_cache(maxsize=4096)
def _best(problem: GmmProblem, chip: Chip) -> Config:
    check(problem, chip)
    priced = []
    for plan in _fitting(problem, chip):
        times = _times(plan, chip)
        priced.append((max(times) + min(times) / 8, -plan.config.block_m, plan.config))
    if not priced:
        p = problem.product
        raise NotImplementedError(
            f"no blocks of [{p.m}, {p.k}] x [{problem.matrices}, {p.k}, {p.n}] fit the kernel on {chip.name}"
        )
    return min(priced, key=lambda x: x[:2])[2]


def estimate(problem: GmmProblem, chip: Chip, config: Config) -> Estimate:
    """Static cost. Raises NotImplementedError where `config` does not fit."""
    plan = resolve(problem, chip, config)
    compute, memory = _times(plan, chip)
    products = problem.product.products
    around = _around_us(plan, chip)
    static = products * (max(compute, memory) + _LAUNCH_US) + _VISITS_US + around
    how = "widened in registers" if plan.widens else "as they are"
    note = f"{plan.dot} WGMMA, weights {how}" + ", turned first" * (not problem.product.rhs_transposed)
    return Estimate(products * compute, products * memory, static, max(cost.gmm_floor(problem, chip)), note)


def _visits(plan: GmmPlan) -> int:
    """Those of groups of equal size; small ones start anywhere, large ones at multiples of 8 if they can."""
    groups = cost.touched(plan.problem)
    each = -(-plan.problem.product.m // groups)
    before = ALIGNED - 1 if each % ALIGNED or each < _SMALL else 0
    return groups * -(-(each + before) // plan.config.block_m)


def _times(plan: GmmPlan, chip: Chip) -> tuple[float, float]:
    """(compute, memory) in microseconds of one product, without what XLA does."""
    p, c = plan.core, plan.config
    rate = {"int8": chip.int8, "bfloat16": chip.bf16, "float16": chip.bf16}.get(plan.dot, chip.fp8)
    matrix = 2 * c.block_m * c.block_n * c.block_k / (rate * 1e6 / chip.sms)
    # Each 64 columns read their rows again, and their weights unless those are in registers.
    read = c.block_n / 64 * (c.block_m + 64 * (not plan.widens)) * c.block_k * dtype_bits(plan.dot) / 8
    matrix = max(matrix, read / (_SHARED_BYTES * chip.ghz * 1e3)) / _UTILISATION
    of_warpgroup = c.tile_n * c.block_k / (64 * 128)
    registers = _WIDEN_US * of_warpgroup * plan.widens
    if plan.tiled:
        sums = c.tile_n * c.block_m / (64 * 128)
        registers += _SCALE_US * sums * (c.block_k // plan.run_k)
    step = max(matrix, registers) + _STEP_US
    item = plan.steps_k * step + _ITEM_US + _SUMS_US * c.block_m * c.block_n / (128 * 256)
    visits = _visits(plan)
    turns = -(-visits * plan.columns // chip.sms)
    weights = matmul_cost.operand_bytes(dataclasses.replace(p.rhs, batch=cost.touched(plan.problem)), p.k)
    panels = -(-plan.columns // c.panel)
    moved = weights + panels * matmul_cost.operand_bytes(p.lhs, p.k) + matmul_cost.result_bytes(p) / p.batch
    return turns * item, moved / (chip.hbm_gbps * 1e3) / _BANDWIDTH


def _around_us(plan: GmmPlan, chip: Chip) -> float:
    """What XLA's ops before and after take."""
    p, full = plan.core, plan.problem.product
    moved, ops = 0.0, 0
    if not full.rhs_transposed:
        moved += 2 * full.products * matmul_cost.operand_bytes(full.rhs, full.k)
        ops += full.products
    if full.quantize_lhs or full.norm:
        moved += 2 * matmul_cost.operand_bytes(full.lhs, full.k) + full.m * full.k * dtype_bits(plan.dot) / 8
        ops += 2
    if full.epilogue:
        sums = full.m * full.n * 4
        moved += full.products * sums + full.m * full.n * dtype_bits(full.out_dtype) / 8
        ops += 2
    ops += p.lhs.is_quantized
    return moved / (chip.hbm_gbps * 1e3) / _BANDWIDTH + ops * _OP_US


def _fitting(problem: GmmProblem, chip: Chip) -> Iterator[GmmPlan]:
    for config in _candidates(problem):
        try:
            yield resolve(problem, chip, config)
        except NotImplementedError:
            continue


def _candidates(problem: GmmProblem) -> Iterator[Config]:
    p = GmmPlan(problem, Config(8, 64, 64, 1, 1)).core
    each = -(-p.m // cost.touched(problem)) + 7
    rows = [b for b in (8, 16, 32, 64, 128, 256) if b // 2 < each]
    # 128 bytes, which copies and matrix instructions take best.
    depths = (128,) if dtype_bits(dense.dot_dtype(p)) == 8 else (64, 128)
    for block_m in rows:
        for block_n, warpgroups in ((64, 1), (128, 2), (256, 2), (192, 3)):
            for block_k in depths:
                plan = GmmPlan(problem, Config(block_m, block_n, block_k, 1, warpgroups))
                spare = SMEM_BYTES - plan.smem_bytes
                more = spare // max(1, _stage_bytes(plan))
                stages = min(1 + more, 8)
                if stages >= 3:
                    yield dataclasses.replace(plan.config, stages=stages)


def _stage_bytes(plan: GmmPlan) -> int:
    two = dataclasses.replace(plan, config=dataclasses.replace(plan.config, stages=2))
    return two.smem_bytes - plan.smem_bytes
