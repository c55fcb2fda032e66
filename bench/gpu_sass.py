"""Reads the machine code of a GPU kernel: its loops, what they execute, and which one multiplies matrices.

The text is nvdisasm's, as Mosaic prints it: an instruction a line, after its address, and labels for the
targets of branches. A loop is a natural one (a branch back to a block that dominates it): the blocks that
ptxas puts out of line to wait for a barrier jump back too, but into blocks that others reach as well.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_MATRIX = re.compile(r"(?:[HIQ]GMMA|UTC[HIQO]MMA|[HIQDO]MMA)\b")
_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")
_WAITS = {"SYNCS", "NANOSLEEP", "BRA"}
# What the mix of a loop counts together, by the beginning of an instruction's name; the first that fits.
KINDS: tuple[tuple[str, str], ...] = (
    ("matrix", r"[HIQ]GMMA|UTC[HIQO]MMA|[HIQDO]MMA"),
    ("tma", r"UTMA|UBLK"),
    ("local", r"LDL|STL"),
    ("shared", r"LDS|STS|ATOMS"),
    ("tensor memory", r"LDTM|STTM|UTCCP"),
    ("global", r"LDG|STG|LD$|ST$|RED|ATOMG"),
    ("sync", r"SYNCS|BAR|WARPGROUP|WARPSYNC|DEPBAR|MEMBAR|FENCE|NANOSLEEP|UTCBAR|ELECT|ERRBAR|R2B|USETMAX"),
    ("control", r"BRA|BRX|BSSY|BSYNC|CALL|RET|EXIT|NOP"),
    ("uniform", r"U|R2UR|S2UR|VOTEU"),
    ("convert", r"I2F$|F2I|F2F$|I2I|MUFU|FRND"),
    ("float", r"FFMA|FMUL|FADD|FSEL|FMNMX|FSETP|HFMA2|HMUL2|HADD2|HMNMX2|HSET|F2FP|I2FP"),
    ("integer", r""),
)
# Cycles for which a warp's instruction holds its pipe; the others take an issue slot. One scheduler of an
# SM has 16 lanes for logic and 32-bit integers, 4 for conversions (CUDA C++ Programming Guide, table of
# arithmetic throughput: 64 and 16 results a cycle and SM).
_PIPES: Mapping[str, float] = {"integer": 2.0, "convert": 8.0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `name` without its modifiers, `text` with everything but address and guard."""

    address: int
    guard: str
    name: str
    text: str

    @property
    def is_matrix(self) -> bool:
        return bool(_MATRIX.match(self.name))

    @property
    def is_local(self) -> bool:
        return self.name in ("LDL", "STL")

    @property
    def multiplies(self) -> int:
        """Multiplications of one warpgroup's instruction; 0 where its name does not tell, as on Blackwell.

        >>> Instruction(0, "", "IGMMA", "IGMMA.64x128x32.S8.S8 R24, gdesc[UR16], R24").multiplies
        262144
        """
        shape = _SHAPE.search(self.text) if self.is_matrix else None
        return int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0

    @property
    def falls_through(self) -> bool:
        """Whether what follows may run next."""
        if self.guard or self.name not in ("BRA", "EXIT", "RET", "BRX"):
            return True
        # A branch may also carry its condition as an operand: BRA.U !UP0, `(.L_x_1)
        return self.name == "BRA" and bool(re.search(r"\bU?P\d\b|\.(?:DIV|CONV)", self.text))


@dataclasses.dataclass(frozen=True)
class Loop:
    """What one warp executes in a turn of a loop, but for waiting.

    `mix` counts instructions by KINDS, `multiplies` the multiplications of a turn where the code tells.
    """

    instructions: int
    matrix: int
    multiplies: int
    local: int  # loads and stores of local memory
    mix: Mapping[str, int]

    @property
    def cycles(self) -> float:
        """Cycles of one scheduler for a turn of one warp: issue slots, or the busiest pipe. Static.

        >>> Loop(100, 4, 0, 0, {"integer": 60, "convert": 2, "matrix": 4, "float": 34}).cycles
        120.0
        """
        return max(self.instructions, *(self.mix.get(kind, 0) * held for kind, held in _PIPES.items()))


def kind_of(name: str) -> str:
    """Under which of KINDS an instruction is counted.

    >>> [kind_of(name) for name in ("IGMMA", "UTCQMMA", "UTMALDG", "LDSM", "PRMT", "I2FP", "UIADD3")]
    ['matrix', 'matrix', 'tma', 'shared', 'integer', 'float', 'uniform']
    """
    return next(kind for kind, start in KINDS if re.match(start, name))


class Code:
    """One kernel's machine code."""

    def __init__(self, text: str):
        self.instructions, self._labels = _parsed(text)

    def count(self, *names: str) -> int:
        """How many instructions have one of these names."""
        return sum(i.name in names for i in self.instructions)

    def matrix(self) -> dict[str, int]:
        """How many matrix instructions of each name there are."""
        return dict(collections.Counter(i.name for i in self.instructions if i.is_matrix))

    def highest_register(self) -> int:
        """The highest number of a 32-bit register that an instruction names."""
        named = (int(n) for i in self.instructions for n in _REGISTER.findall(i.text))
        return max(named, default=0)

    def register_budgets(self) -> tuple[int, ...]:
        """What the kernel's warpgroups set their register budgets to, the smallest first."""
        set_to = (i for i in self.instructions if i.name == "USETMAXREG")
        return tuple(sorted({int(i.text.rsplit(" ", 1)[1], 0) for i in set_to}))

    def main_loop(self) -> Loop | None:
        """The innermost loop that holds matrix instructions, of several the one with the most; else None."""
        holding: dict[frozenset[int], int] = collections.Counter()
        for body in self._matrix_loops():
            holding[body] += 1
        if not holding:
            return None
        return self._loop(max(holding, key=lambda body: (holding[body], -len(body))))

    def local_in_loops(self) -> int:
        """Loads and stores of local memory inside any loop."""
        inside = set().union(*self._loops) if self._loops else set()
        return sum(i.is_local for b in inside for i in self._blocks[b])

    def _matrix_loops(self) -> Iterator[frozenset[int]]:
        """For each matrix instruction inside a loop, the innermost one."""
        for number, block in enumerate(self._blocks):
            around = [body for body in self._loops if number in body]
            if around:
                yield from (min(around, key=len) for i in block if i.is_matrix)

    def _loop(self, body: frozenset[int]) -> Loop:
        waiting = {b for inner in self._loops if inner < body and self._only_waits(inner) for b in inner}
        run = [i for b in body - waiting for i in self._blocks[b]]
        return Loop(
            instructions=len(run),
            matrix=sum(i.is_matrix for i in run),
            multiplies=sum(i.multiplies for i in run),
            local=sum(i.is_local for b in body for i in self._blocks[b]),
            mix=dict(collections.Counter(kind_of(i.name) for i in run)),
        )

    def _only_waits(self, body: frozenset[int]) -> bool:
        return {i.name for b in body for i in self._blocks[b]} <= _WAITS

    @functools.cached_property
    def _blocks(self) -> list[Sequence[Instruction]]:
        starts = {*self._labels.values(), 0}
        starts |= {n + 1 for n, i in enumerate(self.instructions) if _TARGET.search(i.text)}
        starts |= {n + 1 for n, i in enumerate(self.instructions) if not i.falls_through}
        edges = [*sorted(s for s in starts if s < len(self.instructions)), len(self.instructions)]
        return [self.instructions[a:b] for a, b in itertools.pairwise(edges)]

    @functools.cached_property
    def _next(self) -> list[list[int]]:
        """The blocks that may follow each block."""
        at = {block[0].address: number for number, block in enumerate(self._blocks)}
        found = []
        for number, block in enumerate(self._blocks):
            last = block[-1]
            named = _TARGET.findall(last.text) if last.name != "BSSY" else []  # where branches meet again
            targets = [self._labels[label] for label in named if label in self._labels]
            after = [at[self.instructions[t].address] for t in targets if t < len(self.instructions)]
            if last.falls_through and number + 1 < len(self._blocks):
                after.append(number + 1)
            found.append(after)
        return found

    @functools.cached_property
    def _loops(self) -> list[frozenset[int]]:
        """Natural loops as sets of blocks, those of one header together."""
        before: list[list[int]] = [[] for _ in self._blocks]
        for number, after in enumerate(self._next):
            for other in after:
                before[other].append(number)
        dominators = _dominators(before)
        bodies: dict[int, set[int]] = {}
        for number, after in enumerate(self._next):
            for header in after:
                if 0 in dominators[header] and header in dominators[number]:
                    bodies.setdefault(header, {header}).update(_reaching(number, header, before))
        return [frozenset(body) for body in bodies.values()]


def _parsed(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and for each label the index of the one that follows it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        stripped = line.strip()
        if label := _LABEL.match(stripped):
            labels[label[1]] = len(instructions)
        elif match := _LINE.search(stripped):
            address, guard, opcode, operands = match.groups()
            name = opcode.partition(".")[0]
            text_ = f"{opcode} {operands.strip()}".strip()
            instructions.append(Instruction(int(address, 16), guard or "", name, text_))
    return instructions, labels


def _dominators(before: Sequence[Sequence[int]]) -> list[set[int]]:
    """For each block those that every way to it passes; blocks that nothing reaches are left with all."""
    everything = set(range(len(before)))
    found = [{0}, *(set(everything) for _ in before[1:])]
    changed = True
    while changed:
        changed = False
        for number in range(1, len(before)):
            if before[number]:
                new = set.intersection(*(found[p] for p in before[number])) | {number}
                changed |= new != found[number]
                found[number] = new
    return found


def _reaching(number: int, header: int, before: Sequence[Sequence[int]]) -> set[int]:
    """The blocks from which `number` is reached without passing the header."""
    seen, todo = {header, number}, [number]
    while todo:
        here = todo.pop()
        if here != header:
            new = [p for p in before[here] if p not in seen]
            seen.update(new)
            todo += new
    return seen
