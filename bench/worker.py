"""The process that prices cells: one JSON object a line on standard input, one line of answer each.

It compiles kernels, with the compiler's bundles dumped. What holds no kernel goes to xla_worker.py, a process
of its own that dumps nothing.

Run as `python -m bench.worker FOLDER [CACHE]`, by pool.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import warnings
from typing import Any

from bench import tpu_compile
from bench.cache import Cache
from bench.cells import Cell
from bench.child import Child, serve
from bench.shapes import scheme


class Pricer:
    """Prices cells one after the other. `folder` is for its files, `cache` has programs priced before."""

    def __init__(self, folder: str, cache: str | None = None):
        self._dump = os.path.join(folder, "dump")
        tpu_compile.prepare(self._dump)
        self._log = os.path.join(folder, "stderr of xla_worker")
        self._cache_folder, self._cache = cache, Cache(cache) if cache else None
        self._xla: Child | None = None
        self._bf16: dict[tuple[Any, ...], float] = {}

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
            if plan.chosen == "xla":
                cost = self._priced_by_xla(cell, "op")
            else:
                op = problems.kernel(wanted, cell.implementation, config)
                arrays = problems.operands(wanted, *shape)
                cost = tpu_compile.price(
                    cell.chip, self._dump, op, *arrays, cache=self._cache, row_major=True
                )
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
            **self._baselines(cell),
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

    def _baselines(self, cell: Cell) -> dict[str, float | None]:
        bf16 = same = None
        if cell.baselines:
            key = (cell.chip, cell.batch, cell.m, cell.k, cell.n)
            if key not in self._bf16:
                self._bf16[key] = self._priced_by_xla(cell, "bf16").static_us
            bf16 = self._bf16[key]
            if cell.same_op and cell.batch == 1:
                same = self._priced_by_xla(cell, "same_op").static_us
        return {"xla_bf16_us": bf16, "xla_same_op_us": same}

    def _priced_by_xla(self, cell: Cell, program: str) -> tpu_compile.ProgramCost:
        if self._xla is None:
            arguments = [self._cache_folder] if self._cache_folder else []
            self._xla = Child("bench.xla_worker", arguments, self._log)
        request = {"cell": dataclasses.asdict(cell), "program": program}
        answer: dict[str, Any] | None = self._xla.request(request)
        if answer is None:
            words = self._xla.last_words()
            self._xla.close()
            self._xla = None
            raise RuntimeError(f"XLA's compiler died over {program}: {words}")
        if "error" in answer:
            raise RuntimeError(f"XLA's compiler, over {program}: {answer['error']}")
        return tpu_compile.ProgramCost(cell.chip, tuple(tpu_compile.OpCost(**op) for op in answer["ops"]))

    def close(self) -> None:
        """Ends the process that prices what XLA does."""
        if self._xla:
            self._xla.close()


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


def main(folder: str, cache: str | None = None) -> None:
    pricer = Pricer(folder, cache)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return pricer.price(Cell(**request))

    serve(answer)
    pricer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
