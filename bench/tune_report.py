"""What a search says about the formula that dispatch chooses blocks by: its regret and its order. Static.

regret       price of the heuristic's choice over the best price found, less 1
correlation  of the estimates' order with the prices' order (Spearman), over the configs of one problem
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.tune_search import Search, fields_of


@dataclasses.dataclass(frozen=True)
class Regret:
    """Over the searches of one scheme on one chip."""

    chip: str
    scheme: str
    problems: int
    wins: int  # problems for which something beat the heuristic
    mean: float
    worst: float
    worst_at: str
    correlation: float | None


def regret(search: Search) -> float | None:
    """Of one search; None where the heuristic's choice or everything else has no price."""
    own, best = search.price(search.heuristic), search.best
    least = search.price(best) if best else None
    return own / least - 1 if own and least else None


def regrets(searches: Sequence[Search]) -> list[Regret]:
    """One line for each chip and scheme, the greatest regret first."""
    groups: dict[tuple[str, str], list[Search]] = {}
    for search in searches:
        if regret(search) is not None:
            groups.setdefault((search.cell.chip, search.cell.scheme), []).append(search)
    lines = []
    for (chip, scheme), group in groups.items():
        each = [regret(search) or 0.0 for search in group]
        worst = group[each.index(max(each))].cell
        orders = [c for search in group if (c := correlation(search)) is not None]
        lines.append(
            Regret(
                chip,
                scheme,
                len(group),
                sum("config" in (search.entry() or {}) for search in group),
                statistics.geometric_mean(1 + e for e in each) - 1,
                max(each),
                _size(worst),
                statistics.mean(orders) if orders else None,
            )
        )
    return sorted(lines, key=lambda line: -line.worst)


def correlation(search: Search) -> float | None:
    """Spearman's, of estimates and prices; None for fewer than four prices or where all are alike."""
    priced = [a for a in search.answers.values() if "error" not in a]
    pairs = [(round(a["estimate_us"], 3), round(a["static_us"], 3)) for a in priced]
    if len(pairs) < 4 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    return statistics.correlation(*zip(*pairs, strict=True), method="ranked")


def show(searches: Sequence[Search]) -> None:
    """Prints what every search found, and the regrets."""
    console = Console(width=max(150, Console().width))
    table = Table(title="Static microseconds of the heuristic's blocks and of the best that were found")
    right = ("heuristic", "best", "gain", "x floor")
    for column in (
        "chip",
        "scheme",
        "M x K x N or layer",
        *right,
        "priced",
        "heuristic's blocks",
        "best blocks",
    ):
        table.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    for search in sorted(searches, key=lambda s: -(regret(s) or 0.0)):
        table.add_row(*_row(search))
    console.print(table)
    lines = Table(title="Regret of the heuristic")
    for column in ("chip", "scheme", "problems", "beaten", "mean", "worst", "at", "correlation"):
        lines.add_column(column)
    for r in regrets(searches):
        order = "-" if r.correlation is None else f"{r.correlation:.2f}"
        cells = (
            r.chip,
            r.scheme,
            str(r.problems),
            str(r.wins),
            f"{r.mean:.1%}",
            f"{r.worst:.1%}",
            r.worst_at,
        )
        lines.add_row(*cells, order)
    console.print(lines)


def _row(search: Search) -> tuple[str, ...]:
    c, best, own = search.cell, search.best, search.price(search.heuristic)
    least = search.price(best) if best else None
    lost, us = regret(search), lambda x: "-" if x is None else f"{x:.1f}"
    return (
        c.chip,
        c.scheme,
        _size(c),
        us(own),
        us(least),
        "-" if lost is None else f"{lost:.1%}",
        f"{search.answers[best]['ratio_to_floor']:.2f}" if best else "-",
        str(len(search.answers)),
        blocks(search.heuristic),
        blocks(best) if best and best != search.heuristic else "",
    )


def _size(cell: Any) -> str:
    return str(cell.layer) if hasattr(cell, "layer") else f"{cell.m} x {cell.k} x {cell.n}"


def blocks(config) -> str:
    """A config in a few characters.

    >>> from qwix_kernels.matmul.tpu_config import Config
    >>> blocks(Config(1024, 256, 4096, "after"))
    '1024 x 4096 x 256 after'
    """
    if not hasattr(config, "block_k"):
        return " ".join(f"{k}={v}" for k, v in fields_of(config).items()) or config.kernel
    rest = {k: v for k, v in fields_of(config).items() if k not in ("block_m", "block_n", "block_k")}
    return " ".join([f"{config.block_m} x {config.block_k} x {config.block_n}", *map(str, rest.values())])
