"""The search for block sizes: which cells to price next, and what the prices say. Starts no process.

A search prices the heuristic's own choice first, then the best guesses of every class, then the neighbours of
the best so far, until it has had its share of compilations or the price is next to the floor. Searches
advance in rounds, one cell each, so that a budget that runs out has served all of them alike.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
from typing import Any

from qwix_kernels import chips, tuning

from bench import tune_ops, tune_space
from bench.cache import digest_of_files
from bench.tune_ops import TunedOp

IMPLEMENTATION = "mosaic_tpu"
WINS = 0.98  # times the price of the heuristic's choice
DONE = 1.02  # times the floor of the best strategy


@dataclasses.dataclass
class Search:
    """One problem on one chip. `cell` has no config; `limit` counts the cells besides the heuristic's."""

    cell: Any
    limit: int
    op: TunedOp = tune_ops.OPS["matmul"]
    answers: dict[Any, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def chip(self) -> chips.Chip:
        return chips.chip(self.cell.chip)

    @functools.cached_property
    def problem(self) -> Any:
        return self.op.problem(self.cell)

    @functools.cached_property
    def heuristic(self) -> Any:
        return self.op.heuristic(self.problem, self.chip)

    @functools.cached_property
    def _space(self) -> tuple[tune_space.Candidate, ...]:
        return self.op.space(self.problem, self.chip)

    @property
    def best(self) -> Any:
        """The config with the lowest score; the heuristic's where that is as low."""
        scores = {c: score for c in self.answers if (score := self.score(c)) is not None}
        return min(scores, key=lambda c: (scores[c], c != self.heuristic), default=None)

    def price(self, config: Any) -> float | None:
        """Static microseconds, None where that was not priced or has no price."""
        return self.answers.get(config, {}).get("static_us")

    def score(self, config: Any) -> float | None:
        """The price, and the first fetch and last store, which it leaves out: what is compared."""
        price = self.price(config)
        return None if price is None else price + self.op.ramp_us(self.problem, self.chip, config)

    @property
    def finished(self) -> bool:
        return not self.next()

    def next(self, count: int = 1) -> list[Any]:
        """Up to `count` configs to price next; none where the search is at its end."""
        if self.heuristic not in self.answers:
            return [self.heuristic]
        best = self.best
        if best and self.answers[best]["ratio_to_best_floor"] <= DONE:
            return []
        spread = list(tune_space.diverse(self._space, self.heuristic, self.op.kind))
        if best and len(self.answers) > self.limit // 2:
            spread = [*tune_space.neighbours(self._space, best, self.op.sizes), *spread]
        new = [c for c in dict.fromkeys(spread) if c not in self.answers]
        return new[: min(count, self.limit + 1 - len(self.answers))]

    def cell_of(self, config: Any) -> Any:
        return dataclasses.replace(self.cell, config=json.dumps(dataclasses.asdict(config)))

    def planned(self) -> list[Any]:
        """What would be priced if every price were as the estimates have it."""
        return list(tune_space.diverse(self._space, self.heuristic, self.op.kind))[: self.limit + 1]

    @property
    def winner(self) -> Any:
        """The best, where its price beats that of the heuristic's choice by enough for an entry."""
        best, own = self.best, self.price(self.heuristic)
        if best is None or best == self.heuristic:
            return None
        return best if own is None or (self.price(best) or own) < WINS * own else None

    def entry(self) -> dict[str, Any] | None:
        """The line of the tuning table: the winner, or that there is none; None while neither is known."""
        winner, own = self.winner, self.price(self.heuristic)
        found: dict[str, Any] = {**self.op.fields(self.cell), "kernel": kernel_digest(self.op.folder)}
        if own is not None:
            found["heuristic_us"] = round(own, 3)
        if winner:
            return found | {"static_us": round(self.price(winner) or 0.0, 3), "config": fields_of(winner)}
        return found if self.finished and own is not None else None

    @property
    def key(self) -> str:
        return tuning.key(self.problem)


def fields_of(config: Any) -> dict[str, Any]:
    """A config's fields as a table holds them: those at their default are left out."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return {k: v for k, v in dataclasses.asdict(config).items() if v != defaults[k]}


def searches(cells: list[Any], limit: int, op: str = "matmul") -> tuple[list[Search], dict[str, str]]:
    """A search for each cell that the kernel can run, and why it cannot run the others."""
    found, refused = [], {}
    for cell in cells:
        of_kernel = {"implementation": IMPLEMENTATION, "baselines": False} if op == "matmul" else {}
        search = Search(dataclasses.replace(cell, **of_kernel), limit, tune_ops.OPS[op])
        try:
            _ = search.heuristic
        except NotImplementedError as error:
            refused[str(cell)] = str(error)
            continue
        found.append(search)
    return found, refused


@functools.cache
def kernel_digest(folder: str = "matmul") -> str:
    """Says which kernel and compiler an entry was priced with: changes with their sources and versions."""
    root = pathlib.Path(tuning.__file__).parent
    sources = digest_of_files([*root.glob(f"{folder}/tpu*.py"), root / "problem.py"])
    versions = [importlib.metadata.version(p) for p in ("jax", "libtpu")]
    return hashlib.sha256(" ".join([sources, *versions]).encode()).hexdigest()[:12]
