"""The static facts of a Blackwell matmul kernel: how a configuration becomes a plan that fits a problem."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from qwix_kernels.chips import Chip
from qwix_kernels.gpu_blocks import SMEM_BYTES
from qwix_kernels.matmul import gpu_sm100_scaled
from qwix_kernels.matmul.gpu_sm100_check import (
    LEAST_SWIZZLE,
    ROWS,
    check,
    kind,
    run_k,
    varies,
    x_dtype,
)
from qwix_kernels.problem import MatmulProblem, dtype_bits

LEAST_OUT = 16  # columns of a tile of the result
MOST_RUN_ROWS = 128  # of an accumulator that is summed in registers: 64 a thread, of two warpgroups

PAIR = "pair"  # the axis of a cluster of two multiprocessors
LANES = 128  # weights' rows in a tile
TMEM_COLUMNS = 512  # of 32 bits
CHUNK_BYTES = 256  # of a row of converted weights: what a converter holds in registers


@dataclasses.dataclass(frozen=True)
class Config:
    """Blocks of one kernel.

    `block_m` rows by 128 columns of the result are one accumulator, `block_k` of K one block in shared
    memory, of which `steps` are on their way. `splits` of K are different thread blocks', and added up
    afterwards. `converters` warpgroups convert weights, where any are converted. With `pair`, two
    multiprocessors share each block of rows, for 256 columns.
    """

    block_m: int
    block_k: int
    steps: int
    splits: int = 1
    converters: int = 1
    pair: bool = False

    def __post_init__(self):
        sizes = {k: v for k, v in dataclasses.asdict(self).items() if k != "pair"}
        if not all(isinstance(s, int) and s > 0 for s in sizes.values()):
            raise ValueError(f"Sizes must be positive integers, got {sizes}.")

    def refit(self, tuned: tuple[int, int, int], problem: MatmulProblem) -> Config | None:
        """This config of a problem with the sizes `tuned` (M, K, N) for a problem like it."""
        return self


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of one kernel. Sizes count elements; `x` are the activations, `w` the weights."""

    batch: int
    m: int  # in whole tiles of `ROWS`, or fewer
    n: int
    k: int
    x_batch: int
    w_batch: int
    x_dtype: str
    w_dtype: str
    out_dtype: str
    block_m: int
    block_k: int
    steps: int  # blocks in flight
    splits: int = 1  # parts of K, each a partial result
    run_k: int = 0  # neighbours along K that are summed in TMEM; 0: all of a part
    x_tile_k: int = 0  # neighbours along K under one scale; 0: scales are per row
    w_tile_k: int = 0
    x_scaled: bool = False
    w_scaled: bool = False
    block_scale: str | None = None  # the dtype of scales that the matrix unit takes
    scale_k: int = 0  # ... and how many neighbours along K each covers
    drains: int = 1  # warpgroups
    converters: int = 0  # warpgroups; 0: the MMA takes the weights as they are
    pair: bool = False  # two multiprocessors share the blocks of rows
    sms: int = 148

    @property
    def copied_scales(self) -> int:
        """Scales of the rows of a tile, up to the 128 bytes at whose multiples copies end."""
        return max(self.block_m, 32)

    @property
    def multiplied(self) -> str:
        """The dtype of converted weights."""
        return self.x_dtype if self.converters else self.w_dtype

    @property
    def acc_dtype(self) -> Any:
        return jnp.int32 if jnp.issubdtype(self.x_dtype, jnp.integer) else jnp.float32

    @property
    def columns(self) -> int:
        """Of a tile of the result: those of one multiprocessor, or of a pair."""
        return LANES * (2 if self.pair else 1)

    @property
    def tiles(self) -> tuple[int, int]:
        """(blocks of rows, tiles of columns) of a result."""
        return -(-self.m // self.block_m), -(-self.n // self.columns)

    @property
    def out_n(self) -> int:
        """Columns of the result in whole tiles of the copy engine, no narrower than a turned store takes."""
        return -(-self.n // LEAST_OUT) * LEAST_OUT

    @property
    def copied_k(self) -> tuple[int, int]:
        """Columns of blocks of rows, and of weights, that whole tiles of the copy engine divide."""
        return math.gcd(self.block_k, self.k), math.gcd(
            self.chunk_k if self.converters else self.block_k, self.k
        )

    @property
    def units(self) -> int:
        """What items are shared out among: multiprocessors, or pairs of them."""
        return self.sms // 2 if self.pair else self.sms

    @property
    def x_rows(self) -> int:
        """Of a block, in the shared memory of one multiprocessor."""
        return self.block_m // 2 if self.pair else self.block_m

    @property
    def items(self) -> tuple[int, int, int]:
        return self.batch, self.splits, self.tiles[0] * self.tiles[1]

    @property
    def blocks(self) -> int:
        """Blocks along a part of K."""
        return -(-self.k // (self.block_k * self.splits))

    @property
    def run_blocks(self) -> int:
        """Blocks that are summed in TMEM."""
        return self.run_k // self.block_k if self.run_k else self.blocks

    @property
    def runs(self) -> int:
        return self.blocks // self.run_blocks

    @property
    def acc_slots(self) -> int:
        return min(4, TMEM_COLUMNS // self.block_m) if self.run_k else 2

    @property
    def chunk_k(self) -> int:
        """Columns of converted weights in one slot of TMEM."""
        return min(self.block_k, CHUNK_BYTES * 8 // dtype_bits(self.multiplied))

    @property
    def chunks(self) -> int:
        return self.block_k // self.chunk_k

    @property
    def chunk_slots(self) -> int:
        """As many as TMEM has room for, up to eight; a power of two, so that converters alternate."""
        room = (TMEM_COLUMNS - self.acc_slots * self.block_m) // self.chunk_columns
        return 1 << (min(room, 8).bit_length() - 1) if room else 0

    @property
    def chunk_columns(self) -> int:
        """Of TMEM."""
        return self.chunk_k * dtype_bits(self.multiplied) // 32

    @property
    def drain_m(self) -> int:
        """Rows that one step of a drain turns and stores."""
        return min(32, self.block_m // self.drains)

    @property
    def scales_in_runs(self) -> bool:
        """Whether scales along K are applied when partial sums are drained."""
        return bool(self.run_k)

    @property
    def converts_scales(self) -> bool:
        """Whether scales along K are applied when weights are converted."""
        return bool(self.converters and self.w_tile_k and not self.scales_in_runs)

    @property
    def w_scale_dtype(self) -> Any:
        return jnp.dtype(self.x_dtype) if self.converts_scales else jnp.float32

    @property
    def scale_words(self) -> int:
        """Words of four scales along a block."""
        return self.block_k // (gpu_sm100_scaled.ALONG * self.scale_k)

    @property
    def w_scale_tiles(self) -> int:
        """Of a block, where weights are converted with their scales."""
        return max(1, self.block_k // self.w_tile_k)

    @property
    def tmem_columns(self) -> int:
        total = self.acc_slots * self.block_m
        if self.converters:
            total += self.chunk_slots * self.chunk_columns
        if self.block_scale:
            tiles = 1 + -(-self.block_m // LANES)
            total += tiles * self.scale_words * gpu_sm100_scaled.ALONG
        return total

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one step."""
        bits = self.block_k * (LANES * dtype_bits(self.w_dtype) + self.x_rows * dtype_bits(self.x_dtype))
        if self.converts_scales:
            bits += self.w_scale_tiles * LANES * dtype_bits(self.x_dtype)
        if self.block_scale:
            bits += (1 + -(-self.block_m // LANES)) * self.scale_words * 512 * 8
        return bits // 8

    @property
    def smem_bytes(self) -> int:
        """Shared memory that the kernel allocates, but for its barriers."""
        out = self.drains * 2 * self.drain_m * LANES * dtype_bits(self.out_dtype) // 8
        scales = self.acc_slots * (self.copied_scales + LANES) * 4 if self.scales_in_runs else 0
        return self.steps * self.stage_bytes + out + scales


def plan(p: MatmulProblem, chip: Chip, c: Config) -> Plan:
    """The plan, or NotImplementedError where the problem is not taken or the config does not fit it."""
    check(p, chip)
    how, run, out = kind(p), run_k(p), p.out_dtype
    made = Plan(
        batch=p.batch, m=p.m if p.m <= ROWS else -(-p.m // ROWS) * ROWS, n=p.n, k=p.k,
        x_batch=p.lhs.batch, w_batch=p.rhs.batch,
        x_dtype=x_dtype(p), w_dtype=p.rhs.dtype,
        out_dtype="float32" if c.splits > 1 and out != "int32" else out,
        block_m=c.block_m, block_k=c.block_k, steps=c.steps, splits=c.splits, run_k=run,
        x_tile_k=p.lhs.tile_k if varies(p.lhs, p) and how != "scaled" else 0,
        w_tile_k=p.rhs.tile_k if varies(p.rhs, p) and how != "scaled" else 0,
        x_scaled=p.lhs.is_quantized and how != "scaled",
        w_scaled=p.rhs.is_quantized and how != "scaled",
        block_scale=p.lhs.scale_dtype if how == "scaled" else None,
        scale_k=p.lhs.tile_k if how == "scaled" else 0,
        drains=2 if run and c.block_m >= 64 else 1,
        converters=c.converters if how == "converted" else 0,
        pair=c.pair,
        sms=chip.sms,
    )  # fmt: skip
    _check_fit(made, c)
    return made


def _check_fit(a: Plan, c: Config) -> None:
    """Raises NotImplementedError where a config does not fit."""
    step = 16 if a.acc_dtype == jnp.int32 else 8
    if a.block_m % step or not step <= a.block_m <= 256 or a.block_m % (a.drains * a.drain_m):
        raise NotImplementedError(f"{c}: {step} to 256 rows a block, in multiples of {step} (32 beyond that)")
    narrow = min(dtype_bits(a.x_dtype), dtype_bits(a.w_dtype))
    if a.block_k * narrow % LEAST_SWIZZLE or a.block_k % a.chunk_k:
        raise NotImplementedError(
            f"{c}: blocks of K must be multiples of {max(a.chunk_k, LEAST_SWIZZLE // narrow)}"
        )
    if a.block_scale and a.block_k % (4 * a.scale_k):
        raise NotImplementedError(f"{c}: blocks of K must be multiples of {4 * a.scale_k}, four scales")
    if a.run_k and a.block_m > MOST_RUN_ROWS:
        raise NotImplementedError(
            f"{c}: sums of {MOST_RUN_ROWS} rows fit registers, where scales make runs of K"
        )
    if a.run_k and a.run_k % a.block_k:
        raise NotImplementedError(f"{c}: scales change every {a.run_k} of K, which blocks must divide")
    whole = a.runs * a.run_blocks * a.splits * a.block_k
    if a.splits > 1 and whole != -(-a.k // a.block_k) * a.block_k:
        raise NotImplementedError(f"{c}: {a.splits} splits do not divide K {a.k} into whole blocks")
    if a.converters and not a.converters <= a.chunk_slots:
        raise NotImplementedError(
            f"{c}: tensor memory has room for {a.chunk_slots} chunks of converted weights"
        )
    if a.tmem_columns > TMEM_COLUMNS:
        raise NotImplementedError(f"{c} takes {a.tmem_columns} columns of tensor memory of {TMEM_COLUMNS}")
    if a.smem_bytes > SMEM_BYTES:
        raise NotImplementedError(f"{c} takes {a.smem_bytes} bytes of shared memory of {SMEM_BYTES}")
    if a.drains + a.converters > 6:
        raise NotImplementedError(f"{c}: {a.drains + a.converters} warpgroups besides the first; 6 fit")
    rows = 64 if a.multiplied == "int8" else 32
    if a.pair and (a.run_k or a.block_m % rows):
        raise NotImplementedError(f"{c}: pairs sum all of K in the tensor core, {rows} rows at a time")
