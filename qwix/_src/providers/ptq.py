"""Post-training quantization: weights are quantized once, and ops compute with them."""

from __future__ import annotations

from qwix._src import qconfig
from qwix._src.core import qarray
from qwix._src.lora_rule import LoraRule
from qwix._src.providers.boxed_param import (
    BoxedParamProvider,
    WithAux,
    create_quantized_param,
    quantize_act,
)
from qwix._src.quantize_params import quantize_params

__all__ = [
    "BoxedParamProvider",
    "PtqProvider",
    "WithAux",
    "create_quantized_param",
    "qarray",
    "quantize_act",
    "quantize_params",
]


class PtqProvider(BoxedParamProvider):
    """Quantizes a trained model for inference.

    >>> import jax.numpy as jnp, qwix
    >>> from flax import nnx
    >>> rules = [qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")]
    >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
    >>> quantized = qwix.quantize_model(model, qwix.PtqProvider(rules), jnp.ones((1, 64)))
    """

    def _init_rule(self, rule: qconfig.QuantizationRule) -> qconfig.QuantizationRule:
        if isinstance(rule, LoraRule):
            raise TypeError(
                f"PtqProvider gives no weight an adapter, but {rule} asks for one. LoraProvider does; for a "
                "merged model, give a QuantizationRule."
            )
        return super()._init_rule(rule)
