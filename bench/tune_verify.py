"""Prices the entries of the tuning tables again: are they still what they say, and still better?"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from qwix_kernels import chips, tuning, tuning_files

from bench.cells import Cell
from bench.shapes import ConvLayer, RaggedLayer
from bench.tune_ops import OPS, LayerCell, TunedOp
from bench.tune_search import IMPLEMENTATION, WINS, kernel_digest

_DRIFT = 0.02


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry, and the cells that check it: the heuristic's own blocks, and its own where it has some."""

    key: str
    fields: Mapping[str, Any]
    op: TunedOp
    heuristic: Any
    tuned: Any


def entries(chip: str, path: pathlib.Path) -> Iterator[Entry]:
    """The entries of a packaged table.

    Raises ValueError for a file that is no table, and for an entry that is not of the problem it names.
    """
    for key, fields in tuning_files.load(path).get(IMPLEMENTATION, {}).items():
        op, cell = _cell_of(chip, key, fields)
        if cell is None:
            raise ValueError(f"{path}: {key!r} has no sizes or no scheme.")
        problem = op.problem(cell)
        if tuning.key(problem) != key:
            raise ValueError(f"{path}: {key!r} is not {fields['scheme']}; that is {tuning.key(problem)!r}.")
        own = op.heuristic(problem, chips.chip(chip))
        tuned = _with(cell, type(own)(**fields["config"])) if "config" in fields else None
        yield Entry(key, fields, op, _with(cell, own), tuned)


def _cell_of(chip: str, key: str, fields: Mapping[str, Any]) -> tuple[TunedOp, Any]:
    """The op, and the cell without blocks; None where the entry does not say what it is of."""
    kinds: Any = {"conv": ConvLayer, "gmm": RaggedLayer}
    kind = kinds.get(key.split(" ")[0])
    parsed = tuning_files.parse_key(key)
    if "scheme" not in fields or (kind is None and parsed is None) or (kind and "layer" not in fields):
        return OPS["matmul"], None
    if kind is not None:
        name = "conv" if kind is ConvLayer else "ragged"
        return OPS[name], LayerCell(name, chip, fields["scheme"], kind(**fields["layer"]))
    assert parsed is not None
    sizes = (parsed.m, parsed.k, parsed.n)
    cell = Cell(chip, fields["scheme"], *sizes, IMPLEMENTATION, None, False, False, parsed.batch)
    return OPS["matmul"], cell


def _with(cell: Any, config: Any) -> Any:
    return dataclasses.replace(cell, config=json.dumps(dataclasses.asdict(config)))


def verify(
    names: Sequence[str],
    table: Callable[[chips.Chip], pathlib.Path],
    price: Callable[[Sequence[Any]], Iterable[tuple[int, dict[str, Any]]]],
) -> int:
    """Prints what has changed; the number of entries that have lost to the heuristic or no longer compile."""
    found = [e for name in names if (path := table(chips.chip(name))).exists() for e in entries(name, path)]
    cells = list(dict.fromkeys(c for e in found for c in (e.heuristic, e.tuned) if c))
    answers = {cells[index]: answer for index, answer in price(cells)}
    lost = 0
    for entry in found:
        verdict, bad = judge(entry, answers)
        lost += bad
        if verdict:
            print(f"{entry.heuristic.chip} {entry.key}: {verdict}")
    print(f"{len(found)} entries, {lost} have lost.")
    return lost


def by_op(
    cells: Sequence[Any], pricer: Callable[[str], Callable[[Sequence[Any]], Iterable[tuple[int, Any]]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answers for cells of several ops, each by the pricer of its op."""
    groups: dict[str, list[int]] = {}
    for index, cell in enumerate(cells):
        groups.setdefault(getattr(cell, "op", "matmul"), []).append(index)
    for op, indices in groups.items():
        for at, answer in pricer(op)([cells[index] for index in indices]):
            yield indices[at], answer


def judge(entry: Entry, answers: Mapping[Any, Mapping[str, Any]]) -> tuple[str, bool]:
    """(what has changed, whether the entry has lost); nothing for one that is as it was."""
    own, now = answers[entry.heuristic], answers[entry.tuned or entry.heuristic]
    if "error" in now:
        return f"has no price: {now['error']}", True
    if entry.tuned and "error" not in own and now["static_us"] > own["static_us"]:
        return f"{now['static_us']:.2f} us, the heuristic {own['static_us']:.2f} us", True
    changed = []
    then = entry.fields["static_us" if entry.tuned else "heuristic_us"]
    if abs(now["static_us"] / then - 1) > _DRIFT:
        changed.append(f"{then:.2f} us then, {now['static_us']:.2f} us now")
    if entry.tuned and "error" not in own and now["static_us"] > WINS * own["static_us"]:
        changed.append("no longer worth an entry")
    if changed and entry.fields.get("kernel") != kernel_digest(entry.op.folder):
        changed.append("the kernel or the compiler has changed since")
    return "; ".join(changed), False
