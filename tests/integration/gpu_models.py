"""Quantized models as bench.gpu_compile's child compiles them: called there, so that jax is the child's."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import qwix


class Layer(nn.Module):
    """Projections to heads and from heads."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        options: dict[str, Any] = {"use_bias": False, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        y = nn.DenseGeneral((8, 128), **options)(x)
        return nn.DenseGeneral(1024, axis=(-2, -1), **options)(y), None


class Layers(nn.Module):
    """Four of them, by a scan."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return scan()(x, None)[0]


def layers(prepack: Any, **rule: Any) -> tuple[Any, tuple[Any, ...]]:
    """(the quantized model's `apply`, the shapes of its arguments) for 1024 tokens."""
    rules = [qwix.QuantizationRule(module_path=".*", **rule)]
    model = qwix.quantize_model(Layers(), qwix.PtqProvider(rules, prepack=prepack))
    x = jax.ShapeDtypeStruct((1, 1024, 1024), jnp.bfloat16)
    return model.apply, (jax.eval_shape(model.init, jax.random.key(0), x), x)
