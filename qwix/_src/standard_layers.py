"""Calling each of Flax's own NNX layers by itself, with a made-up input: enough to see what it does with
its weight.

That's how a model is converted without sample inputs. Layers that a user wrote aren't known here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx


def call_all(model: nnx.Module) -> None:
    """Calls every layer of a known type once, on zeros. Meant for an abstract run."""
    for _, module in nnx.iter_modules(model):
        for known, call in _CALLS.items():
            if isinstance(module, known):
                call(module)
                break


def _linear(layer: nnx.Linear) -> None:
    layer(jnp.zeros((1, layer.in_features), jnp.float32))


def _linear_general(layer: nnx.LinearGeneral) -> None:
    axes = layer.axis if isinstance(layer.axis, tuple) else (layer.axis,)
    sizes = layer.in_features if isinstance(layer.in_features, tuple) else (layer.in_features,)
    batch = dict(layer.batch_axis)
    needed = [a + 1 if a >= 0 else -a for a in (*axes, *batch)]
    ndim = max(*needed, len(axes) + len(batch) + 1, 2)
    shape: list[Any] = [1] * ndim
    for axis, size in (*zip(axes, sizes, strict=True), *batch.items()):
        shape[axis] = size
    layer(jnp.zeros(shape, jnp.float32))


def _einsum(layer: nnx.Einsum) -> None:
    """Needs the subscripts of the layer; one that gets them with each call isn't known."""
    if layer.einsum_str is None or "." in layer.einsum_str:
        return
    left, right = layer.einsum_str.replace(" ", "").split("->")[0].split(",")
    sizes = dict(zip(right, layer.kernel_shape, strict=True))
    layer(jnp.zeros([sizes.get(label, 1) for label in left], jnp.float32))


def _embed(layer: nnx.Embed) -> None:
    layer(jnp.zeros((1,), jnp.int32))


def _conv(layer: nnx.Conv) -> None:
    spatial = [8 * k for k in layer.kernel_size]
    layer(jnp.zeros((1, *spatial, layer.in_features), jnp.float32))


_CALLS: dict[type, Callable[[Any], None]] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
    nnx.Embed: _embed,
    nnx.Conv: _conv,
}
