"""Compiles a training step for a TPU that is not attached, and lists what its ops cost. Static.

All ops are priced on one ruler, XLA's as well as kernels: the final bundles of an op, and the bytes that it
moves. tpu_compile.py takes the compiler's own estimates for XLA's ops, which is sound for one small matmul;
with 8192 tokens they are 1.2 to 1.7 times what the bundles of a matmul say and up to five times what an
elementwise pass moves, in either program. An op whose bundles cannot be replayed (a loop steered by data)
keeps the estimate.

Run as `python -m bench.train_compile FOLDER [CACHE]`, by train.py: one request a line on standard input,
{"chip", "program"}; the answer is {"ops", "temp_bytes", "seconds"}.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import re
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

from bench import child, hlo, tpu_compile
from bench.cache import Cache, digest_of_files

_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"calls=%?([\w.-]+)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_READER = ("bundles", "hlo", "replay", "tpu_compile", "train_compile")


@dataclasses.dataclass(frozen=True)
class TrainOp:
    """One op of a compiled step, of all its runs.

    Attributes:
      name, where: in the compiled program; the path of modules and transformations that it comes from.
      result: type of its result, as XLA prints it.
      is_kernel, is_matmul: a Pallas kernel; a fusion of XLA's with a dot in it.
      estimated_us: XLA's own estimate; 0 for a kernel.
      compute_us: by its bundles; None where they cannot be replayed.
      memory_us: the bytes that it moves over the bandwidth.
    """

    name: str
    where: str
    result: str
    is_kernel: bool
    is_matmul: bool
    estimated_us: float
    compute_us: float | None
    memory_us: float

    @property
    def static_us(self) -> float:
        """What it takes: bundles or bytes, whichever is more; never more compute than XLA expects."""
        compute = self.estimated_us if self.compute_us is None else self.compute_us
        if not self.is_kernel and self.compute_us is not None:
            compute = min(compute, self.estimated_us)
        return max(compute, self.memory_us)


def step_ops(chip: str, text: str, dump: str) -> list[TrainOp]:
    """The ops of a compiled program, given its text and the folder of its bundles."""
    from qwix_kernels import chips

    spec, files = chips.chip(chip), tpu_compile.dumped(dump)
    bandwidth = tpu_compile.device_bandwidth(spec)
    lines, matmuls = _lines(text)
    scheduled = hlo.ops(text)
    replayed = {op.name: _replayed(spec, op.name, files[op.name]) for op in scheduled if op.name in files}
    # Equal ops are compiled once: the dump has one of them.
    twins = {_content(lines[name]): cost for name, cost in replayed.items()}
    found = []
    for op in scheduled:
        rest = lines[op.name]
        cost = replayed.get(op.name) or twins.get(_content(rest))
        if op.is_kernel and cost is None:
            raise ValueError(f"No bundles of the kernel {op.name!r} could be replayed.")
        moved = op.hbm_bytes
        if op.opcode == "custom-call" and not op.is_kernel:
            moved = _marked_bytes(rest)
        if cost:
            moved = moved + cost[1] if op.is_kernel else max(moved, cost[1])
        us = lambda cycles, times=op.times: cycles * times / spec.ghz / 1e3
        calls, path = _CALLS.search(rest), _OP_NAME.search(rest)
        found.append(
            TrainOp(
                name=op.name,
                where=path[1] if path else "",
                result=_shapes(rest),
                is_kernel=op.is_kernel,
                is_matmul=bool(calls and calls[1] in matmuls) or op.opcode in ("dot", "convolution"),
                estimated_us=us(op.estimated_cycles or 0),
                compute_us=us(cost[0]) if cost else None,
                memory_us=moved * op.times / bandwidth * 1e6,
            )
        )
    return found


def _lines(text: str) -> tuple[dict[str, str], set[str]]:
    """What stands right of each name, and the computations with a dot in them."""
    lines, matmuls, current = {}, set(), ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[1]
        elif match := _LINE.match(line):
            lines[match[1]] = match[2]
            if " convolution(" in match[2] or " dot(" in match[2]:
                matmuls.add(current)
    return lines, matmuls


def _shapes(rest: str) -> str:
    """The type of a result without its layout."""
    end = rest.index(" ") if not rest.startswith("(") else rest.index(") ")
    return re.sub(r"\{[^}]*\}", "", rest[:end])


def _content(rest: str) -> str:
    """An op without the names of its operands and where it comes from."""
    return re.sub(r"%[\w.-]+|metadata=\{[^}]*\}", "", rest)


def _marked_bytes(rest: str) -> int:
    """A marker of XLA's that joins what asynchronous copies brought: the bytes are those of its result."""
    return sum(hlo.array_bytes(dtype, dims) for dtype, dims, _ in hlo.ARRAY.findall(_shapes(rest)))


def _replayed(spec: Any, name: str, path: str) -> tuple[int, int] | None:
    """(cycles of the slowest core, bytes of all cores); None where the bundles say too little."""
    try:
        cores = [tpu_compile.replay_file(spec, name, path, i) for i in range(tpu_compile.device_cores(spec))]
    except (ValueError, RuntimeError):
        return None
    return max(cost.cycles for cost in cores), sum(cost.hbm_bytes for cost in cores)


def answer(chip: str, program: str, dump: str, cache: Cache | None) -> dict[str, Any]:
    """The ops of one program on one chip, from the cache where the same program was compiled before."""
    from bench import train_block

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what dispatch falls back on is in the ops
        lowered = tpu_compile.lower_for(chip, *train_block.program(program))
    key = _key(chip, lowered.as_text())
    if cache and (known := cache.get(key)):
        return known
    tpu_compile.clear(dump)
    start = time.monotonic()
    compiled = lowered.compile()
    ops = step_ops(chip, compiled.as_text(), dump)
    if keep := os.environ.get("QWIX_TRAIN_HLO"):
        pathlib.Path(keep, f"{chip}_{program}.hlo").write_text(compiled.as_text())
    result: Mapping[str, Any] = {
        "ops": [dataclasses.asdict(op) for op in ops],
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": round(time.monotonic() - start, 1),
    }
    if cache:
        cache.put(key, result)
    return dict(result)


def _key(chip: str, program: str) -> str:
    """Of a compiled program: its text without line numbers, the compiler, and this reader."""
    versions = [importlib.metadata.version(p) for p in ("jax", "jaxlib", "libtpu")]
    here = pathlib.Path(__file__).parent
    reader = digest_of_files(here / f"{name}.py" for name in _READER)
    parts = (chip, *versions, reader, tpu_compile.LOCATIONS.sub("", program))
    return "train " + hashlib.sha256("\0".join(parts).encode()).hexdigest()


def main(folder: str, cache: str | None = None) -> None:
    dump = os.path.join(folder, "dump")
    tpu_compile.prepare(dump)
    known = Cache(cache) if cache else None
    child.serve(lambda request: answer(request["chip"], request["program"], dump, known))


if __name__ == "__main__":
    main(*sys.argv[1:])
