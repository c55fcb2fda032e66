"""The table that price.py prints for GPUs. All figures are static."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.gpu_targets import Row

TITLE = "GPU kernels by ptxas and machine code, static microseconds of a simple model (nothing was measured)"
_WORDS = ("chip", "scheme", "problem", "runs", "instruction")
COLUMNS = (
    *_WORDS,
    "registers",
    "spills",
    "local",
    "TMA",
    "shared KB",
    "loop",
    "cycles",
    "issue",
    "tensor",
    "HBM",
    "around",
    "static",
    "floor",
    "x floor",
    "estimate",
)


def show(rows: Sequence[Row]) -> None:
    """Prints the table, and below it what has no price and what dispatch had to say."""
    table = Table(title=TITLE, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in _WORDS else "right", no_wrap=True)
    for row in rows:
        table.add_row(*line(row))
    console = Console(width=max(260, Console().width))
    console.print(table)
    for row in rows:
        console.print(f"{row.cell}: {row.error or row.note}", markup=False, highlight=False)


def line(row: Row) -> tuple[str, ...]:
    """One line: registers are those at launch and each budget, the loop its instructions of a warp."""
    chip, scheme, problem = str(row.cell).split(" ", 2)
    last = (f"{row.static_us:.1f}", f"{row.floor_us:.1f}", f"{row.ratio:.2f}", f"{row.estimate_us:.1f}")
    k = row.kernel
    if k is None:
        return (chip, scheme, problem, row.runs, *["-"] * 12, *last)
    loop = k.main_loop
    return (
        chip,
        scheme,
        problem,
        row.runs,
        " ".join(f"{name} x{count}" for name, count in k.matrix.items()),
        "/".join(map(str, (k.registers, *k.budgets))),
        str(k.spill_bytes),
        str(k.local_in_loops),
        f"{k.tma_loads}+{k.tma_stores}",
        f"{k.shared_bytes / 1024:.0f}",
        str(loop.instructions) if loop else "-",
        f"{loop.cycles:.0f}" if loop else "-",
        "-" if row.issue_us is None else f"{row.issue_us:.1f}",
        f"{row.tensor_us:.1f}",
        f"{row.memory_us:.1f}",
        f"{row.around_us:.1f}",
        *last,
    )
