"""The collectives of a compiled program, and the bytes that each device sends for them.

Read from the text of `compiled.as_text()`, of XLA for CPUs and for TPUs. Bytes are by arithmetic, for rings
of n devices, which nothing that sums or copies everywhere can beat by more than latency:

    all-gather           (n - 1) / n of the result
    reduce-scatter       (n - 1) / n of the operand
    all-reduce           (n - 1) / n of the operand, as it is summed, and of the result, as it is handed out
    all-to-all           (n - 1) / n of the operand
    collective-permute   the operand

Loops count as often as XLA knows that they run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from bench import hlo

OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_LINE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(OPS)})(-start)?\((.*)")
_TYPE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ")
_CALLED = re.compile(r"(?:body|to_apply|calls|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|async_execution_calls)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One op of the program. `shapes`: of its results; `times`: runs of the loops round it.

    operand_bytes: of an all-reduce. TPUs may sum float32 and hand out bfloat16 in one op.
    """

    op: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    group: int
    times: int
    operand_bytes: int = 0

    @property
    def result_bytes(self) -> int:
        """Of all its results, on one device."""
        dims = (",".join(map(str, s)) for s in self.shapes)
        return sum(hlo.array_bytes(dtype, shape) for dtype, shape in zip(self.dtypes, dims, strict=True))

    @property
    def wire_bytes(self) -> int:
        """What a device sends, in all of its runs."""
        n, size = self.group, self.result_bytes
        if self.op == "collective-permute":
            return size * self.times
        if self.op == "reduce-scatter":
            size *= n  # its operand
        if self.op == "all-reduce":
            size += self.operand_bytes
        return math.ceil((n - 1) / n * size) * self.times


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program, in no particular order."""
    bodies = dict(_computations(text))
    entry = next((name for name, (is_entry, _) in bodies.items() if is_entry), None)
    if entry is None:
        raise ValueError("The compiled program's text has no ENTRY computation.")
    return list(_of(bodies, entry, 1))


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    name, entry, lines = None, False, []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, entry, lines = header[2], bool(header[1]), []
        elif line.startswith("}") and name is not None:
            yield name, (entry, lines)
            name = None
        elif name is not None:
            lines.append(line)


def _of(bodies: dict[str, tuple[bool, list[str]]], name: str, times: int) -> Iterator[Collective]:
    types = {match[1]: match[2] for line in bodies[name][1] if (match := _TYPE.match(line))}
    for line in bodies[name][1]:
        if found := _LINE.search(line):
            yield _collective(found, line, times, types)
            continue
        trips = _TRIPS.search(line)
        runs = times * (int(trips[1]) if trips else 1)
        called = set(_CALLED.findall(line))
        for listed in _BRANCHES.findall(line):
            called |= {n.strip().lstrip("%") for n in listed.split(",")}
        for other in called & bodies.keys():
            yield from _of(bodies, other, runs)


def _collective(found: re.Match[str], line: str, times: int, types: dict[str, str]) -> Collective:
    type_, op, start = found[1], found[2], found[3]
    arrays = hlo.ARRAY.findall(type_)
    names = re.findall(r"%([\w.-]+)", found[4].split(")")[0])
    if start and op in ("all-gather", "collective-permute", "all-to-all", "reduce-scatter"):
        # (operands, results, contexts): as many results as operands
        operands = len(re.findall(r"%[\w.-]+", found[4].split("), ")[0])) or 1
        arrays = arrays[operands : 2 * operands]
    elif start:
        arrays = [a for a in arrays if a[0] not in ("u32", "s32") or len(arrays) == 1]
    shapes = tuple(tuple(int(d) for d in dims.split(",") if d) for _, dims, _ in arrays)
    dtypes = tuple(dtype for dtype, *_ in arrays)
    made = Collective(op, dtypes, shapes, _group(line), times)
    if op != "all-reduce":
        return made
    given = [a for name in names for a in hlo.ARRAY.findall(types.get(name, ""))]
    summed = sum(hlo.array_bytes(dtype, dims) for dtype, dims, _ in given)
    return dataclasses.replace(made, operand_bytes=summed or made.result_bytes)


def _group(line: str) -> int:
    """How many devices take part in one group."""
    if match := _LISTED.search(line):
        return len(match[1].split(","))
    if match := _IOTA.search(line):
        return int(match[2])
    if match := _MESH.search(line):
        sizes = {k.strip("' "): int(v) for k, v in (part.split("=") for part in match[1].split(","))}
        return math.prod(sizes[name.strip("' ")] for name in match[2].split(","))
    return 2 if _PAIRS.search(line) else 1


def wire_bytes(found: Iterable[Collective]) -> int:
    """What a device sends for all of them."""
    return sum(c.wire_bytes for c in found)


def counted(found: Sequence[Collective]) -> dict[str, int]:
    """How many of each kind, loops unrolled; those of groups of one device not counted."""
    kinds = Counter[str]()
    for c in found:
        if c.group > 1:
            kinds[c.op] += c.times
    return dict(sorted(kinds.items()))


def said(found: Sequence[Collective]) -> str:
    """In words, as in `1 all-gather s8, 1 all-reduce f32`.

    >>> said([Collective("all-gather", ("s8",), ((8, 4),), 2, 1)])
    '1 all-gather s8'
    """
    kinds = Counter[str]()
    for c in found:
        if c.group > 1:
            kinds[f"{c.op} {'+'.join(sorted(set(c.dtypes)))}"] += c.times
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "none"
