"""Quantization of whole arrays on a TPU, by a Pallas kernel that reads them once.

A block holds whole columns (or rows): the first loop over it finds the maxima, the second one scales and
rounds. XLA takes two passes over HBM for the two, and quantizing is nothing but passes over HBM.

Static microseconds of 4096 x 14336 bfloat16 weights to int8, by column, where XLA takes a pass for the maxima
and one for the values; HBM is what binds but on v7x (the vector unit: 12 slots per 1024 values on v5e, which
computes in float32, 9 elsewhere):

             v5e     v5p     v6e     v7x
    XLA      358.9   106.3   179.2    79.7
    here     215.2    63.7   107.4    55.5
    HBM      215.2    63.7   107.4    47.8
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul import tpu_values
from qwix_kernels.matmul.tpu_config import LANES, pl_cdiv
from qwix_kernels.quantize import xla
from qwix_kernels.quantize.problem import QuantizeProblem

DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")
# Of x in a block; two of them are in VMEM, and two of the values.
_BLOCK_BYTES = 4 << 20
# What is rewritten at a time: whole native tiles of bytes, as many values as stay in registers.
_ROWS, _LANES = 32, 4 * LANES
_AT_A_TIME = _ROWS * _LANES
_UNROLL = 8
# Slots of the vector unit per 1024 values, from the compiler's schedules: magnitude, maximum, product,
# rounding, packing; without and with arithmetic on packed bfloat16.
_OPERATIONS = (12, 9)


@dataclasses.dataclass(frozen=True)
class Config:
    """Columns, or rows, of x in a block."""

    block: int


def check(problem: QuantizeProblem, chip: Chip) -> None:
    """Raises NotImplementedError for what the kernel does not take."""
    p = problem
    if p.dtype not in DTYPES:
        raise NotImplementedError(f"makes {', '.join(DTYPES)}, not {p.dtype}")
    if p.x_dtype not in ("bfloat16", "float32"):
        raise NotImplementedError(f"quantizes bfloat16 and float32, not {p.x_dtype}")
    least = LANES if p.scale_of == "columns" else _ROWS
    if 3 * _slice_bytes(p) * least > chip.vmem_bytes * 3 // 4:
        what = "rows" if p.scale_of == "columns" else "columns"
        raise NotImplementedError(f"{getattr(p, what)} {what} are too many for the memory on the chip")


def _slice_bytes(p: QuantizeProblem) -> int:
    """Of x in one column or row."""
    size = p.rows if p.scale_of == "columns" else p.columns
    return p.bytes[0] // (p.batch * p.rows * p.columns) * size


def heuristic_config(problem: QuantizeProblem, chip: Chip) -> Config:
    """As many columns (rows) as fill a block of 4 MiB."""
    p = problem
    unit, size = (LANES, p.columns) if p.scale_of == "columns" else (_ROWS, p.rows)
    block = max(1, min(_BLOCK_BYTES // (_slice_bytes(p) * unit), 16)) * unit
    return Config(min(block, pl_cdiv(size, unit) * unit))


def estimate(problem: QuantizeProblem, chip: Chip, config: Config) -> Estimate:
    """Bytes over the bandwidth, or the vector unit's work where that is more."""
    read, written = problem.bytes
    values = problem.batch * problem.rows * problem.columns
    memory = (read + written) / (chip.hbm_gbps * 1e3)
    compute = values / 1024 * _OPERATIONS[chip.bf16_math] / 4 / (chip.ghz * 1e3)
    return Estimate(compute, memory, max(compute, memory), memory, f"one pass, blocks of {config.block}")


def run(
    problem: QuantizeProblem, x: jax.Array, *, config: Config, chip: Chip, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """(values, scale) of [batch, rows, columns]; `check(problem, chip)` must have passed."""
    p, block = problem, config.block
    if p.scale_of == "columns":
        grid, blocks = (p.batch, pl_cdiv(p.columns, block)), ((1, p.rows, block), (1, 1, block))
        index: Any = lambda b, i: (b, 0, i)
    else:
        grid, blocks = (p.batch, pl_cdiv(p.rows, block)), ((1, block, p.columns), (1, block, 1))
        index = lambda b, i: (b, i, 0)
    values, scale = (pl.BlockSpec(shape, index) for shape in blocks)
    body = _columns if p.scale_of == "columns" else _rows
    return tuple(
        pl.pallas_call(
            functools.partial(body, p, chip.bf16_math),
            grid=grid,
            in_specs=[values],
            out_specs=[values, scale],
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, p.dtype),
                jax.ShapeDtypeStruct(p.scale_shape, p.x_dtype),
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=int(0.95 * chip.vmem_bytes)
            ),
            interpret=interpret,
            name=f"qwix_{p.scheme}",
        )(x)
    )


def _columns(p: QuantizeProblem, packed: bool, x: Any, values: Any, scale: Any) -> None:
    """A block of whole columns, some lanes at a time: a running maximum of each sublane, then the values."""
    running = x.dtype if packed else jnp.float32
    sublanes = 32 // jnp.dtype(running).itemsize
    for lanes in _pieces(x.shape[2], _LANES):
        width = lanes.stop - lanes.start
        count = _AT_A_TIME // pl_cdiv(width, LANES) // LANES // _ROWS * _ROWS
        turns = p.rows // count
        rest = slice(turns * count, p.rows)
        rows_of = lambda i, count=count: pl.ds(pl.multiple_of(i * count, count), count)
        size = lambda rows, lanes=lanes: jnp.abs(x[0, rows, lanes].astype(running))

        def top(i: jax.Array, so_far: jax.Array, size=size, rows_of=rows_of, count=count) -> jax.Array:
            part = size(rows_of(i))
            for lo in range(0, count, sublanes):
                so_far = jnp.maximum(so_far, part[lo : lo + sublanes])
            return so_far

        unroll = min(_UNROLL, max(turns, 1))
        tops = jax.lax.fori_loop(0, turns, top, jnp.zeros((sublanes, width), running), unroll=unroll)
        found = jnp.max(tops.astype(jnp.float32), axis=0, keepdims=True)
        if rest.start < rest.stop:
            found = jnp.maximum(found, jnp.max(size(rest).astype(jnp.float32), axis=0, keepdims=True))
        stored = xla.scale_of(found, p).astype(scale.dtype)
        scale[0, :, lanes] = stored
        inverse = 1 / stored.astype(jnp.float32)

        @pl.loop(0, turns)
        def _(i, lanes=lanes, inverse=inverse, rows_of=rows_of):
            values[0, rows_of(i), lanes] = _converted(p, x[0, rows_of(i), lanes], inverse)

        if rest.start < rest.stop:
            values[0, rest, lanes] = _converted(p, x[0, rest, lanes], inverse)


def _rows(p: QuantizeProblem, packed: bool, x: Any, values: Any, scale: Any) -> None:
    """A block of whole rows, some of them at a time."""
    del packed  # row_absmax knows

    @pl.loop(0, x.shape[1] // _ROWS)
    def _(i):
        rows = pl.ds(pl.multiple_of(i * _ROWS, _ROWS), _ROWS)
        pieces = _pieces(x.shape[2], _LANES)
        top = tpu_values.row_absmax([x[0, rows, lanes] for lanes in pieces])
        stored = xla.scale_of(top, p).astype(scale.dtype)
        scale[0, rows, :] = stored
        inverse = 1 / stored.astype(jnp.float32)
        for lanes in pieces:
            values[0, rows, lanes] = _converted(p, x[0, rows, lanes], inverse)


def _converted(p: QuantizeProblem, x: jax.Array, inverse: jax.Array) -> jax.Array:
    stored = tpu_values.quantize(x.astype(jnp.float32) * inverse, p.how)
    return tpu_values.narrow(stored, p.dtype)


def _pieces(size: int, width: int) -> list[slice]:
    return [slice(lo, min(lo + width, size)) for lo in range(0, size, width)]
