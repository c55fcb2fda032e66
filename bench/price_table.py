"""The table that price.py prints. All figures are static."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import reference_figures

COLUMNS = (
    "chip",
    "scheme",
    "M x K x N",
    "runs",
    "compute",
    "memory",
    "static",
    "floor",
    "x floor",
    "XLA bf16",
    "XLA same",
    "google/qwix",
    "busiest unit",
    "spills",
)


def show(answers: Sequence[dict[str, Any]]) -> None:
    """Prints the table, and below it what has no price and what dispatch had to say."""
    table = Table(
        title="Static price in microseconds, from the compiler's final bundles (nothing was measured)"
    )
    for column in COLUMNS:
        right = column not in ("chip", "scheme", "M x K x N", "runs", "busiest unit")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    notes = []
    for answer in answers:
        if "error" in answer:
            notes.append(f"{answer['chip']} {answer['scheme']} M={answer['m']}: {answer['error']}")
            continue
        table.add_row(*row(answer))
        if answer["note"]:
            notes.append(f"{answer['chip']} {answer['scheme']} M={answer['m']}: {answer['note']}")
    console = Console(width=max(160, Console().width))
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def row(answer: dict[str, Any]) -> tuple[str, ...]:
    """The cells of one line of the table."""
    theirs = reference_figures.kcycles(*(answer[key] for key in ("chip", "scheme", "m", "k", "n")))
    faster = f"{theirs / answer['static_kcycles']:.1f}x slower" if theirs else "-"
    units = {unit: use for unit, use in answer["units"].items() if use}
    busiest = max(units, key=lambda unit: units[unit], default="-")
    return (
        answer["chip"],
        answer["scheme"],
        f"{answer['m']} x {answer['k']} x {answer['n']}",
        answer["implementation"],
        f"{answer['compute_us']:.1f}",
        f"{answer['memory_us']:.1f}",
        f"{answer['static_us']:.1f}",
        f"{answer['floor_us']:.1f}",
        f"{answer['ratio_to_floor']:.2f}",
        _us(answer["xla_bf16_us"]),
        _us(answer["xla_same_op_us"]),
        faster,
        f"{busiest} {units[busiest]:.0%}" if units else busiest,
        f"{answer['spills']:.0%}",
    )


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
