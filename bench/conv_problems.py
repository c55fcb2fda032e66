"""The convolutions that are priced: a scheme's as dispatch would run it, and XLA's of bfloat16.

Images are NHWC, kernels HWIO with bfloat16 scales of the output features; results are bfloat16.

    w8a8_static   int8 images with one scale for all, as a convolution leaves them that quantizes its result
    w8a8          bfloat16 images, quantized inside the op, a scale for each
    w8a16         bfloat16 images
    w4a8_static   as w8a8_static, with int4 kernels
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from qwix_kernels import conv
from qwix_kernels.conv import ConvProblem
from qwix_kernels.problem import RowQuantize, Tensor

from bench.shapes import CONV_SCHEMES, ConvLayer


def operands(layer: ConvLayer, scheme: str) -> tuple[Any, Tensor]:
    """Images and kernel as the op takes them, without data.

    Raises ValueError for a scheme that is none of `CONV_SCHEMES`.
    """
    if scheme not in CONV_SCHEMES:
        raise ValueError(f"Unknown scheme {scheme!r} of a convolution; known: {', '.join(CONV_SCHEMES)}.")
    struct: Any = jax.ShapeDtypeStruct
    x: Any = struct((layer.images, layer.size, layer.size, layer.features), jnp.bfloat16)
    if scheme.endswith("_static"):
        x = Tensor(struct(x.shape, jnp.int8), struct((1, 1, 1, 1), jnp.float32))
    inputs = 1 if layer.depthwise else layer.features
    shape = (layer.kernel, layer.kernel, inputs, layer.out_features)
    weights = struct(shape, jnp.int4 if scheme.startswith("w4") else jnp.int8)
    return x, Tensor(weights, struct((1, 1, 1, layer.out_features), jnp.bfloat16))


def options(layer: ConvLayer, scheme: str) -> dict[str, Any]:
    """Of the op."""
    pad = (layer.kernel - 1) // 2
    return {
        "strides": (layer.stride,) * 2,
        "padding": ((pad, pad),) * 2,
        "groups": layer.features if layer.depthwise else 1,
        "quantize_lhs": RowQuantize("int8", 127.5) if scheme == "w8a8" else None,
        "out_dtype": jnp.bfloat16,
    }


def problem(layer: ConvLayer, scheme: str) -> ConvProblem:
    """The description that dispatch chooses by.

    >>> from bench.shapes import CONVOLUTIONS
    >>> problem(CONVOLUTIONS["canonical"][0], "w8a8").scheme
    'conv 3x3 w8a8'
    """
    return conv.problem_of(*operands(layer, scheme), **options(layer, scheme))


def config(fields: dict[str, Any] | None) -> Any:
    """The blocks with these fields; None for those that are looked up."""
    from qwix_kernels.conv.tpu_config import Config

    return Config(**fields) if fields else None


def kernel(layer: ConvLayer, scheme: str, implementation: str | None = None, config: Any = None):
    """The op itself, as a function of `operands`."""

    def op(x, w):
        return conv.conv(x, w, implementation=implementation, config=config, **options(layer, scheme))

    return op


def xla_bf16(layer: ConvLayer):
    """XLA's convolution of bfloat16, as a function of images and kernel."""
    pad = (layer.kernel - 1) // 2

    def op(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            w,
            (layer.stride,) * 2,
            ((pad, pad),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=layer.features if layer.depthwise else 1,
        )

    return op


def bf16_operands(layer: ConvLayer) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of `xla_bf16`."""
    x, w = operands(layer, "w8a16")
    return x, jax.ShapeDtypeStruct(w.values.shape, jnp.bfloat16)
