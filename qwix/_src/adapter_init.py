"""Making the params of an adapter: `<weight>_lora_a`, `<weight>_lora_b` and, with DoRA, `<weight>_lora_m`.

They take their dtype, their partition names and their sharding from the weight: a mesh axis that shards an
axis of the weight shards that axis in A or B, and the rank is never sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qwix._src import weight_steps
from qwix._src.adapter import AdapterSpec
from qwix._src.core import qarray
from qwix._src.lora_rule import LoraRule
from qwix._src.weight import dense, float_type


def make_adapter(spec: AdapterSpec, rule: LoraRule, key: jax.Array, payload: Any) -> dict[str, jax.Array]:
    """{"a", "b" and perhaps "m": arrays}.

    Args:
      spec: what to make.
      rule: its initializers.
      key: of these arrays.
      payload: the weight as it's stored, a QArray or floats.
    """
    _, dtype = float_type(payload)
    a_key, b_key = jax.random.split(key)
    made = {
        "a": _layers(spec, a_key, lambda key: rule.lora_a_initializer(key, spec.a_shape, dtype)),
        "b": _layers(spec, b_key, lambda key: rule.lora_b_initializer(key, spec.b_shape, dtype)),
    }
    if spec.dora:
        made["m"] = _magnitudes(spec, dense(payload, jnp.float32)).astype(dtype)
    axes = axes_of(spec)
    stored = payload.qvalue if isinstance(payload, qarray.QArray) else payload
    return {name: _like(stored, value, axes[name]) for name, value in made.items()}


def axes_of(spec: AdapterSpec) -> dict[str, tuple[int | None, ...]]:
    """For each axis of A, B and m: which axis of the stored weight it's sharded like; None: not at all."""
    lead = len(spec.lifted)
    known = not spec.steps
    place = lambda axes: tuple(lead + a if known else None for a in axes)
    one = lambda axes: place(axes[:1] if spec.flat and not spec.conv else axes)
    lifted, batch = tuple(range(lead)), place(spec.batch)
    if spec.conv:
        kernel = tuple(None if a in spec.outs else lead + a for a in range(len(spec.home)))
        kernel = kernel if known else (None,) * len(kernel)
        grouped = (None,) if spec.groups > 1 else ()
        outs = place(spec.outs) if not grouped else (None,)
        return {
            "a": (*lifted, *kernel),
            "b": (*lifted, *grouped, None, *outs),
            "m": (*lifted, *place(spec.outs)),
        }
    return {
        "a": (*lifted, *batch, *one(spec.ins), None),
        "b": (*lifted, *batch, None, *one(spec.outs)),
        "m": (*lifted, *batch, *one(spec.outs)),
    }


def _layers(spec: AdapterSpec, key: jax.Array, make: Any) -> jax.Array:
    """What `make` makes of a key, for each of the layers that are stacked."""
    keys = jax.random.split(key, spec.lifted) if spec.lifted else key
    for _ in spec.lifted:
        make = jax.vmap(make)
    return make(keys)


def _magnitudes(spec: AdapterSpec, weight: jax.Array) -> jax.Array:
    """|W| over the axes of A."""

    def norms(weight: jax.Array) -> jax.Array:
        home = weight_steps.apply(spec.steps, weight)
        order = (*spec.batch, *spec.outs, *spec.ins)
        home = home.transpose(order)
        count = len(spec.batch) + len(spec.outs)
        return jnp.sqrt(jnp.sum(jnp.square(home), range(count, home.ndim))).reshape(spec.m_shape)

    for _ in spec.lifted:
        norms = jax.vmap(norms)
    return norms(weight)


def _like(stored: Any, value: jax.Array, axes: Sequence[int | None]) -> jax.Array:
    """The value, sharded as the stored weight is."""
    traced = isinstance(value, jax.core.Tracer)
    sharding = jax.typeof(stored).sharding if isinstance(stored, jax.core.Tracer) else stored.sharding
    if not isinstance(sharding, NamedSharding):
        return value
    entries = (*sharding.spec, *(None,) * (stored.ndim - len(sharding.spec)))
    spec = PartitionSpec(*(None if a is None else entries[a] for a in axes))
    if traced and all(entry is None for entry in spec):
        return value
    target = NamedSharding(sharding.mesh, spec)
    return jax.sharding.reshard(value, target) if traced else jax.device_put(value, target)
