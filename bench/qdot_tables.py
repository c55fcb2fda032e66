"""The tables that qdot.py prints. Each says in its title which kind of figure it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

TITLES = {
    "device": "Measured on the device, by its profiler: microseconds",
    "cpu": "Measured on the CPU, wall clock: time over another program's (quartiles); under 1 is faster",
}


def show(result: Mapping[str, Any]) -> None:
    """Prints whatever kinds of figures there are, and below them what is lost and why."""
    console = Console(width=max(150, Console().width))
    if "device" in result:
        console.print(_table(TITLES["device"], DEVICE_COLUMNS, map(device_line, result["device"])))
        for row in result["device"]:
            if row["note"]:
                console.print(f"{row['scheme']} {_shape(row)}: {row['note']}", markup=False, highlight=False)
    if "cpu" in result:
        columns = (*CPU_COLUMNS, "to google/qwix") if result["reference"] else CPU_COLUMNS
        console.print(_table(TITLES["cpu"], columns, (cpu_line(row, columns) for row in result["cpu"])))
        if result["reference"]:
            console.print(f"google/qwix {result['reference']}", highlight=False)
        for target in result["targets"]:
            if not target["met"]:
                console.print(target["said"], markup=False, highlight=False)
        met = sum(target["met"] for target in result["targets"])
        console.print(f"CPU targets: {met} of {len(result['targets'])} met.", highlight=False)
    if "static" in result:
        from bench import price_table

        price_table.show(result["static"])


DEVICE_COLUMNS = (
    "chip",
    "scheme",
    "M x K x N",
    "runs",
    "time",
    "% of floor",
    "to XLA bf16",
    "to XLA same op",
    "",
)
CPU_COLUMNS = ("scheme", "M x K x N", "activations", "to jnp float32", "to jnp bfloat16")


def device_line(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table of measured times."""
    return (
        row["chip"],
        row["scheme"],
        _shape(row),
        row["implementation"],
        f"{row['us']:.1f}",
        f"{row['percent_of_floor']:.0f}",
        f"{row['ratio_to_xla_bf16']:.2f}",
        f"{row['ratio_to_xla_same_op']:.2f}",
        "loses" if row["loses"] else "",
    )


def cpu_line(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    """One line of the table of CPU ratios."""
    line = (
        row["scheme"],
        _shape(row),
        row["dtype"],
        *(_ratio(row[f"ratio_to_{other}"]) for other in ("float32", "bfloat16", "reference")),
    )
    return line[: len(columns)]


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else "{median:.2f} ({low:.2f}-{high:.2f})".format(**ratio)


def _shape(row: Mapping[str, Any]) -> str:
    return f"{row['m']} x {row['k']} x {row['n']}"


def _table(title: str, columns: Sequence[str], lines: Any) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        words = ("chip", "scheme", "M x K x N", "runs", "activations", "")
        table.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table
