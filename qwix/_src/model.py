"""`quantize_model`: one call for Linen modules and NNX models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
from flax import nnx

from qwix._src import linen_model, nnx_model, qconfig
from qwix._src.providers.ptq import PtqProvider

Provider = qconfig.QuantizationProvider | qconfig.QuantizationRule | Sequence[qconfig.QuantizationRule]


def quantize_model[M: nn.Module | nnx.Module](
    model: M,
    provider: Provider,
    *model_inputs: Any,
    methods: Sequence[str] = ("__call__",),
    donate: bool = False,
    **model_inputs_kwargs: Any,
) -> M:
    """A quantized model that's used like `model`, which isn't changed.

    Args:
      model: a Linen module or an NNX model. A model that was converted before is converted from its
        original class.
      provider: what to do; rules alone mean `PtqProvider(rules)`.
      *model_inputs: for NNX, sample inputs of the methods (arrays or `jax.ShapeDtypeStruct`s): the model is
        run on them abstractly to see which op eats which param, in what layout. Without any, the layers
        that Flax itself defines are quantized. Static scales need inputs with values, and a run.
      methods: which methods run quantized. All get the sample inputs.
      donate: NNX, and providers that store quantized weights: delete each float weight of `model` as soon as
        it's quantized. Memory then never holds more than the larger of the two models and one layer.
        `model` can't be used any more; if a weight can't be quantized, it's as it was.
      **model_inputs_kwargs: the same. `skip_nnx_init=True` does without the run; `rngs`, unless the model's
        method takes it itself, are an nnx.Rngs for the provider.

    Returns:
      Linen: a module whose `init` returns quantized params; see `quantize_params` for existing ones. NNX: a
      model with quantized params; arrays that stay float are shared with `model`, not copied. An abstract
      model (`nnx.eval_shape`) gives an abstract one. Beside `model` this takes the memory of the quantized
      weights and of one layer.

    Raises:
      ValueError: inputs for a Linen module, a method that isn't there, a tile that doesn't divide a weight,
        ...
      TypeError: not a model, or not a provider.

    >>> import jax, jax.numpy as jnp, qwix
    >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    >>> quantized = qwix.quantize_model(model, qwix.QuantizationRule(weight_qtype="int8"), jnp.ones((1, 64)))
    >>> quantized.kernel.array.qvalue.dtype
    dtype('int8')
    >>> quantized(jnp.ones((2, 64))).shape
    (2, 8)
    """
    if not isinstance(provider, qconfig.QuantizationProvider):
        provider = PtqProvider(provider)
    methods = (methods,) if isinstance(methods, str) else tuple(methods)
    if isinstance(model, nn.Module):
        if model_inputs or model_inputs_kwargs:
            raise ValueError(
                "Model inputs must not be provided for linen models. They convert their params in init; use "
                "quantize_params for params that you have."
            )
        if donate:
            raise ValueError(
                "donate=True, but a linen module has no arrays. Give it to quantize_params, with the params."
            )
        return cast(M, linen_model.quantize_linen_model(model, provider, methods))
    if isinstance(model, nnx.Module):
        given = model_inputs, model_inputs_kwargs
        return cast(M, nnx_model.quantize_nnx_model(model, provider, *given, methods, donate))
    raise ValueError(f"Unsupported model type: {type(model).__name__}. Give a Linen or an NNX module.")
