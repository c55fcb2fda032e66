"""What the tuner asks of an op: its problems, its candidates, and who prices them. Starts no process.

A candidate's kind is what an estimate tends to get wrong as a whole. The best of every kind comes before the
second best of any.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from qwix_kernels import chips
from qwix_kernels.chips import Chip
from qwix_kernels.conv import cost
from qwix_kernels.conv import tpu as conv_tpu
from qwix_kernels.matmul import tpu_estimate
from qwix_kernels.ragged_matmul import tpu_estimate as ragged_tpu

from bench import conv_problems, problems, ragged_problems, shapes, tune_space
from bench.cells import Cell
from bench.shapes import ConvLayer, RaggedLayer
from bench.tpu_compile import OpCost, device_cores
from bench.tune_space import Candidate


class TunedOp(Protocol):
    """One op whose kernel takes blocks.

    Attributes:
      name: as `--op` has it.
      folder: of the kernel, in qwix_kernels.
      sizes: the fields of a config that a step of the search changes, one at a time.
    """

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> str: ...

    @property
    def sizes(self) -> tuple[str, ...]: ...

    def problem(self, cell: Any) -> Any:
        """What dispatch chooses by."""
        ...

    def heuristic(self, problem: Any, chip: Chip) -> Any:
        """The blocks that the formula chooses. Raises NotImplementedError where the kernel runs no such."""
        ...

    def space(self, problem: Any, chip: Chip) -> tuple[Candidate, ...]:
        """All that fit and are not hopeless, the lowest estimate first."""
        ...

    def ramp_us(self, problem: Any, chip: Chip, config: Any) -> float:
        """What a static price leaves out."""
        ...

    def kind(self, config: Any, space: Sequence[Candidate]) -> Any:
        """See the module's header."""
        ...

    def fields(self, cell: Any) -> dict[str, Any]:
        """What an entry says of its problem, besides the key."""
        ...


class Matmul:
    """`qwix_kernels.matmul`, of `bench.cells.Cell`s."""

    name, folder, sizes = "matmul", "matmul", ("block_m", "block_n", "block_k")

    def problem(self, cell: Cell) -> Any:
        return problems.problem(shapes.scheme(cell.scheme), cell.m, cell.k, cell.n, cell.batch)

    def heuristic(self, problem: Any, chip: Chip) -> Any:
        tpu_estimate.check(problem, chip)
        return tpu_estimate.heuristic_config(problem, chip)

    def space(self, problem: Any, chip: Chip) -> tuple[Candidate, ...]:
        return tune_space.space(problem, chip)

    def ramp_us(self, problem: Any, chip: Chip, config: Any) -> float:
        return tune_space.ramp_us(problem, chip, config)

    def kind(self, config: Any, space: Sequence[Candidate]) -> Any:
        most_k = max(c.config.block_k for c in space)
        return config.strategy, config.block_k == most_k, config.block_n > config.block_m

    def fields(self, cell: Cell) -> dict[str, Any]:
        return {"scheme": cell.scheme}


@dataclasses.dataclass(frozen=True)
class LayerCell:
    """One layer of an op in one scheme on one chip. `config` is a JSON object of block sizes."""

    op: str
    chip: str
    scheme: str
    layer: ConvLayer | RaggedLayer
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.chip} {self.scheme} {self.layer}"


class _OfLayers:
    """An op whose cells are layers of bench/shapes.py."""

    def fields(self, cell: LayerCell) -> dict[str, Any]:
        return {"scheme": cell.scheme, "layer": dataclasses.asdict(cell.layer)}

    def ramp_us(self, problem: Any, chip: Chip, config: Any) -> float:
        return 0.0


class Conv(_OfLayers):
    """`qwix_kernels.conv`."""

    name, folder, sizes = "conv", "conv", ("pitch", "images", "chunk_rows", "block_n", "turns", "bands")

    def problem(self, cell: LayerCell) -> Any:
        layer: Any = cell.layer
        return conv_problems.problem(layer, cell.scheme)

    def heuristic(self, problem: Any, chip: Chip) -> Any:
        conv_tpu.check(problem, chip)
        return conv_tpu.heuristic_config(problem, chip)

    def estimate_us(self, problem: Any, chip: Chip, config: Any) -> float:
        return conv_tpu.estimate(problem, chip, config).static_us

    def space(self, problem: Any, chip: Chip) -> tuple[Candidate, ...]:
        configs = [self.heuristic(problem, chip), *conv_tpu.configs(problem, chip)]
        return tune_space.ordered(configs, lambda config: self.estimate_us(problem, chip, config))

    def floor_us(self, cell: LayerCell, chip: Chip) -> float:
        return max(cost.floor(self.problem(cell), chip)) / device_cores(chip)

    def kind(self, config: Any, space: Sequence[Candidate]) -> Any:
        return config.kernel, config.turns > 1, config.bands


class Ragged(_OfLayers):
    """`qwix_kernels.ragged_matmul`: gmm."""

    name, folder = "ragged", "ragged_matmul"
    sizes = ("block_m", "block_n", "block_k", "part")

    def problem(self, cell: LayerCell) -> Any:
        layer: Any = cell.layer
        return ragged_problems.problem(shapes.scheme(cell.scheme), layer)

    def heuristic(self, problem: Any, chip: Chip) -> Any:
        ragged_tpu.check(problem, chip)
        return ragged_tpu.heuristic_config(problem, chip)

    def estimate_us(self, problem: Any, chip: Chip, config: Any) -> float:
        return ragged_tpu.estimate(problem, chip, config).static_us

    def space(self, problem: Any, chip: Chip) -> tuple[Candidate, ...]:
        configs = [self.heuristic(problem, chip), *ragged_tpu.configs(problem, chip)]
        return tune_space.ordered(configs, lambda config: self.estimate_us(problem, chip, config))

    def floor_us(self, cell: LayerCell, chip: Chip) -> float:
        layer: Any = cell.layer
        return max(ragged_problems.floor(shapes.scheme(cell.scheme), layer, chip))

    def kind(self, config: Any, space: Sequence[Candidate]) -> Any:
        return config.strategy, config.part == config.block_m, config.block_n > config.block_m


OF_LAYERS = {op.name: op for op in (Conv(), Ragged())}
OPS: dict[str, TunedOp] = {"matmul": Matmul(), **OF_LAYERS}


def layer_cells(
    op: str, chips: Iterable[str], schemes: Iterable[str], models: Sequence[str] | None
) -> tuple[list[LayerCell], list[str]]:
    """(cells of layers of models, why some are left out). Raises ValueError for names that are not known.

    >>> cells, _ = layer_cells("conv", ["v6e"], ["w8a8_static"], ["canonical"])
    >>> [str(cell) for cell in cells]
    ['v6e w8a8_static 3x3 8x56x56x256 -> 256']
    """
    known: Any = {"conv": shapes.CONVOLUTIONS, "ragged": shapes.RAGGED}[op]
    for model in models or ():
        if model not in known:
            raise ValueError(f"Unknown model {model!r}; models with {op}: {', '.join(known)}.")
    for name in schemes:
        if op == "conv" and name not in shapes.CONV_SCHEMES:
            raise ValueError(f"Unknown scheme {name!r} of conv; known: {', '.join(shapes.CONV_SCHEMES)}.")
        if op == "ragged":
            shapes.scheme(name)
    cells, left_out = [], []
    for layer in (layer for model in models or known for layer in known[model]):
        if getattr(layer, "sizes", "balanced") != "balanced":
            continue  # a kernel is not told the sizes: one problem with the balanced one
        for name in schemes:
            reason = shapes.scheme(name).misfit(layer.k, layer.n) if op == "ragged" else None
            if reason:
                left_out.append(f"{name} {layer}: {reason}")
            else:
                cells += [LayerCell(op, chip, name, layer) for chip in chips]
    return cells, left_out


Ask = Callable[[dict[str, Any]], dict[str, Any]]


def answer(cell: LayerCell, ask: Ask) -> dict[str, Any]:
    """The price of one cell with its config, by a compiling process that `ask` talks to."""
    op, chip = OF_LAYERS[cell.op], chips.chip(cell.chip)
    fields = json.loads(cell.config or "null")
    request = {"chip": cell.chip, "scheme": cell.scheme, "config": fields, "program": "kernel"}
    said = ask(request | {"layer": dataclasses.asdict(cell.layer)})
    what = dataclasses.asdict(cell)
    if "error" in said:
        return what | {"error": said["error"]}
    problem = op.problem(cell)
    config = type(op.heuristic(problem, chip))(**fields)
    static, floor = sum(OpCost(**one).static_us for one in said["ops"]), op.floor_us(cell, chip)
    ratios = dict.fromkeys(("ratio_to_floor", "ratio_to_best_floor"), static / floor)
    estimate = op.estimate_us(problem, chip, config)
    return what | {"static_us": static, "estimate_us": estimate, "floor_us": floor, **ratios}
