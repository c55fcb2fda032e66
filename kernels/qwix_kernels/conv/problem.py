"""What one quantized convolution is: the arrays a kernel is given and the static facts it is chosen by.

Canonical form, the only one that kernels see, for any number of spatial axes:

    lhs   [N, *spatial, C]     rhs   [*kernel, C / groups, O]     result   [N, *out, O]

    lhs scale   [N or 1, 1, ..., tiles of C]        rhs scale   [1, ..., tiles of C / groups, O or fewer]

A scale's size along each axis divides the values'; entry i covers the i-th run of neighbours. The represented
value is (q - zero_point) * scale; zero_point has the scale's shape and the values' dtype. Padding, and the
holes of a dilated lhs, are real zeros whatever the zero point is. Along each spatial axis

    out = floor((dilated lhs + low + high - dilated kernel) / stride) + 1

Batch groups are feature groups of an lhs whose groups of images stand side by side along C: the caller lays
them out so.

What happens before and after, in float32, as in qwix_kernels.problem:

    q   = convert(x * (1 / scale))             RowQuantize, but a "row" is a whole image (and tile of C)
    out = activation(conv(q, w) * scales + bias), rounded once, or quantized for the next convolution
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from qwix_kernels.problem import Epilogue, Operand, RowQuantize, short_name


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lhs_scale", "bias", "out_scale"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class ConvExtras:
    """The arrays besides lhs and rhs; None for what a problem does not use.

    lhs_scale    [N or 1, 1, ..., tiles of C]  of static quantization of a float lhs
    bias         [O]
    out_scale    [1, ..., 1]  of static quantization of the result
    """

    lhs_scale: jax.Array | None = None
    bias: jax.Array | None = None
    out_scale: jax.Array | None = None


NO_EXTRAS = ConvExtras()


@dataclasses.dataclass(frozen=True)
class Window:
    """The geometry along one spatial axis."""

    size: int  # of the lhs
    kernel: int
    stride: int = 1
    low: int = 0  # padding; negative crops
    high: int = 0
    lhs_dilation: int = 1
    rhs_dilation: int = 1

    @property
    def padded(self) -> int:
        """Of the lhs, dilated and padded."""
        return dilated(self.size, self.lhs_dilation) + self.low + self.high

    @property
    def out(self) -> int:
        """Of the result.

        >>> Window(56, 3, stride=2, low=1, high=1).out
        28
        """
        return max(0, (self.padded - dilated(self.kernel, self.rhs_dilation)) // self.stride + 1)

    @functools.cached_property
    def valid(self) -> np.ndarray:
        """[out, kernel], True where a tap of the kernel meets an element of the lhs.

        >>> Window(3, 3, low=1, high=1).valid.sum(1).tolist()
        [2, 3, 2]
        """
        at = np.arange(self.out)[:, None] * self.stride + np.arange(self.kernel) * self.rhs_dilation
        at = at - self.low
        inside = (at >= 0) & (at < dilated(self.size, self.lhs_dilation))
        return inside & (at % self.lhs_dilation == 0)


def dilated(size: int, by: int) -> int:
    """Length of `size` elements with `by` - 1 holes between neighbours."""
    return 0 if size == 0 else (size - 1) * by + 1


@dataclasses.dataclass(frozen=True)
class ConvProblem:
    """One convolution, described. Hashable: the key of dispatch.

    `lhs.free` is N and `lhs.tile_k` counts along C; `rhs.free` is O and `rhs.tile_k` counts along C / groups.
    """

    windows: tuple[Window, ...]
    features: int  # C
    groups: int
    lhs: Operand
    rhs: Operand
    out_dtype: str
    quantize_lhs: RowQuantize | None = None
    precision: str | None = None
    epilogue: Epilogue | None = None

    @property
    def batch(self) -> int:
        """N."""
        return self.lhs.free

    @property
    def out_features(self) -> int:
        """O."""
        return self.rhs.free

    @property
    def inputs(self) -> int:
        """C / groups."""
        return self.features // self.groups

    @property
    def spatial(self) -> tuple[int, ...]:
        return tuple(w.size for w in self.windows)

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(w.kernel for w in self.windows)

    @property
    def out(self) -> tuple[int, ...]:
        """The spatial axes of the result."""
        return tuple(w.out for w in self.windows)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.batch, *self.out, self.out_features

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def k(self) -> int:
        """Products in one element of the result, padding included."""
        return self.taps * self.inputs

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.inputs == 1

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a matmul of (a strided slice of) the lhs: one tap, no padding, no groups."""
        plain = all(w.kernel == 1 and not (w.low or w.high) and w.lhs_dilation == 1 for w in self.windows)
        return plain and self.groups == 1

    @property
    def lhs_tile(self) -> int:
        """Neighbours along C that share a scale of the lhs, within a group; 0 where those of a group do."""
        tile = self.quantize_lhs.tile_k if self.quantize_lhs else self.lhs.tile_k
        return 0 if not tile or tile % self.inputs == 0 else tile

    @property
    def rhs_tile(self) -> int:
        """Neighbours along C / groups that share a scale of the rhs; 0 where all do."""
        return self.rhs.tile_k % self.inputs if self.rhs.tile_k else 0

    @property
    def fused(self) -> str:
        """What else is computed, for example `bias relu ->int8:0:static`; empty for nothing."""
        e = self.epilogue or Epilogue()
        parts = ["bias"] * e.bias + ([e.activation] if e.activation else [])
        return " ".join(parts + ([f"->{e.quantize}"] if e.quantize else []))

    @property
    def tuning_key(self) -> str:
        """The problem in one line that stays the same between versions: the key of tuning tables."""
        windows = ",".join(
            f"{w.size}k{w.kernel}s{w.stride}d{w.lhs_dilation}x{w.rhs_dilation}p{w.low}:{w.high}"
            for w in self.windows
        )
        lhs = (
            f"{_operand_key(self.lhs)}->{self.quantize_lhs}" if self.quantize_lhs else _operand_key(self.lhs)
        )
        sizes = f"conv n{self.batch} {windows} c{self.features}/{self.groups} o{self.out_features}"
        parts = [sizes, lhs, _operand_key(self.rhs), self.out_dtype, self.precision, self.fused]
        return " ".join(part for part in parts if part)

    @property
    def scheme(self) -> str:
        """The short name, for example `conv 3x3 w8a8`, `depthwise 3x3 s2 w8a16`, `conv 1x1 w4a8_g64`."""
        act = self.quantize_lhs.dtype if self.quantize_lhs else self.lhs.codebook or self.lhs.dtype
        tiles = [t for t in (self.lhs_tile, self.rhs_tile) if t]
        name = f"w{short_name(self.rhs.codebook or self.rhs.dtype)}a{short_name(act)}"
        name += f"_g{min(tiles)}" if tiles else ""
        strides = {w.stride for w in self.windows}
        kind = "depthwise" if self.is_depthwise else "conv"
        stride = "" if strides <= {1} else " s" + "x".join(map(str, sorted(strides)))
        return f"{kind} {'x'.join(map(str, self.kernel))}{stride} {name}"


def _operand_key(x: Operand) -> str:
    name = x.codebook or x.dtype
    if x.is_quantized:
        name += f"[{x.scale_dtype}:{x.tile_free}x{x.tile_k}{',zero' if x.zero_point else ''}]"
    return name


def is_stored_integer(x: Operand, quantize: RowQuantize | None = None) -> bool:
    """Whether an operand is multiplied as integers of at most 8 bits."""
    if quantize:
        return quantize.dtype in ("int8", "int4")
    return x.is_integer and x.bits <= 8 and not jnp.issubdtype(x.dtype, jnp.bool_)
