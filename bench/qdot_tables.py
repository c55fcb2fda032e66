"""The tables that qdot.py prints. Each says in its title which kind of figure it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

TITLES = {
    "device": "Measured on the device, by its profiler: microseconds",
    "gpu": "Measured on the GPU, by its profiler: microseconds; weights [N, K], read from HBM in decode",
    "cpu": "Measured on the CPU, wall clock: time over another program's (quartiles); under 1 is faster",
}


def show(result: Mapping[str, Any]) -> None:
    """Prints whatever kinds of figures there are, and below them what is lost and why."""
    console = Console(width=max(180, Console().width))
    if "device" in result:
        console.print(_table(TITLES["device"], DEVICE_COLUMNS, map(device_line, result["device"])))
        for row in result["device"]:
            if row["note"]:
                console.print(f"{row['scheme']} {_shape(row)}: {row['note']}", markup=False, highlight=False)
    if "gpu" in result:
        limits = result["limits"]
        said = "copies at {copy_gbps:.0f} GB/s, multiplies bfloat16 at {bf16_tflops:.0f} TFLOP/s".format(
            **limits
        )
        console.print(f"{result['device_kind']}, jax {result['versions']['jax']}: {said}", highlight=False)
        rows = [row for row in result["gpu"] if "error" not in row]
        lines = (gpu_line(row, limits) for row in rows)
        console.print(_table(TITLES["gpu"], GPU_COLUMNS, lines))
        for row in result["gpu"]:
            if row.get("note") or "error" in row:
                console.print(gpu_summary(row), markup=False, highlight=False)
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
GPU_COLUMNS = (
    "scheme",
    "M x K x N",
    "runs",
    "time",
    "% of floor",
    "XLA bf16",
    "XLA same op",
    "XLA 8-bit dot",
    "% of copy",
    "% of peak",
    "differs",
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


def gpu_line(row: Mapping[str, Any], limits: Mapping[str, float]) -> tuple[str, ...]:
    """One line of the table of a GPU: what moves is held to copies, what multiplies to the peak."""
    copied, rate = shares(row, limits)
    return (
        row["scheme"],
        _shape(row),
        row["implementation"],
        f"{row['us']:.1f}",
        f"{100 * row['floor_us'] / row['us']:.0f}",
        f"{row['xla_bf16_us']:.1f}",
        f"{row['xla_same_op_us']:.1f}",
        "-" if row["xla_dot_us"] is None else f"{row['xla_dot_us']:.1f}",
        f"{100 * copied:.0f}" if row["memory_bound"] else "-",
        "-" if row["memory_bound"] else f"{100 * rate:.0f}",
        f"{row['difference']:.4f}",
        "loses" if row["loses"] else "",
    )


def shares(row: Mapping[str, Any], limits: Mapping[str, float]) -> tuple[float, float]:
    """Of the measured copy bandwidth, and of the measured peak: twice bfloat16's where operands have 8 bits.

    >>> row = {"bytes": 3e8, "us": 100.0, "m": 100, "k": 1000, "n": 1000, "eight_bits": True}
    >>> shares(row, {"copy_gbps": 3000.0, "bf16_tflops": 2.0})
    (1.0, 0.5)
    """
    work = 2 * row["m"] * row["k"] * row["n"] / row["us"] / 1e6
    peak = limits["bf16_tflops"] * (2 if row["eight_bits"] else 1)
    return row["bytes"] / row["us"] / 1e3 / limits["copy_gbps"], work / peak


def gpu_summary(row: Mapping[str, Any]) -> str:
    """A row in one line."""
    if "error" in row:
        return f"{row['scheme']} {_shape(row)}: {row['error']}"
    loses = ", loses" if row["loses"] else ""
    note = f" ({row['note']})" if row["note"] else ""
    return f"{row['scheme']} {_shape(row)}: {row['us']:.1f} us by {row['implementation']}{loses}{note}"


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
