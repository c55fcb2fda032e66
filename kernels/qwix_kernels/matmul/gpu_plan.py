"""What a matmul on a Hopper GPU takes, and how a block configuration becomes a plan.

The kernel computes the transposed product, out^T = W x^T: the weight [N, K] is the matrix instruction's left
operand, which may come from registers, so that narrow weights are widened on the way; the rows [M, K] are its
right operand, of which as few as 8 are a whole block. One kernel serves prefill and decode so.

Three strategies, by where scales go that change along K:

    once     there are none: scales of rows and of columns go on the sum
    after    each tile of K is summed on its own, scaled in float32 and added to a running sum
    before   the weight is scaled in registers as it is widened, and rounded to the dtype of the rows
"""

from __future__ import annotations

import dataclasses
import math

from qwix_kernels.chips import Chip
from qwix_kernels.gpu_blocks import SMEM_BYTES
from qwix_kernels.problem import Epilogue, MatmulProblem, Operand, dtype_bits

STRATEGIES = ("once", "after", "before")
FP8 = ("float8_e4m3fn", "float8_e5m2")
WIDE = ("bfloat16", "float16")
ACTIVATIONS = ("relu", "relu6", "silu")
# What weights are widened from, by what they are multiplied as.
WIDENED = {
    "bfloat16": ("int8", "int4", *FP8),
    "float16": ("int8", "int4", *FP8),
    "int8": ("int4",),
}
MEMORY_REGISTERS, _MOST_REGISTERS = 40, 240  # per thread
_OTHER_REGISTERS = 24  # those that hold no sums
# The longest sum of products of bytes that is sure to fit int32.
MOST_K = 1 << 17
PRECISE = ("high", "highest")
PROMOTED = 128  # products of 8-bit floats that are summed by the unit, where that matters
LEAST_BYTES = 32  # of a row, in a tile that the copy engine brings


@dataclasses.dataclass(frozen=True)
class Config:
    """Blocks of one thread block: rows, columns, K; stages of the pipeline; and who computes what.

    `warpgroups_n` divide the columns, `warpgroups_k` a block of K among them. `splits` of K are different
    thread blocks', and are added up afterwards.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warpgroups_n: int = 2
    warpgroups_k: int = 1
    splits: int = 1
    strategy: str = "once"

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {self.strategy!r}.")
        fields = dataclasses.asdict(self)
        sizes = {name: size for name, size in fields.items() if name != "strategy"}
        if not all(isinstance(s, int) and s > 0 for s in sizes.values()):
            raise ValueError(f"Sizes must be positive integers, got {sizes}.")

    def refit(self, tuned: tuple[int, int, int], problem: MatmulProblem) -> Config | None:
        """This config of a problem with the sizes `tuned` (M, K, N) for a problem like it."""
        return self


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config that fits a problem."""

    problem: MatmulProblem
    config: Config

    @property
    def dot(self) -> str:
        """The dtype that both operands are multiplied in."""
        return dot_dtype(self.problem)

    @property
    def widens(self) -> bool:
        """Whether weights go through registers."""
        p = self.problem
        return p.rhs.codebook is not None or p.rhs.dtype not in (self.dot, *(FP8 if self.dot in FP8 else ()))

    @property
    def acc(self) -> str:
        return "int32" if self.dot == "int8" else "float32"

    @property
    def tile_n(self) -> int:
        """Columns of one warpgroup."""
        return self.config.block_n // self.config.warpgroups_n

    @property
    def tile_k(self) -> int:
        """K of one warpgroup and step."""
        return self.config.block_k // self.config.warpgroups_k

    @property
    def scale_k(self) -> int:
        """Neighbours along K that share all scales; K where there is one tile."""
        return scale_k(self.problem)

    @property
    def run_k(self) -> int:
        """K that is summed before scales are applied or change, within a step."""
        return min(self.tile_k, self.scale_k)

    @property
    def warpgroups(self) -> int:
        return self.config.warpgroups_n * self.config.warpgroups_k

    @property
    def registers(self) -> int:
        """Per thread of each computing warpgroup."""
        return registers(self.warpgroups)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks along M and N."""
        p, c = self.problem, self.config
        return -(-p.m // c.block_m), -(-p.n // c.block_n)

    @property
    def items(self) -> int:
        """Blocks of the result, times splits of K: what the thread blocks share out among them."""
        return self.problem.batch * self.config.splits * math.prod(self.blocks)

    @property
    def steps(self) -> int:
        """Blocks of K of one item."""
        return -(-self.problem.k // (self.config.block_k * self.config.splits))

    @property
    def partial(self) -> bool:
        """Whether the kernel writes 32-bit sums, transposed, which are finished outside."""
        return self.config.splits > 1 or dtype_bits(self.problem.out_dtype) == 32

    @property
    def epilogue_m(self) -> int:
        """Rows of the result that leave a warpgroup at a time."""
        return min(self.config.block_m, 64 if not self.partial else 32)

    @property
    def streams(self) -> dict[str, tuple[tuple[int, int], str]]:
        """What each stage of the pipeline holds: name -> (block, dtype)."""
        p, c = self.problem, self.config
        out = {
            "rhs": ((c.block_n, c.block_k), "uint4" if p.rhs.codebook else p.rhs.dtype),
            "lhs": ((c.block_m, c.block_k), p.lhs.dtype),
        }
        tiles = max(c.block_k // self.scale_k, 1)
        if p.rhs.zero_point:
            out["rhs_zero"] = ((tiles, c.block_n), "float32")
        if c.strategy != "once":
            out["rhs_scale"] = ((tiles, c.block_n), "float32")
            if varies(p.lhs, p):
                # The copy engine writes to multiples of 128 bytes of shared memory.
                out["lhs_scale"] = ((tiles, max(c.block_m, 32)), "float32")
        return out

    @property
    def smem_bytes(self) -> int:
        """Shared memory that the kernel allocates."""
        p, c = self.problem, self.config
        stage = sum(math.prod(block) * dtype_bits(dtype) // 8 for block, dtype in self.streams.values())
        out_bits = 32 if self.partial else dtype_bits(p.out_dtype)
        out = 2 * c.warpgroups_n * self.epilogue_m * self.tile_n * out_bits // 8
        reduced = (c.warpgroups_k - 1) * c.warpgroups_n * self.tile_n * c.block_m * 4
        return c.stages * stage + out + reduced


def registers(warpgroups: int) -> int:
    """Registers per thread of each computing warpgroup.

    A thread block starts with as many for every warpgroup as divide the multiprocessor's 65536, in eights.
    What the memory warpgroup gives back is all there is to take: asking for more would wait for ever.

    >>> [registers(n) for n in (1, 2, 3, 4)]
    [240, 232, 152, 104]
    """
    at_start = min(248, 65536 // (128 * (warpgroups + 1)) // 8 * 8)
    freed = at_start * (warpgroups + 1) - MEMORY_REGISTERS
    return min(_MOST_REGISTERS, freed // warpgroups // 8 * 8)


def fuses(e: Epilogue) -> bool:
    """Whether the kernel does this epilogue itself: a bias, and an activation of `ACTIVATIONS`.

    >>> fuses(Epilogue(bias=True, activation="relu")), fuses(Epilogue(bias=True, residual="bfloat16"))
    (True, False)
    """
    rest = dataclasses.replace(e, bias=False, activation=None)
    return rest == Epilogue() and e.activation in (None, *ACTIVATIONS)


def dot_dtype(p: MatmulProblem) -> str:
    """The dtype that a problem's operands are multiplied in: that of the rows; bytes for 4-bit rows."""
    return "int8" if p.lhs.dtype == "int4" else p.lhs.dtype


def varies(x: Operand, p: MatmulProblem) -> bool:
    """Whether there is more than one scale along K."""
    return x.is_quantized and x.tile_k < p.k


def scale_k(p: MatmulProblem) -> int:
    """Neighbours along K that share all scales, and may be summed by the matrix unit.

    Hopper sums products of 8-bit floats with 13 bits behind the binary point of the greatest one. Where more
    precision is asked for, it sums few of them, and those sums are added in float32.
    """
    tiles = [x.tile_k for x in (p.lhs, p.rhs) if varies(x, p)]
    if dot_dtype(p) in FP8 and p.precision in PRECISE:
        tiles.append(math.gcd(p.k, PROMOTED))
    return math.gcd(*tiles) if tiles else p.k


def check(p: MatmulProblem, chip: Chip) -> None:
    """Raises NotImplementedError, naming the constraint, for a product that the kernel does not take.

    `p` has no prologue, no epilogue but what `fuses`, and a transposed rhs: gpu.py sees to that.
    """
    if chip.name != "h100":
        raise NotImplementedError(f"this kernel is for compute capability 9.0 (Hopper), not for {chip.name}")
    lhs, rhs, dot = p.lhs, p.rhs, dot_dtype(p)
    if not rhs.is_quantized and not rhs.is_integer and rhs.dtype not in FP8:
        raise NotImplementedError(f"the rhs is plain {rhs.dtype}: that product is XLA's")
    if lhs.codebook or lhs.zero_point:
        raise NotImplementedError("codebooks and zero points of the lhs are not supported")
    if dot not in ("int8", *FP8, *WIDE):
        raise NotImplementedError(f"multiplies int8, {', '.join((*FP8, *WIDE))} rows, not {lhs.dtype}")
    if rhs.codebook and dot not in WIDE:
        raise NotImplementedError(f"a codebook multiplies as {' or '.join(WIDE)}, not with {lhs.dtype} rows")
    same = rhs.dtype == dot or (dot in FP8 and rhs.dtype in FP8)
    if not rhs.codebook and not same and rhs.dtype not in WIDENED.get(dot, ()):
        raise NotImplementedError(f"widens {WIDENED.get(dot, ())} to {dot}, not {rhs.dtype}")
    if rhs.zero_point and dot not in WIDE:
        raise NotImplementedError("zero points of the rhs go with bfloat16 or float16 rows only")
    if dot == "int8" and p.k > MOST_K:
        raise NotImplementedError(f"sums of {p.k} products of bytes may not fit int32; {MOST_K} do")
    if p.precision not in (None, "default") and dot not in ("int8", *FP8):
        raise NotImplementedError(f"precision {p.precision!r} of {dot} is XLA's")
    _check_sizes(p)
    if dtype_bits(p.out_dtype) not in (16, 32):
        raise NotImplementedError(f"results are bfloat16, float16, float32 or int32, not {p.out_dtype}")
    _check_tiles(p)


def _check_sizes(p: MatmulProblem) -> None:
    """The copy engine takes whole tiles of an array: 8 rows, and at least 32 bytes of each."""
    for name, x in (("lhs", p.lhs), ("rhs", p.rhs)):
        bits = 8 if x.dtype == "int4" and name == "lhs" else x.bits
        if p.k * bits % (8 * LEAST_BYTES):
            raise NotImplementedError(
                f"K is {p.k}, {name} rows of {p.k * bits / 8:g} bytes; it copies multiples of {LEAST_BYTES}"
            )
    if p.n % 8 or (dtype_bits(p.out_dtype) == 16 and p.n * 16 % (8 * LEAST_BYTES)):
        raise NotImplementedError(f"N is {p.n}; multiples of 16 (8 for 32-bit results) can be copied")
    if p.m % 8 and p.m > 8:
        raise NotImplementedError(f"M is {p.m}; up to 8, or multiples of 8, can be copied")


def _check_tiles(p: MatmulProblem) -> None:
    """Runs of K that share scales must be whole steps of the matrix instruction."""
    run, least = scale_k(p), 32 if dot_dtype(p) in ("int8", *FP8) else 16
    if run < p.k and run % least:
        raise NotImplementedError(f"tiles of {run} along K; a matrix instruction takes {least}")
    if run < p.k and run * p.rhs.bits < 8 * LEAST_BYTES:
        raise NotImplementedError(
            f"tiles of {run} along K, {run * p.rhs.bits // 8} bytes of the rhs; it takes {LEAST_BYTES}"
        )


def resolve(p: MatmulProblem, chip: Chip, config: Config) -> Plan:
    """The plan, or NotImplementedError where the config does not fit the problem or the chip."""
    check(p, chip)
    plan, c = Plan(p, config), config
    if plan.tile_n not in (64, 128) or c.block_n % c.warpgroups_n:
        raise NotImplementedError(f"{c}: 64 or 128 columns a warpgroup, not {plan.tile_n}")
    if c.block_m % 8 or not 8 <= c.block_m <= 256 or c.block_m % plan.epilogue_m:
        raise NotImplementedError(f"{c}: 8 to 256 rows a block, in multiples of 8 (64 beyond that)")
    if c.block_k % c.warpgroups_k or plan.tile_k * 8 % 512:
        raise NotImplementedError(f"{c}: {plan.tile_k} of K a warpgroup; multiples of 64 fit the swizzle")
    many = plan.scale_k < p.k
    if many != (c.strategy != "once"):
        raise NotImplementedError(f"{c}: scales {'change' if many else 'do not change'} along K")
    if c.strategy == "before" and not (plan.widens and plan.dot in WIDE):
        raise NotImplementedError(f"{c}: only weights that are widened to floats are scaled on the way")
    if c.strategy == "before" and varies(p.lhs, p):
        raise NotImplementedError(f"{c}: scales of the rows change along K, so they go after the dot")
    if many and plan.scale_k % plan.run_k:
        raise NotImplementedError(f"{c}: {plan.tile_k} of K do not fit tiles of {plan.scale_k}")
    if many and c.block_k % plan.scale_k and plan.scale_k % c.block_k:
        raise NotImplementedError(f"{c}: steps of {c.block_k} do not fit tiles of {plan.scale_k}")
    if c.splits > 1 and p.k % (c.block_k * c.splits):
        raise NotImplementedError(f"{c}: K is {p.k}, which the splits do not divide into whole steps")
    if plan.smem_bytes > SMEM_BYTES:
        raise NotImplementedError(f"{c} takes {plan.smem_bytes} bytes of shared memory of {SMEM_BYTES}")
    sums = plan.tile_n * c.block_m // 128 * (1 + (c.strategy == "after"))
    if sums > plan.registers - _OTHER_REGISTERS:
        raise NotImplementedError(f"{c}: {sums} registers of sums; a thread has {plan.registers}")
    if plan.warpgroups > 6:
        raise NotImplementedError(f"{c}: {plan.warpgroups} warpgroups compute; 6 can")
    return plan
