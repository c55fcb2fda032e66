"""Quantized matmul on a TPU, by one Pallas kernel: what it takes, with which blocks, and the call itself.

Every scheme is one kernel body (tpu_kernel.py) under a plan (tpu_plan.py); tpu_estimate.py prices a plan and
picks the blocks. The big operands are read as they lie in HBM, any M, N and K, either order of the rhs; only
scales and zero points, which are small, are laid out anew outside.
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
from qwix_kernels.matmul import tpu_across, tpu_kernel, tpu_low_rank_plan
from qwix_kernels.matmul.elementwise import row_scale
from qwix_kernels.matmul.tpu_config import LANES, Config
from qwix_kernels.matmul.tpu_estimate import check, estimate, heuristic_config
from qwix_kernels.matmul.tpu_plan import Plan, resolve
from qwix_kernels.problem import NO_EXTRAS, Extras, MatmulProblem, Tensor, dtype_bits

__all__ = ["Config", "check", "estimate", "heuristic_config", "run"]


def run(
    problem: MatmulProblem,
    lhs: Tensor,
    rhs: Tensor,
    extras: Extras = NO_EXTRAS,
    *,
    config: Config,
    chip: Chip,
    interpret: Any = False,
) -> jax.Array | Tensor:
    """lhs @ rhs and what is fused round it, [batch, M, N] in `problem.out_dtype`; quantized, with its scales.

    Args:
      problem: describes the operands; `check(problem, chip)` must have passed.
      lhs: [batch or 1, M, K].
      rhs: [batch or 1, K, N], or [batch or 1, N, K] when `problem.rhs_transposed`.
      extras: what is fused round the product.
      config: block sizes and strategy.
      chip: the chip to compile for.
      interpret: a `pltpu.InterpretParams` runs the kernel on the CPU.

    Raises NotImplementedError where the config does not fit the problem or the chip.
    """
    if problem.rhs_transposed and problem.n == 1:
        # A single row is the same memory as a single column, which Mosaic takes with every dtype.
        rhs, gate = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), (rhs, extras.gate))
        extras = dataclasses.replace(extras, gate=gate)
        problem = dataclasses.replace(problem, rhs_transposed=False)
    plan = resolve(problem, chip, config)
    names, arrays, specs = zip(*operands(plan, lhs, rhs, extras), strict=True)
    scratch, (outs, out_specs) = scratch_shapes(plan), _results(plan)
    columns = "arbitrary" if plan.once_a_row_block and not plan.megacore_rows else "parallel"
    made = pl.pallas_call(
        functools.partial(tpu_kernel.kernel, plan, bool(interpret), (*names, *outs, *scratch)),
        grid=plan.grid,
        in_specs=specs,
        out_specs=out_specs,
        out_shape=list(outs.values()),
        scratch_shapes=tuple(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", columns, "arbitrary"),
            vmem_limit_bytes=int(0.95 * chip.vmem_bytes),
        ),
        cost_estimate=_cost(plan, arrays),
        interpret=interpret,
        name=f"qwix_matmul_{problem.scheme}",
    )(*arrays)
    if problem.epilogue is None or problem.epilogue.quantize is None:
        return made[0]
    return Tensor(made[0], extras.out_scale if len(made) == 1 else _in_order(plan, made[1]))


def _results(plan: Plan) -> tuple[dict[str, jax.ShapeDtypeStruct], list[pl.BlockSpec]]:
    """What the kernel writes, and its blocks: the result, and the scales of a result that it quantizes."""
    p, bm, bn = plan.problem, plan.block_m, plan.block_n
    outs = {"out": jax.ShapeDtypeStruct((p.batch, p.m, p.n), p.out_dtype)}
    specs = [pl.BlockSpec((1, bm, bn), lambda b, i, j, k: (b, i, j))]
    if p.epilogue and p.epilogue.scales_out:
        tiles = bn // plan.out_tile if plan.out_tile else 1
        outs["out_scales"] = jax.ShapeDtypeStruct((p.batch, plan.grid[2], p.m, tiles), jnp.float32)
        specs.append(pl.BlockSpec((1, 1, bm, tiles), lambda b, i, j, k: (b, j, i, 0)))
    return outs, specs


def _in_order(plan: Plan, scales: jax.Array) -> jax.Array:
    """[batch, N blocks, M, tiles of a block] as [batch, M, tiles]."""
    p = plan.problem
    tiles = jnp.swapaxes(scales, 1, 2).reshape(p.batch, p.m, -1)
    return tiles[:, :, : p.n // plan.out_tile if plan.out_tile else 1]


def operands(
    plan: Plan, lhs: Tensor, rhs: Tensor, extras: Extras
) -> list[tuple[str, jax.Array, pl.BlockSpec]]:
    """(name in the kernel, array, block) of everything the kernel reads."""
    p, bm, bk = plan.problem, plan.block_m, plan.block_k
    last = plan.steps_k - 1
    # A prepared lhs is not read again after the first column block: stay on its last block.
    reuse = plan.prepare_lhs and not plan.megacore_rows
    of_lhs = lambda j, k: jnp.where(j == 0, k, last) if reuse and last else k
    block = pl.BlockSpec(
        (1, bm, bk),
        lambda b, i, j, k: (_or_0(lhs.values, 0, b), i, of_lhs(j, k)),
        pipeline_mode=pl.Buffered(1) if plan.lhs_buffers == 1 else None,
    )
    out = [("lhs", lhs.values, block), *_weight(plan, "rhs", rhs)]
    if extras.gate is not None:
        out += _weight(plan, "gate", extras.gate)
    if extras.norm_weight is not None:
        weight = extras.norm_weight
        block = pl.BlockSpec((1, 1, bk), lambda b, i, j, k: (_or_0(weight, 0, b), 0, of_lhs(j, k)))
        out.append(("norm_weight", weight, block))
    if extras.lhs_columns is not None:
        columns = extras.lhs_columns
        block = pl.BlockSpec((1, 1, bk), lambda b, i, j, k: (_or_0(columns, 0, b), 0, of_lhs(j, k)))
        out.append(("lhs_columns", columns, block))
    if extras.lhs_noise is not None:
        out.append(_lhs_side(plan, "lhs_noise", extras.lhs_noise, tile=0))
    if extras.lhs_scale is not None:
        out.append(_lhs_side(plan, "lhs_scale", extras.lhs_scale))
    elif plan.rows_given:
        assert p.quantize_lhs is not None
        x = lhs.values
        if extras.lhs_columns is not None:
            x = x.astype(jnp.float32) * extras.lhs_columns.astype(jnp.float32)
        top = jnp.max(jnp.abs(x), axis=2, keepdims=True).astype(jnp.float32)
        out.append(_lhs_side(plan, "lhs_scale", row_scale(top, p.quantize_lhs)))
    if lhs.scale is not None:
        out.append(_lhs_side(plan, "lhs_scale", lhs.scale))
    if lhs.zero_point is not None:
        out.append(_lhs_side(plan, "lhs_zero", _wide(lhs.zero_point)))
    return out + _low_rank_operands(plan, extras) + _epilogue_operands(plan, extras)


def _weight(plan: Plan, name: str, w: Tensor) -> list[tuple[str, jax.Array, pl.BlockSpec]]:
    """A weight with its scales and zero points."""
    bn, bk = plan.block_n, plan.block_k
    if plan.problem.rhs_transposed:
        block = pl.BlockSpec((1, bn, bk), lambda b, i, j, k: (_or_0(w.values, 0, b), j, k))
    else:
        block = pl.BlockSpec((1, bk, bn), lambda b, i, j, k: (_or_0(w.values, 0, b), k, j))
    out = [(name, w.values, block)]
    if w.scale is not None:
        out.append(_rhs_side(plan, f"{name}_scale", w.scale))
    if w.zero_point is not None:
        out.append(_rhs_side(plan, f"{name}_zero", _wide(w.zero_point)))
    return out


def _low_rank_operands(plan: Plan, extras: Extras) -> list[tuple[str, jax.Array, pl.BlockSpec]]:
    """The update's factors in bfloat16, the first one as [batch, rank, K], which is how XLA keeps it."""
    if extras.low_rank_a is None or extras.low_rank_b is None:
        return []
    rank, last = tpu_low_rank_plan.rank(plan), plan.steps_k - 1
    a = _padded(jnp.swapaxes(extras.low_rank_a, 1, 2).astype(jnp.bfloat16), 1, rank)
    b = _padded(extras.low_rank_b.astype(jnp.bfloat16), 1, rank)
    # As the rows, a is not read again after the first column block.
    of_a = lambda j, k: jnp.where(j == 0, k, last) if last and not plan.megacore_rows else k
    block_a = (1, rank, plan.block_k), lambda batch, i, j, k: (_or_0(a, 0, batch), 0, of_a(j, k))
    block_b = (1, rank, plan.block_n), lambda batch, i, j, k: (_or_0(b, 0, batch), 0, j)
    out = [("low_rank_a", a, pl.BlockSpec(*block_a)), ("low_rank_b", b, pl.BlockSpec(*block_b))]
    if extras.low_rank_mask is not None:
        mask = _padded(extras.low_rank_mask, 2, rank)
        rows = plan.block_m if mask.shape[1] > 1 else 1
        of_mask = lambda batch, i, j, k: (_or_0(mask, 0, batch), _or_0(mask, 1, i), 0)
        out.append(("low_rank_mask", mask, pl.BlockSpec((1, rows, rank), of_mask)))
    return out


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    """With zeros up to `size` along an axis."""
    missing = size - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _epilogue_operands(plan: Plan, extras: Extras) -> list[tuple[str, jax.Array, pl.BlockSpec]]:
    """What the epilogue reads, in blocks of the result: one row of it, or all."""
    p = plan.problem
    given = {name: getattr(extras, name) for name in ("bias", "gate_bias", "residual")}
    if extras.out_scale is not None:
        given["out_scale"] = _expand(extras.out_scale, 2, p.n).astype(jnp.float32)

    def block(x: jax.Array) -> pl.BlockSpec:
        size = (1, plan.block_m if x.shape[1] > 1 else 1, plan.block_n)
        return pl.BlockSpec(size, lambda b, i, j, k: (_or_0(x, 0, b), _or_0(x, 1, i), j))

    return [(name, x, block(x)) for name, x in given.items() if x is not None]


def _wide(zero: jax.Array) -> jax.Array:
    return zero.astype(jnp.int32).astype(jnp.float32)


def _lhs_side(
    plan: Plan, name: str, x: jax.Array, tile: int | None = None
) -> tuple[str, jax.Array, pl.BlockSpec]:
    """[batch, M', K'] scales or zero points as [batch, K blocks, M, tiles of a block].

    One row of scales that was given for all rows that are quantized stays one.
    """
    p = plan.problem
    if p.quantize_lhs is None:
        x = _expand(x, 1, p.m)
    x = _by_block(plan, _expand(x, 0, p.lhs.batch), plan.lhs_tile if tile is None else tile, axis=2)
    rows = plan.block_m if x.shape[2] > 1 or p.quantize_lhs is None else 1
    index = lambda b, i, j, k: (_or_0(x, 0, b), _or_0(x, 1, k), i if rows > 1 else 0, 0)
    return name, x, pl.BlockSpec((1, 1, rows, x.shape[3]), index)


def _rhs_side(plan: Plan, name: str, x: jax.Array) -> tuple[str, jax.Array, pl.BlockSpec]:
    """Scales or zero points of the rhs as [batch, K blocks, tiles of a block, N].

    Only where they go on a transposed rhs before the dot do they keep its order: [batch, K blocks, N, tiles].
    """
    p = plan.problem
    if tpu_across.applies(p):
        return tpu_across.operand(plan, name, _expand(x, 0, p.rhs.batch))
    free = 1 if p.rhs_transposed else 2
    x = _expand(_expand(x, free, p.n), 0, p.rhs.batch)
    if p.rhs_transposed and plan.folds_rhs:
        x = _by_block(plan, x, plan.rhs_tile, axis=2)
        block = (1, 1, plan.block_n, x.shape[3])
        return name, x, pl.BlockSpec(block, lambda b, i, j, k: (_or_0(x, 0, b), _or_0(x, 1, k), j, 0))
    if p.rhs_transposed:
        x = jnp.swapaxes(x, 1, 2)
    x = _by_block(plan, x, plan.rhs_tile, axis=1)
    block = (1, 1, x.shape[2], plan.block_n)
    return name, x, pl.BlockSpec(block, lambda b, i, j, k: (_or_0(x, 0, b), _or_0(x, 1, k), 0, j))


def _or_0(x: jax.Array, axis: int, index: Any) -> Any:
    return index if x.shape[axis] > 1 else 0


def _expand(x: jax.Array, axis: int, size: int) -> jax.Array:
    """One entry per element along a free axis; a single one along the batch stays."""
    if x.shape[axis] == size or (axis == 0 and x.shape[0] == 1):
        return x
    return jnp.repeat(x, size // x.shape[axis], axis=axis)


def _by_block(plan: Plan, x: jax.Array, tile: int, axis: int) -> jax.Array:
    """K tiles of a rank-3 array split into (K blocks, tiles of a block), K blocks right after the batch."""
    if not tile:
        return x[:, None]
    per_block = plan.block_k // tile
    missing = plan.steps_k * per_block - x.shape[axis]
    if missing:
        # Values past the end are zero under any scale but NaN, which e8m0 has in place of zero.
        nothing = 1 if x.dtype == jnp.float8_e8m0fnu else 0
        widths = [(0, missing if a == axis else 0) for a in range(3)]
        x = jnp.pad(x, widths, constant_values=jnp.asarray(nothing, x.dtype))
    shape = x.shape
    if axis == 1:
        return x.reshape(shape[0], plan.steps_k, per_block, shape[2])
    return jnp.swapaxes(x.reshape(shape[0], shape[1], plan.steps_k, per_block), 1, 2)


def scratch_shapes(plan: Plan) -> dict[str, Any]:
    bm, bn, bk = plan.block_m, plan.block_n, plan.block_k
    out: dict[str, Any] = {}
    if plan.steps_k > 1:
        for name in ("acc", "gate_acc")[: plan.problem.products]:
            out[name] = pltpu.VMEM((bm, bn), jnp.dtype(plan.acc))
    if plan.prepare_lhs:
        out["lhs_ready"] = pltpu.VMEM((plan.steps_k, bm, bk), jnp.dtype(plan.lhs_dot))
    if plan.spreads_row_scale:
        out["row_scale"] = pltpu.VMEM((plan.steps_k, plan.lhs_tiles(), bm, LANES), jnp.float32)
    elif plan.problem.quantize_lhs is not None and not plan.rows_given and not plan.folds_lhs:
        out["row_scale"] = pltpu.VMEM((plan.steps_k, bm, plan.lhs_tiles()), jnp.float32)
    if plan.problem.low_rank:
        out["low_rank_t"] = pltpu.VMEM((bm, tpu_low_rank_plan.rank(plan)), jnp.bfloat16)
        if plan.steps_k > 1:
            shape = (
                (tpu_low_rank_plan.rank(plan), bm)
                if tpu_low_rank_plan.turns(plan)
                else (bm, tpu_low_rank_plan.rank(plan))
            )
            out["low_rank_sum"] = pltpu.VMEM(shape, jnp.float32)
    if plan.prepare_rhs:
        shape = (bn, bk) if plan.problem.rhs_transposed else (bk, bn)
        for name in ("rhs_ready", "gate_ready")[: plan.problem.products]:
            out[name] = pltpu.VMEM(shape, jnp.dtype(plan.rhs_dot))
    return out


def _cost(plan: Plan, arrays: tuple[jax.Array, ...]) -> pl.CostEstimate:
    p = plan.problem
    moved = sum(a.size * dtype_bits(a.dtype.name) // 8 for a in arrays)
    moved += p.batch * p.m * p.n * dtype_bits(p.out_dtype) // 8
    flops = 2 * p.products * p.batch * p.m * p.n * p.k + 2 * p.batch * p.m * tpu_low_rank_plan.rank(plan) * (
        p.n + p.k
    )
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)
