"""What quantizing a model holds at most, beside what must be there. Measured on the devices that are here.

Weights come one after the other, as from a checkpoint. Whenever the next one is asked for, the arrays that
are alive are added up, on all devices; the bound is the quantized model, and one float layer.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qwix
from bench import scale_compile


class _Layers(nn.Module):
    width: int
    count: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.count):
            x = nn.Dense(self.width, use_bias=False, name=f"layer_{i}")(x)
        return x


def row(name: str, width: int, layers: int) -> dict[str, Any]:
    """Quantizes `layers` float32 weights [width, width] to int8 over a mesh, columns along y."""
    mesh = scale_compile.mesh_of(name, AxisType.Auto)
    sharding = NamedSharding(mesh, P(None, ("x", "y")))
    model = qwix.quantize_model(_Layers(width, layers), qwix.QuantizationRule(weight_qtype="int8"))
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, width)))["params"]
    make = jax.jit(lambda i: jnp.full((width, width), i, jnp.float32), out_shardings=sharding)
    before, peak = _alive(), 0

    def checkpoint() -> Iterator[tuple[str, jax.Array]]:
        nonlocal peak
        for i in range(layers):
            weight = make(i)
            peak = max(peak, _alive() - before)
            yield f"layer_{i}/kernel", weight
            del weight

    params = qwix.quantize_params(checkpoint(), abstract)
    peak = max(peak, _alive() - before)
    quantized = sum(_bytes(x) for x in jax.tree.leaves(params))
    layer = width * width * 4
    bound = quantized + layer
    return {
        "mesh": name,
        "float_bytes": layers * layer,
        "quantized_bytes": quantized,
        "layer_bytes": layer,
        "peak_bytes": peak,
        "bound_bytes": bound,
        "failed": [f"{peak} bytes alive where {bound} must do"] if peak > bound else [],
    }


def _alive() -> int:
    """Bytes of all arrays, on all devices together."""
    gc.collect()
    return sum(_bytes(x) for x in jax.live_arrays())


def _bytes(x: jax.Array) -> int:
    """Of all shards here. (Asking an array for its shards would make more arrays.)"""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return 0
    shard = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return shard * len(x.sharding.addressable_devices)
