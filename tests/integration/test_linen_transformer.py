"""The same small transformer in Linen and in NNX: the same rules give the same quantized weights and logits.

The Linen model repeats examples/smollm2/model.py without a cache, and takes its weights from the NNX one.
What reaches the quantized layers is the same, and so are their integers and scales, bit for bit; logits may
differ in the order of a sum.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, traverse_util

import qwix
from examples.smollm2 import schemes
from examples.smollm2.model import Config, SmolLM2, rope

TINY = Config(vocab_size=96, width=64, hidden=128, blocks=2, heads=4, kv_heads=2, head_size=16)
QUANTIZED = [name for name in schemes.SCHEMES if name != "float"]
TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) * 7 % TINY.vocab_size
LINEAR = r"layers_\d+/(attention|mlp)/\w+_proj"
EPS = float(np.finfo(np.float32).eps)


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        config, (batch, length, _) = self.config, x.shape
        linear = lambda heads, name: nn.Dense(heads * config.head_size, use_bias=False, name=name)
        split = lambda y: y.reshape(batch, length, -1, config.head_size)
        turn = lambda y: rope(split(y), jnp.arange(length), config.rope_base)
        query = turn(linear(config.heads, "q_proj")(x))
        key = turn(linear(config.kv_heads, "k_proj")(x))
        value = split(linear(config.kv_heads, "v_proj")(x))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return nn.Dense(config.width, use_bias=False, name="o_proj")(mixed.reshape(batch, length, -1))


class SwiGLU(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        linear = lambda outputs, name: nn.Dense(outputs, use_bias=False, name=name)
        gate, up = linear(self.config.hidden, "gate_proj")(x), linear(self.config.hidden, "up_proj")(x)
        return linear(self.config.width, "down_proj")(nn.silu(gate) * up)


class Transformer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens):
        norm = functools.partial(nn.RMSNorm, epsilon=self.config.norm_epsilon)
        embed = nn.Embed(self.config.vocab_size, self.config.width, name="embed")
        x = embed(tokens)
        for i in range(self.config.blocks):
            x = Block(self.config, name=f"layers_{i}")(x)
        return embed.attend(norm(name="norm")(x))


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.RMSNorm, epsilon=self.config.norm_epsilon)
        x = x + Attention(self.config, name="attention")(norm(name="attention_norm")(x))
        return x + SwiGLU(self.config, name="mlp")(norm(name="mlp_norm")(x))


@functools.cache
def nnx_model() -> SmolLM2:
    return SmolLM2(TINY, rngs=nnx.Rngs(0))


@functools.cache
def linen_params() -> dict:
    """The NNX model's weights under Linen's names: layers/0/... is layers_0/... there."""
    flat = {}
    for path, leaf in nnx.to_flat_state(nnx.state(nnx_model(), nnx.Param)):
        if path[0] == "layers":
            path = (f"layers_{path[1]}", *path[2:])
        flat[path] = leaf[...]
    return traverse_util.unflatten_dict(flat)


@functools.cache
def quantized(name: str):
    """(NNX model, Linen model, Linen params) under a scheme of the demo."""
    rule = schemes.SCHEMES[name].rule
    nnx_rules = schemes.SCHEMES[name].rules()
    linen_rules = [qwix.QuantizationRule(module_path=LINEAR, **rule)]
    in_nnx = qwix.quantize_model(nnx_model(), qwix.PtqProvider(nnx_rules), TOKENS)
    in_linen = qwix.quantize_model(Transformer(TINY), qwix.PtqProvider(linen_rules))
    abstract = jax.eval_shape(in_linen.init, jax.random.key(0), TOKENS)["params"]
    return in_nnx, in_linen, qwix.quantize_params(linen_params(), abstract)


def largest_error(found, expected) -> float:
    """Of logits, over what rounding can do: see tests/integration/test_smollm2.py for the bound."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    bound = 7 * TINY.blocks * TINY.hidden * EPS * 2**TINY.blocks * np.abs(expected).max()
    return np.abs(found - expected).max() / bound


def test_the_float_models_agree():
    found = Transformer(TINY).apply({"params": linen_params()}, TOKENS)
    assert largest_error(found, nnx_model()(TOKENS)[0]) <= 1


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_the_same(name: str):
    in_nnx, _, params = quantized(name)
    for i in range(TINY.blocks):
        for layer in ("attention/q_proj", "attention/o_proj", "mlp/up_proj", "mlp/down_proj"):
            block, linear = layer.split("/")
            ours = getattr(getattr(in_nnx.layers[i], block), linear).kernel.array
            theirs = params[f"layers_{i}"][block][linear]["kernel"].array
            ours, theirs = (jax.tree.leaves(array) for array in (ours, theirs))
            assert len(ours) == len(theirs) == 2
            for x, y in zip(ours, theirs, strict=True):
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_models_agree(name: str):
    in_nnx, in_linen, params = quantized(name)
    found, expected = in_linen.apply({"params": params}, TOKENS), in_nnx(TOKENS)[0]
    assert largest_error(found, expected) <= 1
    exact = nnx_model()(TOKENS)[0]
    assert largest_error(found, exact) > 1, "nothing was quantized"


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_linen_under_jit(name: str):
    _, in_linen, params = quantized(name)
    apply = jax.jit(in_linen.apply)
    found = apply({"params": params}, TOKENS)
    assert largest_error(found, in_linen.apply({"params": params}, TOKENS)) <= 1
    apply({"params": params}, TOKENS)
    assert apply._cache_size() == 1


def test_linen_init_gives_quantized_params():
    _, in_linen, params = quantized("int4")
    fresh = in_linen.init(jax.random.key(1), TOKENS)["params"]
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)


def test_params_of_another_model_are_refused():
    _, in_linen, _ = quantized("int8")
    abstract = jax.eval_shape(in_linen.init, jax.random.key(0), TOKENS)["params"]
    with pytest.raises(ValueError, match="not found"):
        qwix.quantize_params({"decoder": linen_params()}, abstract)
