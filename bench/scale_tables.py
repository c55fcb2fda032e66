"""The tables of bench.scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: Mapping[str, Any]) -> None:
    console = Console(width=150)
    for title, columns, lines in (_cells(result), _memory(result), _plan(result)):
        if not lines:
            continue
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i < 3 else "right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for line in failures(result):
        console.print(f"[red]missed[/red] {line}")


def failures(result: Mapping[str, Any]) -> list[str]:
    """What exceeds its bound, one line each."""
    rows = [*result.get("cells", ()), *result.get("memory", ())]
    return [f"{r['mesh']}, {r.get('op', 'quantizing')}: {said}" for r in rows for said in r["failed"]]


def _mb(count: float) -> str:
    return f"{count / 1e6:.2f}"


def _cells(result: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    title = "Static: collectives in the compiled program, MB sent per device, and what arithmetic asks for"
    columns = ["mesh", "op", "collectives", "MB", "must", "kernels"]
    lines = [
        [c["mesh"], c["op"], c["collectives"], _mb(c["bytes"]), _mb(c["must_bytes"]), _kernels(c)]
        for c in result.get("cells", ())
    ]
    return title, columns, lines


def _kernels(cell: Mapping[str, Any]) -> str:
    return "" if cell["kernels"] is None else str(cell["kernels"])


def _memory(result: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    title = "Measured here: MB alive at most while a model is quantized from a stream of weights"
    columns = ["mesh", "float", "int8", "one layer", "peak", "bound"]
    keys = ("float_bytes", "quantized_bytes", "layer_bytes", "peak_bytes", "bound_bytes")
    return title, columns, [[m["mesh"], *(_mb(m[k]) for k in keys)] for m in result.get("memory", ())]


def _plan(result: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    title = "By arithmetic, nothing measured: weak scaling of 8e9 weights, 8192 tokens per chip, FSDP"
    columns = ["chip", "chips", "compute ms", "bf16 GB", "ms", "efficiency", "int8 GB", "ms", "efficiency"]
    lines = []
    for r in result.get("plan", ()):
        line = [r["chip"], str(r["chips"]), f"{r['compute_ms']:.0f}"]
        for kind in ("bf16", "int8"):
            line += [f"{r[f'{kind}_bytes'] / 1e9:.1f}", f"{r[f'{kind}_wire_ms']:.0f}"]
            line.append(f"{r[f'{kind}_efficiency']:.2f}")
        lines.append(line)
    return title, columns, lines
