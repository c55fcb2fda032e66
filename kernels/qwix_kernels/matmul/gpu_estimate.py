"""What the Hopper kernel costs, and the blocks that cost least: a static model, fitted to measurements.

    time      = launch + (compute^3 + memory^3)^(1/3): the greater one, and some of the lesser in its way
    compute   = the thread blocks' turns x (steps of K x the cycles of one step + an epilogue)
    one step  = matrix instructions, beside which weights are widened; scales after the dot come on top

Fitted to 99 kernels and configurations measured on an H100 80GB HBM3 (jax 0.11.2, 2026-11-22): within 15 % of
89 of them and within 25 % of 97; the geometric mean of estimate over measurement is 0.99.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.gpu_blocks import SMEM_BYTES
from qwix_kernels.matmul import cost
from qwix_kernels.matmul.gpu_plan import Config, Plan, check, resolve, scale_k
from qwix_kernels.problem import MatmulProblem, dtype_bits

LAUNCH_US = 2.8  # from the launch to the first block's arrival, and from the last one's to the end
HBM_SHARE = 0.90  # of the bandwidth, which a copy of 1 GiB reaches too
_PEAK_SHARE = 0.86  # of the matrix unit's peak while it works: the clock falls under load
_STEP_CYCLES = 130  # to wait for a stage and to release it
_EPILOGUE_CYCLES = 1500
# Issue slots per weight that is widened, and per element of a sum that is scaled after the dot.
_WIDEN = {"int8": 2.0, "int4": 2.2, "float8_e4m3fn": 3.0, "float8_e5m2": 3.0}
_LOOK_UP = 5.5
_EXCHANGE = 1.2
_SCALE_BEFORE = 0.5
_SCALE_AFTER = {"int32": 3.0, "float32": 2.0}
_LANES = 128
# How much longer than its slots the widening takes: shared memory, and fences between a stage's users.
_STALLS = 1.35


def estimate(p: MatmulProblem, chip: Chip, config: Config) -> Estimate:
    """Static cost of the kernel, and of what finishes a sum in parts."""
    plan = resolve(p, chip, config)
    compute = _compute_us(plan, chip)
    per_us = chip.hbm_gbps * 1e3 * HBM_SHARE
    memory = cost.floor(p, chip)[1] / HBM_SHARE
    after = 0.0
    if plan.partial:
        moved = p.batch * p.m * p.n * (4 * (config.splits + 1) + dtype_bits(p.out_dtype) / 8)
        after = 1.5 + moved / per_us
    static = (compute**3 + memory**3) ** (1 / 3) + LAUNCH_US + after
    how = f"{config.strategy}, {plan.items} blocks of {config.block_m} x {config.block_n}"
    return Estimate(compute, memory, static, max(cost.floor(p, chip)), how)


def _compute_us(plan: Plan, chip: Chip) -> float:
    c = plan.config
    rate = chip.unit(plan.dot, plan.dot)[1] * 1e12 / (chip.sms * chip.ghz * 1e9)  # operations per cycle
    # Each instruction reads all of its right operand from shared memory: a narrow one keeps the unit waiting.
    narrow = min(1.0, 0.5 + c.block_m / 512)
    rows = 64 * -(-plan.tile_n // 64) * c.warpgroups_n
    tensor = 2 * c.block_m * rows * c.block_k / rate / _PEAK_SHARE
    step = tensor / narrow
    if plan.widens:
        each = c.block_n * c.block_k * _slots(plan) / _LANES
        step = max(step, each * _STALLS)
    if c.strategy == "after":
        runs = c.block_k // plan.run_k
        scaled = c.block_m * c.block_n * runs * _SCALE_AFTER[plan.acc] / _LANES
        step = (tensor * _PEAK_SHARE if not plan.widens else step) + scaled
    turns = -(-plan.items // chip.sms)
    cycles = turns * (plan.steps * (step + _STEP_CYCLES) + _EPILOGUE_CYCLES * c.block_m / 256)
    return cycles / (chip.ghz * 1e3)


def _slots(plan: Plan) -> float:
    p = plan.problem
    slots = _LOOK_UP if p.rhs.codebook else _WIDEN[p.rhs.dtype]
    slots += _SCALE_BEFORE * ((plan.config.strategy == "before") + p.rhs.zero_point)
    return slots + _EXCHANGE * (plan.dot != "int8")


@functools.lru_cache(maxsize=4096)
def heuristic_config(p: MatmulProblem, chip: Chip) -> Config:
    """The cheapest of the candidates."""
    check(p, chip)
    best: tuple[float, Config] | None = None
    for config in _candidates(p):
        try:
            us = estimate(p, chip, config).static_us
        except NotImplementedError:
            continue
        if best is None or us < best[0]:
            best = us, config
    if best is None:
        raise NotImplementedError("no blocks fit: scales along K change too often, or N is too small")
    return best[1]


def _candidates(p: MatmulProblem) -> Iterator[Config]:
    """Blocks worth pricing, with as many stages as fit."""
    rows = next((m for m in (8, 16, 32, 64, 128) if p.m <= m), 256)
    many = scale_k(p) < p.k
    strategies = ("after", "before") if many else ("once",)
    splits = (1, 2, 4) if p.m <= 64 else (1,)
    for m, (n, wn), wk, k, parts, strategy in itertools.product(
        (rows, 128) if rows > 128 else (rows,),
        ((64, 1), (128, 2), (192, 3)),
        (1, 2, 4) if rows <= 64 else (1,),
        (64, 128, 256, 512),
        splits,
        strategies,
    ):
        one = Config(m, n, k, 1, wn, wk, parts, strategy)
        plan = Plan(p, one)
        stage = Plan(p, Config(m, n, k, 2, wn, wk, parts, strategy)).smem_bytes - plan.smem_bytes
        stages = min(8, (SMEM_BYTES - plan.smem_bytes) // stage + 1)
        if stages >= 2:
            yield Config(m, n, k, stages, wn, wk, parts, strategy)
