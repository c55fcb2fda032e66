"""Which TPU kernel runs a convolution, and its blocks: what tuning tables and `config=` hold."""

from __future__ import annotations

import dataclasses

KERNELS = ("blocks", "matmul", "depthwise")


@dataclasses.dataclass(frozen=True)
class Config:
    """The kernel and, for "blocks", what `tpu_plan.Plan` says of the other fields; 0 elsewhere.

    >>> Config("blocks", pitch=64, images=1, chunk_rows=14, block_n=256, turns=8)
    Config(kernel='blocks', pitch=64, images=1, chunk_rows=14, block_n=256, turns=8, bands=1)
    """

    kernel: str = "blocks"
    pitch: int = 0
    images: int = 0
    chunk_rows: int = 0
    block_n: int = 0
    turns: int = 1
    bands: int = 1

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}.")
        sizes = (self.pitch, self.images, self.chunk_rows, self.block_n)
        least = 1 if self.kernel == "blocks" else 0
        if not all(isinstance(s, int) and s >= least for s in sizes) or min(self.turns, self.bands) < 1:
            raise ValueError(f"Blocks are positive integers, got {self}.")
