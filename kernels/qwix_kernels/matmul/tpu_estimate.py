"""What the TPU kernel takes, what it costs, and the blocks that cost least: analytic, from static facts.

The cost of a step is that of its busiest unit, as the compiler overlaps them: the matrix unit at its peak, or
the vector unit at four operations on 1024 float32 lanes per cycle. Vector operations are counted per 1024
elements; the constants below were read from the compiler's final bundles (`python -m bench.price` prints
those of any plan).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul import cost, tpu_across, tpu_low_rank_plan
from qwix_kernels.matmul.tpu_config import LANES, Config, pl_cdiv
from qwix_kernels.matmul.tpu_plan import (
    FP4,
    LONG_K,
    Plan,
    is_fp8,
    is_integer_problem,
    k_tile,
    resolve,
    stored,
    takes_fp4,
)
from qwix_kernels.problem import Epilogue, MatmulProblem, dtype_bits

MIN_TILE = 16
_LHS = ("bfloat16", "float32", "int8", "uint8", "int4", "uint4", "float8_e4m3fn", "float8_e5m2")
_OUT = ("bfloat16", "float32", "int32")
_RHS = (*_LHS, FP4)
_NORM_WEIGHTS = ("bfloat16", "float32")
_SCALES = ("bfloat16", "float32", "float8_e8m0fnu", "float8_e4m3fn")
_QUANTIZED_TO = ("int8", "int4", "float8_e4m3fn", "float8_e5m2")
# Vector operations per 1024 elements.
_WIDEN = {"int8": 2.7, "int4": 2.9, "uint8": 2.5, "uint4": 2.6, "nf4": 7.0, FP4: 3.5, "float8": 5.0}
_WIDEN_16 = {"int8": 0.55, "int4": 0.55, "nf4": 8.5}  # to bfloat16, where the vector unit has that
_WIDEN_8 = {FP4: 0.55, "float8": 0.55}  # the same where float8 is native
# Widened by the compiler, on the way into the matrix unit: integers and e4m3, without and with `bf16_math`.
_FP4_TO_FP8 = 1.3
_WIDEN_WIDE = 0.5
_MIXED = {False: (2.4, 1.0), True: (0.6, 0.8)}
_SCALE_WEIGHT = 2.0  # multiply, and half a pack to bfloat16
_SCALE_WEIGHT_16 = 0.5
# Cycles to hand 1024 weights to the matrix units, by their columns: in bfloat16, and in 8 bits.
_PUSH = {128: (0.28, 0.28), 256: (0.44, 0.25)}
_SCALE_PARTIAL = 2.2  # multiply and add
END = 2.0  # scales of the result, packed
_STACKED = 0.4  # registers that move out of the way
# Rows, without and with `bf16_math`; a tile of one register more, each exchange of lanes in a narrower one.
_QUANTIZE_ROW = {"int": (8.0, 6.8), "float8": (11.0, 8.8), "native": (5.0, 4.3)}
_TILE_SCALE, _EXCHANGE, _NORM = 7.0, 3.0, 11.0
# XLA's maximum of every row: three small ops, and so many times the time in which HBM moves the rows.
_ROW_PASS_US, _ROW_PASS = 3.2, 4.4
_ACTIVATION = {None: 0.0, "relu": 1.0, "relu6": 2.0, "silu": 8.0, "gelu_tanh": 12.0, "gelu": 30.0}
_NOT_HIDDEN = 0.4  # of the lesser of matrix and vector work
_NOT_HIDDEN_WEIGHTS = 0.15  # of the lesser of matrix work and that on the weights
_NOT_HIDDEN_SUMS = 0.1  # where running sums stay in registers, see `Plan.sub_m`, or there are few
_RUNNING_SUM = 4.0  # cycles per 1024 elements
STEP_CYCLES = {128: 180, 256: 230}  # of a grid step, whatever its blocks, by columns of the matrix unit
LOOP_CYCLES = 200  # of a grid of more than one step
_NOT_HIDDEN_ROWS = 0.1  # of the lesser of row and other work, see `Plan.overlapped_rows`
_MOST_COLUMNS, _MOST_SUMS = 2048, 1 << 19
_MOST_ROWS, _MOST_SUMS_WIDE = 1024, 1 << 21
_WHOLE_WEIGHT = 4.5 * (1 << 20)  # bytes of values and scales
# XLA brings operands into VMEM ahead of a kernel where it finds room, so that much of the ramp counts.
RAMP = 0.5


def check(problem: MatmulProblem, chip: Chip) -> None:
    """Raises NotImplementedError, naming the constraint and the shapes, for what the kernel does not run."""
    p, refuse = problem, _refusal(problem, chip)
    check_kinds(p, chip)
    if not any(True for _ in _fitting(p, chip)):
        refuse(
            "finds no blocks that fit its VMEM" + " and hold whole rows to normalise" * (p.norm is not None)
        )


def _refusal(p: MatmulProblem, chip: Chip) -> Callable[[str], None]:
    shapes = (
        f"lhs [{p.lhs.batch}, {p.m}, {p.k}] {p.lhs.dtype}, rhs [{p.rhs.batch}, {p.k}, {p.n}] {p.rhs.dtype}"
    )

    def refuse(reason: str) -> None:
        raise NotImplementedError(f"the TPU kernel {reason}; got {shapes} on {chip.name}")

    return refuse


def check_kinds(problem: MatmulProblem, chip: Chip) -> None:
    """As `check`, but for whether there are blocks that fit."""
    p, refuse = problem, _refusal(problem, chip)
    if chip.platform != "tpu":
        refuse("runs on TPUs")
    if 0 in (p.m, p.n, p.k, p.batch):
        refuse("has no empty operands")
    for name, x in (("lhs", p.lhs), ("rhs", p.rhs)):
        taken = _LHS if name == "lhs" else _RHS
        if x.dtype not in taken:
            refuse(f"takes {', '.join(taken)} as {name}")
        if x.codebook not in (None, "nf4"):
            refuse(f"knows the codebook nf4, not {x.codebook!r}")
        if x.scale_dtype not in (None, *_SCALES):
            refuse(f"takes scales in {' or '.join(_SCALES)}, not {x.scale_dtype}")
        if x.zero_point and x.dtype == FP4:
            refuse(f"has no zero points in {FP4}")
        if x.zero_point and x.codebook:
            refuse("has no zero points with a codebook")
        if k_tile(x, p.k) % MIN_TILE and not (name == "rhs" and tpu_across.is_taken(p, MIN_TILE)):
            refuse(f"takes K tiles of multiples of {MIN_TILE}, not {x.tile_k} ({name})")
    if p.rhs.dtype == FP4 and not takes_fp4(chip) and (p.n if p.rhs_transposed else p.k) % 32:
        refuse(f"unpacks {FP4} by 32 rows of the weight")
    if p.norm and (p.lhs.is_quantized or p.norm.weight_dtype not in _NORM_WEIGHTS):
        refuse(
            f"normalises plain rows, by weights in {' or '.join(_NORM_WEIGHTS)}, not {p.norm.weight_dtype}"
        )
    if p.epilogue and (reason := _epilogue_refused(p.epilogue, p.n)):
        refuse(reason)
    if p.out_dtype not in _OUT and not (p.epilogue and p.epilogue.quantize):
        refuse(f"gives {', '.join(_OUT)}, not {p.out_dtype}")
    if p.precision not in (None, "default") and any(d in ("float32", "bfloat16") for d in stored(p)):
        refuse(f"multiplies floats in bfloat16, not with precision {p.precision!r}")
    if q := p.quantize_lhs:
        tile = q.tile_k % p.k
        if q.dtype not in _QUANTIZED_TO:
            refuse(f"quantizes rows to {', '.join(_QUANTIZED_TO)}, not {q.dtype}")
        if tile % LANES and tile not in (32, 64):
            refuse(f"quantizes rows by K tiles of 32, 64 or multiples of {LANES}, not {tile}")
    if all(x.dtype in ("bfloat16", "float32") and not x.is_quantized for x in (p.lhs, p.rhs)) and not q:
        refuse("needs a quantized operand")
    if _exact_run(p) < min([t for t in (k_tile(p.lhs, p.k), k_tile(p.rhs, p.k)) if t], default=p.k):
        refuse(f"adds up integer products in int32, which is sure to hold {_exact_run(p)} of them")


def _epilogue_refused(e: Epilogue, n: int) -> str:
    """What the kernel does not do after the product; empty for nothing."""
    q = e.quantize
    if e.residual and e.residual not in ("bfloat16", "float32"):
        return f"adds residuals in bfloat16 or float32, not {e.residual}"
    if q is None:
        return ""
    if q.dtype not in _QUANTIZED_TO:
        return f"quantizes its result to {', '.join(_QUANTIZED_TO)}, not {q.dtype}"
    if not q.static and q.tile_k % n % LANES:
        return f"quantizes its result by whole rows or tiles of multiples of {LANES}, not {q.tile_k}"
    return ""


def epilogue_ops(p: MatmulProblem) -> float:
    """Vector operations per element of the result after its scales."""
    e = p.epilogue
    if e is None:
        return 0.0
    each = e.bias + e.gate_bias + e.gate + 1.5 * (e.residual is not None) + _ACTIVATION[e.activation]
    return each + (_QUANTIZE_ROW["float8" if is_fp8(p.out_dtype) else "int"][False] if e.quantize else 0.0)


def _exact_run(p: MatmulProblem) -> int:
    """How many integer products, zero points taken off, int32 is sure to hold the sum of.

    Without scales the sum is right modulo 2**32, so exact wherever int32 holds the result.
    """
    if not is_integer_problem(p) or p.out_dtype == "int32":
        return p.k
    bits = [dtype_bits(d) - (not d.startswith("u")) for d in stored(p)]
    return 1 << (31 - sum(bits) - p.lhs.zero_point - p.rhs.zero_point)


def heuristic_config(problem: MatmulProblem, chip: Chip) -> Config:
    """The blocks and the strategy with the least static time. Raises NotImplementedError as `check` does."""
    return _best(problem, chip)


@functools.lru_cache(maxsize=4096)
def _best(problem: MatmulProblem, chip: Chip) -> Config:
    priced = [(_ramped(plan, chip), config) for config, plan in _fitting(problem, chip)]
    if not priced:
        check(problem, chip)
    return min(priced, key=lambda x: x[0])[1]


def _ramped(plan: Plan, chip: Chip) -> float:
    return (
        max(_compute_us(plan, chip), _memory_us(plan, chip))
        + before_us(plan, chip)
        + RAMP * ramp_us(plan, chip)
    )


def before_us(plan: Plan, chip: Chip) -> float:
    """XLA's pass over the rows for their scales, where a row does not fit one block; nothing overlaps it."""
    q = plan.problem.quantize_lhs
    if not plan.rows_given or q is None or q.static:
        return 0.0
    moved = cost.operand_bytes(plan.problem.lhs, plan.problem.k) / (chip.hbm_gbps * 1e3)
    return _ROW_PASS_US + _ROW_PASS * moved


def ramp_us(plan: Plan, chip: Chip) -> float:
    """Microseconds of the first fetch, the last step and the last store, as far as nothing overlaps them.

    A static price does not see it, so that blocks are chosen by the sum of both. Where compute binds, the
    first fetch is in front of it; where memory does, the last step comes after it.
    """
    p, compute, memory = plan.problem, _compute_us(plan, chip), _memory_us(plan, chip)
    first = plan.block_m * plan.block_k * dtype_bits(p.lhs.dtype)
    first += p.products * plan.block_n * plan.block_k * dtype_bits(p.rhs.dtype)
    fetch = first / 8 / (chip.hbm_gbps * 1e3)
    store = plan.block_m * plan.block_n * dtype_bits(p.out_dtype) / 8 / (chip.hbm_gbps * 1e3)
    step = compute / math.prod(plan.grid)
    # With one buffer, later blocks of rows are waited for too.
    again = (2 - plan.lhs_buffers) * (plan.grid[0] * plan.grid[1] - 1)
    store += again * plan.block_m * plan.block_k * dtype_bits(p.lhs.dtype) / 8 / (chip.hbm_gbps * 1e3)
    return max(fetch + compute, memory + step) - max(compute, memory) + store


def _fitting(p: MatmulProblem, chip: Chip) -> Iterator[tuple[Config, Plan]]:
    found = False
    for whole_k in (True, False):
        for config in _candidates(p, whole_k):
            try:
                plan = resolve(p, chip, config)
            except NotImplementedError:
                continue
            found = True
            yield config, plan
        # The whole K in one block wins wherever it leaves room for wide blocks of rows and columns.
        if found and p.k <= LONG_K:
            return


def _candidates(p: MatmulProblem, whole_k: bool) -> Iterator[Config]:
    tiles = [t for t in (k_tile(p.lhs, p.k), k_tile(p.rhs, p.k)) if t]
    if p.quantize_lhs and p.quantize_lhs.tile_k % p.k:
        tiles.append(p.quantize_lhs.tile_k)
    for strategy in ("after", "before") if tiles else ("once",):
        for bm in _row_blocks(p.m):
            for bn in _column_blocks(p):
                if strategy == "after" and bm > 64 and bn > 256 and p.n > 256:
                    continue
                if 1024 < bn < p.n and bm * bn > _MOST_SUMS:  # much to compile, and little to win
                    continue
                if bn > _MOST_COLUMNS and bm * bn > _MOST_SUMS_WIDE:
                    continue
                for bk in (p.k,) if whole_k else k_parts(p.k, math.lcm(LANES, *tiles)):
                    yield Config(bm, bn, bk, strategy)


def _column_blocks(p: MatmulProblem) -> list[int]:
    """Widths of a block; whole tiles of a result that is quantized by tiles, all of one quantized by rows."""
    q = p.epilogue.quantize if p.epilogue and p.epilogue.scales_out else None
    tile = q.tile_k % p.n if q else LANES
    if not tile:
        return [p.n]
    fixed = [pl_cdiv(size, tile) * tile for size in (1024, 512, 256, 128)]
    # Blocks of one width that leave no tail, or the least one: for few columns, and for two cores.
    even = [w for w in range(2 * tile, _MOST_COLUMNS + 1, tile) if p.n % w == 0]
    even += [w for parts in (1, 2, 3, 4) if (w := pl_cdiv(p.n, parts * tile) * tile) <= _MOST_COLUMNS]
    # Several blocks of rows read the weight once if all of it is one block.
    if p.m > _MOST_ROWS and cost.operand_bytes(p.rhs, p.k) <= _WHOLE_WEIGHT:
        even.append(p.n)
    return sorted({w if w < p.n else p.n for w in (*fixed, *even)})


def _row_blocks(m: int) -> list[int]:
    unit = 8 if m <= 32 else 64
    return sorted({min(size, pl_cdiv(m, unit) * unit) for size in (_MOST_ROWS, 512, 256, 128, 64, 32, 8)})


def k_parts(k: int, unit: int) -> list[int]:
    """Parts of a K that is too long for VMEM; those that leave no tail, where there are any."""
    parts = [b for b in (unit * i for i in (1, 2, 4, 8, 16, 32, 64)) if 512 <= b < k]
    return [b for b in parts if k % b == 0] or parts


def estimate(problem: MatmulProblem, chip: Chip, config: Config) -> Estimate:
    """Static cost on one core. Raises NotImplementedError where `config` does not fit."""
    plan = resolve(problem, chip, config)
    compute, memory = _compute_us(plan, chip), _memory_us(plan, chip)
    note = f"{config.strategy}, {plan.lhs_dot} x {plan.rhs_dot}"
    static = max(compute, memory) + before_us(plan, chip)
    return Estimate(compute, memory, static, max(cost.floor(problem, chip)), note)


def _compute_us(plan: Plan, chip: Chip) -> float:
    b, rows, columns, steps = plan.grid
    step = step_cycles(plan, chip)
    cycles = b * rows * columns * steps * (plan.problem.products * step + STEP_CYCLES[chip.mxu])
    cycles += LOOP_CYCLES * (b * rows * columns * steps > 1)
    last = (END + epilogue_ops(plan.problem)) / 4 * plan.block_m * _lanes(plan.block_n) / 1024
    cycles += b * rows * columns * last
    if plan.has_prologue:
        again, prologue = (columns if plan.megacore_rows else 1), row_ops(plan) / 4
        beside = min(prologue * plan.overlapped_rows / plan.block_m, step)
        prologue -= (1 - _NOT_HIDDEN_ROWS) * beside
        cycles += b * rows * again * steps * prologue
    of_rows, of_block = tpu_low_rank_plan.cycles(plan, chip, _PUSH[chip.mxu][False])
    cycles += b * rows * ((columns if plan.megacore_rows else 1) * of_rows + columns * of_block)
    return cycles * _idle(plan, chip) / (chip.ghz * 1e3)


def step_cycles(plan: Plan, chip: Chip) -> float:
    """Cycles for the dots of one step and what is done to their weights and sums."""
    macs = plan.block_m * pl_cdiv(plan.block_n, chip.mxu) * chip.mxu * plan.block_k
    rate = {"int8": chip.int8, "int4": chip.int4}.get(plan.lhs_dot, chip.bf16)
    if is_fp8(plan.lhs_dot) and is_fp8(plan.rhs_dot):
        rate = max(chip.fp8, chip.bf16)
    # A dot that is shorter than the unit is deep leaves the rest of it idle.
    depth = chip.mxu / min(chip.mxu, plan.chunk) if plan.strategy == "after" else 1.0
    weights = pl_cdiv(plan.block_n, chip.mxu) * chip.mxu * plan.block_k
    push = _PUSH[chip.mxu][_pushes_bytes(plan, chip)] * weights / 1024
    matrix = max(2 * macs * plan.stack * depth / (rate * 1e12) * chip.ghz * 1e9, push)
    weights_ops, partial_ops = weight_ops(plan, chip), _partial_ops(plan)
    vector = weights_ops + partial_ops
    # A running sum in VMEM is read, added to and written by nothing that the matrix unit hides.
    sums = _RUNNING_SUM * plan.block_m * _lanes(plan.block_n) / 1024 if plan.steps_k > 1 else 0
    apart = _NOT_HIDDEN_SUMS if plan.sub_m < plan.block_m or plan.block_m <= 32 else _NOT_HIDDEN
    exposed = apart * min(matrix, partial_ops / 4)
    # What the compiler does to weights on their way into the unit, it does beside the dots.
    if plan.prepare_rhs:
        exposed += _NOT_HIDDEN_WEIGHTS * min(matrix, weights_ops / 4)
    return max(matrix, vector / 4) + exposed + sums


def _idle(plan: Plan, chip: Chip) -> float:
    """How much longer the busier core takes than an even share, where a device is two of them."""
    if chip.name != "v5p":
        return 1.0
    b, rows, columns, _ = plan.grid
    split = [b, rows] + ([columns] if plan.megacore_rows or not plan.once_a_row_block else [])
    return min(pl_cdiv(count, chip.cores) * chip.cores / count for count in split)


def weight_ops(plan: Plan, chip: Chip) -> float:
    """Vector operations on the weights of one step."""
    p = plan.problem
    kind = p.rhs.codebook or p.rhs.dtype
    each = 0.0
    if plan.prepare_rhs or kind != plan.rhs_dot:
        each = _widen(kind, chip) + (0 if chip.bf16_math else 0.5)
    elif not chip.is_native(plan.lhs_dot, plan.rhs_dot):
        each = _MIXED[chip.bf16_math][is_fp8(kind)]
    if plan.rhs_gain != 1 and not plan.folds_rhs:
        each = _FP4_TO_FP8
    if plan.folds_rhs:
        each += (_SCALE_WEIGHT_16 if chip.bf16_math else _SCALE_WEIGHT) + p.rhs.zero_point
    return each * pl_cdiv(plan.block_n, chip.mxu) * chip.mxu * plan.block_k / 1024


def _partial_ops(plan: Plan) -> float:
    """Vector operations on the partial results of one step."""
    runs = pl_cdiv(plan.block_k, plan.chunk)
    each = 1.0 * (plan.partial == "int32" or plan.integer)
    if plan.strategy == "after":
        each += _SCALE_PARTIAL + (plan.lhs_tile > 0) + _STACKED * (plan.stack > 1)
    elif runs > 1:
        each += 1
    return each * runs * plan.stack * plan.block_m * _lanes(plan.block_n) / 1024


def _pushes_bytes(plan: Plan, chip: Chip) -> bool:
    """Whether the matrix unit takes the weights in at most 8 bits."""
    if takes_fp4(chip) and plan.rhs_dot in ("int4", FP4):
        return True  # as float8_e4m3fn
    return is_fp8(plan.rhs_dot) or (plan.lhs_dot == plan.rhs_dot and plan.rhs_dot != "bfloat16")


def row_ops(plan: Plan) -> float:
    """Vector operations on the rows of one block."""
    p, tile = plan.problem, plan.lhs_tile
    if q := p.quantize_lhs:
        kind = "int" if not is_fp8(q.dtype) else "native" if plan.lhs_dot == q.dtype else "float8"
        each = _QUANTIZE_ROW[kind][plan.bf16_math] - q.static + 2 * q.columns + q.noise
        each += _TILE_SCALE * LANES / max(tile, LANES) if tile else 0
        each += _EXCHANGE * math.log2(tile) if 0 < tile < LANES and not q.static else 0
    else:
        each = _widen(p.lhs.codebook or p.lhs.dtype) + 1 + plan.folds_lhs if plan.prepare_lhs else 0
        each += 6 * LANES / tile if plan.spreads_row_scale else 0
    return (each + _NORM * (p.norm is not None)) * plan.block_m * plan.block_k / 1024


def _widen(dtype: str, chip: Chip | None = None) -> float:
    cost = dict(_WIDEN)
    if chip is not None:
        cost |= (_WIDEN_16 if chip.bf16_math else {}) | (_WIDEN_8 if takes_fp4(chip) else {})
    return cost.get("float8" if is_fp8(dtype) else dtype, _WIDEN_WIDE)


def _lanes(n: int) -> int:
    return pl_cdiv(n, LANES) * LANES


def _memory_us(plan: Plan, chip: Chip) -> float:
    """Bytes that the blocks move, fetched again wherever the block index changes, over the bandwidth."""
    p = plan.problem
    _, rows, columns, steps = plan.grid
    lhs = cost.operand_bytes(p.lhs, p.k) * (p.batch // p.lhs.batch if rows > 1 or steps > 1 else 1)
    if steps > 1 and (not plan.prepare_lhs or plan.megacore_rows):
        lhs *= columns
    again = rows if columns > 1 or steps > 1 else 1
    rhs = cost.operand_bytes(p.rhs, p.k) * again * (p.batch // p.rhs.batch) * p.products
    out = cost.result_bytes(p) + cost.epilogue_bytes(p)
    return (lhs + rhs + out + tpu_low_rank_plan.moved_bytes(plan)) / (chip.hbm_gbps * 1e3)
