"""The static price of one training step of a Llama-shaped block, quantized against XLA's bfloat16.

`python -m bench.price --suite train [--chip v6e] [--check]`. The block is train_block.py's, the ops and what
they cost train_compile.py's; here they are sorted into parts, compared and held to the target.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import tqdm

from bench import child
from bench.cells import check_chips

# What is trained in which format; v7x has no int8 unit, the others no unit for e4m3.
FORMAT_OF = {"v5e": "int8", "v5p": "int8", "v6e": "int8", "v7x": "fp8"}
TARGET = 1.25
PARTS = ("forward", "dlhs", "drhs", "quantize", "attention", "other")
_ARRAY = re.compile(r"[a-z]\w*\[([\d,]*)\]")
_PROJECTION = re.compile(r"\b(\w+_proj)\b")
_MEMORY_GB = {"v5e": 16, "v5p": 95, "v6e": 32, "v7x": 96}  # of a jax device


@dataclasses.dataclass(frozen=True)
class Step:
    """Price of one program on one chip: microseconds by part, and what it needs of the memory."""

    program: str
    parts: dict[str, float]
    temp_bytes: int

    @property
    def static_us(self) -> float:
        return sum(self.parts.values())

    @property
    def linear_us(self) -> float:
        """All but attention, which both programs compute in bfloat16 by the same kernels."""
        return self.static_us - self.parts["attention"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One chip."""

    chip: str
    bf16: Step
    quantized: Step

    @property
    def ratio(self) -> float:
        """How many times as fast the quantized step is."""
        return self.bf16.static_us / self.quantized.static_us

    @property
    def linear_ratio(self) -> float:
        """The same without attention."""
        return self.bf16.linear_us / self.quantized.linear_us

    @property
    def losing(self) -> dict[str, float]:
        """Parts that take longer when quantized, in microseconds more."""
        more = {part: self.quantized.parts[part] - self.bf16.parts[part] for part in PARTS}
        return {part: us for part, us in more.items() if us > 1}

    def as_json(self) -> dict[str, Any]:
        """Everything, with the ratios written out."""
        steps = {step.program: dataclasses.asdict(step) for step in (self.bf16, self.quantized)}
        return {"chip": self.chip, "ratio": self.ratio, "linear_ratio": self.linear_ratio, "steps": steps}


def part_of(op: dict[str, Any], weights: dict[str, tuple[int, int]], quantized: bool) -> str:
    """Which of `PARTS` an op (`train_compile.TrainOp`) belongs to. `weights`: shapes by projection.

    A matmul is told by what it gives: one with the shape of the weight is its gradient. What XLA fuses into
    one of its own matmuls counts with it.

    >>> op = {"where": "jit(f)/transpose(jvp(Block))/up_proj/dot", "result": "bf16[1,64,32]"}
    >>> op |= {"name": "qwix_matmul_w8a8.1", "is_kernel": True, "is_matmul": False}
    >>> part_of(op, {"up_proj": (64, 32)}, True)
    'drhs'
    """
    where, projection = op["where"], _PROJECTION.search(op["where"])
    if "flash" in where or ("_attention" in where and not projection):
        return "attention"
    if projection is None:
        return "other"
    if not (op["is_kernel"] or op["is_matmul"]) or op["name"].startswith("qwix_quantize"):
        return "quantize" if quantized else "other"
    if "transpose(" not in where:
        return "forward"
    sizes = [
        sorted(int(d) for d in dims.split(",") if d not in ("", "1")) for dims in _ARRAY.findall(op["result"])
    ]
    return "drhs" if sorted(weights[projection[1]]) in sizes else "dlhs"


def step_of(program: str, answer: dict[str, Any], weights: dict[str, tuple[int, int]]) -> Step:
    """Adds the ops of a compiled program up."""
    from bench.train_compile import TrainOp

    parts = dict.fromkeys(PARTS, 0.0)
    for op in answer["ops"]:
        parts[part_of(op, weights, program != "bf16")] += TrainOp(**op).static_us
    return Step(program, parts, answer["temp_bytes"])


def weight_shapes() -> dict[str, tuple[int, int]]:
    """Of the projections of the block that is priced (needs no jax)."""
    hidden, mlp, kv = 4096, 14336, 1024
    wide = dict.fromkeys(("gate_proj", "up_proj"), (hidden, mlp)) | {"down_proj": (mlp, hidden)}
    return (
        wide
        | dict.fromkeys(("q_proj", "o_proj"), (hidden, hidden))
        | dict.fromkeys(("k_proj", "v_proj"), (hidden, kv))
    )


def price(chips: Sequence[str], *, jobs: int = 1, cache: str | None = None) -> list[Comparison]:
    """Prices the step on each chip, quantized and not; `jobs` programs are compiled at a time.

    Raises ValueError for a chip that is not known, RuntimeError where the compiler fails.
    """
    wanted = _programs(chips)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda w: _compiled(w[0], w[1], cache), wanted)
        bar = tqdm.tqdm(found, "training step", len(wanted), unit="program")
        answers = dict(zip(wanted, bar, strict=True))
    step = lambda chip, program: step_of(program, answers[chip, program], weight_shapes())
    return [Comparison(chip, step(chip, "bf16"), step(chip, FORMAT_OF[chip])) for chip in chips]


def plan(chips: Sequence[str]) -> str:
    """What `price` would compile, in words. Raises ValueError for a chip that is not known.

    >>> print(plan(["v6e"]))
    v6e bf16
    v6e int8
    2 programs, each several minutes of compiling unless it was priced before
    """
    programs = _programs(chips)
    last = f"{len(programs)} programs, each several minutes of compiling unless it was priced before"
    return "\n".join([*(" ".join(program) for program in programs), last])


def _programs(chips: Sequence[str]) -> list[tuple[str, str]]:
    check_chips(chips)
    # The bfloat16 programs first: XLA takes the longest to choose blocks for their matmuls.
    return [(chip, "bf16") for chip in chips] + [(chip, FORMAT_OF[chip]) for chip in chips]


def _compiled(chip: str, program: str, cache: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="qwix_train_") as folder:
        arguments = [folder, *([os.path.abspath(cache)] if cache else [])]
        worker = child.Child("bench.train_compile", arguments, os.path.join(folder, "stderr"))
        answer = worker.request({"chip": chip, "program": program})
        if answer is None:
            raise RuntimeError(f"The compiler died over {program} on {chip}: {worker.last_words()}")
        worker.close()
    if "error" in answer:
        raise RuntimeError(f"{program} on {chip}: {answer['error']}")
    return answer


def show(rows: Iterable[Comparison]) -> None:
    """Prints a table: a line for each program, and what the quantized one loses."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="A training step of a Llama-3 8B block, 8192 tokens: static microseconds, nothing was measured"
    )
    for column in ("chip", "step", "static", *PARTS, "faster", "without attention", "GB besides arguments"):
        table.add_column(column, justify="left" if column in ("chip", "step") else "right", no_wrap=True)
    notes = []
    for row in rows:
        for step in (row.bf16, row.quantized):
            last = step is row.quantized
            ratios = (f"{row.ratio:.2f}x", f"{row.linear_ratio:.2f}x") if last else ("", "")
            memory = f"{step.temp_bytes / 1e9:.1f} of {_MEMORY_GB[row.chip]}"
            parts = [f"{step.parts[part]:.0f}" for part in PARTS]
            table.add_row(
                row.chip, step.program, f"{step.static_us:.0f}", *parts, *ratios, memory, end_section=last
            )
        losing = ", ".join(f"{part} by {us:.0f} us" for part, us in row.losing.items())
        notes.append(f"{row.chip}: slower when quantized: {losing or 'nothing'}")
    console = Console(width=max(160, Console().width))
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def failures(rows: Iterable[Comparison]) -> list[str]:
    """What misses the target."""
    return [
        f"{row.chip}: the {row.quantized.program} step is {row.ratio:.2f}x as fast as bfloat16, not {TARGET}x"
        for row in rows
        if row.ratio < TARGET
    ]
