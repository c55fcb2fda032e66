"""Static prices of convolutions, next to XLA's bfloat16: `python -m bench.price --suite conv`.

A cell is one layer of shapes.CONVOLUTIONS in one scheme on one chip. Targets:

    bf16     at least as fast as XLA's convolution of bfloat16, or dispatch falls back
    floor    3x3 and 1x1 in w8a8: at most `FLOOR` times the floor, the multiplications at the peak of the best
             exact unit or each operand and the result once through HBM
    price    there is one

What misses a target is printed, and fails unless conv_known_misses.json lists it, with its reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tqdm

from bench import op_suite, shapes
from bench.cells import check_chips
from bench.shapes import ConvLayer
from bench.targets import Miss

CHIPS = ("v5e", "v6e", "v7x")
FLOOR = 1.5
MISSES = pathlib.Path(__file__).parent / "conv_known_misses.json"
# Schemes besides w8a8_static, of these layers only.
_MORE = {"w8a8": ("square", "conv3 3x3", "conv4 1x1", "32"), "w8a16": ("square",), "w4a8_static": ("square",)}


@dataclasses.dataclass(frozen=True)
class ConvCell:
    """What is priced."""

    chip: str
    scheme: str
    layer: ConvLayer

    def __str__(self) -> str:
        return f"{self.chip} {self.scheme} {self.layer}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell's figures, in static microseconds of one jax device."""

    cell: ConvCell
    runs: str  # what dispatch chooses
    static_us: float
    compute_us: float
    memory_us: float
    floor_us: float
    xla_bf16_us: float
    estimate_us: float
    mxu_busy: float
    spills: float
    note: str
    error: str = ""

    @property
    def ratio(self) -> float:
        """To the floor."""
        return self.static_us / self.floor_us if self.floor_us else math.inf

    def as_json(self) -> dict[str, Any]:
        """Everything, flat."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "cell"}
        layer = dataclasses.asdict(self.cell.layer)
        return {
            "chip": self.cell.chip,
            "scheme": self.cell.scheme,
            "layer": layer,
            **fields,
            "ratio": self.ratio,
        }


def cells(chips: Sequence[str], schemes: Sequence[str] = ()) -> list[ConvCell]:
    """The suite on these chips.

    Raises ValueError for a chip or a scheme that is not known.

    >>> str(cells(["v6e"])[0])
    'v6e w8a8_static 3x3 8x56x56x256 -> 256'
    """
    check_chips(chips)
    for name in schemes:
        if name not in shapes.CONV_SCHEMES:
            raise ValueError(
                f"Unknown scheme {name!r} of a convolution; known: {', '.join(shapes.CONV_SCHEMES)}."
            )
    layers = [layer for model in shapes.CONVOLUTIONS.values() for layer in model]
    found = []
    for chip in chips:
        for layer in layers:
            names = ["w8a8_static"] + [name for name, of in _MORE.items() if layer.name in of]
            found += [ConvCell(chip, name, layer) for name in names if not schemes or name in schemes]
    return found


def price(wanted: Sequence[ConvCell], cache: str | None = None) -> Iterator[Row]:
    """Rows in the order of the cells, with a bar on standard error."""
    with tempfile.TemporaryDirectory(prefix="qwix_conv_") as folder, contextlib.ExitStack() as stack:
        where = os.path.abspath(cache) if cache else ""
        started = lambda name, bundles: op_suite.Worker(
            "bench.conv_compile", [bundles, where], os.path.join(folder, f"stderr of {name}")
        )
        kernels, plain = started("kernels", folder), started("xla", "")
        stack.callback(kernels.close)
        stack.callback(plain.close)
        for cell in tqdm.tqdm(wanted, unit="cell", mininterval=5, disable=len(wanted) == 1):
            yield _row(cell, kernels, plain)


def _ops(worker: op_suite.Worker, cell: ConvCell, program: str) -> list[Any]:
    """The ops of a program. Raises RuntimeError with what the compiler says against it."""
    from bench.tpu_compile import OpCost

    layer = dataclasses.asdict(cell.layer)
    answer = worker.ask({"chip": cell.chip, "layer": layer, "scheme": cell.scheme, "program": program})
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return [OpCost(**op) for op in answer["ops"]]


def _row(cell: ConvCell, kernels: op_suite.Worker, plain: op_suite.Worker) -> Row:
    from qwix_kernels import chips, dispatch
    from qwix_kernels.conv import cost

    from bench import conv_problems
    from bench.tpu_compile import device_bandwidth, device_cores

    spec = chips.chip(cell.chip)
    problem = conv_problems.problem(cell.layer, cell.scheme)
    chosen = dispatch.explain(problem, spec)
    floor = max(cost.floor(problem, spec)) / device_cores(spec)
    notes = [f"not {name}: {reason}" for name, reason in chosen.rejected]
    try:
        worker, program = (plain, "xla") if chosen.chosen == "xla" else (kernels, "kernel")
        ops, bf16 = _ops(worker, cell, program), _ops(plain, cell, "bf16")
    except RuntimeError as error:
        return Row(cell, chosen.chosen, math.inf, 0, 0, floor, 0, 0, 0, 0, "; ".join(notes), str(error)[:500])
    total = lambda ops, field="static_us": sum(getattr(op, field) for op in ops)
    longest = max((op for op in ops if op.is_kernel), key=lambda op: op.static_us, default=None)
    if longest is not None:  # DMAs past the edge of an array are not among those that the reader counts
        least = cost.tiled_bytes(problem) / device_bandwidth(spec) * 1e6
        moved = dataclasses.replace(longest, memory_us=max(longest.memory_us, least))
        ops, longest = [moved if op is longest else op for op in ops], moved
    around = total([op for op in ops if not op.is_kernel])
    if longest is not None and around > 0.05 * total(ops):
        notes.append(f"XLA ops round the kernel take {around:.1f} us")
    return Row(
        cell,
        chosen.chosen,
        total(ops),
        total(ops, "compute_us"),
        total(ops, "memory_us"),
        floor,
        total(bf16),
        chosen.estimate.static_us,
        longest.mxu_busy if longest else 0.0,
        longest.spills if longest else 0.0,
        "; ".join([chosen.estimate.note, *notes] if longest else notes),
    )


def found_misses(rows: Iterable[Row]) -> list[Miss]:
    """Every target that a row misses."""
    found = []
    for row in rows:
        cell, layer = row.cell, row.cell.layer
        kind = "depthwise" if layer.depthwise else f"{layer.kernel}x{layer.kernel}"
        miss = lambda target, excess, why, cell=cell, kind=kind: found.append(
            Miss(cell.chip, f"{kind} {cell.layer.name}", cell.scheme, target, excess, str(cell), why)
        )
        if row.error:
            miss("price", math.inf, row.error)
            continue
        if row.static_us > row.xla_bf16_us:
            miss(
                "bf16", row.static_us / row.xla_bf16_us, f"{row.static_us:.1f} us, XLA {row.xla_bf16_us:.1f}"
            )
        if not layer.depthwise and "a8" in cell.scheme and row.ratio > FLOOR:
            why = f"{row.static_us:.1f} us, floor {row.floor_us:.1f}, matrix units held {row.mxu_busy:.0%}"
            miss("floor", row.ratio / FLOOR, why)
    return found


def _line(row: Row) -> list[str]:
    cell, numbers = row.cell, (row.compute_us, row.memory_us, row.static_us, row.floor_us)
    return [
        cell.chip, cell.scheme, str(cell.layer), row.runs, *(f"{x:.1f}" for x in numbers),
        f"{row.ratio:.2f}", f"{row.xla_bf16_us:.1f}", f"{row.xla_bf16_us / row.static_us:.2f}x",
        f"{row.estimate_us:.1f}", f"{row.mxu_busy:.0%}", f"{row.spills:.0%}",
    ]  # fmt: skip


def show(rows: Iterable[Row]) -> None:
    """Prints the table, losing rows included."""
    title = "Convolutions: static microseconds from the compiler's bundles (nothing was measured)"
    numbers = ("compute", "memory", "static", "floor", "x floor", "XLA bf16", "faster", "estimate")
    texts = ("chip", "scheme", "layer", "runs")
    op_suite.print_table(title, texts, (*numbers, "MXU held", "spills"), rows, _line, lambda row: row.note)


SUITE = op_suite.OpSuite(
    CHIPS, cells, 14, price, found_misses, show, MISSES, "kernels/qwix_kernels/conv/tpu_kernel.py: the ladder"
)
