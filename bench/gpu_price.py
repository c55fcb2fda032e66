"""Static facts of GPU kernels, cell by cell: `python -m bench.price --suite matmul --chip h100 --check`.

A cell is compiled for the GPU (gpu_compile.py) as dispatch runs it, and its kernel is held to what
gpu_targets.py lists. What misses a target is printed, and fails unless gpu_known_misses.json lists it, with
its reason; an entry that nothing misses any more fails too. Nothing is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tqdm

from bench import gpu_compile, gpu_targets, misses, shapes
from bench.cache import Cache, digest_of_files
from bench.gpu_targets import Row

CHIPS = gpu_compile.CHIPS
MISSES = pathlib.Path(__file__).parent / "gpu_known_misses.json"
# Where the strategies that were tried stand, by chip.
_LADDERS = {
    "h100": "kernels/qwix_kernels/matmul/gpu_plan.py",
    "b200": "kernels/qwix_kernels/matmul/gpu_sm100.py",
}
_RAGGED = "kernels/qwix_kernels/ragged_matmul/gpu_kernel.py"


@dataclasses.dataclass(frozen=True)
class Suite:
    """The cells of one op, "matmul" or "ragged", with what price.py asks of a suite."""

    name: str

    @property
    def chips(self) -> tuple[str, ...]:
        """That the whole suite is of."""
        return CHIPS

    @property
    def seconds(self) -> int:
        """Of a processor that a cell takes."""
        return 3

    def cells(self, chips: Sequence[str], schemes: Sequence[str] = ()) -> list[Any]:
        """Raises ValueError for a chip or a scheme that is not known."""
        from bench import gpu_problems, gpu_ragged

        _check(chips)
        of = gpu_problems.cells if self.name == "matmul" else gpu_ragged.cells
        return [cell for chip in chips for cell in of(chip, schemes)]

    def price(self, wanted: Sequence[Any], cache: str | None = None) -> Iterator[Row]:
        """Rows in the order of the cells, with a bar on standard error."""
        known = Cache(cache) if cache else None
        for cell in tqdm.tqdm(wanted, unit="cell", mininterval=5, disable=len(wanted) == 1):
            yield _row(cell, known)

    def checked(self, rows: Sequence[Row], complete: Sequence[str]) -> tuple[list[str], list[str]]:
        """(what fails, what is known and still so). `complete`: chips whose whole suite was priced."""
        return misses.against(gpu_targets.misses(rows), self._known(), complete)

    def write_misses(self, rows: Sequence[Row], chips: Sequence[str]) -> None:
        """Rewrites this suite's part of the list of known misses for these chips."""
        mine = self._known()
        others = [entry for entry in misses.load(MISSES) if entry not in mine]
        drafted = misses.draft(gpu_targets.misses(rows), mine, chips)
        for entry in drafted:
            entry["ladder"] = _LADDERS[entry["chip"]] if self.name == "matmul" else _RAGGED
        misses.save(sorted([*others, *drafted], key=json.dumps), MISSES)

    def _known(self) -> list[dict[str, Any]]:
        ragged = self.name == "ragged"
        return [entry for entry in misses.load(MISSES) if entry["rows"].startswith("ragged") == ragged]

    def show(self, rows: Iterable[Row]) -> None:
        """Prints the table, losing rows included."""
        from bench import gpu_table

        gpu_table.show(list(rows))


@dataclasses.dataclass(frozen=True)
class Chosen(Suite):
    """Matmuls of given sizes, (M, K, N)."""

    sizes: tuple[tuple[int, int, int], ...] = ()

    def cells(self, chips: Sequence[str], schemes: Sequence[str] = ()) -> list[Any]:
        """Raises ValueError for a chip, a scheme or a size that is not possible."""
        from bench import gpu_problems

        _check(chips)
        for name in schemes:
            for _, k, n in self.sizes:
                if reason := shapes.scheme(name).misfit(k, n):
                    raise ValueError(f"{name}: {reason}.")
        return [gpu_problems.Cell(c, name, *size) for c in chips for size in self.sizes for name in schemes]


def _check(chips: Iterable[str]) -> None:
    for chip in chips:
        if chip not in CHIPS:
            raise ValueError(
                f"GPUs are priced apart from other chips, got {chip!r}; GPUs: {', '.join(CHIPS)}."
            )


def _row(cell: Any, known: Cache | None) -> Row:
    from qwix_kernels import chips, dispatch

    chip = chips.chip(cell.chip)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fallback is in the row
        plan = dispatch.explain(cell.problem, chip, implementation=cell.implementation)
    compute, memory = cell.floor(chip)
    estimate, mine = plan.estimate, [r for r in plan.rejected if r[0] != "mosaic_tpu"]
    notes = [estimate.note, *(f"not {name}: {reason}" for name, reason in mine)]
    row = Row(
        cell, plan.chosen, max(compute, memory), estimate.static_us, note="; ".join(filter(None, notes))
    )
    if plan.chosen == "xla":
        return row
    try:
        program = _program(cell, known)
    except RuntimeError as error:
        return dataclasses.replace(row, error=str(error)[:500])
    multiplying = [kernel for kernel in program.kernels if kernel.matrix]
    if not multiplying:
        return dataclasses.replace(row, error="the compiled program holds no kernel that multiplies")
    kernel = max(multiplying, key=lambda kernel: kernel.instructions)
    tensor, issue = gpu_targets.model(cell, chip, kernel, plan.config)
    others = len(program.kernels) - 1
    around = program.around_bytes + (cell.quantized_bytes if others else 0)
    return dataclasses.replace(
        row,
        memory_us=memory,
        tensor_us=tensor,
        issue_us=issue,
        around_us=around / (chip.hbm_gbps * 1e3),
        kernel=kernel,
        others=others,
        note=f"{plan.config}; {row.note}",
    )


def _program(cell: Any, known: Cache | None) -> gpu_compile.Program:
    what, arguments = cell.request
    op = "ragged" if what.startswith("bench.gpu_ragged") else "matmul"
    key = f"gpu {cell.chip} {what} {json.dumps(arguments)} {_sources(cell.chip, op)}"
    if known and (answer := known.get(key)):
        return gpu_compile.program_of(answer)
    program = gpu_compile.compiled(cell.chip, what, **arguments)
    if known:
        known.put(key, dataclasses.asdict(program))
    return program


@functools.cache
def _sources(chip: str, op: str) -> str:
    """A digest of all that decides a program: the kernels, the compilers, the readers."""
    import qwix_kernels

    kernels, here = pathlib.Path(str(qwix_kernels.__file__)).parent, pathlib.Path(__file__).parent
    names = ("compile", "sass", "worker", "problems", "ragged")
    read = [here / f"gpu_{name}.py" for name in names] + [here / "problems.py", here / "ragged_problems.py"]
    apart = {"conv"} if op == "ragged" else {"conv", "ragged_matmul"}
    other = "gpu_sm100" if chip == "h100" else "gpu_sm90"
    used = [
        path
        for path in kernels.rglob("*.py")
        if not path.name.startswith(("tpu", other)) and not apart & set(path.relative_to(kernels).parts)
    ]
    versions = (importlib.metadata.version(package) for package in ("jax", "jaxlib"))
    return " ".join([digest_of_files([*used, *read]), *versions])
