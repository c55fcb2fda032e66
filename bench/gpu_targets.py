"""What kernels for a GPU are held to, from ptxas and the machine code, and a static model of their time.

    target        what must hold
    spills        no bytes of spills, and nothing in local memory
    local         no loads or stores of local memory inside loops
    instruction   the matrix instruction of the scheme, and no other
    tma           operands are loaded by the copy engine
    registers     what the code names fits the budget of its warpgroup, and all threads the register file
    kernel        a kernel of ours runs, not XLA's chain
    price         there is a program

Model, in microseconds, of a grid that shares out the blocks of the result:

    issue     cycles of a scheduler for all turns of the main loop on the busiest multiprocessor; none where
              the code does not say how much a matrix instruction multiplies (Blackwell)
    tensor    the multiplications of all blocks, padding and the last, partial wave included, at the peak
    memory    each operand and the result once through HBM
    around    XLA's ops round the kernel, and the kernel that quantizes rows, by their bytes
    static    the greatest of the first three, plus the last
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from qwix_kernels.chips import Chip

from bench import shapes
from bench.gpu_compile import REGISTERS, Kernel
from bench.gpu_problems import FP4_RATE
from bench.targets import Miss

_LANES = 128  # columns of a block on Blackwell: the lanes of tensor memory
_INSTRUCTIONS = {"h100": "{}GMMA", "b200": "UTC{}MMA"}


@dataclasses.dataclass(frozen=True)
class Row:
    """What is said about one cell. Times are static microseconds."""

    cell: Any  # gpu_problems.Cell or gpu_ragged.Cell
    runs: str
    floor_us: float
    estimate_us: float  # by dispatch's formula
    memory_us: float = 0.0
    tensor_us: float = 0.0
    issue_us: float | None = None
    around_us: float = 0.0
    kernel: Kernel | None = None  # the one that multiplies
    others: int = 0  # kernels besides
    note: str = ""
    error: str = ""

    @property
    def static_us(self) -> float:
        """Of the model; dispatch's estimate where no kernel of ours multiplies."""
        if self.kernel is None:
            return self.estimate_us
        return max(self.issue_us or 0.0, self.tensor_us, self.memory_us) + self.around_us

    @property
    def ratio(self) -> float:
        """To the floor."""
        return self.static_us / self.floor_us

    def as_json(self) -> dict[str, Any]:
        """Everything, with the cell's fields."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("cell"), **fields, "static_us": self.static_us, "ratio": self.ratio}


def instruction(chip: str, scheme: str) -> str:
    """The matrix instruction that a scheme should run on.

    >>> instruction("h100", "w8a8"), instruction("h100", "w4a16_g128"), instruction("b200", "wnvfp4anvfp4")
    ('IGMMA', 'HGMMA', 'UTCOMMA')
    """
    rows = shapes.scheme(scheme).activation
    letter = {"int8": "I", "int4": "I", "bfloat16": "H", "float4_e2m1fn": "O"}.get(rows, "Q")
    return _INSTRUCTIONS[chip].format(letter)


def model(cell: Any, chip: Chip, kernel: Kernel, config: Any) -> tuple[float, float | None]:
    """(tensor, issue) in microseconds: see the module's header. `config`: what dispatch chose."""
    rows = cell.padded_rows(config.block_m)
    block_n = getattr(config, "block_n", _LANES)
    columns = math.ceil(cell.n / block_n) * block_n
    items = rows // config.block_m * (columns // block_n) * getattr(config, "splits", 1)
    busy = min(math.prod(kernel.grid), items)
    waves = math.ceil(items / busy) * busy / items
    products = waves * rows * columns * cell.k
    rate = {"I": chip.int8, "H": chip.bf16, "O": FP4_RATE * chip.fp8}.get(_letter(kernel), chip.fp8)
    tensor = 2 * products * chip.sms / busy / (rate * 1e6)
    loop = kernel.main_loop
    if loop is None or not loop.multiplies:
        return tensor, None
    return tensor, products / busy / loop.multiplies * loop.cycles / (chip.ghz * 1e3)


def _letter(kernel: Kernel) -> str:
    """Of the matrix instruction, what it multiplies."""
    name = max(kernel.matrix, key=lambda name: kernel.matrix[name])
    return name.removeprefix("UTC")[0]


def misses(rows: Sequence[Row]) -> list[Miss]:
    """Every target that a row misses."""
    return [
        Miss(row.cell.chip, row.cell.scheme, row.cell.rows, target, excess, str(row.cell), why)
        for row in rows
        for target, excess, why in _of_one(row)
    ]


def _of_one(row: Row) -> list[tuple[str, float, str]]:
    if row.error:
        return [("price", math.inf, row.error)]
    if row.runs == "xla" or row.kernel is None:
        return [("kernel", 2.0, row.note)]
    k, wanted = row.kernel, instruction(row.cell.chip, row.cell.scheme)
    found = []
    if k.spill_bytes or k.local:
        why = f"{k.spill_bytes} bytes spilled, {k.local} accesses of local memory, a stack of {k.stack_bytes}"
        found.append(("spills", 1.0 + k.spill_bytes + k.local, why))
    if k.local_in_loops:
        found.append(
            ("local", 1.0 + k.local_in_loops, f"{k.local_in_loops} accesses to local memory in loops")
        )
    if set(k.matrix) != {wanted}:
        found.append(("instruction", 2.0, f"{', '.join(k.matrix)} instead of {wanted}"))
    if not k.tma_loads:
        found.append(("tma", 2.0, "no loads by the copy engine"))
    if k.highest_register >= k.register_budget or k.registers * k.threads > REGISTERS:
        used = f"R{k.highest_register} of {k.register_budget}, {k.registers} x {k.threads} at launch"
        found.append(("registers", max(k.highest_register / k.register_budget, 1.001), used))
    return found
