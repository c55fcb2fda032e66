"""Tables of what was measured of an op: on a device, and on a CPU as ratios."""

from __future__ import annotations

from typing import Any


def show(result: dict[str, Any]) -> None:
    """Prints whatever kinds of figures there are, losing ones included."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(150, Console().width))
    titles = {
        "device": "Measured on the device, by its profiler: microseconds",
        "cpu": "Measured on the CPU, wall clock: time over another program's (quartiles); under 1 is faster",
    }
    for kind, title in titles.items():
        rows = result.get(kind, ())
        if not rows:
            continue
        table = Table(title=title)
        for column in rows[0]:
            table.add_column(column)
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
