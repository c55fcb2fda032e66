"""Quantized models as the TPU's compiler leaves them: kernels that read the weights as they lie, one program
per shape, and no more of it than the bfloat16 original has.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from bench import compiled
from bench.tpu_compile import compile_for
from examples.smollm2.model import Config, SmolLM2
from qwix import ops

CONFIG = Config(vocab_size=160, width=256, hidden=512, blocks=1, heads=4, kv_heads=2, head_size=64)
LAYERS = 7 * CONFIG.blocks
TOKENS = jax.ShapeDtypeStruct((1, 40), jnp.int32)
SCHEMES = {
    "int8": {"weight_qtype": "int8"},
    "w8a8": {"weight_qtype": "int8", "act_qtype": "int8"},
    "int4": {"weight_qtype": "int4", "tile_size": 128},
    "nf4": {"weight_qtype": "nf4", "tile_size": 64},
    "fp8": {"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"},
}


class Block(nn.Module):
    """The layers of a transformer's block in Linen; what mixes the tokens is of no interest here."""

    @nn.compact
    def __call__(self, x):
        linear = lambda outputs, name: nn.Dense(outputs, use_bias=False, name=name)
        y = nn.RMSNorm(name="norm")(x)
        q = linear(CONFIG.width, "q_proj")(y)
        k, v = (linear(CONFIG.width // 2, name)(y) for name in ("k_proj", "v_proj"))
        x = x + linear(CONFIG.width, "o_proj")(q + jnp.concatenate([k, v], -1))
        gate, up = linear(CONFIG.hidden, "gate_proj")(x), linear(CONFIG.hidden, "up_proj")(x)
        return x + linear(CONFIG.width, "down_proj")(nn.silu(gate) * up)


def rules(scheme: str | None) -> list[qwix.QuantizationRule]:
    return [qwix.QuantizationRule(module_path=r".*_proj", **SCHEMES[scheme])] if scheme else []


def bfloat16(tree):
    """The same leaves, floats in bfloat16."""
    narrow = lambda dtype: jnp.bfloat16 if dtype == jnp.float32 else dtype
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, narrow(a.dtype)), tree)


def in_nnx(scheme: str | None, config: Config = CONFIG):
    """(function of the state and tokens, the state without data)"""

    def make():
        model = SmolLM2(config, rngs=nnx.Rngs(0))
        if not scheme:
            return model
        return qwix.quantize_model(model, qwix.PtqProvider(rules(scheme)), jnp.zeros(TOKENS.shape, jnp.int32))

    graphdef, state = nnx.split(nnx.eval_shape(make))
    return lambda state, tokens: nnx.merge(graphdef, state)(tokens)[0], bfloat16(state)


def in_linen(scheme: str | None):
    """(function of the params and activations, the params without data)"""
    model = Block()
    if scheme:
        model = qwix.quantize_model(model, qwix.PtqProvider(rules(scheme)))
    x = jax.ShapeDtypeStruct((1, 40, CONFIG.width), jnp.bfloat16)
    return model.apply, bfloat16(jax.eval_shape(model.init, jax.random.key(0), x))


@functools.cache
def text_of(kind: str, scheme: str | None, chip: str = "v5e", blocks: int = CONFIG.blocks) -> str:
    if kind == "linen":
        fn, params = in_linen(scheme)
        return compile_for(
            chip, fn, params, jax.ShapeDtypeStruct((1, 40, CONFIG.width), jnp.bfloat16)
        ).as_text()
    config = (
        Config(**{**CONFIG.__dict__, "blocks": blocks}) if kind == "nnx" else Config(vocab_size=96, blocks=1)
    )
    return compile_for(chip, *_shapes(in_nnx(scheme, config))).as_text()


def _shapes(made):
    fn, state = made
    return fn, state, TOKENS


def weight_sizes(config: Config) -> set[int]:
    heads, kv = (n * config.head_size for n in (config.heads, config.kv_heads))
    return {config.width * n for n in (heads, kv, config.hidden)}


@pytest.mark.parametrize("kind", ["nnx", "linen"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_go_into_the_kernels_as_they_lie(kind, scheme):
    text = text_of(kind, scheme)
    assert compiled.kernels(text).total() == LAYERS
    assert compiled.relayouts(text, weight_sizes(CONFIG)) == []


@pytest.mark.parametrize("scheme", ["w8a8", pytest.param("nf4", marks=pytest.mark.large)])
def test_weights_of_the_real_widths_of_smollm2(scheme):
    """576 and 192 are no multiples of 128, so that a TPU keeps some of the weights column by column."""
    text = text_of("smollm2", scheme)
    assert compiled.kernels(text).total() == 7
    assert compiled.relayouts(text, weight_sizes(Config())) == []


@pytest.mark.large
@pytest.mark.parametrize("chip", ["v5p", "v6e", "v7x"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_chips(chip, scheme):
    text = text_of("nnx", scheme, chip)
    assert compiled.kernels(text).total() == LAYERS
    assert compiled.relayouts(text, weight_sizes(CONFIG)) == []


def test_a_converted_weight_would_be_seen():
    """The float model in bfloat16, its weights stored in float32: XLA converts each of them in every call."""
    fn, state = in_nnx(None)
    wide = lambda state: jax.tree.map(lambda a: a.astype(jnp.bfloat16), state)
    floats = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), state)
    text = compile_for("v5e", lambda state, tokens: fn(wide(state), tokens), floats, TOKENS).as_text()
    assert compiled.relayouts(text, weight_sizes(CONFIG))


@pytest.mark.parametrize("scheme", ["w8a8", "int4"])
def test_a_quantized_model_is_no_larger_a_program(scheme):
    """What there is to compile is what compile time is made of; bench/compile_time.py measures that."""
    assert compiled.executed(text_of("nnx", scheme)) <= 1.3 * compiled.executed(text_of("nnx", None))


def test_more_blocks_are_not_more_kernels():
    """Layers of one shape are one kernel, whatever block they are in, up to the memory of its operands."""
    one, three = (compiled.kernels(text_of("nnx", "w8a8", blocks=blocks)) for blocks in (1, 3))
    assert three.total() == 3 * one.total()
    assert len(three) <= len(one) + 4


# --- calls, not compiles


@pytest.fixture
def compiles():
    """A list that grows by one with every program that is compiled."""
    seen = []

    def listen(event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


TINY = Config(vocab_size=32, width=32, hidden=64, blocks=1, heads=2, kv_heads=1, head_size=16)


@pytest.mark.parametrize("jitted", [True, False])
def test_a_second_call_of_an_nnx_model_compiles_nothing(compiles, jitted):
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    provider = qwix.PtqProvider(rules("w8a8"))
    model = qwix.quantize_model(SmolLM2(TINY, rngs=nnx.Rngs(0)), provider, tokens)
    call = (
        nnx.jit(lambda model, tokens: model(tokens)[0]) if jitted else lambda model, tokens: model(tokens)[0]
    )
    call(model, tokens)
    other = tokens[:, ::-1]
    assert compiles
    compiles.clear()
    call(model, other)
    assert not compiles


@pytest.mark.parametrize("jitted", [True, False])
def test_a_second_call_of_a_linen_model_compiles_nothing(compiles, jitted):
    model = qwix.quantize_model(Block(), qwix.PtqProvider(rules("w8a8")))
    x = jax.random.normal(jax.random.key(0), (1, 4, CONFIG.width))
    params = model.init(jax.random.key(1), x)
    other, apply = x * 2, jax.jit(model.apply) if jitted else model.apply
    apply(params, x)
    compiles.clear()
    apply(params, other)
    assert not compiles


# --- weights of three axes


class Heads(nnx.Module):
    """Projections as attention layers have them: to heads, from heads, and with the heads in front."""

    def __init__(self, rngs):
        options = {"use_bias": False, "rngs": rngs, "dtype": jnp.bfloat16}
        self.to_proj = nnx.LinearGeneral(512, (4, 128), **options)
        self.from_proj = nnx.LinearGeneral((4, 128), 512, axis=(-2, -1), **options)
        self.first_proj = nnx.Einsum("btd,ndh->btnh", (4, 512, 128), None, rngs=rngs, dtype=jnp.bfloat16)

    def __call__(self, x):
        x = x + self.from_proj(self.to_proj(x))
        return x + self.first_proj(x).reshape(x.shape)


class LinenHeads(nn.Module):
    @nn.compact
    def __call__(self, x):
        options = {"use_bias": False, "dtype": jnp.bfloat16}
        y = nn.DenseGeneral((4, 128), name="to_proj", **options)(x)
        return nn.DenseGeneral(512, axis=(-2, -1), name="from_proj", **options)(y)


def heads_text(kind: str, scheme: str, prepack: bool) -> str:
    x = jax.ShapeDtypeStruct((1, 40, 512), jnp.bfloat16)
    # Tiles lie along the last contracted axis, which is the 128 of from_proj.
    provider = qwix.PtqProvider(rules(scheme), prepack=prepack)
    if kind == "linen":
        model = qwix.quantize_model(LinenHeads(), provider)
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        return compile_for("v5e", model.apply, bfloat16(params), x).as_text()
    make = lambda: qwix.quantize_model(Heads(nnx.Rngs(0)), provider, jnp.zeros(x.shape, x.dtype))
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return compile_for("v5e", lambda s, x: nnx.merge(graphdef, s)(x), bfloat16(state), x).as_text()


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("nnx", "w8a8"), ("linen", "int8")]
    + [pytest.param("nnx", scheme, marks=pytest.mark.large) for scheme in ("int4", "nf4", "fp8")]
    + [pytest.param("linen", scheme, marks=pytest.mark.large) for scheme in ("w8a8", "int4", "nf4", "fp8")],
)
def test_prepacked_weights_of_three_axes_are_not_copied(kind, scheme):
    text = heads_text(kind, scheme, prepack=True)
    assert compiled.kernels(text).total() == (3 if kind == "nnx" else 2)
    assert compiled.relayouts(text, [512 * 512]) == []


def test_prepacking_is_what_saves_the_copies():
    assert len(compiled.relayouts(heads_text("nnx", "w8a8", prepack=False), [512 * 512])) >= 2


# --- products of activations


@pytest.mark.parametrize("subscripts", ["bnth,bnsh->bnts", "bnts,bnsh->bnth"])
def test_attention_with_heads_in_front_is_one_kernel_without_copies(subscripts):
    sizes = {"b": 2, "n": 4, "t": 256, "s": 384, "h": 128}
    lhs, rhs, out = subscripts.replace("->", ",").split(",")

    def quantized(axes: str) -> qwix.QArray:
        """int8, one scale for each row of what is not summed over."""
        shape = [sizes[axis] for axis in axes]
        scale = [sizes[axis] if axis in out else 1 for axis in axes]
        return qwix.QArray(jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(scale, jnp.float32))

    def run(lhs, rhs):
        return ops.qeinsum(subscripts, lhs, rhs, preferred_element_type=jnp.bfloat16)

    text = compile_for("v5e", run, quantized(lhs), quantized(rhs)).as_text()
    assert compiled.kernels(text).total() == 1 and " while(" not in text
    elements = [int(np.prod([sizes[axis] for axis in axes])) for axes in (lhs, rhs)]
    assert compiled.relayouts(text, elements) == []
