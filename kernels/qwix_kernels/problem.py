"""What one quantized matmul is: the arrays a kernel is given and the static facts it is chosen by.

Canonical form, the only one that kernels see:

    lhs   [batch, M, K]      rhs   [batch, K, N]  (or [batch, N, K] when `rhs_transposed`)
    scale has the rank and the axis order of its values; along each axis its size divides the values' size,
    and entry i covers the i-th run of size/len(scale) neighbours. The represented value is (q - zero_point) *
    scale. zero_point has the scale's shape and the values' dtype. A batch of 1 is shared by all batches of
    the other side.

    result  [batch, M, N]

What happens to the lhs before the product and to the sum after it, in this order, all in float32:

    y   = x * rsqrt(mean(x^2) + eps) * weight                      RMSNorm
    q   = convert(y * columns * (1 / scale) + noise)               RowQuantize
    z   = q @ w * scales + scaling * ((x @ a) * mask) @ b + bias      LowRank, of the lhs as it was given
    out = activation(z), or activation(q @ w_gate ... + gate_bias) * z with a gate
    out + residual, rounded once to the output dtype, or quantized for the next matmul (RowQuantize again)

The arrays that this takes are `Extras`, all of rank 3, each with a batch of 1 or the problem's.

`MatmulProblem` says all of it without the arrays, so that dispatch, tuning, pricing and reports need no
device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# QLoRA, appendix E (arXiv 2305.14314): the 16 values of NormalFloat4.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
CODEBOOKS = {"nf4": NF4}
ACTIVATIONS = ("relu", "relu6", "gelu", "gelu_tanh", "silu")
ROW_SCALES = ("float32", "float8_e8m0fnu")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "zero_point"],
    meta_fields=["codebook"],
)
@dataclasses.dataclass(frozen=True)
class Tensor:
    """One operand: quantized (`scale` given) or plain. Shapes: see the module's header."""

    values: jax.Array
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None
    codebook: str | None = None  # a key of CODEBOOKS: the values are indices into it

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


@dataclasses.dataclass(frozen=True)
class Operand:
    """The static facts of a `Tensor`."""

    dtype: str
    batch: int
    free: int  # M of the lhs, N of the rhs
    scale_dtype: str | None = None  # None: not scaled
    tile_free: int = 0  # neighbours along the free axis that share a scale; 0 when not scaled
    tile_k: int = 0  # neighbours along K that share a scale; 0 when not scaled
    zero_point: bool = False
    codebook: str | None = None

    @property
    def is_quantized(self) -> bool:
        return self.scale_dtype is not None

    @property
    def is_integer(self) -> bool:
        """Whether the stored values are integers that stand for themselves (no codebook)."""
        return self.codebook is None and jnp.issubdtype(self.dtype, jnp.integer)

    @property
    def bits(self) -> int:
        """Bits that one stored value takes on a device."""
        return dtype_bits(self.dtype)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "lhs_scale",
        "lhs_columns",
        "lhs_noise",
        "norm_weight",
        "bias",
        "gate",
        "gate_bias",
        "residual",
        "out_scale",
        "low_rank_a",
        "low_rank_b",
        "low_rank_mask",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Extras:
    """The arrays besides lhs and rhs; None for what a problem does not use. A batch of 1 serves all batches.

    lhs_scale    [batch, M or 1, tiles of K]  of static row quantization
    lhs_columns  [batch, 1, K]  what each column is multiplied with before its row is quantized
    lhs_noise    [batch, M or 1, 1]  what is added before rounding, in [-0.5, 0.5)
    norm_weight  [batch, 1, K]
    bias         [batch, 1, N]
    gate         a second rhs, of the same description as the first
    gate_bias    [batch, 1, N]
    residual     [batch, M, N]
    out_scale    [batch, M or 1, tiles of N]  of static quantization of the result
    low_rank_a   [batch, K, rank]  with low_rank_b an update of rhs (and not of the gate)
    low_rank_b   [batch, rank, N]
    low_rank_mask  [batch, M or 1, rank]  what lhs @ low_rank_a is multiplied with
    """

    lhs_scale: jax.Array | None = None
    lhs_columns: jax.Array | None = None
    lhs_noise: jax.Array | None = None
    norm_weight: jax.Array | None = None
    bias: jax.Array | None = None
    gate: Tensor | None = None
    gate_bias: jax.Array | None = None
    residual: jax.Array | None = None
    out_scale: jax.Array | None = None
    low_rank_a: jax.Array | None = None
    low_rank_b: jax.Array | None = None
    low_rank_mask: jax.Array | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The arrays that are there, by name."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: x for name, x in named.items() if x is not None}

    @property
    def of_low_rank(self) -> Extras:
        """Those of `LOW_RANK_EXTRAS`."""
        return Extras(**{name: getattr(self, name) for name in LOW_RANK_EXTRAS})

    @property
    def of_rows(self) -> Extras:
        """Those of `ROW_EXTRAS`."""
        return Extras(**{name: getattr(self, name) for name in ROW_EXTRAS})


NO_EXTRAS = Extras()
# Those that are used before the product.
ROW_EXTRAS = ("lhs_scale", "lhs_columns", "lhs_noise", "norm_weight")
LOW_RANK_EXTRAS = ("low_rank_a", "low_rank_b", "low_rank_mask")


@dataclasses.dataclass(frozen=True)
class RowQuantize:
    """Symmetric quantization row by row: of a float lhs inside the matmul, or of a result for the next one.

    For each row and each run of `tile_k` along it (0: the whole row), in float32:
        scale = max|x| * (1 / bound)  (1 where that is below sqrt of float32's smallest normal)
        q     = convert(x * (1 / scale))   integers: round half to even, then clip; floats: clip, then cast
    The clip is to `limits`.
    The reciprocal of the bound is one float32 constant: compilers turn a division by a constant into that
    product anyway, and the greatest element of a row lies on a rounding boundary, where the last bit shows.

    `static`: the scale is given instead (`Extras.lhs_scale` or `.out_scale`); the rest is the same.

    `columns`: what is quantized is x * `Extras.lhs_columns`, in float32; x alone otherwise.

    `noise`: `Extras.lhs_noise` is added to the integers before they are rounded: uniform in [-0.5, 0.5), it
    makes rounding right on average. It is made outside, from a key, so that a program gives the same numbers
    again, and however its operands are laid out over devices.

    `scale_dtype` "float8_e8m0fnu": scales are powers of two, 2^(floor(log2(max|x|)) - `emax`), as in the OCP
    Microscaling Formats specification v1.0, section 6.3; 1 where that is too small, as above, and NaN where
    max|x| is not finite. They are held in float32 all the same.
    """

    dtype: str
    bound: float
    tile_k: int = 0
    static: bool = False
    scale_dtype: str = "float32"
    columns: bool = False
    noise: bool = False

    @property
    def reciprocal(self) -> float:
        """1 / bound, correctly rounded to float32."""
        return float(np.float32(1) / np.float32(self.bound))

    def __str__(self) -> str:
        return (
            f"{self.dtype}:{self.tile_k}"
            + ":static" * self.static
            + ":e8m0" * (self.scale_dtype != "float32")
            + ":columns" * self.columns
            + ":noise" * self.noise
        )

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest stored value; narrower than the dtype where the bound says so.

        >>> RowQuantize("int8", 127.5).limits, RowQuantize("int8", 31.5).limits
        ((-128.0, 127.0), (-32.0, 31.0))
        """
        if jnp.issubdtype(self.dtype, jnp.integer):
            info = jnp.iinfo(self.dtype)
            low, high = -math.floor(self.bound + 0.5), math.floor(self.bound)
            return float(max(low, info.min)), float(min(high, info.max))
        most = float(jnp.finfo(self.dtype).max)
        return -most, most

    @property
    def emax(self) -> int:
        """The exponent of the greatest stored value.

        >>> RowQuantize("float8_e4m3fn", 448.0).emax, RowQuantize("int8", 127.5).emax
        (8, 6)
        """
        return math.floor(math.log2(self.limits[1]))


@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """Root mean square normalisation of the lhs (arXiv 1910.07467): see the module's header."""

    eps: float = 1e-6
    weight_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class LowRank:
    """An update of the rhs that is never added to it (LoRA, arXiv 2106.09685): see the module's header.

    What is multiplied by it is the lhs before row quantization. Both products are accumulated in float32.
    """

    rank: int
    scaling: float
    a_dtype: str
    b_dtype: str
    mask_dtype: str | None = None  # None: no mask


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What happens to the sum: see the module's header."""

    bias: bool = False
    activation: str | None = None  # one of ACTIVATIONS
    gate: bool = False
    gate_bias: bool = False
    residual: str | None = None  # its dtype
    quantize: RowQuantize | None = None  # `tile_k` counts along N, the K of the next matmul

    @property
    def scales_out(self) -> bool:
        """Whether scales are a second result."""
        return self.quantize is not None and not self.quantize.static


@dataclasses.dataclass(frozen=True)
class MatmulProblem:
    """One matmul, described. Hashable: the key of dispatch and tuning."""

    m: int
    k: int
    n: int
    lhs: Operand
    rhs: Operand
    out_dtype: str
    rhs_transposed: bool = False
    quantize_lhs: RowQuantize | None = None
    precision: str | None = None  # None or "default": the unit's own; "high"/"highest" as for jax.lax.dot
    norm: RMSNorm | None = None
    epilogue: Epilogue | None = None
    low_rank: LowRank | None = None

    @property
    def batch(self) -> int:
        return max(self.lhs.batch, self.rhs.batch)

    @property
    def products(self) -> int:
        """How many weights the rows are multiplied with."""
        return 2 if self.epilogue and self.epilogue.gate else 1

    @property
    def fused(self) -> str:
        """What else is computed, for example `rms_norm bias gate silu ->int8:128`; empty for nothing."""
        e, parts = self.epilogue or Epilogue(), ["rms_norm"] if self.norm else []
        if self.low_rank:
            parts.append(f"low_rank:{self.low_rank.rank}" + ":mask" * bool(self.low_rank.mask_dtype))
        parts += ["bias"] * e.bias + ["gate"] * e.gate + ["gate_bias"] * e.gate_bias
        parts += [e.activation] if e.activation else []
        parts += [f"residual:{e.residual}"] if e.residual else []
        return " ".join(parts + ([f"->{e.quantize}"] if e.quantize else []))

    @property
    def scheme(self) -> str:
        """The short name of the scheme, for example `w4a16_g128`, `wf8af8`, `wnf4a16_g64`, `w8a8`."""
        act = self.quantize_lhs.dtype if self.quantize_lhs else self.lhs.codebook or self.lhs.dtype
        tiles = [t for t in (self.rhs.tile_k, self.lhs.tile_k) if 0 < t < self.k]
        name = f"w{short_name(self.rhs.codebook or self.rhs.dtype)}a{short_name(act)}"
        return name + (f"_g{min(tiles)}" if tiles else "")


def short_name(dtype: str) -> str:
    """The dtype in the name of a scheme.

    >>> short_name("float8_e5m2"), short_name("bfloat16"), short_name("uint4")
    ('f8', '16', '4')
    """
    if dtype.startswith("float8"):
        return "f8"
    if dtype.startswith("float4"):
        return "f4"
    return {"bfloat16": "16", "float16": "16", "float32": "32"}.get(dtype) or dtype.removeprefix(
        "u"
    ).removeprefix("int")


def dtype_bits(dtype: str) -> int:
    """Bits per element on a device (`np.dtype.itemsize` says 8 for 4-bit types).

    >>> dtype_bits("int4"), dtype_bits("float8_e4m3fn"), dtype_bits("bfloat16")
    (4, 8, 16)
    """
    d = jnp.dtype(dtype)
    if jnp.issubdtype(d, jnp.integer):
        return jnp.iinfo(d).bits
    if jnp.issubdtype(d, jnp.floating):
        return jnp.finfo(d).bits
    return 8 * np.dtype(d).itemsize
