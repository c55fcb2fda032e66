"""Quantized matmul on Hopper: one Pallas Mosaic GPU kernel for every scheme.

    gpu_plan.py          what is taken, the strategies, and the static facts of a kernel
    gpu_estimate.py      what it costs, and the blocks that cost least
    gpu_sm90_kernel.py   the kernel: who does what, and what was tried
    gpu_values.py, gpu_registers.py   weights that are widened on the way

A problem that arrives here has neither prologue nor epilogue, and a weight stored [N, K].
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwix_kernels.chips import Chip
from qwix_kernels.gpu_blocks import WARPGROUP, interpreted, transforms
from qwix_kernels.matmul import gpu_sm90_kernel
from qwix_kernels.matmul.elementwise import activate
from qwix_kernels.matmul.gpu_estimate import estimate, heuristic_config
from qwix_kernels.matmul.gpu_plan import Config, Plan, check, resolve, varies
from qwix_kernels.problem import Epilogue, MatmulProblem, Tensor, dtype_bits

__all__ = ["Config", "check", "estimate", "heuristic_config", "run"]


def run(
    problem: MatmulProblem,
    lhs: Tensor,
    rhs: Tensor,
    bias: jax.Array | None = None,
    *,
    config: Config,
    chip: Chip,
    interpret: Any = False,
) -> jax.Array:
    """[batch, M, N] in `problem.out_dtype`: lhs [batch, M, K] times rhs [batch, N, K], bias [batch, 1, N].

    A batch of 1 is shared.

    Raises NotImplementedError where the config does not fit the problem.
    """
    plan = resolve(problem, chip, config)
    named = operands(plan, lhs, rhs, bias)
    scratch = scratch_types(plan, bool(interpret))
    sms = min(chip.sms, plan.items)
    made = plgpu.kernel(
        lambda *refs: gpu_sm90_kernel.kernel(
            plan, sms, dict(zip((*named, "out", *scratch), refs, strict=True))
        ),
        out_type=_out_type(plan),
        grid=(sms,),
        grid_names=("sm",),
        num_threads=plan.warpgroups + 1,
        thread_name="wg",
        scratch_types=list(scratch.values()),
        compiler_params=WARPGROUP,
        **interpreted(interpret),
    )(*named.values())
    return _finished(plan, made, named) if plan.partial else made


def operands(plan: Plan, lhs: Tensor, rhs: Tensor, bias: jax.Array | None) -> dict[str, jax.Array]:
    """What the kernel reads, by name. Scales are float32, and have an entry for each row that a block has."""
    p, c = plan.problem, plan.config
    rows, columns = plan.blocks[0] * c.block_m, plan.blocks[1] * c.block_n
    values = lhs.values.astype(jnp.int8) if lhs.values.dtype == jnp.int4 else lhs.values
    out = {"lhs": values, "rhs": rhs.values}
    tiles = p.k // plan.scale_k
    if p.rhs.is_quantized or "rhs_scale" in plan.streams:
        scale = jnp.ones((1, 1, 1), jnp.float32) if rhs.scale is None else rhs.scale
        out["rhs_scale"] = _along(scale, p.rhs.free, columns, tiles)
    if lhs.scale is not None:
        out["lhs_scale"] = _along(lhs.scale, p.m, rows, tiles if varies(p.lhs, p) else 1)
    if rhs.zero_point is not None:
        out["rhs_zero"] = _along(rhs.zero_point.astype(jnp.int32), p.rhs.free, columns, tiles)
    if bias is not None:
        out["bias"] = _along(jnp.swapaxes(bias, 1, 2), p.n, columns, 1)
    return out


def _along(x: jax.Array, size: int, padded: int, tiles: int) -> jax.Array:
    """[batch, free', K'] scales or zero points as float32 [batch, tiles, padded]."""
    x = jnp.repeat(x.astype(jnp.float32), size // x.shape[1], axis=1)
    x = jnp.repeat(jnp.swapaxes(x, 1, 2), tiles // x.shape[2], axis=1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, padded - size)))


def _out_type(plan: Plan) -> jax.ShapeDtypeStruct:
    p, c = plan.problem, plan.config
    if not plan.partial:
        return jax.ShapeDtypeStruct((p.batch, p.m, p.n), p.out_dtype)
    rows = plan.blocks[0] * c.block_m  # so that the copy engine takes any M
    dtype = "float32" if c.strategy != "once" else plan.acc
    return jax.ShapeDtypeStruct((c.splits, p.batch, p.n, rows), dtype)


def _finished(plan: Plan, parts: jax.Array, named: dict[str, jax.Array]) -> jax.Array:
    """The result of the parts [splits, batch, N, M]: added up, scaled, in the dtype that is asked for."""
    p = plan.problem
    z = jnp.swapaxes(jnp.sum(parts, 0, dtype=parts.dtype)[:, :, : p.m], 1, 2)
    if p.out_dtype == "int32":
        return z
    z = z.astype(jnp.float32)
    if "rhs_scale" in named and plan.config.strategy == "once":
        z = z * named["rhs_scale"][:, 0, None, : p.n]
    if "lhs_scale" in named and not varies(p.lhs, p):
        z = z * named["lhs_scale"][:, 0, : p.m, None]
    if "bias" in named:
        z = z + named["bias"][:, :, : p.n]
    return activate(z, (p.epilogue or Epilogue()).activation).astype(p.out_dtype)


def scratch_types(plan: Plan, interpret: bool) -> dict[str, Any]:
    """Shared memory and barriers, by name."""
    c = plan.config
    out: dict[str, Any] = {}
    for name, (block, dtype) in plan.streams.items():
        small = name not in ("lhs", "rhs")
        how = () if small else transforms(math.gcd(plan.run_k, plan.problem.k), dtype)
        shape = block if small or c.warpgroups_k == 1 else (c.warpgroups_k, block[0], plan.tile_k)
        out[f"{name}_stages"] = plgpu.SMEM((c.stages, *shape), jnp.dtype(dtype), transforms=how)
    out["arrived"] = plgpu.Barrier(num_arrivals=_copies(plan), num_barriers=c.stages)
    out["free"] = plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=c.stages)
    made = _out_type(plan).dtype
    chunk = (plan.tile_n, plan.epilogue_m) if plan.partial else (plan.epilogue_m, plan.tile_n)
    across = chunk[1] if plan.partial else math.gcd(chunk[1], plan.problem.n)
    how = transforms(min(across, 1024 // dtype_bits(made.name)), made.name)
    out["leaving"] = plgpu.SMEM((c.warpgroups_n, 2, *chunk), made, transforms=how)
    if c.warpgroups_k > 1:
        dtype = "float32" if c.strategy != "once" else plan.acc
        shape = (c.warpgroups_n, c.warpgroups_k - 1, plan.tile_n, c.block_m)
        out["parts"] = plgpu.SMEM(shape, jnp.dtype(dtype), transforms=transforms(min(c.block_m, 32), dtype))
        out["parts_full"] = plgpu.Barrier(num_arrivals=c.warpgroups_k - 1, num_barriers=c.warpgroups_n)
        out["parts_free"] = plgpu.Barrier(num_barriers=c.warpgroups_n)
    if interpret and plan.widens:
        # The interpreter's WGMMA has no operand in registers: it goes through here.
        shape = (plan.warpgroups, plan.tile_n, plan.tile_k)
        out["registers"] = plgpu.SMEM(
            shape, jnp.dtype(plan.dot), transforms=transforms(plan.tile_k, plan.dot)
        )
    return out


def _copies(plan: Plan) -> int:
    big = 2 * plan.config.warpgroups_k
    return big + len(plan.streams) - 2
