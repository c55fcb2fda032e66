"""Static prices of grouped matmuls, of MoE layers: `python -m bench.price --suite ragged`.

A cell is one layer of shapes.RAGGED in one scheme on one chip, with the group sizes that its name says: they
steer the kernels, which are replayed with them. Targets:

    floor      balanced groups in w8a8 and w4a16: at most `FLOOR` times the floor, the multiplications at the
               peak of the best exact unit or each operand and the result once through HBM
    reference  at least as fast as google/qwix, where that was priced
    rows       fewer rows or groups take less time: as much less as their floor is, within `ROWS`
    price      there is one

What misses a target is printed, and fails unless ragged_known_misses.json lists it, with its reason.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tqdm

from bench import op_suite, shapes
from bench.cells import check_chips
from bench.shapes import RaggedLayer
from bench.targets import Miss

CHIPS = ("v5e", "v6e", "v7x")
FLOOR, ROWS = 1.5, 1.25
MISSES = pathlib.Path(__file__).parent / "ragged_known_misses.json"
SCHEMES = ("w8a8", "w4a16_g128", "w8a16", "wf8af8")
# Thousands of cycles of google/qwix 0.1.8 for the canonical layer, balanced: the compiler's estimates.
REFERENCE: Mapping[str, Mapping[str, int]] = {
    "w8a8": {"v5e": 405, "v6e": 194},
    "w8a16": {"v5e": 276, "v6e": 171},
}


@dataclasses.dataclass(frozen=True)
class RaggedCell:
    """What is priced."""

    chip: str
    scheme: str
    layer: RaggedLayer

    def __str__(self) -> str:
        return f"{self.chip} {self.scheme} {self.layer}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell's figures, in static microseconds of one jax device."""

    cell: RaggedCell
    runs: str  # what dispatch chooses
    static_us: float = math.inf
    kernel_us: float = 0.0  # the larger of its two kernels
    compute_us: float = 0.0
    memory_us: float = 0.0
    floor_us: float = 0.0
    estimate_us: float = 0.0
    kcycles: float = 0.0
    mxu_busy: float = 0.0
    spills: float = 0.0
    note: str = ""
    error: str = ""

    @property
    def ratio(self) -> float:
        """To the floor."""
        return self.static_us / self.floor_us if self.floor_us else math.inf

    def as_json(self) -> dict[str, Any]:
        """Everything, flat."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "cell"}
        layer = dataclasses.asdict(self.cell.layer)
        where = {"chip": self.cell.chip, "scheme": self.cell.scheme, "layer": layer}
        return where | fields | {"ratio": self.ratio}


def cells(chips: Sequence[str], schemes: Sequence[str] = ()) -> list[RaggedCell]:
    """The suite on these chips: two schemes on every layer, the others on the canonical one.

    Raises ValueError for a chip or a scheme that is not known.

    >>> str(cells(["v6e"])[0])
    'v6e w8a8 canonical 8 experts, 4096 x 2048 x 1408'
    """
    check_chips(chips)
    for name in schemes:
        shapes.scheme(name)
    found = []
    for chip in chips:
        for model, layers in shapes.RAGGED.items():
            for layer in layers:
                names = SCHEMES if model == "canonical" and layer.sizes == "balanced" else SCHEMES[:2]
                names = SCHEMES[:1] if layer.sizes != "balanced" else names
                found += [RaggedCell(chip, name, layer) for name in names if not schemes or name in schemes]
    return found


def price(wanted: Sequence[RaggedCell], cache: str | None = None) -> Iterator[Row]:
    """Rows in the order of the cells, with a bar on standard error."""
    with tempfile.TemporaryDirectory(prefix="qwix_ragged_") as folder:
        arguments = [folder, *([os.path.abspath(cache)] if cache else [])]
        worker = op_suite.Worker("bench.ragged_compile", arguments, os.path.join(folder, "stderr"))
        for cell in tqdm.tqdm(wanted, unit="cell", mininterval=5, disable=len(wanted) == 1):
            layer = dataclasses.asdict(cell.layer)
            yield _row(cell, worker.ask({"chip": cell.chip, "scheme": cell.scheme, "layer": layer}))
        worker.close()


def _row(cell: RaggedCell, answer: dict[str, Any]) -> Row:
    from qwix_kernels import chips, dispatch

    from bench import ragged_problems
    from bench.tpu_compile import OpCost

    spec, scheme = chips.chip(cell.chip), shapes.scheme(cell.scheme)
    chosen = dispatch.explain(ragged_problems.problem(scheme, cell.layer), spec)
    floor = max(ragged_problems.floor(scheme, cell.layer, spec))
    if "error" in answer:
        return Row(cell, chosen.chosen, floor_us=floor, error=answer["error"][:500])
    ops = [OpCost(**op) for op in answer["ops"]]
    total = lambda field: sum(getattr(op, field) for op in ops)
    longest = max(ops, key=lambda op: op.static_us)
    notes = [chosen.estimate.note, *(f"not {name}: {reason}" for name, reason in chosen.rejected)]
    notes += [f"{chosen.config}"] if chosen.config else []
    return Row(
        cell=cell,
        runs=chosen.chosen,
        static_us=total("static_us"),
        kernel_us=longest.static_us,
        compute_us=total("compute_us"),
        memory_us=total("memory_us"),
        floor_us=floor,
        estimate_us=chosen.estimate.static_us,
        kcycles=total("static_us") * spec.ghz,
        mxu_busy=longest.mxu_busy,
        spills=longest.spills,
        note="; ".join(notes),
    )


def found_misses(rows: Sequence[Row]) -> list[Miss]:
    """Every target that a row misses."""
    found = []
    at = {(r.cell.chip, r.cell.scheme, r.cell.layer): r for r in rows}
    for row in rows:
        cell, layer = row.cell, row.cell.layer

        def miss(target: str, value: float, limit: float, why: str, cell: RaggedCell = cell) -> None:
            if not value <= limit:
                excess = math.inf if math.isinf(value) else value / limit
                where = f"{cell.layer.name} {cell.layer.sizes}"
                found.append(Miss(cell.chip, cell.scheme, where, target, excess, str(cell), why))

        if row.error:
            miss("price", math.inf, 1.0, row.error)
            continue
        if layer.sizes == "balanced" and cell.scheme in ("w8a8", "w4a16_g128"):
            why = f"{row.static_us:.1f} us (compute {row.compute_us:.1f}), floor {row.floor_us:.1f}"
            miss("floor", row.ratio, FLOOR, f"{why}; matrix units held {row.mxu_busy:.0%}")
        theirs = REFERENCE.get(cell.scheme, {}).get(cell.chip)
        if theirs and layer == shapes.RAGGED["canonical"][0]:
            why = f"{row.kcycles:.0f}k cycles, google/qwix 0.1.8, static {theirs}k"
            miss("reference", row.kcycles, theirs, why)
        whole = at.get((cell.chip, cell.scheme, dataclasses.replace(layer, sizes="balanced")))
        if whole and not whole.error and layer.sizes in ("empty", "half"):
            limit = min(1.01 * whole.static_us, ROWS * whole.static_us * row.floor_us / whole.floor_us)
            miss("rows", row.static_us, limit, f"{row.static_us:.1f} us, balanced {whole.static_us:.1f}")
    return found


def _line(row: Row) -> list[str]:
    cell = row.cell
    return [
        cell.chip, cell.scheme, str(cell.layer), row.runs, f"{row.compute_us:.1f}",
        f"{row.memory_us:.1f}", f"{row.static_us:.1f}", f"{row.floor_us:.1f}", f"{row.ratio:.2f}",
        f"{row.kcycles:.0f}", f"{row.estimate_us:.1f}", f"{row.mxu_busy:.0%}", f"{row.spills:.0%}",
    ]  # fmt: skip


def show(rows: Iterable[Row]) -> None:
    """Prints the table, losing rows included."""
    title = "Grouped matmuls: static microseconds from the compiler's bundles (nothing was measured)"
    numbers = ("compute", "memory", "static", "floor", "x floor", "kcycles", "estimate", "MXU held", "spills")
    texts = ("chip", "scheme", "layer", "runs")
    op_suite.print_table(title, texts, numbers, rows, _line, lambda row: row.note)


SUITE = op_suite.OpSuite(
    CHIPS, cells, 12, price, found_misses, show, MISSES,
    "kernels/qwix_kernels/ragged_matmul/tpu_kernel.py: the ladder",
)  # fmt: skip
