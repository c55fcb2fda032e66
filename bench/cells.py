"""One line of the price table: what is priced, on which chip, against what. Needs no jax."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from bench import shapes, tpu_compile


@dataclasses.dataclass(frozen=True)
class Cell:
    """[batch, M, K] times [batch, K, N] in one scheme on one chip.

    `config` is a JSON object of block sizes. `baselines`: price XLA's bfloat16 too, and XLA's chain for the
    same op unless `same_op` is off.
    """

    chip: str
    scheme: str
    m: int
    k: int
    n: int
    implementation: str | None = None
    config: str | None = None
    baselines: bool = True
    same_op: bool = True
    batch: int = 1

    def __str__(self) -> str:
        batch = f"{self.batch} x " if self.batch > 1 else ""
        return f"{self.chip} {self.scheme} {batch}{self.m} x {self.k} x {self.n}"


def cells_of(
    chips: Sequence[str],
    schemes: Sequence[str],
    ms: Iterable[int],
    layers: Iterable[tuple[int, int]],
    **options,
) -> list[Cell]:
    """All combinations, checked.

    Raises ValueError for a chip, a scheme or a size that cannot be priced, with what can.

    >>> [str(cell) for cell in cells_of(["v5e"], ["w8a8"], [1, 16], [(256, 128)])]
    ['v5e w8a8 1 x 256 x 128', 'v5e w8a8 16 x 256 x 128']
    """
    check_chips(chips)
    ms, layers = list(ms), list(layers)
    for size in itertools.chain(ms, *layers):
        if size < 1:
            raise ValueError(f"Sizes start at 1, got {size}.")
    for scheme, (k, n) in itertools.product(map(shapes.scheme, schemes), layers):
        if reason := scheme.misfit(k, n):
            raise ValueError(f"{scheme.name}: {reason}.")
    return [
        Cell(chip, scheme, m, k, n, **options)
        for chip, (k, n), m, scheme in itertools.product(chips, layers, ms, schemes)
    ]


def check_chips(chips: Iterable[str]) -> None:
    """Raises ValueError for a chip that cannot be priced, with those that can."""
    for chip in chips:
        if chip not in tpu_compile.TOPOLOGY:
            raise ValueError(f"Unknown chip {chip!r}; chips: {', '.join(tpu_compile.TOPOLOGY)}.")
