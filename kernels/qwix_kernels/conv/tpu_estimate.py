"""What the TPU kernel costs: analytic, from static facts.

The constants were read from the compiler's final bundles (`python -m bench.price --suite conv`).
"""

from __future__ import annotations

from qwix_kernels.chips import Chip
from qwix_kernels.conv import cost
from qwix_kernels.conv.tpu_plan import Plan
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul.tpu_config import LANES, pl_cdiv
from qwix_kernels.matmul.tpu_plan import is_fp8
from qwix_kernels.problem import Epilogue, dtype_bits

# Vector operations per 1024 elements of 32 bits.
_ABSMAX = {False: 2.5, True: 1.0}
_QUANTIZE, _STAGE, _WORD, _END = 5.0, 2.0, 5.0, 4.0
_SPLIT = 3.0
_ACTIVATION = {None: 0.0, "relu": 1.0, "relu6": 2.0, "silu": 8.0, "gelu_tanh": 12.0, "gelu": 30.0}
# Cycles to hand 1024 weights to the matrix units, by their columns: in bfloat16, and in 8 bits.
_PUSH = {128: (0.28, 0.28), 256: (0.44, 0.25)}
_NOT_HIDDEN = 0.2  # of the lesser of matrix work and what follows it
_STEP, _CHUNK = 400, 130  # cycles
_TOGETHER = 0.4  # of staging is left beside the dots
_ALONE = 1.7  # times as long takes staging in loops of its own, whose latency nothing hides


def estimate(plan: Plan, chip: Chip) -> Estimate:
    """Static cost of a plan on one core."""
    compute, memory = compute_cycles(plan, chip) / (chip.ghz * 1e3), memory_us(plan, chip)
    note = (
        f"{plan.lhs_dot} x {plan.rhs_dot}, {plan.images} images of pitch {plan.pitch}, "
        f"chunks of {plan.chunk}, {plan.block_n} columns, {len(plan.copies)} copies"
        + (f", {plan.turns} turns" if plan.turns > 1 else "")
        + (f", {plan.bands} bands" if plan.bands > 1 else "")
    )
    return Estimate(compute, memory, max(compute, memory), max(cost.floor(plan.problem, chip)), note)


def compute_cycles(plan: Plan, chip: Chip) -> float:
    """Of all grid steps."""
    p = plan.problem
    blocks, columns = plan.grid
    lanes = pl_cdiv(p.features, LANES) * LANES
    # The dots of a step.
    deep = pl_cdiv(plan.depth, chip.mxu) * chip.mxu
    wide = pl_cdiv(plan.columns, chip.mxu) * chip.mxu
    places = plan.chunks * plan.chunk
    rate = {"int8": chip.int8}.get(plan.lhs_dot, chip.bf16)
    if is_fp8(plan.lhs_dot) and is_fp8(plan.rhs_dot):
        rate = max(chip.fp8, chip.bf16)
    matrix = 2 * places * deep * wide / (rate * 1e3) * chip.ghz
    # Every chunk hands the matrix unit all weights again.
    push = (
        _PUSH[chip.mxu][dtype_bits(plan.rhs_dot) == 8 and plan.rhs_dot == plan.lhs_dot] * deep * wide / 1024
    )
    matrix = max(matrix, push * plan.chunks)
    e = p.epilogue or Epilogue()
    after = _END + _ACTIVATION[e.activation] + e.bias + 3 * (e.quantize is not None) + (plan.images > 1)
    vector = after * places * pl_cdiv(plan.columns, LANES) * LANES / 1024 / 4
    # Staging, once for all blocks of columns.
    values = plan.images * plan.block_rows * plan.block_columns * lanes / 1024
    stage = _STAGE + _QUANTIZE * plan.quantizes + _SPLIT * plan.splits / (4 if plan.splits_words else 1)
    stage += _ABSMAX[plan.bf16_math and p.lhs.dtype == "bfloat16"] * plan.finds_scale
    rows = plan.body if plan.turns > 1 and plan.copies_are_local else plan.length
    copied = len(plan.copies) * rows * lanes / 1024 * dtype_bits(plan.lhs_dot) / 32
    staging = (stage * values + _WORD * copied) / 4
    side_by_side = lambda a, b: max(a, b) + _NOT_HIDDEN * min(a, b)
    rest = _CHUNK * plan.chunks
    weights = 3.0 * plan.depth * plan.columns / 1024 / 4 if plan.widens_rhs else 0.0
    if plan.turns > 1:
        turn = side_by_side(matrix, vector + staging) + rest
        return blocks * (plan.turns * turn + _ALONE * staging + weights + _STEP)
    dots = side_by_side(matrix, vector) + rest
    # A loop of one chunk is none: where no loop of copies is in front either, one schedule has all.
    together = plan.chunks == 1 and columns == 1 and not plan.copies and not plan.quantizes
    return blocks * (columns * (dots + weights + _STEP) + (_TOGETHER if together else _ALONE) * staging)


def memory_us(plan: Plan, chip: Chip) -> float:
    """Bytes that the blocks move over the bandwidth."""
    p = plan.problem
    blocks, columns = plan.grid
    again = cost.rhs_bytes(p) * (blocks - 1 if columns > 1 else 0)
    return (cost.tiled_bytes(p) + again) / (chip.hbm_gbps * 1e3)
