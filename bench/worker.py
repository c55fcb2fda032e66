"""The process that compiles: reads cells from standard input, one JSON object a line, answers one line each.

libtpu reads its settings once, and a compiler that meets what it cannot take may abort; so price.py keeps it
out of its own process and starts another one where this one dies.

Run as `python -m bench.worker DUMP [CACHE]`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from bench import tpu_compile
from bench.cache import Cache
from bench.shapes import Scheme, scheme

if TYPE_CHECKING:
    from bench.cells import Cell

ANSWER = "@cell "  # libtpu prints lines of its own


class Pricer:
    """Prices cells one after the other. `dump`: libtpu's folder; `cache`: for programs priced before."""

    def __init__(self, dump: str, cache: Cache | None = None):
        self._price = functools.partial(_price, dump, cache)
        self._bf16 = functools.cache(self._price_bf16)

    def _price_bf16(self, chip: str, m: int, k: int, n: int, batch: int) -> tpu_compile.ProgramCost:
        import jax
        import jax.numpy as jnp

        from bench import problems

        shapes = (jax.ShapeDtypeStruct((batch, *s), jnp.bfloat16) for s in ((m, k), (k, n)))
        return self._price(chip, problems.xla_bf16, *shapes)

    def _same_op(self, cell: Cell, wanted: Scheme, shape: tuple[int, ...]) -> tpu_compile.ProgramCost | None:
        from bench import problems

        if cell.batch > 1:
            return None
        arrays = problems.shapes_of(wanted, *shape)
        return self._price(cell.chip, problems.xla_same_op(wanted), *arrays)

    def price(self, cell: Cell) -> dict[str, Any]:
        """Everything that is said about one cell of the table."""
        from qwix_kernels import chips, dispatch

        from bench import floors, problems

        start = time.monotonic()
        wanted, shape = scheme(cell.scheme), (cell.m, cell.k, cell.n, cell.batch)
        spec = chips.chip(cell.chip)
        problem = problems.problem(wanted, *shape)
        config = _config(problem, cell)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fallback is in the answer
            plan = dispatch.explain(problem, spec, implementation=cell.implementation, config=config)
            op = problems.kernel(wanted, cell.implementation, config)
            cost = self._price(cell.chip, op, *problems.operands(wanted, *shape))
        bf16 = self._bf16(cell.chip, *shape) if cell.baselines else None
        same = self._same_op(cell, wanted, shape) if cell.baselines and cell.same_op else None
        floor = floors.floor(spec, wanted, *shape)
        return {
            "chip": cell.chip,
            "scheme": cell.scheme,
            "m": cell.m,
            "k": cell.k,
            "n": cell.n,
            "batch": cell.batch,
            "implementation": plan.chosen,
            **_times(cost),
            "floor_us": floor.us,
            "ratio_to_floor": cost.static_us / floor.us,
            "best_floor_us": floor.best_us,
            "best_floor_of": floor.strategy,
            "ratio_to_best_floor": cost.static_us / floor.best_us,
            "hbm_floor_us": floor.memory_us,
            "xla_bf16_us": bf16.static_us if bf16 else None,
            "xla_same_op_us": same.static_us if same else None,
            "estimate_us": plan.estimate.static_us,
            "static_kcycles": cost.static_us * spec.ghz,
            "config": dataclasses.asdict(plan.config) if plan.config is not None else None,
            "config_source": plan.config_source,
            **_use(cost),
            "ops": [
                {k: v for k, v in dataclasses.asdict(op).items() if k != "units"}
                | {"static_us": op.static_us}
                for op in cost.ops
            ],
            "note": _note(plan, cost),
            "seconds": round(time.monotonic() - start, 2),
        }


def _price(dump: str, cache: Cache | None, chip: str, fn: Any, *args: Any) -> tpu_compile.ProgramCost:
    return tpu_compile.price(chip, dump, fn, *args, cache=cache)


def _times(cost: tpu_compile.ProgramCost) -> dict[str, Any]:
    return {
        "bundles": cost.bundles,
        "compute_us": cost.compute_us,
        "memory_us": cost.memory_us,
        "static_us": cost.static_us,
        "hbm_bytes": cost.hbm_bytes,
    }


def _use(cost: tpu_compile.ProgramCost) -> dict[str, Any]:
    """What the longest kernel keeps busy, and what binds: XLA's ops, HBM, the matrix units or some slots."""
    kernel = max(cost.kernels, key=lambda op: op.static_us, default=None)
    if kernel is None:
        return {"units": {}, "mxu_busy": 0.0, "spills": 0.0, "binds": "XLA"}
    units = {unit: round(use, 4) for unit, use in kernel.units.items()}
    slots = {u: use for u, use in units.items() if u not in ("MXU", "FILL", "SPILL", "SALU")}
    busiest = max(slots, key=lambda u: slots[u], default="MXU")
    binds = busiest if slots.get(busiest, 0.0) > kernel.mxu_busy else "MXU"
    if kernel.memory_us >= kernel.compute_us:
        binds = "HBM"
    if 2 * kernel.static_us < cost.static_us:
        binds = "XLA"
    return {"units": units, "mxu_busy": round(kernel.mxu_busy, 4), "spills": kernel.spills, "binds": binds}


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


def main(dump: str, cache: str | None = None) -> None:
    tpu_compile.prepare(dump)
    from bench.cells import Cell

    pricer = Pricer(dump, Cache(cache) if cache else None)
    for line in sys.stdin:
        cell = Cell(**json.loads(line))
        try:
            answer = pricer.price(cell)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            answer = {**dataclasses.asdict(cell), "error": f"{type(error).__name__}: {error}"}
        print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
