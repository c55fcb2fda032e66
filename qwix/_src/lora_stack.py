"""Several adapters on one base model: each call, or each row of a batch, says which one it wants.

The adapters of a weight stand side by side along the rank, so all of them cost one pass over the activations;
`lora_rows` leaves to each row its own. Weights that an adapter doesn't change have no ranks of it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from qwix._src import linen_model, model_class, nnx_model
from qwix._src.adapter import AdapterSpec
from qwix._src.lora_merge import Weights, arrays_of, provider_of, spec_of


def stack(
    model: nnx.Module | nn.Module,
    adapters: Mapping[str, Any],
    params: Any = None,
    *,
    alphas: Mapping[str, float] | None = None,
) -> Any:
    """A model with several adapters, one of which is chosen in every call.

    Args:
      model: as `apply_lora_to_model` returned it; its own adapters aren't in the result.
      adapters: {name: adapters of this model, as `adapters_of` or `load_adapters` return them}. Their ranks
        may differ.
      params: of a Linen model.
      alphas: {name: alpha}, where an adapter has another one than the model's rule.

    Returns: NNX: a model that shares its weights with this one. Linen: (module, params). It's called with
      `adapter=name`, with a number or None (the base model), or with one of them per row of the batch: an
      int array `[batch]`, -1 for the base model, which may be traced. The batch is then the first axis of
      every activation, alone or together with others (`[batch * length, features]`).

    Raises:
      ValueError: no adapters, an adapter of another model, one with DoRA.
      TypeError: not a model of a LoraProvider.

    >>> import qwix, qwix.lora
    >>> provider = qwix.LoraProvider(rank=2, alpha=4.0)
    >>> model = qwix.apply_lora_to_model(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), provider, rngs=nnx.Rngs(1))
    >>> adapters = qwix.lora.adapters_of(model)
    >>> both = stack(model, {"math": adapters, "code": adapters})
    >>> both(jnp.ones((3, 8)), adapter=["math", None, "code"]).shape
    (3, 4)
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(f"Give at least one adapter, {{name: adapters}}; got {adapters!r}.")
    if unknown := sorted(set(alphas or {}) - set(adapters)):
        raise ValueError(f"alphas has {unknown[0]!r}, but the adapters are {list(adapters)}.")
    old = provider_of(model, params)
    weights = Weights(model, params)
    weights.drop_adapters()
    given = {name: arrays_of(tree) for name, tree in adapters.items()}
    provider: Any = copy.copy(old)
    provider.names, provider.adapters = tuple(given), {}
    for path in dict.fromkeys(path for tree in given.values() for path in tree):
        spec = spec_of(old, path)
        members = {name: tree[path] for name, tree in given.items() if path in tree}
        parts, stacked = _side_by_side(path, spec, members, alphas or {})
        weights.add_adapter(path, parts, stacked)
        provider.adapters |= {key: stacked for key in old.adapters if "/".join(map(str, key)) == path}
    if params is not None:
        linen: Any = model
        methods = type(linen)._qwix_methods
        return linen_model.quantize_linen_model(linen, provider, methods), weights.params
    stacked_model: Any = weights.model
    for _, module in nnx.iter_modules(stacked_model):
        object.__setattr__(module, "__class__", model_class.original(type(module)))
    nnx_model.change_classes(stacked_model, provider)
    return stacked_model


def _side_by_side(
    path: str, spec: AdapterSpec, members: Mapping[str, Mapping[str, Any]], alphas: Mapping[str, float]
) -> tuple[dict[str, Any], AdapterSpec]:
    """The arrays of all adapters of one weight as those of one, and its facts."""
    lead = len(spec.lifted)
    a_axis = lead + (spec.outs[0] if spec.conv else len(spec.a_shape) - 1)
    b_axis = lead + (len(spec.b_shape) - 2 if spec.conv else len(spec.batch))
    first, where, all_a, all_b = 0, [], [], []
    for name, parts in members.items():
        if parts["m"] is not None or spec.dora:
            raise ValueError(f"{name!r} has magnitudes (DoRA) of {path!r}: such adapters can't be stacked.")
        rank = parts["b"].shape[b_axis] if parts["b"].ndim > b_axis else 0
        own = dataclasses.replace(spec, rank=rank)
        shapes = tuple(parts["a"].shape[lead:]), tuple(parts["b"].shape[lead:])
        if shapes != (own.a_shape, own.b_shape):
            raise ValueError(
                f"The adapter {name!r} of {path!r} has A and B of {shapes[0]} and {shapes[1]}, but a "
                f"weight of {spec.home} wants {spec.a_shape} and {spec.b_shape}, of any rank. Is it one "
                "of another model?"
            )
        a = jnp.moveaxis(parts["a"], a_axis, -1)
        all_a.append(a.reshape(*a.shape[:-1], spec.groups, rank))
        all_b.append(parts["b"] * spec.scaling_of(rank, alphas.get(name, spec.alpha)))
        where.append((name, (first, rank)))
        first += rank
    a = jnp.concatenate(all_a, -1)
    a = jnp.moveaxis(a.reshape(*a.shape[:-2], -1), -1, a_axis)
    stacked = dataclasses.replace(spec, rank=first, members=tuple(where), dropout=0.0)
    return {"a": a, "b": jnp.concatenate(all_b, b_axis)}, stacked
