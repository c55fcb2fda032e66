"""What rounding does to the mean of a layer's outputs, taken back; without training and without labels.

Rounded to the nearest, the weights of a channel are off by errors that don't cancel. Inputs behind a ReLU are
not negative, so such a sum moves the whole channel, by as much as its signal where a filter lives from
differences of neighbours: the first depthwise layer alone loses 23 dB that way. Two steps, which store not a
byte more:

    sums      a few weights are rounded the other way, those that were nearest to it, so that the errors of
              each channel (and tile) add up to half a step at most
    biases    are given what the mean input makes of the errors that are left: bias correction, section 4.2 of
              Data-Free Quantization (https://arxiv.org/abs/1906.04721), here with the mean of real inputs
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qwix
from examples.mobilenet.model import MobileNetV2

Path = tuple[Any, ...]
Layer = nnx.Conv | nnx.Linear


class _WatchedConv(nnx.Conv):
    """A convolution that keeps the mean of its inputs, `[channels]`."""

    def __call__(self, inputs: jax.Array, *args, **kwargs) -> jax.Array:
        self.mean = nnx.Intermediate(inputs.mean((0, 1, 2)))
        return super().__call__(inputs, *args, **kwargs)


class _WatchedLinear(nnx.Linear):
    def __call__(self, inputs: jax.Array, *args, **kwargs) -> jax.Array:
        self.mean = nnx.Intermediate(inputs.mean(0))
        return super().__call__(inputs, *args, **kwargs)


def layers(model: nnx.Module) -> dict[Path, Layer]:
    """The convolutions and linear layers of a model, by path."""
    return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Layer)}


def mean_inputs(model: MobileNetV2, images: np.ndarray) -> dict[Path, np.ndarray]:
    """Of each layer of the float model, the mean of each channel that comes in, over images and pixels."""
    watched = nnx.clone(model)
    for layer in layers(watched).values():
        watch = _WatchedConv if isinstance(layer, nnx.Conv) else _WatchedLinear
        object.__setattr__(layer, "__class__", watch)
    nnx.jit(lambda model, images: model(images))(watched, jnp.asarray(images))
    mean = lambda layer: np.asarray(layer.mean[...], np.float64)
    return {path: mean(layer) for path, layer in layers(watched).items()}


def with_sums(values: np.ndarray, exact: np.ndarray, lowest: int, largest: int) -> np.ndarray:
    """Whole numbers near `exact` whose sum over the last axis is as near as whole numbers come.

    Args:
      values: `exact`, each rounded by itself.
      exact: numbers of any shape.
      lowest, largest: the range of the results.

    Example:
      >>> exact = np.array([1.4, 2.3, 3.4])
      >>> with_sums(exact.round(), exact, -128, 127).tolist()
      [2.0, 2.0, 3.0]
    """
    error = exact - values
    count = np.rint(error.sum(-1, keepdims=True))
    towards = np.sign(count)
    moved = values + towards
    gain = np.where((moved < lowest) | (moved > largest), -np.inf, towards * error)
    rank = np.argsort(np.argsort(-gain, axis=-1), axis=-1)
    moves = (rank < np.abs(count)) & np.isfinite(gain)
    return values + towards * moves


def rounded(weight: qwix.QArray, kernel: np.ndarray) -> np.ndarray:
    """The stored values of a weight `[..., inputs, outputs]`, rounded so that the sums of each scale hold."""
    tiles = weight.scale.shape[-2]
    split = (*kernel.shape[:-2], tiles, kernel.shape[-2] // tiles, kernel.shape[-1])
    scale = np.asarray(weight.scale, np.float64).reshape(
        *(1,) * (kernel.ndim - 2), tiles, 1, kernel.shape[-1]
    )
    order = (len(split) - 3, len(split) - 1, *range(len(split) - 3), len(split) - 2)  # tile, output, the rest
    in_rows = lambda x: x.reshape(split).transpose(order).reshape(tiles, kernel.shape[-1], -1)
    exact = in_rows((kernel.astype(np.float64).reshape(split) / scale).reshape(kernel.shape))
    values = in_rows(np.asarray(weight.qvalue, np.float64))
    info = jnp.iinfo(weight.qvalue.dtype)
    moved = with_sums(values, exact, int(info.min), int(info.max))
    permuted = moved.reshape([split[a] for a in order])
    return permuted.transpose(np.argsort(order)).reshape(kernel.shape)


def shift(error: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """`[outputs]`: what errors of a kernel `[..., inputs, outputs]` do to the outputs for the mean input."""
    if error.ndim == 4 and error.shape[2] == 1 and mean.size > 1:  # depthwise
        return error.sum((0, 1, 2)) * mean
    return mean @ error.reshape(-1, *error.shape[-2:]).sum(0)


def correct(candidate: MobileNetV2, model: MobileNetV2, images: np.ndarray) -> None:
    """Corrects a quantized model in place.

    Args:
      candidate: the quantized model.
      model: the float model that it was made of.
      images: of which the mean inputs are taken.
    """
    means, originals = mean_inputs(model, images), layers(model)
    for path, layer in layers(candidate).items():
        kernel = np.asarray(originals[path].kernel[...])
        stored = layer.kernel.array
        new = rounded(layer.kernel.unboxed, kernel)
        stored.qvalue[...] = jnp.asarray(new).astype(stored.qvalue.dtype)
        error = kernel.astype(np.float64) - np.asarray(qwix.dequantize(layer.kernel.unboxed), np.float64)
        if layer.bias is not None:
            layer.bias[...] = layer.bias[...] + jnp.asarray(shift(error, means[path]), jnp.float32)
