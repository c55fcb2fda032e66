"""Fresh adapters for Linen params that exist already, from a checkpoint say."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from qwix._src import linen_scope, lora_params
from qwix._src.lora_files import adapters_of
from qwix._src.lora_merge import provider_of
from qwix._src.utils import flax_util


def init_adapters(model: nn.Module, params: Any, key: jax.Array, *inputs: Any, **kwargs: Any) -> Any:
    """Params of a Linen model with new adapters among them.

    Args:
      model: as `qwix.apply_lora_to_model` returned it.
      params: of the model without adapters: float, or of `qwix.quantize_params` where rules quantize.
      key: of the adapters.
      *inputs, **kwargs: of the model's `init`, arrays or `jax.ShapeDtypeStruct`s: it's only traced.

    Returns: a new tree that holds the same weights.

    Raises:
      ValueError: params that have adapters, or lack a weight that gets one.
      TypeError: not a Linen model of a LoraProvider.

    >>> import jax.numpy as jnp, qwix
    >>> x, dense = jnp.ones((1, 8)), nn.Dense(4, use_bias=False)
    >>> params = dense.init(jax.random.key(0), x)["params"]
    >>> model = qwix.apply_lora_to_model(dense, qwix.LoraProvider(rank=2, alpha=4.0))
    >>> sorted(init_adapters(model, params, jax.random.key(1), x))
    ['kernel', 'kernel_lora_a', 'kernel_lora_b']
    """
    provider = provider_of(model, params)
    if adapters_of(params):
        raise ValueError("The params have adapters already; qwix.lora.with_adapters changes them.")
    jax.eval_shape(lambda key: model.init(key, *inputs, **kwargs), key)
    new = linen_scope.plain(params)
    for where in provider.adapters:
        if flax_util.get_value_from_path(new, where) is None:
            raise ValueError(
                f"The params have no {'/'.join(map(str, where))!r}, which gets an adapter. Are they those of "
                "another model?"
            )
    found = {where: (provider.infos[where], spec) for where, spec in provider.adapters.items()}
    lora_params.add_to_linen(new, found, key)
    return new
