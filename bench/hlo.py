"""Reads the compiled program that XLA prints: its scheduled ops, what they move, what they should take.

Only the text of `compiled.as_text()` is used. Every op that XLA schedules carries the compiler's own
`estimated_cycles`; Pallas kernels (custom calls) do not, and are priced from their bundles. A buffer whose
layout ends in `S(1)` lives in on-chip memory and costs no HBM traffic; the asynchronous copies that bring it
there do, and count with the op that needs (or made) the buffer, whose work they overlap.
"""

from __future__ import annotations

import dataclasses
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BODY = re.compile(r"(?:body|to_apply)=%?([\w.-]+)")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}


@dataclasses.dataclass
class Op:
    """One scheduled op. `times` counts the runs of the loops round it; `hbm_bytes` is of one run.

    A kernel's `hbm_bytes` are only those that XLA copies for it; its own DMAs are in its bundles.
    """

    name: str
    opcode: str
    is_kernel: bool
    estimated_cycles: int | None
    hbm_bytes: int
    times: int = 1


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str


def ops(text: str) -> list[Op]:
    """The ops that the program's entry schedules, loops unrolled into `times`.

    Raises ValueError where the text has no entry computation.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError("The compiled program's text has no ENTRY computation.")
    return _schedule(computations, entry, 1)


def _computations(text: str) -> tuple[dict[str, list[_Line]], str | None]:
    found: dict[str, list[_Line]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _NAME.match(line)):
            current.append(_line(match[1], match[2]))
    return found, entry


def _line(name: str, rest: str) -> _Line:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    type_, tail = rest[:end], rest[end:]
    opcode = _OPCODE.match(tail)
    if not opcode:
        return _Line(name, type_, "", (), rest)
    stop = _closing(tail, opcode.end() - 1)
    return _Line(name, type_, opcode[1], tuple(re.findall(r"%([\w.-]+)", tail[opcode.end() : stop])), rest)


def _closing(text: str, start: int) -> int:
    """One past the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    return len(text)


def _schedule(computations: dict[str, list[_Line]], name: str, times: int) -> list[Op]:
    lines = computations[name]
    types = {line.name: line.type for line in lines}
    scheduled: dict[str, Op] = {}
    result: list[Op] = []
    for line in lines:
        body = _BODY.search(line.text) if line.opcode in ("while", "call") else None
        if body:
            trips = _TRIPS.search(line.text)
            result += _schedule(computations, body[1], times * (int(trips[1]) if trips else 1))
        elif line.opcode and line.opcode not in _FREE and not line.opcode.endswith(("-start", "-done")):
            scheduled[line.name] = op = _op(line, types, times)
            result.append(op)
    for line in lines:
        if line.opcode.endswith("-start"):
            _overlap(line, lines, scheduled, result, times)
    return result


def _op(line: _Line, types: dict[str, str], times: int) -> Op:
    estimate = _ESTIMATE.search(line.text)
    kernel = line.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in line.text
    moved = 0
    if line.opcode != "custom-call":  # a kernel's own DMAs are counted by replay; the others are markers
        moved = sum(_hbm_bytes(types.get(o, "")) for o in line.operands) + _hbm_bytes(line.type)
    return Op(line.name, line.opcode, kernel, int(estimate[1]) if estimate else None, moved, times)


def _overlap(line: _Line, lines: list[_Line], scheduled: dict[str, Op], result: list[Op], times: int) -> None:
    """Charges an asynchronous copy to the op that it feeds, else to the one whose result it carries away."""
    arrays = ARRAY.findall(line.type)[:2]  # destination and source
    if not arrays:
        return
    moved = array_bytes(*arrays[0][:2]) * sum("S(" not in layout for *_, layout in arrays)
    passed_on = {line.name}
    for other in lines:
        if passed_on & set(other.operands):
            if other.name in scheduled:
                scheduled[other.name].hbm_bytes += moved
                return
            passed_on.add(other.name)
    source = next((scheduled[o] for o in line.operands if o in scheduled), None)
    if source:
        source.hbm_bytes += moved
    else:
        result.append(Op(line.name, line.opcode, False, None, moved, times))


def _hbm_bytes(type_: str) -> int:
    return sum(array_bytes(d, dims) for d, dims, layout in ARRAY.findall(type_) if "S(" not in layout)


def array_bytes(dtype: str, dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d) * _bits(dtype) // 8


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    if dtype.startswith("f8"):
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0
