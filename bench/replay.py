"""Runs a parsed kernel's scalar program, so that nothing about its loops has to be guessed.

Grid loops, `fori_loop`s, nested pipelines and bodies under `pl.when` are all steered by scalar arithmetic on
constants that stand in the bundles. Executing just that arithmetic tells how often every bundle issues, which
DMAs really start (a block that stays in place is not fetched again), and in which order the matrix
instructions reach their units. What it cannot know are values that come from the kernel's data; a branch on
one is not taken forwards (the body is charged) and is an error backwards (the trip count is unknown). Inputs
of whole numbers that steer a kernel, such as which blocks it visits, can be given for that.

Time: one bundle per cycle, but a run of bundles between two branches lasts at least as long as its matrix
instructions hold the busiest MXU. The compiler's schedule does not see to that: it may issue them faster than
the unit's peak, and the results, which the same run of bundles needs, are then late. Not seen: DMA waits,
bank conflicts, the latency of a first result.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from bench.bundles import UNITS, Branch, Instruction, Kernel

GRANULE_BYTES = 32  # unit of a DMA's size
MAX_STEPS = 30_000_000  # scalar instructions; a kernel beyond it does not end, as far as we can tell
_WORD = 1 << 32


class UnknownTripCount(ValueError):
    """A loop's trip count depends on the kernel's data."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """What the matrix units of a core are like.

    `occupancy` gives the cycles for which a matrix instruction with this element type holds its MXU;
    `delay_slots` bundles issue after a branch before it happens.
    """

    occupancy: Callable[[str], float]
    delay_slots: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one core spends on one call of a kernel.

    `cycles` are the `bundles` plus the waits for matrix units; `mxu_cycles` is what the busiest ones take.
    `units` are the slots used, as a fraction of those there were; `spills` is the share of the register loads
    and stores that only move registers out of the way. `traffic` is bytes by DMA kind.
    `assumed` says how many times a branch on unknown data was passed over.
    """

    bundles: int
    cycles: int
    mxu_cycles: int
    units: dict[str, float]
    spills: float
    traffic: dict[str, int]
    assumed: int

    @property
    def hbm_bytes(self) -> int:
        """Bytes read from and written to HBM."""
        return sum(size * kind.count("hbm") for kind, size in self.traffic.items())


@dataclasses.dataclass(frozen=True)
class _Block:
    """Bundles that issue in a row, up to a branch and with it."""

    start: int
    stop: int
    scalars: tuple[Instruction, ...]
    mxu_cycles: float  # of the busiest MXU
    branch: Branch | None


# Inputs of a kernel that are known, by their number: whole numbers in the order in which they lie in memory.
Known = Mapping[int, Sequence[int]]


def replay(kernel: Kernel, timing: Timing, core: int = 0, known: Known | None = None) -> Cost:
    """The cost of `kernel` on core number `core` of its device.

    Raises UnknownTripCount where a loop's end depends on data, and ValueError where the program does not end.
    """
    return _Run(kernel, timing, core, known or {}).cost()


class _Run:
    def __init__(self, kernel: Kernel, timing: Timing, core: int, known: Known):
        self._kernel, self._timing = kernel, timing
        self._blocks: dict[tuple[int, bool], _Block] = {}
        self._visits: dict[tuple[int, bool], int] = {}
        self._scalars = _Scalars(core, kernel.inputs, known)
        self._assumed = 0

    def cost(self) -> Cost:
        end, pc = len(self._kernel.bundles), 0
        while pc < end:
            block = self._visit(pc)
            pc = block.stop
            if block.branch and self._taken(block.branch, pc):
                if pc < end:
                    self._visit(pc, after_branch=True)
                pc = self._target(block.branch)
        blocks = [(self._blocks[key], times) for key, times in self._visits.items()]
        issued = [0] * (end + 1)
        for block, times in blocks:
            issued[block.start] += times
            issued[block.stop] -= times
        issued = list(itertools.accumulate(issued))[:-1]
        slots = _slots(self._kernel, issued)
        return Cost(
            bundles=sum(issued),
            cycles=round(sum(n * max(b.stop - b.start, b.mxu_cycles) for b, n in blocks)),
            mxu_cycles=round(sum(n * b.mxu_cycles for b, n in blocks)),
            units={u: n / (c * sum(issued)) for u, n, c in slots if c},
            spills=_spills({u: n for u, n, _ in slots}),
            traffic=dict(self._scalars.traffic),
            assumed=self._assumed,
        )

    def _visit(self, start: int, after_branch: bool = False) -> _Block:
        key = (start, after_branch)
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = self._cut(start, after_branch)
        self._visits[key] = self._visits.get(key, 0) + 1
        self._scalars.run(block.scalars)
        return block

    def _cut(self, start: int, after_branch: bool) -> _Block:
        """The bundles from `start` up to the next branch, or those that still issue after one."""
        bundles = self._kernel.bundles
        if after_branch:
            stop, branch = min(start + self._timing.delay_slots, len(bundles)), None
        else:
            stop = next((i + 1 for i in range(start, len(bundles)) if bundles[i].branch), len(bundles))
            branch = bundles[stop - 1].branch
        busy: dict[int, float] = {}
        for matmul in itertools.chain.from_iterable(b.matmuls for b in bundles[start:stop]):
            busy[matmul.mxu] = busy.get(matmul.mxu, 0.0) + self._timing.occupancy(matmul.element)
        scalars = tuple(itertools.chain.from_iterable(b.scalars for b in bundles[start:stop]))
        return _Block(start, stop, scalars, max(busy.values(), default=0.0), branch)

    def _target(self, branch: Branch) -> int:
        # Only the region that leaves the kernel, for a core that has no share in it, starts unmarked.
        return self._kernel.regions.get(branch.region, len(self._kernel.bundles) - 1)

    def _taken(self, branch: Branch, pc: int) -> bool:
        if branch.predicate is None:
            return True
        holds = self._scalars.value("%" + branch.predicate)
        if holds is None:
            if self._target(branch) < pc:
                raise UnknownTripCount(
                    f"{self._kernel.name!r}: the loop that ends at bundle {pc - 1:#x} runs as often as "
                    "the kernel's data says; price it with bounds that are constants."
                )
            self._assumed += 1
            return False
        return bool(holds) != branch.negated


class _Scalars:
    """The scalar unit: values, predicates and scalar memory. None stands for what is not known."""

    def __init__(self, core: int, inputs: Sequence[tuple[str, int]], known: Known):
        self.traffic: dict[str, int] = {}
        self._core = core
        self._known = known
        # One that is a number and not an array is in a scalar register.
        self._values: dict[str, object] = {
            name: known[i][0] if len(known[i]) == 1 else (f"input {i}", 0) for name, i in inputs if i in known
        }
        self._written: dict[str, int] = {}  # when each value was last written: what a phi picks by
        self._memory: dict[object, object] = {}
        self._step = 0

    def run(self, instructions: tuple[Instruction, ...]) -> None:
        for instruction in instructions:
            self._step += 1
            self._execute(instruction)
        if self._step > MAX_STEPS:
            raise ValueError(f"More than {MAX_STEPS:,} scalar instructions: the kernel does not seem to end.")

    def value(self, text: str) -> object:
        """An operand's value: a number, a predicate, an address or None."""
        if text.startswith("!"):
            held = self.value(text[1:])
            return None if held is None else not held
        if text.startswith("%"):
            return self._values.get(text[1:])
        if text.startswith("["):
            return self._address(text.strip("[]").removeprefix("smem:").strip("[]"))
        try:
            return _signed(int(text, 0))
        except ValueError:
            return None

    def _address(self, text: str) -> object:
        total: object = 0
        for part in text.split("+"):
            part = part.strip()
            if part.startswith("#"):
                term: object = (part, 0)
            else:
                term = self.value(part.removeprefix("$"))
            total = _add(total, term)
        return total

    def _execute(self, i: Instruction) -> None:
        does: object = True
        if i.predicate is not None:
            held = self._values.get(i.predicate)
            does = None if held is None else bool(held) != i.negated
        if i.op.startswith("dma."):
            self._start_dma(i, does)
        elif i.op == "sst":
            self._store(i, does)
        elif does is False:
            if i.otherwise is not None:
                self._write(i.result, self.value(i.otherwise))
        else:
            self._write(i.result, self._result(i) if does else None)

    def _write(self, name: str, value: object) -> None:
        self._values[name] = value
        self._written[name] = self._step

    def _start_dma(self, i: Instruction, does: object) -> None:
        if does is False:
            return
        size = self.value(i.args[0]) if i.args else None
        if not isinstance(size, int):
            raise ValueError(f"A DMA ({i.op}) of a size that depends on data cannot be priced.")
        kind = i.op.removeprefix("dma.")
        if len(i.args) == 3 and does:
            self._fill(*map(self.value, i.args[1:]))
        self.traffic[kind] = self.traffic.get(kind, 0) + size * GRANULE_BYTES

    def _fill(self, source: object, target: object) -> None:
        """Scalar memory with a known input, whose DMA starts."""
        if not (isinstance(source, tuple) and isinstance(target, tuple)):
            return
        index = str(source[0]).removeprefix("input ")
        for at, value in enumerate(self._known.get(int(index), ()) if index.isdigit() else ()):
            self._memory[(target[0], target[1] + at)] = value

    def _store(self, i: Instruction, does: object) -> None:
        if does is False:
            return
        address, value = self.value(i.args[0]), self.value(i.args[1])
        if address is None:  # anything may have been overwritten, but for the compiler's own spills
            self._memory = {k: v for k, v in self._memory.items() if isinstance(k, tuple) and "spill" in k[0]}
        else:
            self._memory[address] = value if does else None

    def _result(self, i: Instruction) -> object:
        if i.op == "sphi":
            return self.value(max(i.args, key=lambda a: self._written.get(a[1:], -1)))
        if i.op == "core_id":
            return self._core
        if i.op == "sld":
            return self._memory.get(self.value(i.args[0]))
        operands = [self.value(a) for a in i.args]
        if i.op.startswith("scalar_lea"):
            return _add(*operands)
        if i.op.startswith("int_to_ptr") or i.op in ("smov", "pmov"):
            return operands[0]
        if i.op == "sdivrem.u32":
            return [_compute("srem.u32", operands), _compute("sdiv.u32", operands)]
        if i.op == "spop.drf":  # of one division there are up to two results, the quotient first
            return operands[0].pop() if isinstance(operands[0], list) else operands[0]
        if i.op == "scalar_select":
            chosen, yes, no = operands
            return None if chosen is None else yes if chosen else no
        return _compute(i.op, operands)


def _signed(value: int) -> int:
    return (value + _WORD // 2) % _WORD - _WORD // 2


def _add(a: object, b: object = 0) -> object:
    """A sum of numbers, or of an address (memory, offset) and a number."""
    if isinstance(a, int) and isinstance(b, int):
        return _signed(a + b)
    if isinstance(a, tuple) and isinstance(b, int):
        return (a[0], a[1] + b)
    if isinstance(b, tuple) and isinstance(a, int):
        return (b[0], b[1] + a)
    return None


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "sand": lambda a, b: a & b,
    "sor": lambda a, b: a | b,
    "sxor": lambda a, b: a ^ b,
    "sshll": lambda a, b: a << b if 0 <= b < 32 else 0,
    "sshra": lambda a, b: a >> min(b, 31),
    "smin": min,
    "smax": max,
}
_UNSIGNED: dict[str, Callable[[int, int], int]] = {
    "sshrl": lambda a, b: a >> b if b < 32 else 0,
    "smulhi": lambda a, b: (a * b) >> 32,
    "smin": min,
    "smax": max,
    "sdiv": lambda a, b: a // b if b else 0,
    "srem": lambda a, b: a % b if b else 0,
}


def _compute(op: str, operands: list) -> object:
    """The value of an arithmetic, comparing or logical op; None for an op that is not modelled."""
    name, *suffix = op.split(".")
    if name in ("por", "pnor", "pand", "pnand", "pneg", "pxor"):
        return _logic(name, operands)
    if name == "sadd":
        return _add(*operands)
    if name == "sshll" and isinstance(operands[0], tuple):
        return operands[0]  # an address, counted in smaller units
    if len(operands) != 2 or not all(isinstance(o, int) for o in operands):
        return None
    a, b = operands
    unsigned = "u32" in suffix
    if unsigned:
        a, b = a % _WORD, b % _WORD
    if name == "scmp":
        return _COMPARE[suffix[0]](a, b)
    table = _UNSIGNED if unsigned and name in _UNSIGNED else _ARITHMETIC
    return _signed(int(table[name](a, b))) if name in table else None


def _logic(name: str, operands: list) -> bool | None:
    """Three-valued logic: an operand that is not known matters only where the others do not decide."""
    if name == "pneg":
        return None if operands[0] is None else not operands[0]
    if name == "pxor":
        return None if None in operands else bool(operands[0]) != bool(operands[1])
    decides = name in ("por", "pnor")  # the value that settles it: true for or, false for and
    if any(o is not None and bool(o) == decides for o in operands):
        settled: bool | None = decides
    else:
        settled = None if None in operands else not decides
    return settled if settled is None or name in ("por", "pand") else not settled


def _slots(kernel: Kernel, issued: list[int]) -> list[tuple[str, int, int]]:
    """(unit, slots used, slots per bundle)."""
    if not kernel.units:
        return []
    used = [0] * len(UNITS)
    for times, row in zip(issued, kernel.units, strict=True):
        if times:
            used = [u + times * r for u, r in zip(used, row, strict=True)]
    return list(zip(UNITS, used, kernel.capacity, strict=True))


def _spills(used: dict[str, int]) -> float:
    # The compiler counts fills among the loads, and spills among the stores.
    moves = used.get("VLOAD", 0) + used.get("VSTORE", 0)
    return round((used["FILL"] + used["SPILL"]) / moves, 4) if moves else 0.0
