"""Matmul on NVIDIA Blackwell (sm_100a) with tcgen05 and tensor memory: the kernel's interface.

    gpu_sm100_check.py     what is taken, and how
    gpu_sm100_plan.py      the static facts of a kernel
    gpu_sm100_estimate.py  what it is expected to cost, and the blocks that are chosen by it
    gpu_sm100_kernel.py    the kernel: who does what, and what was tried
    gpu_sm100_{work,convert,drain,scaled}.py  its parts

A problem that arrives here has neither prologue nor epilogue, and a weight stored [N, K].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.chips import Chip
from qwix_kernels.matmul import gpu_sm100_kernel, gpu_sm100_scaled
from qwix_kernels.matmul.gpu_sm100_check import check
from qwix_kernels.matmul.gpu_sm100_estimate import estimate, heuristic_config
from qwix_kernels.matmul.gpu_sm100_plan import Config, Plan, plan
from qwix_kernels.problem import MatmulProblem, Tensor

__all__ = ["Config", "check", "estimate", "heuristic_config", "run"]


def run(
    problem: MatmulProblem,
    lhs: Tensor,
    rhs: Tensor,
    *,
    config: Config,
    chip: Chip,
    interpret: Any = False,
) -> jax.Array:
    """lhs [batch, M, K] times rhs [batch, N, K] -> [batch, M, N] in `problem.out_dtype`.

    `interpret`: a `plgpu.InterpretGPUParams`, or False for a GPU.

    Raises NotImplementedError where the config does not fit the problem.
    """
    a = plan(problem, chip, config)
    missing = ((0, 0), (0, a.m - problem.m), (0, 0))
    operands = {"x": jnp.pad(lhs.values.astype(a.x_dtype), missing), "w": rhs.values}
    if a.block_scale:
        operands["x_block_scale"] = gpu_sm100_scaled.arranged(_by_row(lhs), a.block_m)
        operands["w_block_scale"] = gpu_sm100_scaled.arranged(_by_row(rhs), a.columns)
    if a.x_scaled:
        operands["x_scale"] = _padded(_by_row(lhs).astype(jnp.float32), a.block_m, a.x_tile_k)
    if a.w_scaled:
        operands["w_scale"] = _padded(_by_row(rhs).astype(a.w_scale_dtype), a.columns, a.w_tile_k)
    out = gpu_sm100_kernel.run(a, operands, interpret)[:, :, : problem.m, : problem.n]
    return _summed(a, out).astype(problem.out_dtype)


def _summed(a: Plan, parts: jax.Array) -> jax.Array:
    return parts[0] if a.splits == 1 else jnp.sum(parts, axis=0)


def _by_row(x: Tensor) -> jax.Array:
    """The scales of each row, [batch, rows, tiles of K]."""
    assert x.scale is not None
    return jnp.repeat(x.scale, x.shape[1] // x.scale.shape[1], axis=1)


def _padded(scale: jax.Array, block: int, tile_k: int) -> jax.Array:
    """As the kernel reads them: [batch, tiles of K, rows] or [batch, rows], rows in whole blocks of zeros."""
    turned = jnp.swapaxes(scale, 1, 2) if tile_k else scale[:, :, 0]
    missing = -scale.shape[1] % block
    return jnp.pad(turned, ((0, 0),) * (turned.ndim - 1) + ((0, missing),))
