"""Weights with a scale for each element of K, shared by runs of columns: a weight in its matmul's gradient.

A weight [K, N] with tiles along K serves g @ w.T as it is stored: what is summed over is then N, where each
element has its own scale, and the tiles lie along the result's columns. Such scales go on the weights in
VMEM, before the dot. The block of weights is rewritten as in the forward pass: its tiles lie along the same
axis of memory. A tile may be longer than a block of columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.tpu_config import LANES, Config, pl_cdiv
from qwix_kernels.problem import MatmulProblem

if TYPE_CHECKING:
    from qwix_kernels.matmul.tpu_plan import Plan


def applies(p: MatmulProblem) -> bool:
    """Whether the rhs is such a weight."""
    return p.rhs.is_quantized and p.k > 1 and p.rhs.tile_k == 1 and p.rhs.tile_free > 1


def is_taken(p: MatmulProblem, least: int) -> bool:
    """Whether its runs of columns are multiples of `least`, or all columns."""
    return applies(p) and (p.rhs.tile_free % least == 0 or p.rhs.tile_free == p.n)


def check(p: MatmulProblem, config: Config) -> None:
    """Raises NotImplementedError for a config that does not fit such a weight."""
    if not applies(p):
        return
    tile = p.rhs.tile_free
    if config.strategy != "before" or (config.block_n % tile and tile % config.block_n and tile < p.n):
        raise NotImplementedError(
            "a scale for each element of K goes on the weights 'before' the dot, in blocks of columns that "
            f"are multiples of the {tile} that share it, or divide them, got {config}"
        )


def scale_bytes(p: MatmulProblem, block_n: int, block_k: int) -> int:
    """VMEM of the scales of one block, in float32."""
    up = lambda size, unit: pl_cdiv(size, unit) * unit
    tiles = _tiles(p, block_n)
    return 4 * (up(tiles, 8) * up(block_k, LANES) if p.rhs_transposed else block_k * up(tiles, LANES))


def _tiles(p: MatmulProblem, block_n: int) -> int:
    return max(1, block_n // p.rhs.tile_free)


def local_tile(plan: Plan) -> int:
    """Columns of a block that share scales, or 0 where all of them do."""
    tile = plan.problem.rhs.tile_free
    return tile if tile < plan.block_n else 0


def operand(plan: Plan, name: str, x: jax.Array) -> tuple[str, jax.Array, pl.BlockSpec]:
    """Scales or zero points as [batch, N blocks, tiles of a block, K], or with K before the tiles where the
    rhs has it there. Blocks of columns that share a tile are given the same one."""
    p, bk, tiles = plan.problem, plan.block_k, _tiles(plan.problem, plan.block_n)
    turn = lambda a: a if p.rhs_transposed else jnp.swapaxes(a, -1, -2)
    x = turn(x)
    missing = -x.shape[1] % tiles
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)), constant_values=1) if missing else x
    x = turn(x.reshape(x.shape[0], -1, tiles, x.shape[2]))
    blocks = max(1, p.rhs.tile_free // plan.block_n)
    one, batched = x.shape[1] == 1, x.shape[0] > 1
    at = lambda b, j: (b if batched else 0, 0 if one else j // blocks)
    if p.rhs_transposed:
        return name, x, pl.BlockSpec((1, 1, tiles, bk), lambda b, i, j, k: (*at(b, j), 0, k))
    return name, x, pl.BlockSpec((1, 1, bk, tiles), lambda b, i, j, k: (*at(b, j), k, 0))


def prepare(plan: Plan, r: dict[str, Any], step: jax.Array) -> None:
    """The weights of this step dequantized, a piece of the block at a time.

    Scales past the end of K are whatever the DMA left there, so zeros come last.
    """
    p, wide = plan.problem, "bfloat16" if plan.bf16_math else "float32"
    for rows, lanes, tiles in _pieces(plan):
        w = values.widen(r["rhs"][0, rows, lanes], p.rhs.codebook, wide, fp4=plan.rhs_gain != 1)
        if p.rhs.zero_point:
            w = w - _spread(plan, r["rhs_zero"], rows, lanes, tiles).astype(wide)
        w = w * (_spread(plan, r["rhs_scale"], rows, lanes, tiles) * plan.rhs_gain).astype(wide)
        start, axis = (lanes.start, 1) if p.rhs_transposed else (rows.start, 0)
        w = values.zero_past(w, plan.k_limit(step), start, axis)
        r["rhs_ready"][rows, lanes] = values.narrow(w, plan.rhs_dot)


def _pieces(plan: Plan) -> list[tuple[slice, slice, list[tuple[int, int, int]]]]:
    """(rows, lanes, tiles of columns) of the block as it is stored."""
    tile = local_tile(plan)
    if plan.problem.rhs_transposed:
        columns, along_k = values.row_groups(plan.block_n, tile), values.lane_groups(plan.block_k, 0)
        return [(rows, lanes, tiles) for rows, tiles in columns for lanes, _ in along_k]
    columns, along_k = values.lane_groups(plan.block_n, tile), values.row_groups(plan.block_k, 0)
    return [(rows, lanes, tiles) for lanes, tiles in columns for rows, _ in along_k]


def _spread(plan: Plan, ref: Any, rows: slice, lanes: slice, tiles: list[tuple[int, int, int]]) -> jax.Array:
    """What stands in `ref` for a piece, in float32, once for each of its values."""
    if not plan.problem.rhs_transposed:
        return values.spread(ref, (0, 0, rows), tiles, lanes)
    width = lanes.stop - lanes.start
    row = lambda t: ref[0, 0, t : t + 1, lanes].astype(jnp.float32)
    parts = [jnp.broadcast_to(row(t), (hi - lo, width)) for t, lo, hi in tiles]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)
