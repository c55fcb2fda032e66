"""What a compiled program consists of, from its HLO text: instructions, kernels, and work that XLA puts round
the kernels.

A weight that lies in memory as a kernel reads it goes from the program's parameter straight into the kernel,
or through an asynchronous copy (`copy-start`, `copy-done`) that prefetches it as it is. Everything else with
as many elements as the weight, a copy into another layout above all, is work that is done again in every
call.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
import re
from collections.abc import Collection

_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[a-z][\w-]*)\("
)
_ARRAY = re.compile(r"^([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_BODY = re.compile(r'custom_call_target="tpu_custom_call".*?backend_config=(?P<config>.*)$')
# Names, sizes or aliases of values; nothing runs.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "opt-barrier")
_ASYNC = ("copy-start", "copy-done", "async-start", "async-done", "slice-start", "slice-done")
RELAYOUTS = ("copy", "transpose", "reshape", "convert", "pad", "concatenate", "bitcast-convert", "fusion")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO. `elements` is 0 for a tuple."""

    name: str
    opcode: str
    dtype: str
    elements: int
    text: str


def instructions(text: str) -> list[Instruction]:
    """All instructions of all computations, fused ones too.

    >>> [i.opcode for i in instructions("  ROOT %a.1 = s8[2,3]{1,0} convert(%b), metadata={}")]
    ['convert']
    """
    found = []
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match:
            array = _ARRAY.match(match["type"])
            dtype, dims = array.groups() if array else ("", None)
            size = 0 if dims is None else math.prod(int(d) for d in dims.split(",") if d)
            found.append(Instruction(match["name"], match["opcode"], dtype, size, line.strip()))
    return found


def executed(text: str) -> int:
    """How many instructions do something: a machine-independent measure of what the compiler had to do."""
    return sum(i.opcode not in _FREE + _ASYNC for i in instructions(text))


def kernels(text: str) -> collections.Counter[str]:
    """Pallas kernels: how often each distinct one is called."""
    bodies = (_BODY.search(i.text) for i in instructions(text) if i.opcode == "custom-call")
    return collections.Counter(hashlib.sha256(b["config"].encode()).hexdigest()[:12] for b in bodies if b)


def relayouts(text: str, sizes: Collection[int]) -> list[str]:
    """The instructions that make a new array of as many elements as one of `sizes`, and are no kernel.

    Give the sizes of weights, and choose activations of other sizes.

    >>> relayouts("  %a = s8[4,8]{0,1} copy(%w)" + chr(10) + "  %b = s8[32]{0} bitcast(%a)", {32})
    ['a = s8[4,8]{0,1} copy(%w)']
    """
    wanted = set(sizes)
    return [
        i.text.removeprefix("ROOT ").removeprefix("%")
        for i in instructions(text)
        if i.opcode in RELAYOUTS and i.elements in wanted
    ]
