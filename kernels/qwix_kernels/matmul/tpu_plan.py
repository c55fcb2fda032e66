"""What the TPU kernel will do for one problem on one chip: resolved once, from static facts only.

A plan fixes the dtypes on the matrix unit, which operand is rewritten in VMEM first, where each scale is
applied and how much of K one partial dot may cover. `resolve` raises NotImplementedError, naming the
constraint, for what the kernel does not do; `tpu_kernel.py` then trusts the plan.

Where a scale that changes along K is applied:
    after    each K tile is its own dot, whose result is scaled into a float32 accumulator before   the values
    are dequantized to bfloat16 in VMEM, then one dot takes the whole block once     no scale changes along K
    (scales per row and per column are always applied last, on the accumulator)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from qwix_kernels.chips import Chip
from qwix_kernels.matmul import tpu_across, tpu_low_rank_plan
from qwix_kernels.matmul.tpu_config import LANES, Config, pl_cdiv
from qwix_kernels.problem import MatmulProblem, Operand, dtype_bits

FP4 = "float4_e2m1fn"
FP4_GAIN = 2.0**14  # float8_e5m2 with the bits of a float4_e2m1fn in its low bits is that much smaller
VMEM_SHARE = 0.75  # the compiler's own temporaries live in the rest
SUB_M = 128
LONG_K = 8192  # beyond it, blocks of rows are what VMEM is full of
OVERLAP = 1 << 21  # elements of rows
# With more columns the rows are a small part of the work, and straight-line code takes five times as long to
# compile: v6e w8a8 1024 x 4096 x 4096 is 23.3 us after 14 s of it, or 24.0 after 2.4 s. v7x gains 11 % there.
OVERLAP_COLUMNS, OVERLAP_COLUMNS_SLOW_INT8 = 2560, 4096
# |q| <= 128 makes every product at most 2^14, and float32 counts exactly up to 2^24.
EXACT_BITS = 24
_INT8_BITS, _INT4_BITS = 7, 3  # log2 of the largest magnitude


@dataclasses.dataclass(frozen=True)
class Plan:
    """See the module's header. Sizes are elements."""

    problem: MatmulProblem
    block_m: int
    block_n: int
    block_k: int
    strategy: str
    lhs_dot: str  # dtype on the matrix unit
    rhs_dot: str
    chunk: int  # K of one partial dot whose sum is exact (integers) or shares its scales ("after")
    prepare_lhs: bool  # rewritten into VMEM once per row block, reused by every column block
    prepare_rhs: bool  # rewritten into VMEM in every step
    rhs_gain: float  # what the weights on the matrix unit are too small by
    integer: bool  # accumulates in int32
    rows_given: bool  # scales of `quantize_lhs` come from outside: static, or the row does not fit one block
    bf16_math: bool  # weights are scaled in bfloat16, two to a lane, where the vector unit does that
    megacore_rows: bool  # prepare the lhs in every step, so that the column blocks may run on both cores
    overlap: int  # elements of rows that are prepared beside the dots of the first column block
    lhs_buffers: int = 2  # blocks of the lhs in VMEM: one, which is waited for, where two leave too few rows

    @property
    def steps_k(self) -> int:
        return pl_cdiv(self.problem.k, self.block_k)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        p = self.problem
        return p.batch, pl_cdiv(p.m, self.block_m), pl_cdiv(p.n, self.block_n), self.steps_k

    @property
    def k_tail(self) -> bool:
        """Whether the last block of K reaches past the operands."""
        return self.problem.k % self.block_k != 0

    def k_limit(self, step: Any) -> Any:
        """How much of K block `step` lies inside the operands, or None where all blocks do."""
        return self.problem.k - step * self.block_k if self.k_tail else None

    @property
    def lhs_tile(self) -> int:
        """Run of K that shares a scale of the lhs, or 0 where one scale (or none) covers the whole K."""
        q = self.problem.quantize_lhs
        return k_tile(self.problem.lhs, self.problem.k) if q is None else q.tile_k % self.problem.k

    @property
    def rhs_tile(self) -> int:
        return k_tile(self.problem.rhs, self.problem.k)

    @property
    def scales_lhs(self) -> bool:
        return self.problem.lhs.is_quantized or self.problem.quantize_lhs is not None

    @property
    def folds_lhs(self) -> bool:
        """Whether the prepared lhs has its scale in it already."""
        return self.strategy == "before" and self.lhs_tile > 0

    @property
    def folds_rhs(self) -> bool:
        return self.strategy == "before" and self.rhs_tile > 0

    @property
    def out_tile(self) -> int:
        """Columns that share a scale of a result that is quantized dynamically, or 0: whole rows do."""
        e = self.problem.epilogue
        q = e.quantize if e else None
        return 0 if q is None or q.static else q.tile_k % self.problem.n

    @property
    def row_step(self) -> int:
        """Rows rewritten at a time: a native tile of what they become, at most that of 4-bit values."""
        return row_step(self.lhs_dot)

    @property
    def sub_m(self) -> int:
        """Rows whose running sum stays in registers while the tiles of K go by."""
        return SUB_M if self.strategy == "after" and self.block_m % SUB_M == 0 else self.block_m

    @property
    def stack(self) -> int:
        """K tiles of one dot of strategy "after": more than one where they are narrower than a register.

        The rows then stand in the dot once for each tile, zero outside of it, so that one pass of the weights
        through the matrix unit gives the partial sums of every tile.
        """
        return LANES // self.run if self.strategy == "after" and self.run < LANES else 1

    @property
    def run(self) -> int:
        """Strategy "after": the K that shares its scales on both sides."""
        return min(t for t in (self.lhs_tile, self.rhs_tile) if t)

    @property
    def spreads_row_scale(self) -> bool:
        """Whether scales of K tiles are stored along the lanes, once for all column blocks."""
        return self.strategy == "after" and self.lhs_tile > 0

    @property
    def has_prologue(self) -> bool:
        """Whether something is made of the rows that all their column blocks use."""
        return self.prepare_lhs or self.spreads_row_scale

    @property
    def once_a_row_block(self) -> bool:
        """Whether the first column block of a row block leaves something in VMEM for the others."""
        return self.has_prologue or self.problem.low_rank is not None

    @property
    def overlapped_rows(self) -> int:
        """How many of the block's rows are prepared between the dots of the first column block.

        Beside the dots that costs next to nothing. It takes straight-line code, though, so there is an end to
        how much of it is worth compiling; the other rows are prepared in front, in a loop.
        """
        if not self.has_prologue or self.problem.norm or self.steps_k > 1 or self.strategy == "after":
            return 0
        part = self.overlapped_part
        return min(self.block_m, self.overlap // self.block_k // part * part)

    @property
    def overlapped_part(self) -> int:
        """Rows that are multiplied at a time where others are prepared meanwhile."""
        fits = [n for n in (256, 128) if self.block_m % n == 0 and n * self.block_k <= self.overlap]
        return fits[0] if fits else self.block_m

    @property
    def partial(self) -> str:
        """dtype of one partial dot."""
        return "int32" if jnp.issubdtype(self.lhs_dot, jnp.integer) else "float32"

    @property
    def acc(self) -> str:
        return "int32" if self.integer and self.strategy == "once" else "float32"

    def lhs_tiles(self, block: int | None = None) -> int:
        """Scales along K in one block (at least one)."""
        return (block or self.block_k) // self.lhs_tile if self.lhs_tile else 1

    def rhs_tiles(self, block: int | None = None) -> int:
        return (block or self.block_k) // self.rhs_tile if self.rhs_tile else 1


def row_step(dtype: str) -> int:
    return 64 if dtype == "int4" else 32


def k_tile(x: Operand, k: int) -> int:
    """The tile along K, or 0 where one scale (or none) covers the whole K."""
    return x.tile_k if x.is_quantized and x.tile_k < k else 0


def stored(problem: MatmulProblem) -> tuple[str, str]:
    """(lhs, rhs) element types after dynamic quantization; a codebook's name where there is one."""
    lhs = problem.quantize_lhs.dtype if problem.quantize_lhs else problem.lhs.codebook or problem.lhs.dtype
    return lhs, problem.rhs.codebook or problem.rhs.dtype


def is_int(dtype: str) -> bool:
    return dtype.startswith(("int", "uint"))


def is_integer_problem(problem: MatmulProblem) -> bool:
    return all(is_int(d) for d in stored(problem))


def dot_dtypes(problem: MatmulProblem, chip: Chip, strategy: str) -> tuple[str, str]:
    """What the matrix unit is fed on either side.

    Exact by construction: int4 fits int8 and float8_e4m3fn; int8 and fp8 fit bfloat16. A float32 operand is
    rounded to bfloat16, the unit's own default precision.
    """
    lhs, rhs = stored(problem)
    folded = strategy == "before"
    if folded or "nf4" in (lhs, rhs) or "uint8" in (lhs, rhs):
        return "bfloat16", "bfloat16"
    if rhs == FP4 and not takes_fp4(chip):
        return "bfloat16", "float8_e5m2"
    if is_int(lhs) and is_int(rhs):
        if lhs == rhs == "int4" and chip.is_native("int4", "int4"):
            return "int4", "int4"
        if chip.is_native("int8", "int8"):
            return "int8", "int8"
    if is_fp8(lhs) and is_fp8(rhs) and chip.is_native(lhs, rhs):
        return lhs, rhs
    # Mosaic widens a narrow rhs on the way into the matrix unit, for less than a pass over it in VMEM.
    return "bfloat16", rhs if is_narrow(rhs) else "bfloat16"


def is_fp8(dtype: str) -> bool:
    return dtype.startswith("float8")


def is_narrow(dtype: str) -> bool:
    return dtype in ("int8", "int4", FP4) or is_fp8(dtype)


def takes_fp4(chip: Chip) -> bool:
    """Whether Mosaic widens float4_e2m1fn on the way into the matrix unit, as it does where fp8 is native."""
    return chip.is_native("float8_e4m3fn", "float8_e4m3fn")


def _exact_chunk(problem: MatmulProblem, lhs_dot: str) -> int:
    """The longest K whose integer dot is exact on a float unit (any K on an integer unit)."""
    if lhs_dot.startswith("int") or not is_integer_problem(problem):
        return problem.k
    bits = sum(dtype_bits(d) - (not d.startswith("u")) for d in stored(problem))
    return 1 << (EXACT_BITS - bits)


def resolve(problem: MatmulProblem, chip: Chip, config: Config) -> Plan:
    """The plan of `config`; NotImplementedError where it does not fit the problem or the chip's VMEM."""
    p = problem
    tiles = [t for t in (k_tile(p.lhs, p.k), k_tile(p.rhs, p.k), _row_tile(p)) if t]
    if bool(tiles) == (config.strategy == "once"):
        raise NotImplementedError(
            f"strategy {config.strategy!r} with K tiles {tiles}: 'once' is for problems without them, "
            f"'after' and 'before' for those with"
        )
    lhs_dot, rhs_dot = dot_dtypes(p, chip, config.strategy)
    _check_blocks(p, config, tiles, row_step(lhs_dot))
    _check_out_tiles(p, config)
    tpu_across.check(p, config)
    if p.norm and config.block_k < p.k:
        raise NotImplementedError(f"rows are normalised where the whole K is in one block, got {config}")
    chunk = min(config.block_k, _exact_chunk(p, lhs_dot))
    if config.strategy == "after":
        chunk = _after_chunk(p, tiles, chunk)
    lhs, rhs = stored(p)
    k_tail = p.k % config.block_k != 0
    zero_in_place = config.strategy == "before"
    plan = Plan(
        problem=p,
        block_m=config.block_m,
        block_n=config.block_n,
        block_k=config.block_k,
        strategy=config.strategy,
        lhs_dot=lhs_dot,
        rhs_dot=rhs_dot,
        chunk=chunk,
        prepare_lhs=k_tail or lhs != lhs_dot or p.quantize_lhs is not None or p.norm is not None,
        prepare_rhs=k_tail
        or rhs == "nf4"
        or (rhs == FP4 and not takes_fp4(chip) and (zero_in_place or config.block_m > SUB_M))
        or (zero_in_place and (p.rhs.zero_point or k_tile(p.rhs, p.k) > 0)),
        rhs_gain=1.0 if rhs != FP4 or takes_fp4(chip) else FP4_GAIN,
        integer=is_integer_problem(p) and config.strategy == "once",
        rows_given=_rows_given(p, config),
        bf16_math=chip.bf16_math,
        megacore_rows=chip.name == "v5p" and p.batch * pl_cdiv(p.m, config.block_m) < chip.cores,
        overlap=OVERLAP if p.n <= _overlap_columns(chip) else 0,
    )
    need = vmem_bytes(plan)
    if need > VMEM_SHARE * chip.vmem_bytes and plan.prepare_lhs and plan.steps_k == 1 and p.k > LONG_K:
        plan = dataclasses.replace(plan, lhs_buffers=1)
        need = vmem_bytes(plan)
    if need > VMEM_SHARE * chip.vmem_bytes:
        raise NotImplementedError(
            f"{config} needs {need >> 20} MiB of VMEM for {p.m}x{p.k}x{p.n}, "
            f"{chip.name} has {int(VMEM_SHARE * chip.vmem_bytes) >> 20} MiB for it"
        )
    return plan


def _overlap_columns(chip: Chip) -> int:
    return OVERLAP_COLUMNS if chip.int8 > chip.bf16 else OVERLAP_COLUMNS_SLOW_INT8


def _row_tile(p: MatmulProblem) -> int:
    return p.quantize_lhs.tile_k % p.k if p.quantize_lhs else 0


def _rows_given(p: MatmulProblem, config: Config) -> bool:
    if p.quantize_lhs is None:
        return False
    return p.quantize_lhs.static or (not _row_tile(p) and config.block_k < p.k)


def _after_chunk(p: MatmulProblem, tiles: list[int], exact: int) -> int:
    small = min(tiles)
    if (small % LANES and LANES % small) or any(t % small for t in tiles):
        raise NotImplementedError(
            f"strategy 'after' needs K tiles that divide {LANES} or are multiples of it, and divide each "
            f"other, got {tiles}"
        )
    if small < LANES and (p.lhs.zero_point or p.k % LANES):
        raise NotImplementedError(
            f"strategy 'after' with K tiles below {LANES} needs a K of whole {LANES}s and an lhs without "
            f"zero points, got K={p.k}, tiles {tiles}"
        )
    small = max(small, LANES)
    return small if small <= exact else math.gcd(small, exact)


def _check_blocks(p: MatmulProblem, config: Config, tiles: list[int], rows: int) -> None:
    if config.block_m % 8 or (config.block_m > rows and config.block_m % rows):
        raise NotImplementedError(f"block_m must be a multiple of 8 below {rows}, or of {rows}, got {config}")
    if config.block_n % LANES and config.block_n != p.n:
        raise NotImplementedError(f"block_n must be a multiple of {LANES} or N={p.n}, got {config}")
    if config.block_k != p.k:
        unit = math.lcm(LANES, *tiles)
        if config.block_k % unit or config.block_k > p.k:
            raise NotImplementedError(
                f"block_k must be K={p.k} or a smaller multiple of {unit}, got {config}"
            )


def _check_out_tiles(p: MatmulProblem, config: Config) -> None:
    if p.epilogue is None or not p.epilogue.scales_out or p.epilogue.quantize is None:
        return
    tile = p.epilogue.quantize.tile_k % p.n
    if config.block_n < p.n and (not tile or config.block_n % tile):
        raise NotImplementedError(
            f"the result is quantized by {f'tiles of {tile} columns' if tile else 'whole rows'}, so block_n "
            f"must be {f'a multiple of {tile} or ' if tile else ''}N={p.n}, got {config}"
        )


def vmem_bytes(plan: Plan) -> int:
    """VMEM that the blocks (two of each), the scratch and the largest temporaries take, in bytes."""
    p, bm, bn, bk = plan.problem, plan.block_m, plan.block_n, plan.block_k
    bits = lambda d: dtype_bits(d)
    lhs = bm * _pad(bk) * bits(p.lhs.dtype) // 8
    rhs = p.products * _pad(bn) * _pad(bk) * bits(p.rhs.dtype) // 8
    out = bm * _pad(bn) * bits(p.out_dtype) // 8
    scales = 0
    if tpu_across.applies(p):
        scales += p.products * (1 + p.rhs.zero_point) * tpu_across.scale_bytes(p, bn, bk)
    elif p.rhs.is_quantized:
        scales += p.products * (1 + p.rhs.zero_point) * (_pad(plan.rhs_tiles(), 8) * _pad(bn) * 4)
    if plan.scales_lhs:
        scales += (1 + p.lhs.zero_point) * bm * _pad(plan.lhs_tiles()) * 4
    if q := p.quantize_lhs:
        scales += q.noise * bm * LANES * 4 + q.columns * 8 * _pad(bk) * 4
    # The accumulator, or the dot's own result, or both where tiles are stacked.
    scratch = p.products * bm * _pad(bn) * 4 + (plan.stack > 1) * plan.stack * plan.sub_m * _pad(bn) * 4
    if plan.prepare_lhs:
        scratch += plan.steps_k * bm * _pad(bk) * bits(plan.lhs_dot) // 8
    if plan.spreads_row_scale:
        scratch += plan.steps_k * plan.lhs_tiles() * bm * LANES * 4
    if plan.prepare_rhs or p.rhs.dtype != plan.rhs_dot:
        scratch += p.products * _pad(bn) * _pad(bk) * bits(plan.rhs_dot) // 8
    scratch += tpu_low_rank_plan.vmem_bytes(p.low_rank, bm, bn, bk)
    return 2 * (rhs + out + scales + _epilogue_bytes(plan)) + plan.lhs_buffers * lhs + scratch


def _epilogue_bytes(plan: Plan) -> int:
    """VMEM of one block of everything that the epilogue reads, and of the scales that it writes."""
    e, bm, bn = plan.problem.epilogue, plan.block_m, plan.block_n
    if e is None:
        return 0
    rows = 8 * _pad(bn) * 4
    out = (e.bias + e.gate_bias) * rows
    if e.residual:
        out += bm * _pad(bn) * dtype_bits(e.residual) // 8
    if e.quantize:
        out += rows if e.quantize.static else bm * _pad(bn // plan.out_tile if plan.out_tile else 1) * 4
    return out


def _pad(size: int, unit: int = LANES) -> int:
    return pl_cdiv(size, unit) * unit
