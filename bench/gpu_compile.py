"""Compiles a function for a GPU that is not attached, and reads what is said of its kernels. Static.

jax compiles for a described GPU on any machine that has its CUDA plugin and ptxas. Mosaic prints what ptxas
says of each Pallas kernel, its machine code (where nvdisasm is at hand) and how it is launched, on standard
output, and only when the kernel is compiled: an equal kernel in the same process prints nothing again.

Two GPUs' devices compare equal, so jit's caches would hand the second chip the first one's program; and an
instruction that the chip lacks aborts the process. So there is one child process per chip, which lives as
long as its `Compiler`:

    with Compiler("h100") as compiler:
        program = compiler.compile("bench.gpu_problems:matmul", scheme="w8a8", m=64, k=4096, n=4096)

where the function is called in the child and returns (function, its arguments' shapes).
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from bench import child, gpu_sass
from bench.gpu_sass import Loop

CHIPS = ("h100", "b200")
REGISTERS = 65536  # 32-bit ones of a multiprocessor
_FUNCTION = re.compile(r"ptxas info +: Compiling entry function '(\S+)' for '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SECTION = re.compile(r"^//-+ \.text\.(\S+) -+$", re.M)
# Grid, cluster, block, then the bytes of shared memory.
_LAUNCH = re.compile(r"call \w+ @mosaic_gpu_(?:build|launch)_kernel\w*\(ptr %\w+, " + r"i32 (\d+), " * 10)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compilers say of one kernel. Bytes are of a thread, shared memory of a block of threads."""

    name: str
    target: str  # "sm_90a"
    registers: int  # of a thread at launch
    budgets: tuple[int, ...]  # of its warpgroups' threads, where they set their own
    highest_register: int
    stack_bytes: int
    spill_bytes: int
    grid: tuple[int, int, int]
    cluster: tuple[int, int, int]
    threads: int
    shared_bytes: int
    matrix: Mapping[str, int]  # matrix instructions by name
    tma_loads: int
    tma_stores: int
    local: int  # loads and stores of local memory
    local_in_loops: int
    instructions: int
    main_loop: Loop | None  # the innermost with matrix instructions

    @property
    def register_budget(self) -> int:
        """Registers that a thread may have: its warpgroup's own, else as many as all threads can have."""
        return max(self.budgets, default=min(255, REGISTERS // self.threads))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its kernels, and XLA's ops round them, with the bytes that each moves."""

    chip: str
    kernels: tuple[Kernel, ...]
    around: tuple[tuple[str, int], ...]

    @property
    def around_bytes(self) -> int:
        return sum(moved for _, moved in self.around)


class Compiler(contextlib.AbstractContextManager):
    """A child process that compiles for `chip`, replaced where the compiler takes it down.

    Raises ValueError for a chip that is not in CHIPS.
    """

    def __init__(self, chip: str):
        if chip not in CHIPS:
            raise ValueError(f"Cannot compile for {chip!r}; GPUs known here: {', '.join(CHIPS)}.")
        self._chip = chip
        self._folder = tempfile.TemporaryDirectory(prefix="qwix_gpu_")
        self._child: child.Child | None = None

    def compile(self, what: str, **arguments: Any) -> Program:
        """The program of `what`, "module:function", called with these arguments in the child.

        Raises RuntimeError with what the function or the compiler says where there is none.
        """
        if self._child is None:
            log = os.path.join(self._folder.name, "stderr")
            self._child = child.Child("bench.gpu_worker", [self._chip, self._folder.name], log)
        answer = self._child.request({"what": what, "arguments": arguments})
        if answer is None:
            answer = {"error": f"the compiler's process died: {self._child.last_words()}"}
            self._child.close()
            self._child = None
        if "error" in answer:
            raise RuntimeError(f"{self._chip} {what} {arguments}: {answer['error']}")
        return program_of(answer)

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.close()
        self._folder.cleanup()


@functools.cache
def _lasting(chip: str) -> Compiler:
    compiler = Compiler(chip)
    atexit.register(compiler.__exit__)
    return compiler


def compiled(chip: str, what: str, **arguments: Any) -> Program:
    """As `Compiler.compile`, by one child per chip that lives as long as this process."""
    return _lasting(chip).compile(what, **arguments)


def program_of(answer: Mapping[str, Any]) -> Program:
    """The inverse of `dataclasses.asdict`, through JSON."""

    def kernel(fields: dict[str, Any]) -> Kernel:
        loop: dict[str, Any] | None = fields["main_loop"]
        changed: dict[str, Any] = {k: tuple(fields[k]) for k in ("budgets", "grid", "cluster")}
        changed["main_loop"] = Loop(**loop) if loop else None
        return Kernel(**(fields | changed))

    around = tuple((name, moved) for name, moved in answer["around"])
    return Program(answer["chip"], tuple(map(kernel, answer["kernels"])), around)


def kernels(text: str) -> tuple[Kernel, ...]:
    """The kernels that the text which Mosaic printed is about, in the order of their compilation.

    Raises ValueError where the three parts, ptxas's, the code and the launch, are not there for each.
    """
    said = list(_FUNCTION.finditer(text))
    codes, launches = list(_SECTION.finditer(text)), list(_LAUNCH.finditer(text))
    if not len(said) == len(codes) == len(launches):
        raise ValueError(
            f"{len(said)} kernels by ptxas, {len(codes)} with code, {len(launches)} with a launch; "
            "nvdisasm (package nvidia-cuda-nvdisasm) must be installed."
        )
    starts = [*(match.start() for match in said), len(text)]
    return tuple(
        _kernel(text[match.start() : end], match, text[code.end() : end], launch)
        for match, end, code, launch in zip(said, starts[1:], codes, launches, strict=True)
    )


def _kernel(text: str, said: re.Match[str], section: str, launch: re.Match[str]) -> Kernel:
    frame, used = _FRAME.search(text), _USED.search(text)
    if not frame or not used:
        raise ValueError(f"ptxas says nothing of the registers of {said[1]!r}: {text[:300]}")
    sizes = [int(size) for size in launch.groups()]
    code = gpu_sass.Code(section)
    return Kernel(
        name=said[1],
        target=said[2],
        registers=int(used[1]),
        budgets=code.register_budgets(),
        highest_register=code.highest_register(),
        stack_bytes=int(frame[1]),
        spill_bytes=int(frame[2]) + int(frame[3]),
        grid=(sizes[0], sizes[1], sizes[2]),
        cluster=(sizes[3] or 1, sizes[4] or 1, sizes[5] or 1),
        threads=sizes[6] * sizes[7] * sizes[8],
        shared_bytes=sizes[9],
        matrix=code.matrix(),
        tma_loads=code.count("UTMALDG"),
        tma_stores=code.count("UTMASTG", "UTMAREDG"),
        local=code.count("LDL", "STL"),
        local_in_loops=code.local_in_loops(),
        instructions=len(code.instructions),
        main_loop=code.main_loop(),
    )
