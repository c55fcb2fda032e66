"""Quantized matmul on a GPU: what the kernels take, and what is done before and after them.

The kernels multiply and scale; Hopper's adds a bias and applies an activation. The rest is done by XLA round
them: rows are normalised and quantized before, in one pass over the rows; a low-rank update, a gate, a
residual and a quantized result come after, on float32 sums. A weight that is stored [K, N] is transposed
first, as 8-bit matrix instructions read both operands along K: prepacked weights
(`PtqProvider(prepack="k_major")`) save that.

    compute capability 9.0   gpu_sm90.py     10.0   gpu_sm100.py     others: XLA
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul import cost, elementwise, gpu_plan, gpu_sm90, gpu_sm100
from qwix_kernels.matmul.gpu_plan import Config as Config
from qwix_kernels.problem import NO_EXTRAS, Extras, MatmulProblem, Operand, Tensor, dtype_bits
from qwix_kernels.quantize import gpu as quantize_gpu

_ROWS = 8  # what the copy engine takes at a time
_HBM_SHARE = 0.9
_PASS_US = 1.5  # a kernel of XLA's, however small


def product(p: MatmulProblem, chip: Chip) -> MatmulProblem:
    """What the kernel is given: prepared rows, a transposed rhs, and float32 sums where more follows.

    Hopper's kernel adds a bias and applies an activation itself, where nothing comes between or after.

    >>> from qwix_kernels import chips
    >>> from qwix_kernels.problem import Operand, RowQuantize
    >>> x, w = Operand("bfloat16", 1, 8), Operand("int8", 1, 32, "float32", 1, 64)
    >>> p = MatmulProblem(8, 64, 32, x, w, "bfloat16", quantize_lhs=RowQuantize("int8", 127.5))
    >>> inner = product(p, chips.chip("h100"))
    >>> inner.lhs.dtype, inner.rhs_transposed
    ('int8', True)
    """
    m = p.m if p.m <= _ROWS else -(-p.m // _ROWS) * _ROWS
    lhs = dataclasses.replace(p.lhs, free=m)
    if q := p.quantize_lhs:
        stored = "int8" if q.dtype in ("int2", "int4") else q.dtype
        lhs = Operand(stored, p.lhs.batch, m, "float32", 1, q.tile_k or p.k)
    e = p.epilogue
    fused = chip.name == "h100" and not p.low_rank and e and gpu_plan.fuses(e)
    return dataclasses.replace(
        p,
        m=m,
        lhs=lhs,
        out_dtype="float32" if (e and not fused) or p.low_rank else p.out_dtype,
        rhs_transposed=True,
        quantize_lhs=None,
        norm=None,
        epilogue=e if fused else None,
        low_rank=None,
    )


def _of(chip: Chip) -> Any:
    """The module of the chip's kernel. Raises NotImplementedError for a GPU that has none."""
    modules = {"h100": gpu_sm90, "b200": gpu_sm100}
    if chip.name not in modules:
        raise NotImplementedError(
            f"{chip.name} has no kernel; {' and '.join(modules)} (compute capability 9.0 and 10.0) have one"
        )
    return modules[chip.name]


def check(problem: MatmulProblem, chip: Chip) -> None:
    """Raises NotImplementedError, naming the constraint, for what no kernel takes."""
    _of(chip).check(product(problem, chip), chip)


def heuristic_config(problem: MatmulProblem, chip: Chip) -> Any:
    """Blocks of the kernel: a `Config`, or that of gpu_sm100."""
    return _of(chip).heuristic_config(product(problem, chip), chip)


def estimate(problem: MatmulProblem, chip: Chip, config: Any) -> Estimate:
    """Static cost of the kernel and of the passes round it."""
    p = problem
    kernel = _of(chip).estimate(product(p, chip), chip, config)
    per_us = chip.hbm_gbps * 1e3 * _HBM_SHARE
    passes, moved = 0, 0.0
    if p.norm or p.quantize_lhs:
        passes += 1
        stored = dtype_bits(p.quantize_lhs.dtype) if p.quantize_lhs else p.lhs.bits
        moved += p.lhs.batch * p.m * p.k * (p.lhs.bits * (1 + bool(p.norm)) + stored) / 8
    if not p.rhs_transposed:
        passes += p.products
        moved += p.products * 2 * cost.operand_bytes(p.rhs, p.k)
    if p.m > _ROWS and p.m % _ROWS:
        passes += 2
        moved += 2 * (cost.operand_bytes(p.lhs, p.k) + cost.result_bytes(p))
    if (p.epilogue and not product(p, chip).epilogue) or p.low_rank:
        passes += 1
        moved += cost.result_bytes(p, "float32") * p.products + cost.epilogue_bytes(p)
    more = passes * _PASS_US + moved / per_us + cost.low_rank_us(p, chip)
    return dataclasses.replace(
        kernel,
        compute_us=kernel.compute_us * p.products,
        memory_us=kernel.memory_us * p.products + moved / per_us,
        static_us=kernel.static_us * p.products + more,
        floor_us=max(cost.floor(p, chip)),
    )


def run(
    problem: MatmulProblem,
    lhs: Tensor,
    rhs: Tensor,
    extras: Extras = NO_EXTRAS,
    *,
    config: Any,
    chip: Chip,
    interpret: Any = False,
) -> jax.Array | Tensor:
    """As the op: [batch, M, N], and the scales of a result that is quantized."""
    inner = product(problem, chip)
    rows = _padded(_prepared(problem, lhs, extras, interpret), inner.m)

    def multiplied(weight: Tensor) -> jax.Array:
        if not problem.rhs_transposed:
            weight = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), weight)
        fused = {"bias": extras.bias} if inner.epilogue else {}
        made = _of(chip).run(inner, rows, weight, config=config, chip=chip, interpret=interpret, **fused)
        return made[:, : problem.m]

    z = multiplied(rhs)
    if inner.epilogue:
        return z
    if problem.low_rank:
        z = elementwise.add_low_rank(problem, z, lhs.values, extras)
    gate = None if extras.gate is None else multiplied(extras.gate)
    return elementwise.finish(problem, z, gate, extras)


def _prepared(problem: MatmulProblem, lhs: Tensor, extras: Extras, interpret: Any) -> Tensor:
    """The rows as the kernel takes them; quantized by a kernel that reads them once, where it can."""
    how = problem.quantize_lhs
    if how is None or problem.norm or extras.of_rows != NO_EXTRAS:
        return elementwise.prepare(problem, lhs, extras)
    try:
        quantize_gpu.check_rows(lhs.shape, lhs.values.dtype.name, how)
    except NotImplementedError:
        return elementwise.prepare(problem, lhs, extras)
    return quantize_gpu.rows(lhs.values, how, interpret=interpret)


def _padded(x: Tensor, m: int) -> Tensor:
    """[batch, m, K]: with rows of zeros, whose scale is 1."""
    missing = m - x.shape[1]
    if not missing:
        return x
    more = lambda a, value: jnp.pad(a, ((0, 0), (0, missing), (0, 0)), constant_values=value)
    values = more(x.values, jnp.zeros((), x.values.dtype))
    if x.scale is None or x.scale.shape[1] == 1:
        return dataclasses.replace(x, values=values)
    each = jnp.repeat(x.scale, x.shape[1] // x.scale.shape[1], axis=1)
    return dataclasses.replace(x, values=values, scale=more(each, jnp.ones((), each.dtype)))
