"""The table that price.py prints. All figures are static."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import targets

UNITS = ("MXU", "VALU", "XLU", "EUP", "VLOAD", "VSTORE")
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
    "x best",
    "XLA bf16",
    "XLA same",
    "google/qwix",
    "binds",
    *UNITS,
    "spills",
)
CLASSES = (
    "chip",
    "rows",
    "scheme",
    "cells",
    "x best floor",
    "worst",
    "at",
    "x XLA bf16",
    "worst",
    "fell back",
)


def show(answers: Sequence[dict[str, Any]]) -> None:
    """Prints the table, and below it what has no price and what dispatch had to say."""
    table = Table(
        title="Static price in microseconds, from the compiler's final bundles (nothing was measured)"
    )
    for column in COLUMNS:
        right = column not in ("chip", "scheme", "M x K x N", "runs", "binds")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    notes = []
    for answer in answers:
        if "error" in answer:
            notes.append(f"{targets.name_of(answer)}: {answer['error']}")
            continue
        table.add_row(*row(answer))
        if answer["note"]:
            notes.append(f"{targets.name_of(answer)}: {answer['note']}")
    console = Console(width=max(230, Console().width))
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def show_classes(answers: Sequence[dict[str, Any]]) -> None:
    """Prints, for each chip, class of rows and scheme, the geometric means and the worst cell."""
    table = Table(title="Static prices by class of rows and scheme: geometric means, and the worst cell")
    for column in CLASSES:
        table.add_column(column, justify="left" if column in ("chip", "rows", "scheme", "at") else "right")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for answer in answers:
        if "error" not in answer:
            for scheme in (answer["scheme"], "all"):
                groups.setdefault((answer["chip"], targets.rows_of(answer["m"]), scheme), []).append(answer)
    for (chip, rows, scheme), group in sorted(groups.items()):
        table.add_row(chip, rows, scheme, *class_row(group))
    Console(width=max(160, Console().width)).print(table)


def class_row(answers: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """What is said about the answers of one class, after its name."""
    worst = max(answers, key=lambda a: a["ratio_to_best_floor"])
    to_bf16 = [a["static_us"] / a["xla_bf16_us"] for a in answers if a["xla_bf16_us"]]
    return (
        str(len(answers)),
        f"{targets.geomean([a['ratio_to_best_floor'] for a in answers]):.2f}",
        f"{worst['ratio_to_best_floor']:.2f}",
        " x ".join(str(worst[key]) for key in ("m", "k", "n")),
        f"{targets.geomean(to_bf16):.2f}" if to_bf16 else "-",
        f"{max(to_bf16):.2f}" if to_bf16 else "-",
        str(sum(a["implementation"] == "xla" for a in answers)),
    )


def row(answer: dict[str, Any]) -> tuple[str, ...]:
    """The cells of one line of the table."""
    theirs = targets.reference_kcycles(answer)
    faster = f"{theirs / answer['static_kcycles']:.1f}x slower" if theirs else "-"
    units = {**answer["units"], "MXU": answer["mxu_busy"]} if answer["units"] else {}
    batch = f"{answer['batch']} x " if answer["batch"] > 1 else ""
    return (
        answer["chip"],
        answer["scheme"],
        f"{batch}{answer['m']} x {answer['k']} x {answer['n']}",
        answer["implementation"],
        f"{answer['compute_us']:.1f}",
        f"{answer['memory_us']:.1f}",
        f"{answer['static_us']:.1f}",
        f"{answer['floor_us']:.1f}",
        f"{answer['ratio_to_floor']:.2f}",
        f"{answer['ratio_to_best_floor']:.2f}",
        _us(answer["xla_bf16_us"]),
        _us(answer["xla_same_op_us"]),
        faster,
        answer["binds"],
        *(f"{units[unit]:.0%}" if unit in units else "-" for unit in UNITS),
        f"{answer['spills']:.0%}",
    )


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
