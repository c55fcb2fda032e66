"""What gets priced and timed: the schemes' names, and the shapes of layers in real models.

Needs no jax. Tests, benchmarks and the tuner share this file.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping

# Stored types. Block formats: (values, neighbours along K that share a scale, scale).
WEIGHTS: Mapping[str, str] = {
    "4": "int4",
    "8": "int8",
    "f8": "float8_e4m3fn",
    "f4": "float4_e2m1fn",
    "nf4": "nf4",
}
ACTIVATIONS: Mapping[str, str] = {"4": "int4", "8": "int8", "f8": "float8_e4m3fn", "16": "bfloat16"}
BLOCK_FORMATS: Mapping[str, tuple[str, int, str]] = {
    "mxfp8": ("float8_e4m3fn", 32, "float8_e8m0fnu"),
    "mxfp4": ("float4_e2m1fn", 32, "float8_e8m0fnu"),
    "nvfp4": ("float4_e2m1fn", 16, "float8_e4m3fn"),
}
GRAMMAR = (
    f"w{{{','.join([*WEIGHTS, *BLOCK_FORMATS])}}}a{{{','.join([*ACTIVATIONS, *BLOCK_FORMATS])}}}, then "
    "_g{tile} where tile neighbours along K share a scale, or _b{tile} where tile x tile weights do, _z for "
    "weights with zero points, _static for activations that come quantized: w8a8, w4a16_g128, w8a8_b128, "
    "wnf4a16_g64, wmxfp4a16, w4a16_g128_z, w8a8_static"
)
_SCHEME = re.compile(
    r"w(nf4|mxfp8|mxfp4|nvfp4|f8|f4|4|8)a(mxfp8|mxfp4|nvfp4|f8|16|8|4)"
    r"(?:_([gb])([1-9]\d*))?(_z)?(_static)?"
)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Weight and activation types, and what shares a scale.

    `tile`: neighbours along K that share a scale, of the weight and of quantized activations; 0 for the whole
    of K. `tile_n`: neighbours along N of the weight that do. Activations other than bfloat16 are quantized
    from bfloat16 on the way, row by row (and tile by tile where there are tiles), inside the op; `static`
    ones come quantized like that. `weight_scale` and `row_scale` are the dtypes of the scales.
    """

    name: str
    weight: str
    activation: str
    tile: int = 0
    tile_n: int = 1
    zero_point: bool = False
    static: bool = False
    weight_scale: str = "bfloat16"
    row_scale: str = "float32"

    @property
    def is_weight_only(self) -> bool:
        return self.activation == "bfloat16"

    def misfit(self, k: int, n: int) -> str | None:
        """Why a weight [K, N] cannot have this scheme, or None.

        >>> scheme("w8a8_g128").misfit(576, 1536)
        'the tile 128 does not divide K=576'
        """
        for name, size, tile in (("K", k, self.tile or k), ("N", n, self.tile_n)):
            if size % tile:
                return f"the tile {tile} does not divide {name}={size}"
        return None


def scheme(name: str) -> Scheme:
    """The scheme called `name`.

        w{weight}a{activation}   4, 8: integers; f8: float8_e4m3fn; f4: float4_e2m1fn; nf4: NormalFloat4;
                                 16: bfloat16; mxfp8, mxfp4 (tiles of 32), nvfp4 (tiles of 16)
        _g{tile}                 `tile` neighbours along K share a scale
        _b{tile}                 `tile` x `tile` weights share one; activations `tile` neighbours along K
        _z                       weights have zero points, one beside each scale
        _static                  activations come quantized

    Raises ValueError, with the grammar, for anything else.

    >>> scheme("w4a16_g128")
    Scheme(name='w4a16_g128', weight='int4', activation='bfloat16', tile=128, tile_n=1, zero_point=False, \
static=False, weight_scale='bfloat16', row_scale='float32')
    >>> scheme("wf8af8").is_weight_only, scheme("wmxfp4a16").tile, scheme("w8a8_b128").tile_n
    (False, 32, 128)
    >>> scheme("w3a16")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: Unknown scheme 'w3a16'; schemes are ...
    """
    match = _SCHEME.fullmatch(name)
    reason = None if match else "schemes are " + GRAMMAR
    if match:
        weight, activation, kind, tile, zero, static = match.groups()
        formats = {x: BLOCK_FORMATS[x] for x in (weight, activation) if x in BLOCK_FORMATS}
        tiles = {t for _, t, _ in formats.values()} | ({int(tile)} if tile else set())
        if len(tiles) > 1 or (formats and tile):
            reason = "a block format has its own tile, the same on both sides"
        elif zero and not weight.isdigit():
            reason = "only integer weights have zero points"
        elif static and activation == "16":
            reason = "bfloat16 activations are not quantized"
        else:
            values, _, scale = formats.get(weight) or (WEIGHTS[weight], 0, "bfloat16")
            rows, _, row_scale = formats.get(activation) or (ACTIVATIONS[activation], 0, "float32")
            side = max(tiles, default=0)
            side_n = side if kind == "b" else 1
            return Scheme(name, values, rows, side, side_n, bool(zero), bool(static), scale, row_scale)
    raise ValueError(f"Unknown scheme {name!r}; {reason}.")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer: [M, k] times [k, n], for any number of rows M."""

    name: str
    k: int
    n: int
    experts: int = 1


def _transformer(hidden: int, q: int, kv: int, mlp: int, experts: int = 1) -> tuple[Layer, ...]:
    return (
        Layer("q", hidden, q),
        Layer("kv", hidden, kv),
        Layer("o", q, hidden),
        Layer("gate_up", hidden, mlp, experts),
        Layer("down", mlp, hidden, experts),
    )


# From the models' published configurations.
MODELS: Mapping[str, tuple[Layer, ...]] = {
    "canonical": (Layer("square", 4096, 4096),),
    "llama3_8b": _transformer(4096, 4096, 1024, 14336),
    "llama3_70b": _transformer(8192, 8192, 1024, 28672),
    "gemma3_4b": _transformer(2560, 2048, 1024, 10240),
    "gemma3_27b": _transformer(5376, 4096, 2048, 21504),
    "mixtral_8x7b": _transformer(4096, 4096, 1024, 14336, experts=8),
    "deepseek_v2_lite_moe": (Layer("gate_up", 2048, 1408, experts=64), Layer("down", 1408, 2048, experts=64)),
    "vit_l16": (
        Layer("patch", 768, 1024),
        Layer("qkvo", 1024, 1024),
        Layer("mlp_in", 1024, 4096),
        Layer("mlp_out", 4096, 1024),
    ),
    "smollm2_135m": _transformer(576, 576, 192, 1536),
}


@dataclasses.dataclass(frozen=True)
class RaggedLayer:
    """Rows in groups, [rows, k], with a matrix [k, n] for each of `experts` groups.

    `sizes`: how the rows are dealt out. "balanced": evenly; "empty": evenly to half of the groups; "half":
    half of the rows, to half of the groups; "uneven": from an eighth to nearly twice of the mean.
    """

    name: str
    experts: int
    rows: int
    k: int
    n: int
    sizes: str = "balanced"

    def group_sizes(self) -> list[int]:
        """The size of each group.

        >>> RaggedLayer("x", 4, 512, 1, 1, "half").group_sizes()
        [128, 0, 128, 0]
        >>> sum(RaggedLayer("x", 8, 512, 1, 1, "uneven").group_sizes())
        512
        """
        each = self.rows // self.experts
        if self.sizes == "balanced":
            ends = [self.rows * i // self.experts for i in range(self.experts + 1)]
            return [end - start for start, end in itertools.pairwise(ends)]
        if self.sizes in ("empty", "half"):
            return [0 if i % 2 else each * (2 if self.sizes == "empty" else 1) for i in range(self.experts)]
        # Pairs that add up to twice the mean.
        less = [each * (i % 7 + 1) // 8 for i in range(self.experts // 2)]
        return [*less, *(2 * each - size for size in less)]

    def __str__(self) -> str:
        sizes = "" if self.sizes == "balanced" else f" {self.sizes}"
        return f"{self.name}{sizes} {self.experts} experts, {self.rows} x {self.k} x {self.n}"


# Rows of a prefill of 1024 tokens and of decoding 16, each with the top two (Mixtral) or six (DeepSeek).
RAGGED: Mapping[str, tuple[RaggedLayer, ...]] = {
    "canonical": (
        RaggedLayer("canonical", 8, 4096, 2048, 1408),
        RaggedLayer("canonical", 8, 4096, 2048, 1408, "empty"),
        RaggedLayer("canonical", 8, 4096, 2048, 1408, "half"),
        RaggedLayer("canonical", 8, 4096, 2048, 1408, "uneven"),
    ),
    "mixtral_8x7b": (
        RaggedLayer("gate_up", 8, 2048, 4096, 14336),
        RaggedLayer("gate_up decode", 8, 32, 4096, 14336),
    ),
    "deepseek_v2_lite_moe": (
        RaggedLayer("gate_up", 64, 6144, 2048, 1408),
        RaggedLayer("down", 64, 6144, 1408, 2048),
        RaggedLayer("gate_up decode", 64, 96, 2048, 1408),
    ),
}

# Rows: decoding 16 and 64 sequences, and a prefill.
DECODE_M, BATCH_M, PREFILL_M = 16, 64, 1024


@dataclasses.dataclass(frozen=True)
class ConvLayer:
    """One convolution of square images, `size` x `size` x `features`; stride 1 keeps the size."""

    name: str
    images: int
    size: int
    features: int
    out_features: int
    kernel: int = 3
    stride: int = 1
    depthwise: bool = False

    def __str__(self) -> str:
        kind = "depthwise " * self.depthwise + f"{self.kernel}x{self.kernel}"
        stride = f" s{self.stride}" if self.stride > 1 else ""
        shape = f"{self.images}x{self.size}x{self.size}x{self.features} -> {self.out_features}"
        return f"{kind}{stride} {shape}"


def _depthwise(name: str, size: int, features: int, stride: int = 1) -> ConvLayer:
    return ConvLayer(name, 8, size, features, features, 3, stride, True)


# From the models' published architectures: eight images; of Stable Diffusion's U-Net two latents (guidance).
CONVOLUTIONS: Mapping[str, tuple[ConvLayer, ...]] = {
    "canonical": (ConvLayer("square", 8, 56, 256, 256),),
    "resnet50": (
        ConvLayer("conv2 3x3", 8, 56, 64, 64),
        ConvLayer("conv3 3x3", 8, 28, 128, 128),
        ConvLayer("conv4 3x3", 8, 14, 256, 256),
        ConvLayer("conv5 3x3", 8, 7, 512, 512),
        ConvLayer("conv3 3x3 s2", 8, 56, 128, 128, 3, 2),
        ConvLayer("conv2 1x1", 8, 56, 64, 256, 1),
        ConvLayer("conv3 1x1", 8, 28, 512, 128, 1),
        ConvLayer("conv4 1x1", 8, 14, 1024, 256, 1),
        ConvLayer("conv5 1x1", 8, 7, 512, 2048, 1),
    ),
    "mobilenet_v2": (
        ConvLayer("expand", 8, 56, 24, 144, 1),
        ConvLayer("project", 8, 14, 576, 96, 1),
        ConvLayer("head", 8, 7, 320, 1280, 1),
        _depthwise("112", 112, 32),
        _depthwise("56 s2", 56, 144, 2),
        _depthwise("28", 28, 192),
        _depthwise("14", 14, 576),
    ),
    "sd_unet": (
        ConvLayer("64", 2, 64, 320, 320),
        ConvLayer("32", 2, 32, 640, 640),
        ConvLayer("16", 2, 16, 1280, 1280),
        ConvLayer("8", 2, 8, 1280, 1280),
        ConvLayer("64 1x1", 2, 64, 320, 320, 1),
    ),
}
CONV_SCHEMES = ("w8a8_static", "w8a8", "w8a16", "w4a8_static")
