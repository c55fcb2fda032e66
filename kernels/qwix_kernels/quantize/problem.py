"""What the quantization of one array is.

    x       [batch, rows, columns]
    scale   [batch, 1, columns], one for each column; or [batch, rows, 1], one for each row

    scale   = max|x| * (1 / bound) over the column (row), in float32; 1 where that is below sqrt of float32's
              smallest normal; kept where it and its reciprocal are finite in `x_dtype`, and rounded to that
    values  = convert(x * (1 / scale))   integers: round half to even, then clip; floats: clip, then cast

This is what XLA makes of `qwix.quantize`, to the bit: a division by a constant, or by what is broadcast,
becomes a product with the reciprocal. (`problem.RowQuantize`, by which a matmul quantizes on the way, keeps
its scales in float32.)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from qwix_kernels.problem import RowQuantize, dtype_bits

Axis = Literal["rows", "columns"]


@dataclasses.dataclass(frozen=True)
class QuantizeProblem:
    """One quantization, described. Hashable: the key of dispatch."""

    batch: int
    rows: int
    columns: int
    x_dtype: str
    dtype: str
    bound: float  # what max|x| maps to
    scale_of: Axis  # what has a scale of its own

    @property
    def scheme(self) -> str:
        """A short name, for example `quantize_int8_columns`."""
        return f"quantize_{self.dtype}_{self.scale_of}"

    @property
    def tuning_key(self) -> str:
        """See `tuning.key`."""
        return f"b{self.batch} {self.rows}x{self.columns} {self.x_dtype}->{self.dtype} by {self.scale_of}"

    @property
    def scale_shape(self) -> tuple[int, int, int]:
        if self.scale_of == "columns":
            return self.batch, 1, self.columns
        return self.batch, self.rows, 1

    @property
    def how(self) -> RowQuantize:
        """The dtype with its limits. `static`: either end of them may be reached."""
        return RowQuantize(self.dtype, self.bound, static=True)

    @property
    def bytes(self) -> tuple[int, int]:
        """Device bytes of x, and of the values."""
        size = self.batch * self.rows * self.columns
        return size * dtype_bits(self.x_dtype) // 8, size * dtype_bits(self.dtype) // 8
