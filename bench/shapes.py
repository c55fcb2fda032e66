"""What gets priced and timed: the schemes' names, and the shapes of layers in real models.

Needs no jax. Tests, benchmarks and the tuner share this file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

WEIGHTS: Mapping[str, str] = {"4": "int4", "8": "int8", "f8": "float8_e4m3fn", "nf4": "nf4"}
ACTIVATIONS: Mapping[str, str] = {"4": "int4", "8": "int8", "f8": "float8_e4m3fn", "16": "bfloat16"}
_SCHEME = re.compile(r"w(nf4|f8|4|8)a(f8|16|8|4)(?:_g([1-9]\d*))?")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Weight and activation types. `tile`: neighbours along K that share a scale, 0 for the whole of K.

    Activations other than bfloat16 are quantized from bfloat16 on the way, row by row (and tile by tile where
    there are tiles), inside the op.
    """

    name: str
    weight: str
    activation: str
    tile: int = 0

    @property
    def is_weight_only(self) -> bool:
        return self.activation == "bfloat16"


def scheme(name: str) -> Scheme:
    """The scheme called `name`.

    Raises ValueError, with the grammar, for anything else.

    >>> scheme("w4a16_g128")
    Scheme(name='w4a16_g128', weight='int4', activation='bfloat16', tile=128)
    >>> scheme("wf8af8").is_weight_only
    False
    >>> scheme("w3a16")
    Traceback (most recent call last):
      ...
    ValueError: Unknown scheme 'w3a16'; schemes are w{4,8,f8,nf4}a{4,8,f8,16}, then _g{tile} where tile \
neighbours along K share a scale: w8a8, w4a16_g128, wf8af8, wnf4a16_g64.
    """
    match = _SCHEME.fullmatch(name)
    if not match:
        raise ValueError(
            f"Unknown scheme {name!r}; schemes are w{{{','.join(WEIGHTS)}}}a{{{','.join(ACTIVATIONS)}}}, "
            "then _g{tile} where tile neighbours along K share a scale: w8a8, w4a16_g128, wf8af8, "
            "wnf4a16_g64."
        )
    weight, activation, tile = match.groups()
    return Scheme(name, WEIGHTS[weight], ACTIVATIONS[activation], int(tile or 0))


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

# Rows of the canonical shape: decoding 16 and 64 sequences, and a prefill.
DECODE_M, BATCH_M, PREFILL_M = 16, 64, 1024
CANONICAL_M = (PREFILL_M, DECODE_M)
CANONICAL_SCHEMES = (
    "w8a8",
    "w8a8_g128",
    "w8a8_g256",
    "w4a8_g128",
    "w8a16_g128",
    "w4a16_g128",
    "wnf4a16_g64",
    "wf8af8",
    "wf8a16_g128",
)
