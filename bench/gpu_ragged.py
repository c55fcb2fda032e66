"""The grouped matmuls that are compiled for a GPU: ragged_problems.py's, with matrices [G, N, K]."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from qwix_kernels import ragged_matmul
from qwix_kernels.chips import Chip
from qwix_kernels.ragged_matmul import GmmProblem

from bench import gpu_problems, problems, ragged_problems, shapes
from bench.shapes import RaggedLayer, Scheme

IMPLEMENTATIONS = ("mosaic_gpu", "xla")
SCHEMES = ("w8a8", "w4a16_g128", "w8a16", "wf8af8", "wf8af8_b128", "w4a8")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One layer in one scheme on one GPU."""

    chip: str
    scheme: str
    layer: RaggedLayer

    def __str__(self) -> str:
        return f"{self.chip} {self.scheme} {self.layer}"

    @property
    def k(self) -> int:
        return self.layer.k

    @property
    def n(self) -> int:
        return self.layer.n

    @property
    def rows(self) -> str:
        """The class that a miss is listed under."""
        return f"ragged {self.layer.name} {self.layer.sizes}"

    @property
    def request(self) -> tuple[str, dict[str, Any]]:
        """What gpu_compile.py is asked."""
        return "bench.gpu_ragged:gmm", {"scheme": self.scheme, "layer": dataclasses.asdict(self.layer)}

    @property
    def implementation(self) -> tuple[str, ...]:
        """What may run: a kernel that dispatch takes on request only is priced all the same."""
        return IMPLEMENTATIONS

    @property
    def problem(self) -> GmmProblem:
        return problem(shapes.scheme(self.scheme), self.layer)

    def floor(self, chip: Chip) -> tuple[float, float]:
        """(compute, memory) in microseconds, of the rows and the matrices that there are."""
        return ragged_problems.floor(shapes.scheme(self.scheme), self.layer, chip)

    @property
    def quantized_bytes(self) -> int:
        """What a pass that quantizes the rows reads and writes."""
        return gpu_problems.row_bytes(shapes.scheme(self.scheme), self.layer.rows, self.k)

    def padded_rows(self, block: int) -> int:
        """Rows that blocks of `block` compute, if each block is of one group."""
        return sum(-(-size // block) * block for size in self.layer.group_sizes())


def cells(chip: str, schemes: Sequence[str] = ()) -> list[Cell]:
    """Every scheme on the canonical layer, w8a8 and w4a16_g128 on all balanced ones, w8a8 on the others.

    Raises ValueError for a scheme that is not one.

    >>> len(cells("h100")), str(cells("h100")[0])
    (19, 'h100 w8a8 canonical 8 experts, 4096 x 2048 x 1408')
    """
    for name in schemes:
        shapes.scheme(name)
    found = []
    for model, layers in shapes.RAGGED.items():
        for layer in layers:
            names = SCHEMES if model == "canonical" and layer.sizes == "balanced" else SCHEMES[:2]
            names = SCHEMES[:1] if layer.sizes != "balanced" else names
            found += [Cell(chip, name, layer) for name in names if not schemes or name in schemes]
    return found


def operands(scheme: Scheme, layer: RaggedLayer) -> tuple[Any, ...]:
    """Activations [M, K], the matrices [G, N, K] and the group sizes, without data."""
    lhs, rhs, sizes = ragged_problems.operands(scheme, layer)
    turned = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], *x.shape[:0:-1]), x.dtype), rhs)
    return lhs, turned, sizes


def problem(scheme: Scheme, layer: RaggedLayer) -> GmmProblem:
    """The description that dispatch chooses by."""
    return ragged_matmul.gmm_problem_of(*operands(scheme, layer), **_options(scheme))


def gmm(scheme: str, layer: dict[str, Any]):
    """(function, shapes): what gpu_compile.py is asked to compile."""
    named, of = shapes.scheme(scheme), RaggedLayer(**layer)
    options = _options(named) | {"implementation": IMPLEMENTATIONS}
    return lambda *given: ragged_matmul.gmm(*given, **options), operands(named, of)


def _options(scheme: Scheme) -> dict[str, Any]:
    how = problems.row_quantize(scheme)
    return {"quantize_lhs": how, "rhs_transposed": True, "out_dtype": jnp.bfloat16}
