"""The process that compiles: reads cells from standard input, one JSON object a line, answers one line each.

libtpu reads its settings once, and a compiler that meets what it cannot take may abort; so price.py keeps it
out of its own process and starts another one where this one dies. Run as `python -m bench.worker FOLDER`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings
from typing import TYPE_CHECKING, Any

from bench import tpu_compile
from bench.shapes import Scheme, scheme

if TYPE_CHECKING:
    from bench.price import Cell

ANSWER = "@cell "  # libtpu prints lines of its own


@functools.cache
def _bf16(chip: str, m: int, k: int, n: int, dump: str) -> tpu_compile.ProgramCost:
    import jax
    import jax.numpy as jnp

    from bench import problems

    shapes = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((m, k), (k, n)))
    return tpu_compile.price(chip, dump, problems.xla_bf16, *shapes)


@functools.cache
def _same_op(chip: str, wanted: Scheme, m: int, k: int, n: int, dump: str) -> tpu_compile.ProgramCost:
    from bench import problems

    return tpu_compile.price(chip, dump, problems.xla_same_op(wanted), *problems.shapes_of(wanted, m, k, n))


def price_cell(cell: Cell, dump: str) -> dict[str, Any]:
    """Everything that is said about one cell of the table."""
    from qwix_kernels import chips, dispatch

    from bench import problems

    wanted, shape = scheme(cell.scheme), (cell.m, cell.k, cell.n)
    spec = chips.chip(cell.chip)
    problem = problems.problem(wanted, *shape)
    config = _config(problem, cell)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fallback is in the answer
        plan = dispatch.explain(problem, spec, implementation=cell.implementation, config=config)
        op = problems.kernel(wanted, cell.implementation, config)
        cost = tpu_compile.price(cell.chip, dump, op, *problems.operands(wanted, *shape))
    bf16 = _bf16(cell.chip, *shape, dump).static_us if cell.baselines else None
    same = _same_op(cell.chip, wanted, *shape, dump).static_us if cell.baselines else None
    floor = problems.floor_us(spec, wanted, *shape)
    longest = max(cost.kernels, key=lambda op: op.cycles, default=None)
    return {
        "chip": cell.chip,
        "scheme": cell.scheme,
        "m": cell.m,
        "k": cell.k,
        "n": cell.n,
        "implementation": plan.chosen,
        "bundles": cost.bundles,
        "compute_us": cost.compute_us,
        "memory_us": cost.memory_us,
        "static_us": cost.static_us,
        "floor_us": floor,
        "ratio_to_floor": cost.static_us / floor,
        "xla_bf16_us": bf16,
        "xla_same_op_us": same,
        "estimate_us": plan.estimate.static_us,
        "static_kcycles": cost.static_us * spec.ghz,
        "hbm_bytes": cost.hbm_bytes,
        "config": dataclasses.asdict(plan.config) if plan.config is not None else None,
        "config_source": plan.config_source,
        "units": {unit: round(use, 4) for unit, use in longest.units.items()} if longest else {},
        "spills": longest.spills if longest else 0.0,
        "ops": [
            {k: v for k, v in dataclasses.asdict(op).items() if k != "units"} | {"static_us": op.static_us}
            for op in cost.ops
        ],
        "note": _note(plan, cost),
    }


def _config(problem: Any, cell: Cell) -> Any:
    from qwix_kernels import dispatch

    if cell.config is None:
        return None
    chosen = dispatch.named(problem, cell.implementation)[0]
    if chosen.config_type is None:
        raise ValueError(f"{chosen.name!r} takes no config, got {cell.config}.")
    return chosen.config_type()(**json.loads(cell.config))


def _note(plan: Any, cost: tpu_compile.ProgramCost) -> str:
    notes = [f"not {name}: {reason}" for name, reason in plan.rejected]
    if plan.chosen != "xla" and not cost.kernels:
        notes.append("the compiled program holds no kernel all the same")
    around = cost.static_us - sum(op.static_us for op in cost.kernels)
    if cost.kernels and around > 0.01 * cost.static_us:
        notes.append(f"XLA ops round the kernel take {around:.1f} us")
    assumed = sum(op.assumed for op in cost.ops)
    if assumed:
        notes.append(f"{assumed} branches depend on data and are charged in full")
    return "; ".join(notes)


def main(dump: str) -> None:
    tpu_compile.prepare(dump)
    from bench.price import Cell

    for line in sys.stdin:
        cell = Cell(**json.loads(line))
        try:
            answer = price_cell(cell, dump)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            answer = {**dataclasses.asdict(cell), "error": f"{type(error).__name__}: {error}"}
        print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
