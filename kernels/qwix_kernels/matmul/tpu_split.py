"""How much of a problem the TPU kernel takes: all of it, or less, completed by XLA ops before and after.

The kernel refuses some of what is fused round a product: whole rows of a wide result cannot be quantized
where only a part of their columns is at hand, a normalised row must fit one block. What is left out then, in
this order: the quantization of the result, all that follows the product, a low-rank update, the
normalisation. Of those that run, the one with the least static time is taken; `Estimate.note` says which.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul import cost, elementwise, tpu
from qwix_kernels.problem import NO_EXTRAS, Epilogue, Extras, MatmulProblem, Tensor

# The least that an XLA op takes on these chips, by the compiler's estimate.
_PASS_US = 1.2


def check(problem: MatmulProblem, chip: Chip) -> None:
    """Raises NotImplementedError, naming the constraint, where not even the product is taken."""
    _kernel_part(problem, chip, None)


def heuristic_config(problem: MatmulProblem, chip: Chip) -> tpu.Config:
    """Blocks of the kernel."""
    return tpu.heuristic_config(_kernel_part(problem, chip, None), chip)


def estimate(problem: MatmulProblem, chip: Chip, config: tpu.Config) -> Estimate:
    """Static cost of the kernel and of what XLA does round it, one after the other."""
    part = _kernel_part(problem, chip, config)
    mine = tpu.estimate(part, chip, config)
    if part == problem:
        return mine
    calls = problem.products // part.products
    extra = _outside_us(problem, part, chip)
    floor = max(cost.floor(problem, chip))
    return Estimate(
        calls * mine.compute_us,
        calls * mine.memory_us + extra,
        calls * mine.static_us + extra,
        floor,
        f"{mine.note}; by XLA: {_left_out(problem, part)}",
    )


def run(
    problem: MatmulProblem,
    lhs: Tensor,
    rhs: Tensor,
    extras: Extras = NO_EXTRAS,
    *,
    config: tpu.Config,
    chip: Chip,
    interpret: Any = False,
) -> jax.Array | Tensor:
    """As `tpu.run`, whatever is fused round the product."""
    part = _kernel_part(problem, chip, config)
    kernel: Any = functools.partial(tpu.run, part, config=config, chip=chip, interpret=interpret)
    if part == problem:
        return kernel(lhs, rhs, extras)
    if problem.norm and not part.norm:
        assert extras.norm_weight is not None
        normed = elementwise.rms_norm(lhs.values, extras.norm_weight, problem.norm)
        lhs, extras = Tensor(normed.astype(part.lhs.dtype)), dataclasses.replace(extras, norm_weight=None)
    if problem.epilogue == part.epilogue and problem.low_rank == part.low_rank:
        return kernel(lhs, rhs, extras)
    before = extras.of_rows
    if part.epilogue is None:
        if part.low_rank:
            z = kernel(lhs, rhs, dataclasses.replace(extras.of_low_rank, **before.given))
        else:
            z = kernel(lhs, rhs, before)
        if problem.low_rank and not part.low_rank:
            z = elementwise.add_low_rank(problem, z, lhs.values, extras)
        of_gate: Any = functools.partial(
            tpu.run, _of_gate(part), config=config, chip=chip, interpret=interpret
        )
        gate = None if extras.gate is None else of_gate(lhs, extras.gate, before)
        return elementwise.finish(problem, z, gate, extras)
    z = kernel(lhs, rhs, dataclasses.replace(extras, out_scale=None))
    assert problem.epilogue
    rest = dataclasses.replace(problem, epilogue=Epilogue(quantize=problem.epilogue.quantize))
    return elementwise.finish(rest, z, None, Extras(out_scale=extras.out_scale))


@functools.lru_cache(maxsize=4096)
def _kernel_part(problem: MatmulProblem, chip: Chip, config: tpu.Config | None) -> MatmulProblem:
    """The part that the kernel runs: `config` has been chosen for it, or will be."""
    refusals, priced = [], []
    for part in _parts(problem):
        try:
            tpu.check(part, chip)
            blocks = config or tpu.heuristic_config(part, chip)
            each = tpu.estimate(part, chip, blocks).static_us * problem.products / part.products
        except NotImplementedError as refusal:
            refusals.append(refusal)
            continue
        priced.append((each + _outside_us(problem, part, chip), len(priced), part))
    if not priced:
        raise refusals[-1]
    return min(priced)[2]


def _parts(problem: MatmulProblem) -> list[MatmulProblem]:
    """The problem, and less and less of it. The kernel's result is float32 where more is to be done to it."""
    parts, e = [problem], problem.epilogue
    less = functools.partial(dataclasses.replace, out_dtype="float32")
    if e and e.quantize and e != Epilogue(quantize=e.quantize):
        parts.append(less(problem, epilogue=dataclasses.replace(e, quantize=None)))
    if e:
        parts.append(less(problem, epilogue=None))
    if problem.low_rank:
        parts.append(less(problem, epilogue=None, low_rank=None))
    if problem.norm:
        # A normalised row is quantized from float32, and multiplied in the dtype that it had.
        dtype = "float32" if problem.quantize_lhs else problem.lhs.dtype
        lhs = dataclasses.replace(problem.lhs, dtype=dtype)
        parts += [dataclasses.replace(part, norm=None, lhs=lhs) for part in parts]
    return parts


def _of_gate(part: MatmulProblem) -> MatmulProblem:
    """The problem of the gate's product, which no update is added to."""
    return dataclasses.replace(part, low_rank=None)


def _outside_us(problem: MatmulProblem, part: MatmulProblem, chip: Chip) -> float:
    """Microseconds of XLA's passes before and after the kernel: what they move, and what each takes at least.

    Dynamic scales of a result take two passes, one for the scales and one for the values, and so does a norm.
    """
    moved, passes, apart = 0.0, 0, 0.0
    if problem.norm and not part.norm:
        moved += 2 * cost.operand_bytes(problem.lhs, problem.k) + cost.operand_bytes(part.lhs, problem.k)
        passes += 2
    if problem.low_rank and not part.low_rank:
        apart = cost.low_rank_us(problem, chip)
    if problem.epilogue != part.epilogue:
        reads = problem.products // part.products * cost.result_bytes(part)
        twice = problem.epilogue is not None and problem.epilogue.scales_out
        moved += (1 + twice) * reads + cost.result_bytes(problem) + cost.epilogue_bytes(problem)
        passes += 1 + twice
    return apart + moved / (chip.hbm_gbps * 1e3) + passes * _PASS_US


def _left_out(problem: MatmulProblem, part: MatmulProblem) -> str:
    """The words of `problem.fused` that are not in the part's."""
    there = part.fused.split()
    return " ".join(word for word in problem.fused.split() if word not in there)
