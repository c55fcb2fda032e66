"""The tgmm on a TPU: for each group the sum over its rows of lhs^T g.

The grid is (K blocks, N blocks, visits), visits innermost: the sum of a group stays in VMEM while its row
tiles go by, and is scaled, rounded and stored after the last one. Rows of the tile that are not the group's
become zero on both sides, since zero times NaN is not. An empty group is one visit that computes nothing:
its zeros have to be written.

Scales are those of columns, so they go on the sum: of integers in int32, exactly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.tpu_config import LANES, pl_cdiv
from qwix_kernels.matmul.tpu_estimate import LOOP_CYCLES, STEP_CYCLES
from qwix_kernels.matmul.tpu_plan import VMEM_SHARE, is_fp8, is_int
from qwix_kernels.problem import Tensor, dtype_bits
from qwix_kernels.ragged_matmul import cost, tpu_visits
from qwix_kernels.ragged_matmul.problem import Groups, TgmmProblem
from qwix_kernels.ragged_matmul.tpu_visits import FETCH, HI, LO, MATRIX

_TAKEN = ("bfloat16", "float32", "int8", "int4", "float8_e4m3fn", "float8_e5m2")
_OUT = ("bfloat16", "float32", "int32")
# Vector operations per 1024 values: to turn the rows of lhs to where the matrix unit wants them, with what a
# mask takes; and to add 1024 sums.
_TURN, _MASK, _ADD = 4.0, 3.0, 4.0
_VISITS_US = 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes: elements of M, K and N."""

    block_m: int
    block_k: int
    block_n: int

    def __post_init__(self):
        sizes = (self.block_m, self.block_k, self.block_n)
        if not all(isinstance(s, int) and s > 0 for s in sizes):
            raise ValueError(f"Block sizes must be positive integers, got {sizes}.")


@dataclasses.dataclass(frozen=True)
class _Plan:
    problem: TgmmProblem
    config: Config
    dots: tuple[str, str]  # dtypes on the matrix unit

    @property
    def grid(self) -> tuple[int, int]:
        p, c = self.problem, self.config
        return pl_cdiv(p.k, c.block_k), pl_cdiv(p.n, c.block_n)

    @property
    def most(self) -> int:
        p = self.problem
        ranges = p.batch * p.groups
        return tpu_visits.most_visits(p.m, self.config.block_m, ranges, p.batch, per_matrix=True)

    @property
    def acc(self) -> str:
        return "int32" if is_int(self.dots[0]) else "float32"


def _dot_dtypes(p: TgmmProblem, chip: Chip) -> tuple[str, str]:
    """int8 where both are integers and the unit takes them, fp8 alike; else bfloat16, which holds both."""
    left, right = p.lhs.dtype, p.g.dtype
    if is_int(left) and is_int(right) and chip.is_native("int8", "int8"):
        return "int8", "int8"
    if is_fp8(left) and is_fp8(right) and chip.is_native(left, right):
        return left, right
    return "bfloat16", "bfloat16"


def _resolve(p: TgmmProblem, chip: Chip, c: Config) -> _Plan:
    if c.block_m % 32 and c.block_m < p.m:
        raise NotImplementedError(f"block_m must be a multiple of 32 or at least M={p.m}, got {c}")
    for name, block, size in (("block_k", c.block_k, p.k), ("block_n", c.block_n, p.n)):
        if block % LANES and block != size:
            raise NotImplementedError(f"{name} must be a multiple of {LANES} or {size}, got {c}")
    plan = _Plan(p, c, _dot_dtypes(p, chip))
    exact = 1 << (24 - 14)
    if is_int(p.lhs.dtype) and is_int(p.g.dtype) and plan.acc != "int32" and c.block_m > exact:
        raise NotImplementedError(f"sums of more than {exact} products of bytes are not exact in float32")
    need = _vmem_bytes(plan)
    if need > VMEM_SHARE * chip.vmem_bytes:
        raise NotImplementedError(f"{c} needs {need >> 20} MiB of VMEM on {chip.name}")
    return plan


def _vmem_bytes(plan: _Plan) -> int:
    p, c = plan.problem, plan.config
    wide = lambda size: pl_cdiv(size, LANES) * LANES
    rows = c.block_m * (wide(c.block_k) * p.lhs.bits + wide(c.block_n) * p.g.bits) // 8
    out = wide(c.block_k) * wide(c.block_n) * dtype_bits(p.out_dtype) // 8
    turned = c.block_m * (wide(c.block_k) + wide(c.block_n)) * 4
    return 2 * (rows + out) + turned + 2 * wide(c.block_k) * wide(c.block_n) * 4


def check(problem: TgmmProblem, chip: Chip) -> None:
    """Raises NotImplementedError, naming the constraint and the shapes, for what the kernel does not run."""
    p = problem

    def refuse(reason: str) -> None:
        shapes = f"lhs [{p.m}, {p.k}] {p.lhs.dtype}, g [{p.m}, {p.n}] {p.g.dtype}"
        raise NotImplementedError(f"the TPU kernel {reason}; got {shapes} on {chip.name}")

    if chip.platform != "tpu":
        refuse("runs on TPUs")
    for name, x in (("lhs", p.lhs), ("g", p.g)):
        if x.dtype not in _TAKEN:
            refuse(f"takes {', '.join(_TAKEN)} as {name}")
        if x.codebook or x.zero_point:
            refuse(f"sums {name} without codebooks and zero points")
    if p.out_dtype not in _OUT:
        refuse(f"gives {', '.join(_OUT)}, not {p.out_dtype}")
    integers = is_int(p.lhs.dtype) and is_int(p.g.dtype)
    if integers and p.m > 1 << 16:
        refuse(f"adds up integer products in int32, which is sure to hold {1 << 16} of them")
    if integers and p.out_dtype == "int32" and _dot_dtypes(p, chip)[0] == "bfloat16":
        refuse("adds up integers in float32 where there is no unit for them")
    if p.precision not in (None, "default") and not integers:
        refuse(f"multiplies floats in bfloat16, not with precision {p.precision!r}")
    if not any(True for _ in _fitting(p, chip)):
        refuse("finds no blocks that fit its VMEM")


def heuristic_config(problem: TgmmProblem, chip: Chip) -> Config:
    """The blocks with the least static time. Raises NotImplementedError as `check` does."""
    return _best(problem, chip)


@functools.lru_cache(maxsize=4096)
def _best(problem: TgmmProblem, chip: Chip) -> Config:
    priced = [(max(_times(plan, chip)), -c.block_m, c) for c, plan in _fitting(problem, chip)]
    if not priced:
        check(problem, chip)
    return min(priced, key=lambda x: x[:2])[2]


def estimate(problem: TgmmProblem, chip: Chip, config: Config) -> Estimate:
    """Static cost on one core, for groups of equal size. Raises NotImplementedError for what does not fit."""
    plan = _resolve(problem, chip, config)
    compute, memory = _times(plan, chip)
    note = f"{plan.dots[0]} x {plan.dots[1]}"
    floor = max(cost.tgmm_floor(problem, chip))
    return Estimate(compute, memory, max(compute, memory) + _VISITS_US, floor, note)


def _times(plan: _Plan, chip: Chip) -> tuple[float, float]:
    """(compute, memory) in microseconds."""
    p, c = plan.problem, plan.config
    groups = cost.touched(p)
    tiles = pl_cdiv(p.m, c.block_m)
    visits = tiles if (p.m / groups) % c.block_m == 0 else tiles + groups - 1
    rate = {"int8": chip.int8}.get(plan.dots[0], chip.fp8 if is_fp8(plan.dots[0]) else chip.bf16)
    up = lambda size: pl_cdiv(size, chip.mxu) * chip.mxu
    matrix = 2 * pl_cdiv(c.block_m, chip.mxu) * chip.mxu * up(c.block_k) * up(c.block_n)
    matrix = matrix / (rate * 1e12) * chip.ghz * 1e9
    rows = c.block_m * ((_TURN + _MASK) * c.block_k + _MASK * c.block_n) / 1024 / 4
    sums = c.block_k * c.block_n / 1024
    each = max(matrix, rows + _ADD * sums / 4) + 0.4 * min(matrix, rows) + STEP_CYCLES[chip.mxu]
    blocks = plan.grid[0] * plan.grid[1]
    cores = min(chip.cores, blocks) if chip.name == "v5p" else 1
    share = pl_cdiv(blocks, cores) / blocks
    cycles = blocks * (visits * each + p.matrices * (sums + STEP_CYCLES[chip.mxu])) + LOOP_CYCLES
    moved = p.m * (p.k * p.lhs.bits * plan.grid[1] + p.n * p.g.bits * plan.grid[0]) / 8 * visits / tiles
    moved += p.matrices * p.k * p.n * dtype_bits(p.out_dtype) / 8
    return cycles * share / (chip.ghz * 1e3), moved / (chip.hbm_gbps * 1e3)


def _fitting(p: TgmmProblem, chip: Chip) -> Iterator[tuple[Config, _Plan]]:
    def widths(size: int) -> list[int]:
        shares = {pl_cdiv(size, parts * LANES) * LANES for parts in (1, 2, 3, 4, 8)} | {256, 512, 1024}
        return sorted({w if w < size else size for w in shares})

    rows = sorted({min(b, pl_cdiv(p.m, 32) * 32) for b in (128, 256, 512, 1024)})
    for bm in rows:
        for bk in widths(p.k):
            for bn in widths(p.n):
                config = Config(bm, bk, bn)
                try:
                    yield config, _resolve(p, chip, config)
                except NotImplementedError:
                    continue


# --- the kernel


def run(
    problem: TgmmProblem,
    lhs: Tensor,
    g: Tensor,
    groups: Groups,
    *,
    config: Config,
    chip: Chip,
    interpret: Any = False,
) -> jax.Array:
    """[matrices, K, N] of lhs [1, M, K] and g [1, M, N]; `check(problem, chip)` has passed.

    Raises NotImplementedError where the config does not fit the problem or the chip.
    """
    plan = _resolve(problem, chip, config)
    p, c = problem, config
    count, words = tpu_visits.visits(groups, p.m, c.block_m, per_matrix=True, interpret=interpret)
    get = functools.partial(tpu_visits.field, plan.most)
    rows = lambda words, v: get(words, FETCH, v)
    named = {
        "lhs": (
            lhs.values,
            pl.BlockSpec((1, c.block_m, c.block_k), lambda i, j, v, words: (0, rows(words, v), i)),
        ),
        "g": (
            g.values,
            pl.BlockSpec((1, c.block_m, c.block_n), lambda i, j, v, words: (0, rows(words, v), j)),
        ),
    }
    if lhs.scale is not None:  # as a column, for the rows of the result
        scale = _each(lhs.scale, p.k).reshape(p.k, 1)
        named["lhs_scale"] = scale, pl.BlockSpec((c.block_k, 1), lambda i, j, v, words: (i, 0))
    if g.scale is not None:
        scale = _each(g.scale, p.n).reshape(1, p.n)
        named["g_scale"] = scale, pl.BlockSpec((1, c.block_n), lambda i, j, v, words: (0, j))
    arrays, specs = zip(*named.values(), strict=True)
    call = pl.pallas_call(
        functools.partial(_kernel, plan, bool(interpret), (*named, "out", "acc")),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(*plan.grid, count),
            in_specs=list(specs),
            out_specs=pl.BlockSpec(
                (1, c.block_k, c.block_n), lambda i, j, v, words: (get(words, MATRIX, v), i, j)
            ),
            scratch_shapes=(pltpu.VMEM((c.block_k, c.block_n), jnp.dtype(plan.acc)),),
        ),
        out_shape=jax.ShapeDtypeStruct((p.matrices, p.k, p.n), p.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=int(0.95 * chip.vmem_bytes),
        ),
        interpret=interpret,
        name=f"qwix_{p.scheme}",
    )
    return call(words, *arrays)


def _each(scale: jax.Array, size: int) -> jax.Array:
    """One float32 scale for each column."""
    return jnp.repeat(scale.astype(jnp.float32), size // scale.shape[2], axis=2)


def _kernel(plan: _Plan, emulate: bool, names: tuple[str, ...], visits: Any, *refs: Any) -> None:
    r = dict(zip(names, refs, strict=True))
    visit, count = pl.program_id(2), tpu_visits.count(plan.most, visits)
    get = lambda which, v=visit: tpu_visits.field(plan.most, visits, which, v)
    here = get(MATRIX)
    first = (visit == 0) | (here != get(MATRIX, jnp.maximum(visit - 1, 0)))
    last = (visit == count - 1) | (here != get(MATRIX, jnp.minimum(visit + 1, count - 1)))
    lo, hi = get(LO), get(HI)

    @pl.when(first)
    def _():
        r["acc"][...] = jnp.zeros_like(r["acc"])

    @pl.when(lo < hi)
    def _():
        left, right = (_rows(r[name], dot, lo, hi) for name, dot in zip(("lhs", "g"), plan.dots, strict=True))
        if emulate:
            left, right = left.astype(plan.acc), right.astype(plan.acc)
        dims = (((0,), (0,)), ((), ()))
        precision = lax.Precision.HIGHEST if emulate else None
        r["acc"][...] += lax.dot_general(
            left, right, dims, precision, preferred_element_type=jnp.dtype(plan.acc)
        )

    @pl.when(last)
    def _():
        out = r["acc"][...]
        for name in ("lhs_scale", "g_scale"):
            out = out.astype(jnp.float32) * r[name][...] if name in r else out
        r["out"][0] = out.astype(r["out"].dtype)


def _rows(ref: Any, dot: str, lo: jax.Array, hi: jax.Array) -> jax.Array:
    """The rows of the group as the matrix unit gets them, and zeros for the others."""
    x = ref[0]
    wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    x = jnp.where((row >= lo) & (row < hi), x.astype(wide), jnp.zeros(x.shape, wide))
    return values.narrow(x, dot)
