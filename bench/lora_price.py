"""What a low-rank adapter of rank 16 adds to a matmul: `python -m bench.price --suite lora`. Static.

A cell is one layer of Llama-3 8B over a frozen quantized weight on one chip, forward (x @ w) or the gradient
that reaches x (g @ w.T). Two programs are priced, with the adapter and without; XLA ops count in either.
Targets:

    adapter   the program with the adapter takes at most `ADAPTER` times as long as the one without
    price     there is one, and both run a kernel

What misses a target is printed, and fails unless lora_known_misses.json lists it, with its reason.
"""

from __future__ import annotations

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
from bench.shapes import Layer
from bench.targets import Miss

CHIPS = ("v5e", "v6e", "v7x")
RANK, ADAPTER = 16, 1.15
MISSES = pathlib.Path(__file__).parent / "lora_known_misses.json"
SCHEMES = ("wnf4a16_g64", "w4a16_g128", "w8a8")
LADDER = "kernels/qwix_kernels/matmul/tpu_low_rank.py: the ladder"


@dataclasses.dataclass(frozen=True)
class LoraCell:
    """What is priced."""

    chip: str
    scheme: str
    m: int
    layer: Layer
    backward: bool = False

    def __str__(self) -> str:
        product = "g @ w.T" if self.backward else "x @ w"
        sizes = f"{self.m} x {self.layer.k} x {self.layer.n}"
        return f"{self.chip} {self.scheme} {self.layer.name} {sizes}, {product}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell's figures, in static microseconds of one jax device; cycles of all ops."""

    cell: LoraCell
    static_us: float = math.inf  # with the adapter
    base_us: float = math.inf
    kernels: int = 0
    base_kernels: int = 0
    around_us: float = 0.0  # XLA's ops in the program with the adapter
    cycles: int = 0
    base_cycles: int = 0
    mxu_busy: float = 0.0
    binds: str = ""
    error: str = ""

    @property
    def ratio(self) -> float:
        """To the program without the adapter."""
        return self.static_us / self.base_us if not self.error else math.inf

    @property
    def compute_ratio(self) -> float:
        """The same of the cycles, whatever HBM hides of them."""
        return self.cycles / self.base_cycles if self.base_cycles else math.inf

    def as_json(self) -> dict[str, Any]:
        """Everything, flat."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "cell"}
        where = dataclasses.asdict(self.cell)
        return where | fields | {"ratio": self.ratio, "compute_ratio": self.compute_ratio}


def cells(chips: Sequence[str], schemes: Sequence[str] = ()) -> list[LoraCell]:
    """The suite on these chips: int4 on every layer, the rest on the square one; more gradients on v6e.

    Raises ValueError for a chip or a scheme that is not known.

    >>> str(cells(["v6e"])[0])
    'v6e w4a16_g128 q 512 x 4096 x 4096, x @ w'
    """
    check_chips(chips)
    for name in schemes:
        shapes.scheme(name)
    layers = [layer for layer in shapes.MODELS["llama3_8b"] if layer.name in ("q", "gate_up", "down")]
    square = layers[0]
    nf4, int4, w8a8 = SCHEMES
    found = []
    for chip in chips:
        found += [LoraCell(chip, int4, 512, layer) for layer in layers]
        found += [LoraCell(chip, int4, 2048, square), LoraCell(chip, w8a8, 2048, square)]
        backward = layers if chip == "v6e" else layers[:1]
        found += [LoraCell(chip, int4, 512, layer, backward=True) for layer in backward]
        found += [LoraCell(chip, nf4, 512, square, backward) for backward in (False, True)]
    return [cell for cell in found if not schemes or cell.scheme in schemes]


def price(wanted: Sequence[LoraCell], cache: str | None = None) -> Iterator[Row]:
    """Rows in the order of the cells, with a bar on standard error."""
    with tempfile.TemporaryDirectory(prefix="qwix_lora_") as folder:
        arguments = [folder, *([os.path.abspath(cache)] if cache else [])]
        worker = op_suite.Worker("bench.lora_compile", arguments, os.path.join(folder, "stderr"))
        for cell in tqdm.tqdm(wanted, unit="cell", mininterval=5, disable=len(wanted) == 1):
            layer = {"m": cell.m, "k": cell.layer.k, "n": cell.layer.n, "backward": cell.backward}
            request = {"chip": cell.chip, "scheme": cell.scheme, **layer}
            yield row_of(cell, *(worker.ask(request | {"rank": rank}) for rank in (0, RANK)))
        worker.close()


def row_of(cell: LoraCell, base: dict[str, Any], adapted: dict[str, Any]) -> Row:
    """The figures of a cell, from what the compiling process said of either program."""
    from bench.tpu_compile import OpCost

    error = base.get("error") or adapted.get("error")
    if error:
        return Row(cell, error=error[:500])
    without, ops = ([OpCost(**op) for op in answer["ops"]] for answer in (base, adapted))
    kernels = [op for op in ops if op.is_kernel]
    longest = max(ops, key=lambda op: op.static_us)
    slots = {u: v for u, v in longest.units.items() if u in ("MXU", "XLU", "VALU", "VLOAD", "VSTORE")}
    binds = max(slots, key=lambda u: slots[u]) if slots else "XLA"
    binds = "MXU" if longest.mxu_busy >= slots.get(binds, 0.0) else binds
    return Row(
        cell=cell,
        static_us=sum(op.static_us for op in ops),
        base_us=sum(op.static_us for op in without),
        kernels=len(kernels),
        base_kernels=sum(op.is_kernel for op in without),
        around_us=sum(op.static_us for op in ops if not op.is_kernel),
        cycles=sum(op.cycles for op in ops),
        base_cycles=sum(op.cycles for op in without),
        mxu_busy=longest.mxu_busy,
        binds="HBM" if longest.memory_us >= longest.compute_us else binds,
    )


def found_misses(rows: Sequence[Row]) -> list[Miss]:
    """Every target that a row misses."""
    found = []
    for row in rows:
        cell = row.cell
        where = f"{cell.layer.name} {cell.m}" + " backward" * cell.backward
        if row.error or not (row.kernels and row.base_kernels):
            why = row.error or f"{row.kernels} kernels with the adapter, {row.base_kernels} without"
            found.append(Miss(cell.chip, cell.scheme, where, "price", math.inf, str(cell), why))
        elif row.ratio > ADAPTER:
            why = f"{row.static_us:.1f} us, {row.base_us:.1f} without the adapter; {row.binds} binds"
            excess = row.ratio / ADAPTER
            found.append(Miss(cell.chip, cell.scheme, where, "adapter", excess, str(cell), why))
    return found


def _line(row: Row) -> list[str]:
    cell = row.cell
    return [
        cell.chip, cell.scheme, f"{cell.layer.name} {cell.m} x {cell.layer.k} x {cell.layer.n}",
        "g @ w.T" if cell.backward else "x @ w", f"{row.base_us:.1f}", f"{row.static_us:.1f}",
        f"{row.ratio:.3f}" + " over" * (row.ratio > ADAPTER), f"{row.compute_ratio:.3f}",
        str(row.kernels), f"{row.around_us:.1f}", f"{row.mxu_busy:.0%}", row.binds,
    ]  # fmt: skip


def show(rows: Iterable[Row]) -> None:
    """Prints the table, losing rows included."""
    title = f"Adapters of rank {RANK}: static microseconds from the compiler's bundles (nothing was measured)"
    numbers = ("base", "adapter", "ratio", "of cycles", "kernels", "XLA round it", "MXU held", "binds")
    op_suite.print_table(title, ("chip", "scheme", "layer", "product"), numbers, rows, _line)


SUITE = op_suite.OpSuite(CHIPS, cells, 40, price, found_misses, show, MISSES, LADDER)
