"""What the Blackwell matmul kernel is expected to cost. Static: counted, not measured.

A thread block's item takes as long as the slowest of what overlaps in it, in cycles:

    tensor core   128 x block_m x K over the rate of one multiprocessor, and no less than it takes to read the
                  weights' block from shared memory, 128 bytes a cycle
    copies        all that is copied to a multiprocessor, 64 bytes a cycle (its port to the L2 cache)
    conversion    instructions per weight, from the machine code, four warps' a cycle
    draining      of runs of K: instructions per element of the accumulators, likewise

and all items together no less than their bytes from HBM. What is stated and not counted: `_UTILISATION` of
the slowest, `_HBM` of the bandwidth, `_LAUNCH_US` for a kernel and as much for the sum of parts of K,
`_PASS_US` for what fills up rows or columns.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.gpu_blocks import SMEM_BYTES
from qwix_kernels.matmul import cost
from qwix_kernels.matmul.gpu_sm100_check import check, kind, run_k, x_dtype
from qwix_kernels.matmul.gpu_sm100_plan import CHUNK_BYTES, LANES, Config, Plan, plan
from qwix_kernels.problem import MatmulProblem, dtype_bits

_UTILISATION = 0.85
_HBM = 0.9
_LAUNCH_US = 2.0
_PASS_US = 1.5  # a kernel of XLA's, however small
_PORT_BYTES = 64  # a cycle, from L2 to one multiprocessor
_SHARED_BYTES = 128  # a cycle, of shared memory
_FILL_CYCLES = 1500  # until the first block arrives, and to store the last tile
_THREADS = 128  # lanes that issue in a cycle
# Instructions per weight and thread, from the machine code of 128 x 128 blocks for sm_100a (static).
_CONVERSION = {"int4": 1.4, "int8": 2.2, "float8_e4m3fn": 2.0, "float8_e5m2": 2.0, "float4_e2m1fn": 2.0}
_SCALING = 0.5
_DRAINING = 2.2  # per element of a run
_SPLITS = (1, 2, 3, 4, 6, 8)
_ROWS = (16, 32, 64, 96, 128, 160, 192, 224, 256)


def estimate(p: MatmulProblem, chip: Chip, config: Config) -> Estimate:
    """Static microseconds. Raises NotImplementedError where the config does not fit the problem."""
    a = plan(p, chip, config)
    floor = cost.floor(p, chip)
    floor = (floor[0] / _faster(a), floor[1])
    tensor, item = _item_cycles(a, chip)
    count = a.items[0] * a.items[1] * a.items[2]
    waves = -(-count // a.units)
    per_us = chip.ghz * 1e3
    busy = (waves * item / _UTILISATION + _FILL_CYCLES) / per_us
    moved = cost.operand_bytes(p.lhs, p.k) + cost.operand_bytes(p.rhs, p.k) + cost.result_bytes(p)
    memory = moved / (chip.hbm_gbps * 1e3 * _HBM)
    after = 0.0
    if a.splits > 1:
        partial = 2 * a.splits * cost.result_bytes(p, "float32")
        after = _LAUNCH_US + partial / (chip.hbm_gbps * 1e3)
    if a.m != p.m:  # rows are filled up before, and cut off after
        after += 2 * _PASS_US + 2 * (cost.operand_bytes(p.lhs, p.k) + cost.result_bytes(p)) / (
            chip.hbm_gbps * 1e3
        )
    elif a.out_n != p.n:
        after += _PASS_US + 2 * cost.result_bytes(p) / (chip.hbm_gbps * 1e3)
    compute = waves * tensor / per_us
    return Estimate(compute, memory, max(busy, memory) + _LAUNCH_US + after, max(floor), _note(a))


def _faster(a: Plan) -> float:
    """4-bit floats multiply at twice the rate of 8-bit ones."""
    return 2.0 if a.block_scale and dtype_bits(a.w_dtype) == 4 else 1.0


def _item_cycles(a: Plan, chip: Chip) -> tuple[float, float]:
    """(of the tensor core, of the slowest part) for one item."""
    _, rate = chip.unit(a.multiplied, a.multiplied)
    macs = rate * _faster(a) * 1e12 / (2 * chip.sms * chip.ghz * 1e9)
    k = a.blocks * a.block_k
    stored = dtype_bits(a.multiplied) / 8
    tensor = max(LANES * a.block_m * k / macs, LANES * k * stored / _SHARED_BYTES)
    copies = a.blocks * a.stage_bytes / _PORT_BYTES
    convert = drain = 0.0
    if a.converters:
        per_weight = _CONVERSION[a.w_dtype] + (_SCALING if a.converts_scales else 0)
        convert = LANES * k * per_weight / _THREADS
    if a.run_k:
        drain = a.runs * LANES * a.block_m * _DRAINING / _THREADS
    return tensor, max(tensor, copies, convert, drain)


def _note(a: Plan) -> str:
    how = "block-scaled" if a.block_scale else f"{a.w_dtype} weights converted" if a.converters else "native"
    parts = [f"tcgen05, {how}", f"{LANES}x{a.block_m} tiles"]
    parts += ["two multiprocessors a tile"] if a.pair else []
    parts += [f"{a.runs} runs of K scaled in registers"] if a.run_k else []
    parts += [f"{a.splits} parts of K"] if a.splits > 1 else []
    return ", ".join([*parts, f"{_UTILISATION:.0%} of the slowest part assumed"])


def heuristic_config(p: MatmulProblem, chip: Chip) -> Config:
    """The cheapest by `estimate`. Raises NotImplementedError where the problem is not taken.

    >>> from qwix_kernels.chips import CHIPS
    >>> from qwix_kernels.problem import Operand
    >>> lhs, rhs = Operand("bfloat16", 1, 16), Operand("int4", 1, 4096, "float32", 1, 128)
    >>> p = MatmulProblem(16, 4096, 4096, lhs, rhs, "bfloat16", rhs_transposed=True)
    >>> heuristic_config(p, CHIPS["b200"])
    Config(block_m=16, block_k=128, steps=8, splits=4, converters=2, pair=False)
    """
    best: tuple[float, Config] | None = None
    for config in _candidates(p, chip):
        us = estimate(p, chip, config).static_us
        if best is None or us < best[0]:
            best = us, config
    if best is None:
        raise NotImplementedError(f"no blocks fit {p}")
    return best[1]


def _candidates(p: MatmulProblem, chip: Chip) -> Iterator[Config]:
    """Those that fit."""
    check(p, chip)
    least = min(max(16, -(-p.m // 16) * 16), 256)
    rows = [size for size in _ROWS if size < 2 * least or size == 16]
    for block_k, block_m, pair in itertools.product(_block_ks(p), rows, (False, True)):
        blocks = -(-p.k // block_k)
        for splits in _SPLITS:
            if splits == 1 or (blocks % splits == 0 and blocks // splits >= 4):
                converters = 2 if kind(p) == "converted" and block_m < 64 else 1
                config = _deepest(p, chip, Config(block_m, block_k, 1, splits, converters, pair))
                if config is not None:
                    yield config


def _deepest(p: MatmulProblem, chip: Chip, config: Config) -> Config | None:
    """With as many blocks on their way as fit, up to eight; None where there are not two."""
    try:
        a = plan(p, chip, config)
    except NotImplementedError:
        return None
    steps = min(8, 1 + (SMEM_BYTES - a.smem_bytes) // a.stage_bytes)
    return dataclasses.replace(config, steps=steps) if steps > 1 else None


def _block_ks(p: MatmulProblem) -> tuple[int, ...]:
    """128 bytes of K of native operands; of converted weights a chunk of 128, or two of them."""
    sizes = (128 * 8 // dtype_bits(p.rhs.dtype),)
    if kind(p) == "converted":
        chunk = CHUNK_BYTES * 8 // dtype_bits(x_dtype(p))
        sizes = (chunk, 2 * chunk)
    run = run_k(p)
    if not run:
        return sizes
    return tuple({next((s for s in (size, size // 2, size // 4) if run % s == 0), run) for size in sizes})
