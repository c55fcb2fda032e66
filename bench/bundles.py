"""Reads what the TPU compiler finally emits: the text of `*-final_bundles.txt`.

One line of that file is one VLIW bundle and one bundle issues per cycle. A bundle holds instructions of every
unit; the ones kept here are those that decide what a kernel costs:

    scalar and predicate arithmetic, scalar memory   they steer the loops and the predicated regions
    branches                                         `sbr.rel (!%p3) target = $region7`
    DMA starts                                       bytes between HBM and on-chip memory
    matrix instructions                              each holds one matrix unit (MXU) for several cycles

The vector instructions are counted per unit in a second file
(`*-final_hlo-static-per-bundle-utilization.txt`).
Values are named in static single assignment (`%s19614_s25`: value 19614, in register s25), so that a reader
needs no register file. A name that starts with `#allocation` is a piece of on-chip memory.
"""

from __future__ import annotations

import dataclasses
import re

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")

_BUNDLE = re.compile(r"^[ ]*(?:0x[0-9a-f]+|0)[ ]+(?:[A-Z]{2}[ ]*)?:[ >]*\{", re.M)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_REGION = re.compile(r"(Start/End empty|Start|End) region (\d+)")
_INSTRUCTION = re.compile(r"%(\w+) = ([a-z][\w.]*)(?:\[[^\]]*\])?(\S*)\s*(.*)", re.S)
_PREDICATE = re.compile(r"\((!?)%(p\w+)(?:,\s*([^)]*))?\)")
_TARGET = re.compile(r"target = \$region(\d+)")
_DMA_SIZE = re.compile(r"/\*size_in_granules=\*/\s*(%?\w+)")
_MATMUL = re.compile(r"vmatmul\.(\S+)")
_MXU = re.compile(r"\.mxu(\d)")
# Ops that steer: results are scalars and predicates, or the state of scalar memory.
_SCALAR = re.compile(r"(s(?!br|halt|pop(?!\.drf))[a-z]|p[a-z]+$|scalar_|int_to_ptr|inlined_call_operand)")
_ELEMENT_BITS = {"bf16": 16, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "bf8": 8, "f32": 32}
# Operands of a call that live in on-chip memory: XLA has moved (or will move) their bytes.
_OPERAND = re.compile(r"= inlined_call_operand\.(\w+) \[shape: (\w+)\[([\d,]*)\], index: (\d+), kind: (\w+)")
_INPUT = re.compile(
    r"%(\w+) = inlined_call_operand\.(?:<no memory space>|\w+) \[shape: [^,]*?, index: (\d+), kind: input"
)
_DMA_ENDS = re.compile(r"/\*(?:vmem|hbm)=\*/\s*(%?\w+).*?/\*smem=\*/\s*(%?\w+)", re.S)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of the scalar unit, or a DMA start.

    With a predicate it happens only where the predicate holds (or not, `negated`); `otherwise` is the value
    that the result then keeps.
    """

    result: str
    op: str
    args: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False
    otherwise: str | None = None


@dataclasses.dataclass(frozen=True)
class Branch:
    """A jump to a region. Without a predicate it is always taken."""

    region: int
    predicate: str | None
    negated: bool


@dataclasses.dataclass(frozen=True)
class Matmul:
    """One matrix instruction: which MXU it occupies and the element type of the streamed operand."""

    mxu: int
    element: str

    @property
    def rows(self) -> int:
        """Rows that it streams: a vector register holds 8 sublanes of 32 bits, packed."""
        return 8 * 32 // element_bits(self.element)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One cycle's issue."""

    scalars: tuple[Instruction, ...] = ()
    matmuls: tuple[Matmul, ...] = ()
    branch: Branch | None = None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A parsed kernel.

    `regions` gives each region's first bundle. `units` has one row per bundle: slots used, in the order of
    `UNITS`; `capacity` says how many slots there are. `operands` are (memory, dtype, shape, kind).
    """

    name: str
    bundles: tuple[Bundle, ...]
    regions: dict[int, int]
    units: tuple[tuple[int, ...], ...]
    capacity: tuple[int, ...]
    operands: tuple[tuple[str, str, tuple[int, ...], str], ...]
    inputs: tuple[
        tuple[str, int], ...
    ] = ()  # the scalar that holds each input, or its address, and its index


def element_bits(element: str) -> int:
    """Bits of an element type as the matrix instructions spell it.

    >>> element_bits("bf16"), element_bits("s4"), element_bits("f8e4m3b11")
    (16, 4, 8)
    """
    return 8 if element.startswith("f8") else _ELEMENT_BITS[element]


def parse(name: str, bundles_text: str, units_text: str = "") -> Kernel:
    """The kernel called `name` out of the two dump files' text.

    Raises ValueError where the text holds no bundles, or where the two files disagree on how many.
    """
    starts = list(_BUNDLE.finditer(bundles_text))
    if not starts:
        raise ValueError(f"No bundles in the dump of {name!r}; the compiler's format may have changed.")
    ends = [m.start() for m in starts[1:]] + [len(bundles_text)]
    bundles: list[Bundle] = []
    regions: dict[int, int] = {}
    operands: list[tuple[str, str, tuple[int, ...], str]] = []
    inputs: list[tuple[str, int]] = []
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        chunk = bundles_text[start.end() : end]
        for kind, number in _REGION.findall(chunk):
            if kind != "End":
                regions.setdefault(int(number), index)
        operands += [
            (space, dtype, tuple(int(d) for d in dims.split(",") if d), kind)
            for space, dtype, dims, _, kind in _OPERAND.findall(chunk)
        ]
        inputs += [(value, int(number)) for value, number in _INPUT.findall(chunk)]
        bundles.append(_bundle(chunk))
    units, capacity = _units(name, units_text, len(bundles))
    return Kernel(name, tuple(bundles), regions, units, capacity, tuple(operands), tuple(inputs))


def _bundle(chunk: str) -> Bundle:
    scalars, matmuls, branch = [], [], None
    # A bundle closes with the last brace that is not in a comment.
    for raw in chunk[: _closing(chunk)].split(" ;; "):
        text = _COMMENT.sub("", raw).strip()
        match = _INSTRUCTION.match(text)
        if not match:
            continue
        result, op, suffix, rest = match.groups()
        if op.startswith("vmatmul"):
            matmuls.append(_matmul(op + suffix))
        elif op.startswith("sbr"):
            branch = _branch(rest)
        elif op.startswith("dma.") and "wait" not in op:
            scalars.append(_dma(result, op, rest, raw))
        elif _SCALAR.match(op) and not op.startswith("inlined"):
            if "megacore core id" in raw:
                op = "core_id"
            elif op.startswith("sdivrem"):  # the comment says which results are popped, in this order
                op = "sdivrem.u32" if "kDivAndRem" in raw else "srem.u32" if "kRem" in raw else "sdiv.u32"
            scalars.append(_scalar(result, op, rest))
    # A phi reads what the predecessors left, so it comes before the bundle's other instructions.
    scalars.sort(key=lambda i: i.op != "sphi")
    return Bundle(tuple(scalars), tuple(matmuls), branch)


def _closing(chunk: str) -> int:
    blank = _COMMENT.sub(lambda m: " " * len(m.group()), chunk)
    return blank.rfind("}") if "}" in blank else len(chunk)


def _predicate(rest: str) -> tuple[str, str | None, bool, str | None]:
    """(the operands without their predicate, predicate, negated, value kept otherwise)."""
    match = _PREDICATE.search(rest)
    if not match:
        return rest, None, False, None
    return rest[: match.start()] + rest[match.end() :], match[2], bool(match[1]), match[3]


def _scalar(result: str, op: str, rest: str) -> Instruction:
    rest, predicate, negated, otherwise = _predicate(rest)
    # `sst [smem:[%s4 + $0x2]] %s7` has no comma between the address and the value.
    rest = re.sub(r"\]\]\s+%", "]], %", rest)
    # What else stands in brackets says which memory a pointer is to.
    rest = re.sub(r"\[resolvable:[^\]]*\]|(?<=\w)\s+\[#\w+\]", "", rest)
    args = tuple(a.strip() for a in rest.split(",") if a.strip())
    return Instruction(result, op, args, predicate, negated, otherwise.strip() if otherwise else None)


def _dma(result: str, op: str, rest: str, raw: str) -> Instruction:
    _, predicate, negated, _ = _predicate(rest)
    size = _DMA_SIZE.search(raw)
    ends = _DMA_ENDS.search(raw) if op.endswith("_to_smem") else None
    args = ((size[1],) if size else ()) + (ends.groups() if ends else ())
    return Instruction(result, op, args, predicate, negated)


def _branch(rest: str) -> Branch:
    rest, predicate, negated, _ = _predicate(rest)
    target = _TARGET.search(rest)
    if not target:
        raise ValueError(f"A branch without a region: {rest!r}; the compiler's format may have changed.")
    return Branch(int(target[1]), predicate, negated)


def _matmul(op: str) -> Matmul:
    mxu = _MXU.search(op)
    tokens = op.split(".")
    element = next((t for t in tokens if t in _ELEMENT_BITS or re.match(r"f8e\dm\d", t)), None)
    if not mxu or not element:
        raise ValueError(f"Unknown matrix instruction {op!r}; the compiler's format may have changed.")
    return Matmul(int(mxu[1]), element)


def _units(name: str, text: str, bundles: int) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    rows = [
        tuple(map(int, parts))
        for parts in map(str.split, text.splitlines())
        if len(parts) == len(UNITS) and all(p.isdigit() for p in parts)
    ]
    if not rows:
        return (), ()
    capacity, *used = rows
    if len(used) != bundles:
        raise ValueError(f"{name!r}: {bundles} bundles, but unit utilisation for {len(used)}.")
    return tuple(used), capacity
