"""The gmm on an NVIDIA GPU: a Pallas Mosaic GPU kernel for Hopper (gpu_kernel.py), and XLA's ops round it.

Rows are normalised and quantized before the kernel; a bias, a gate, an activation and a residual follow on
its float32 sums. Weights stored [matrices, K, N] are turned first, as 8-bit operands and those that are
widened on the way have to lie along K: `rhs_transposed` saves that.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.chips import Chip
from qwix_kernels.matmul import elementwise
from qwix_kernels.matmul.gpu_plan import scale_k
from qwix_kernels.problem import Extras, Tensor
from qwix_kernels.ragged_matmul import gpu_kernel, gpu_visits
from qwix_kernels.ragged_matmul.gpu_estimate import check, estimate, heuristic_config
from qwix_kernels.ragged_matmul.gpu_plan import Config, GmmPlan, resolve
from qwix_kernels.ragged_matmul.groups import ranges
from qwix_kernels.ragged_matmul.problem import GmmProblem, Groups

__all__ = ["Config", "check", "estimate", "heuristic_config", "run"]


def run(
    problem: GmmProblem,
    lhs: Tensor,
    rhs: Tensor,
    extras: Extras,
    groups: Groups,
    *,
    config: Config,
    chip: Chip,
    interpret: Any = False,
) -> jax.Array:
    """[M, N] of lhs [1, M, K] and rhs [matrices, K, N] (or transposed); `check(problem, chip)` has passed.

    Args: as for `qwix_kernels.matmul.tpu.run`, and `groups`.

    Raises NotImplementedError where the config does not fit the problem or the chip.
    """
    plan = resolve(problem, chip, config)
    p = problem.product
    words = gpu_visits.visits(groups, p.m, config.block_m)
    rows = elementwise.prepare(p, lhs, extras)

    def product(weights: Tensor) -> jax.Array:
        arrays = {"words": words, **_rows(plan, rows), **_weights(plan, weights)}
        return gpu_kernel.call(plan, arrays, sms=chip.sms, interpret=interpret)[: p.m]

    z = product(rhs)
    if p.epilogue is None:
        return z
    gate = None if extras.gate is None else product(extras.gate)
    return _finished(p.out_dtype, problem, z, gate, extras, groups)


def _rows(plan: GmmPlan, x: Tensor) -> dict[str, jax.Array]:
    """The rows [M, K] as they are multiplied, and their scales: [M], or [tiles, M], with zeros behind."""
    p, m = plan.core, plan.problem.product.m
    behind = p.m - m
    made = {"lhs": jnp.pad(x.values[0].astype(plan.dot), ((0, behind), (0, 0)))}
    if x.scale is None:
        return made
    scale = jnp.repeat(x.scale[0].astype(jnp.float32), m // x.scale.shape[1], axis=0)
    if "lhs" in plan.tiled:
        return made | {"lhs_scale": _along_k(jnp.pad(scale, ((0, behind), (0, 0))), plan, 1).T}
    # A block may start at the last rows, and one of no matrix starts behind them.
    return made | {"lhs_scale": jnp.pad(scale[:, 0], (0, behind + plan.config.block_m))}


def _weights(plan: GmmPlan, w: Tensor) -> dict[str, jax.Array]:
    """The weights [matrices, N, K], and their scales: [matrices, N], or [matrices, tiles, N]."""
    p, c = plan.core, plan.config
    turned = plan.problem.product.rhs_transposed
    made = {"rhs": w.values if turned else jnp.swapaxes(w.values, 1, 2)}
    if w.scale is None:
        return made
    scale = w.scale.astype(jnp.float32)
    scale = jnp.swapaxes(scale, 1, 2) if turned else scale  # [matrices, tiles, N or a divisor]
    scale = jnp.repeat(scale, p.n // scale.shape[2], axis=2)
    if "rhs" in plan.tiled:
        return made | {"rhs_scale": _along_k(scale, plan, 1)}
    return made | {"rhs_scale": jnp.pad(scale[:, 0], ((0, 0), (0, -p.n % c.block_n)))}


def _along_k(scale: jax.Array, plan: GmmPlan, axis: int) -> jax.Array:
    """A scale for each run of K over which no operand's scale changes."""
    tiles = plan.core.k // scale_k(plan.core)
    return jnp.repeat(scale, tiles // scale.shape[axis], axis=axis)


def _finished(
    out_dtype: str, problem: GmmProblem, z: jax.Array, gate: jax.Array | None, extras: Extras, groups: Groups
) -> jax.Array:
    """What follows the sums, each row with what is its matrix's; rows of no matrix stay zero."""
    p = problem.product
    assert p.epilogue
    start, stop, matrix = ranges(groups, p.m)
    row = jnp.arange(p.m, dtype=jnp.int32)[:, None]
    mine = (start <= row) & (row < stop) & (matrix >= 0)
    of_row = jnp.sum(jnp.where(mine, matrix, 0), axis=1)
    each = lambda x: x if x is None or x.shape[0] == 1 else x[of_row, 0][None]
    here = Extras(bias=each(extras.bias), gate_bias=each(extras.gate_bias), residual=extras.residual)
    out = elementwise.combine(p.epilogue, z[None], None if gate is None else gate[None], here)[0]
    return jnp.where(jnp.any(mine, axis=1)[:, None], out, 0).astype(out_dtype)
