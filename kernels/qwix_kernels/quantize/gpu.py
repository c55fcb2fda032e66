"""Quantization by rows on an NVIDIA GPU: one Pallas Mosaic GPU kernel that reads x once.

A thread block takes a few rows, or runs of a row that share a scale, whole, into the registers of one
warpgroup: as consecutive lanes read consecutive 16 bytes, copies need no shared memory. There it finds the
greatest magnitude (shuffles, and shared memory where a run is spread over warps), scales, rounds and stores.
Many such blocks run on a multiprocessor, so one's loads overlap another's arithmetic.

`rows(x, how) -> Tensor` quantizes the activations of a matmul, [batch, M, K] with float32 scales
[batch, M, K / tile]; it raises NotImplementedError for what `check_rows` refuses. `run` is dispatch's way in.
Values and scales are what problem.py says, to the bit: the reciprocal of a scale is rounded correctly here,
which the division that Mosaic emits is not. (XLA's own on a GPU are not quite: it divides by the scale before
that is rounded to the dtype of x, by which 3 % of the int8 values of bfloat16 rows differ by one.)

Scales by columns are XLA's: a block would hold whole columns, which lie far apart.

Measured on an H100 80GB HBM3 (jax 0.11.2, 2026-11-22), microseconds of bfloat16 rows to int8, and to fp8 with
scales by 128; copies run at 3051 GB/s there, and here rows at 2860, 3086 and 3102:

               4096 x 4096   16384 x 14336   16 x 14336   16384 x 4096, fp8
    XLA               38.5           442.6          5.1               135.6
    here              17.6           228.3          2.9                64.9
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.gpu_blocks import WARPGROUP, interpreted
from qwix_kernels.matmul.elementwise import row_scale
from qwix_kernels.problem import RowQuantize, Tensor, dtype_bits
from qwix_kernels.quantize import xla
from qwix_kernels.quantize.problem import QuantizeProblem

X_DTYPES = ("bfloat16", "float16", "float32")
DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")
_THREADS, _WARPS, _LANES = 128, 4, 32
_AT_A_TIME = 32  # values of a thread, where rows are short
_MOST_WORDS = 112  # 32-bit registers of a thread that hold x; as many again are for everything else
_BETWEEN_WARPS = 1024  # values of a run beyond which all warps share it
# A scheduler's cycles for 32 values: what the logic pipe does to clip and pack them.
_CYCLES = 10
_LARGEST = np.float32(2.0**120)  # scales beyond have reciprocals that lose bits anyway


@dataclasses.dataclass(frozen=True)
class Config:
    """Rows (or runs that share a scale) of a thread block."""

    rows: int


@dataclasses.dataclass(frozen=True)
class _Share:
    """How a warpgroup shares out a block of runs: `warps` and `lanes` along a run, `vector` values a lane."""

    warps: int
    lanes: int
    vector: int

    @property
    def rows(self) -> int:
        """The fewest runs that keep all threads busy."""
        return (_WARPS // self.warps) * (_LANES // self.lanes)

    @property
    def layout(self) -> Any:
        down, across = _LANES // self.lanes, self.lanes * self.vector
        tiles = (self.rows, self.warps * across), (down, across), (1, self.vector)
        made = mgpu.TiledLayout(plgpu.Tiling(tiles), (-6, -5), (-4, -3), -1, _check_canonical=False)
        made = made.canonicalize()
        return plgpu.Layout.TILED(made.tiling, made.warp_dims, made.lane_dims, made.vector_dim)


def check(problem: QuantizeProblem, chip: Chip) -> None:
    """Raises NotImplementedError for what the kernel does not take."""
    p = problem
    if not chip.sms:
        raise NotImplementedError(f"needs compute capability 9.0 or more; nothing is known of {chip.name}")
    if p.dtype not in DTYPES:
        raise NotImplementedError(f"makes {', '.join(DTYPES)}, not {p.dtype}")
    if p.scale_of != "rows":
        raise NotImplementedError("scales by columns are XLA's on a GPU")
    _share(p.batch * p.rows, p.columns, p.x_dtype)


def check_rows(shape: tuple[int, ...], dtype: str, how: RowQuantize) -> None:
    """Raises NotImplementedError for rows [batch, M, K] of this dtype that `rows` does not quantize.

    >>> check_rows((1, 16, 4096), "bfloat16", RowQuantize("int8", 127.5, 128))
    >>> check_rows((1, 16, 4096), "bfloat16", RowQuantize("int8", 127.5, static=True))
    Traceback (most recent call last):
      ...
    NotImplementedError: quantizes rows by their own greatest magnitude only, not int8:0:static
    """
    if how.static or how.columns or how.noise:
        raise NotImplementedError(f"quantizes rows by their own greatest magnitude only, not {how}")
    if _stored(how) not in DTYPES:
        raise NotImplementedError(f"makes {', '.join(DTYPES)}, not {how.dtype}")
    batch, m, k = shape
    tile = how.tile_k or k
    _share(batch * m * (k // tile), tile, dtype)


def rows(x: jax.Array, how: RowQuantize, *, interpret: Any = False) -> Tensor:
    """[batch, M, K] quantized as `how` says, with scales [batch, M, K / tile] in float32.

    What `matmul.elementwise.quantize_rows` gives, to the bit. 4-bit values are given in int8.

    Raises NotImplementedError for what `check_rows` refuses.
    """
    check_rows(x.shape, x.dtype.name, how)
    batch, m, k = x.shape
    tile = how.tile_k or k
    scale_of = lambda top: row_scale(top, how)
    count = batch * m * (k // tile)
    config = _config(_share(count, tile, x.dtype.name), count, tile)
    values, scale = _quantized(
        x.reshape(count, tile), how, _stored(how), "float32", scale_of, config, interpret
    )
    return Tensor(values.reshape(x.shape), scale.reshape(batch, m, k // tile))


def heuristic_config(problem: QuantizeProblem, chip: Chip) -> Config:
    """One row where rows are long, else as many as give a thread some work."""
    runs = problem.batch * problem.rows
    return _config(_share(runs, problem.columns, problem.x_dtype), runs, problem.columns)


def estimate(problem: QuantizeProblem, chip: Chip, config: Config) -> Estimate:
    """Bytes over the bandwidth, or the conversions' cycles where those are more."""
    read, written = problem.bytes
    share = _share(problem.batch * problem.rows, problem.columns, problem.x_dtype)
    if (problem.batch * problem.rows) % config.rows or config.rows % share.rows:
        raise NotImplementedError(
            f"{config}: blocks are multiples of {share.rows} rows and divide all of them"
        )
    memory = (read + written) / (chip.hbm_gbps * 1e3)
    values = problem.batch * problem.rows * problem.columns
    compute = values / (_LANES * _WARPS) * _CYCLES / (chip.sms * chip.ghz * 1e3)
    static = max(compute, memory) + xla.GPU_KERNEL_US
    return Estimate(compute, memory, static, memory, f"one pass, {config.rows} rows a block")


def run(
    problem: QuantizeProblem, x: jax.Array, *, config: Config, chip: Chip, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """(values, scale) of [batch, rows, columns]; `check(problem, chip)` must have passed."""
    p = problem
    scale_of = lambda top: xla.scale_of(top, p)
    runs = x.reshape(-1, p.columns)
    values, scale = _quantized(runs, p.how, p.dtype, p.x_dtype, scale_of, config, interpret)
    return values.reshape(x.shape), scale.reshape(p.scale_shape)


def _stored(how: RowQuantize) -> str:
    return "int8" if how.dtype in ("int2", "int4") else how.dtype


def _share(runs: int, size: int, dtype: str) -> _Share:
    """How `runs` of `size` values are shared out; NotImplementedError where there is no way."""
    if dtype not in X_DTYPES:
        raise NotImplementedError(f"quantizes {', '.join(X_DTYPES)}, not {dtype}")
    vectors = [v for v in (8, 4, 2, 1) if v * dtype_bits(dtype) <= 128]
    warps = (_WARPS, 1) if size > _BETWEEN_WARPS else (1, _WARPS)
    for vector, along, lanes in itertools.product(vectors, warps, (32, 16, 8, 4)):
        share = _Share(along, lanes, vector)
        words = size * share.rows * dtype_bits(dtype) // 32 // _THREADS
        fits = size % (along * lanes * vector) == 0 and runs % share.rows == 0
        if fits and words <= _MOST_WORDS:
            return share
    raise NotImplementedError(f"{runs} rows of {size} {dtype} do not fit a warpgroup's registers evenly")


def _config(share: _Share, runs: int, size: int) -> Config:
    count = share.rows
    while 2 * count * size <= _AT_A_TIME * _THREADS and runs % (2 * count) == 0:
        count *= 2
    return Config(count)


def _quantized(
    x: jax.Array,
    how: RowQuantize,
    dtype: str,
    scale_dtype: str,
    scale_of: Callable[[jax.Array], jax.Array],
    config: Config,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """(values [runs, size], scales [runs]) of x [runs, size]."""
    runs, size = x.shape
    layout = _share(runs, size, x.dtype.name).layout
    low, high = (np.float32(limit) for limit in how.limits)

    def kernel(x_g, values_g, scale_g):
        here = pl.ds(config.rows * jax.lax.axis_index("block"), config.rows)
        given = plgpu.load(x_g.at[here], layout=layout, optimized=False)
        top = jnp.max(jnp.abs(given), axis=1).astype(jnp.float32)
        scale = scale_of(top).astype(scale_dtype)
        inverse = jax.lax.broadcast_in_dim(_reciprocal(scale.astype(jnp.float32)), given.shape, (0,))
        scaled = given.astype(jnp.float32) * inverse
        if jnp.issubdtype(dtype, jnp.integer):
            scaled = jnp.round(scaled)
        _store(values_g.at[here], jnp.clip(scaled, low, high).astype(dtype))
        _store(scale_g.at[here], scale)

    shapes = jax.ShapeDtypeStruct(x.shape, dtype), jax.ShapeDtypeStruct((runs,), scale_dtype)
    return plgpu.kernel(
        kernel,
        out_type=list(shapes),
        grid=(runs // config.rows,),
        grid_names=("block",),
        compiler_params=WARPGROUP,
        **interpreted(interpret),
    )(x)


def _store(ref: Any, value: jax.Array) -> None:
    """To global memory, however little of it; jax before 0.12 has one kind of store, which does that."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _reciprocal(d: jax.Array) -> jax.Array:
    """1 / d, correctly rounded, of positive float32: the division may be off by units in the last place.

    A Newton step with the exact residual leaves the result or a neighbour of it; of the two the one with the
    smaller residual is it. (Tried for all 2^23 fractions, with quotients off by up to 3 units.)
    """
    r = 1 / d
    near = r + r * _residual(d, r)
    left = _residual(d, near)
    step = jnp.where(left > 0, np.int32(1), np.int32(-1))
    other = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(near, jnp.int32) + step, jnp.float32)
    best = jnp.where(jnp.abs(_residual(d, other)) < jnp.abs(left), other, near)
    return jnp.where(d < _LARGEST, best, r)  # also infinity and NaN as they are


def _residual(d: jax.Array, r: jax.Array) -> jax.Array:
    """1 - d r, where d r is almost 1: products of halves are exact, and so is each difference."""
    (d_high, d_low), (r_high, r_low) = _halves(d), _halves(r)
    return (((1 - d_high * r_high) - d_high * r_low) - d_low * r_high) - d_low * r_low


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 12 leading bits of a float32's significand, and the rest."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & np.int32(-1 << 12)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high
