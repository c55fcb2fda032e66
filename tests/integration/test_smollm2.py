"""The SmolLM2 example at toy size: the schemes of the demo, and the loader on the real file.

A quantized model is held against the same network with linear layers in the plainest arithmetic, on the
numbers that the quantized weights (and activations) stand for: to the last bit where sums are of integers, to
the rounding of float32 sums elsewhere.
"""

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from examples.smollm2 import evaluate, generate, load, schemes
from examples.smollm2 import model as model_module
from examples.smollm2.model import Cache, Config, SmolLM2

TINY = Config(vocab_size=96, width=64, hidden=128, blocks=2, heads=4, kv_heads=2, head_size=16)
QUANTIZED = [name for name in schemes.SCHEMES if name != "float"]
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) * 7 % TINY.vocab_size
EPS = float(np.finfo(np.float32).eps)
LAYERS = 7 * TINY.blocks


@functools.cache
def float_model() -> SmolLM2:
    return SmolLM2(TINY, rngs=nnx.Rngs(0))


@functools.cache
def quantized_model(name: str) -> SmolLM2:
    provider = qwix.PtqProvider(schemes.SCHEMES[name].rules())
    return qwix.quantize_model(float_model(), provider, jnp.asarray(TOKENS))


@nnx.jit
def score(model: SmolLM2, tokens: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
    return model(tokens, cache)


def logits(model: SmolLM2, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return np.asarray(score(model, jnp.asarray(tokens))[0], np.float64)


def bound(scores: np.ndarray) -> float:
    """How far float32 rounding moves logits: linear layers in a row, each a sum of at most 128 terms.

    Norms keep activations at magnitude 1; the residual stream at most doubles an error per block.
    """
    return LAYERS * TINY.hidden * EPS * 2**TINY.blocks * np.abs(scores).max()


class RoundedLinear(nnx.Linear):
    """A linear layer on rounded weights and, with `act_qtype`, rounded rows, in the plainest arithmetic.

    Of an integer scheme the sum is exact, and scaled by the row and then the column, so that the result is
    that of the quantized layer to the last bit.
    """

    act_qtype: str | None = None
    weight: qwix.QArray | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.act_qtype is None:
            return x @ qwix.dequantize(self.weight)
        rows = qwix.quantize(x, self.act_qtype, channelwise_axes=tuple(range(x.ndim - 1)))
        exact = np.asarray(rows.qvalue, np.float64) @ np.asarray(self.weight.qvalue, np.float64)
        return exact.astype(np.float32) * rows.scale * self.weight.scale[0]


def rounded_model(name: str) -> SmolLM2:
    rule = dict(schemes.SCHEMES[name].rule)
    model = nnx.clone(float_model())
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            tiles = {0: rule["tile_size"]} if "tile_size" in rule else None
            how = {"channelwise_axes": (1,), "tiled_axes": tiles}
            module.__class__ = RoundedLinear
            module.weight = nnx.data(qwix.quantize(module.kernel[...], rule["weight_qtype"], **how))
            module.act_qtype = rule.get("act_qtype")
    return model


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_model_computes_what_its_numbers_say(name: str):
    models = quantized_model(name), rounded_model(name), float_model()
    # One operation at a time: fused ones may round otherwise, and a rounded activation is then a step away.
    found, expected, exact = (np.asarray(model(jnp.asarray(TOKENS))[0], np.float64) for model in models)
    assert np.abs(found - exact).max() > bound(exact), "nothing was quantized"
    if name == "w8a8":
        np.testing.assert_array_equal(found, expected)
    else:
        assert np.abs(found - expected).max() <= bound(exact)


@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_are_those_on_the_device(name: str):
    rule = schemes.SCHEMES[name].rule
    bits = {"int8": 8, "float8_e4m3fn": 8, "int4": 4, "nf4": 4}[rule["weight_qtype"]]
    values = scales = 0
    for _, module in nnx.iter_modules(float_model()):
        if isinstance(module, nnx.Linear):
            rows, columns = module.kernel.shape
            values += rows * columns
            scales += columns * (rows // rule.get("tile_size", rows))
    expected = (values * bits / 8 + scales * 4) / (values * 4)
    found = evaluate.linear_bytes(quantized_model(name)) / evaluate.linear_bytes(float_model())
    assert found == expected


def test_the_float_model_is_left_alone():
    model = SmolLM2(TINY, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model))
    qwix.quantize_model(model, qwix.PtqProvider(schemes.SCHEMES["int8"].rules()), jnp.asarray(TOKENS))
    after = nnx.state(model)
    assert type(model) is SmolLM2
    assert jax.tree.structure(after) == jax.tree.structure(before)
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("name", ["float", "int8", "nf4"])
def test_the_cache_gives_the_same_logits(name: str):
    model = float_model() if name == "float" else quantized_model(name)
    whole = logits(model)
    cache, parts = Cache.empty(TINY, 2, capacity=16), []
    for part in np.split(TOKENS, [10, 11], axis=1):  # a prompt, then one token at a time
        scores, cache = score(model, jnp.asarray(part), cache)
        parts.append(np.asarray(scores, np.float64))
    assert int(cache.length) == TOKENS.shape[1]
    off = np.abs(np.concatenate(parts, axis=1) - whole).max()
    assert off <= bound(whole)


@pytest.mark.parametrize("name", ["float", "w8a8"])
def test_a_conversation_compiles_once(name: str):
    model = float_model() if name == "float" else quantized_model(name)
    graphdef, state = nnx.split(model)
    before = generate.step._cache_size()
    prompt = [int(token) for token in np.resize(TOKENS, generate.CHUNK + 3)]
    token, cache = generate.feed(graphdef, state, prompt, Cache.empty(TINY, 1, 64))
    said = [int(token)]
    for _ in range(2):
        token, cache = generate.feed(graphdef, state, [said[-1]], cache)
        said.append(int(token))
    assert generate.step._cache_size() == before + 1
    # The padding of the chunks changed nothing: without a cache the same tokens are the likeliest.
    scores = logits(model, np.array([prompt + said[:-1]], np.int32))[0]
    assert list(scores.argmax(-1)[len(prompt) - 1 :]) == said


def test_perplexity_of_a_model_that_knows_nothing():
    model = nnx.clone(float_model())
    model.embed.embedding[...] = jnp.zeros_like(model.embed.embedding[...])
    # Every token is as likely as any other.
    found = evaluate.perplexity(model, TOKENS, progress=False)
    assert abs(found / TINY.vocab_size - 1) <= TOKENS.size * EPS * np.log(TINY.vocab_size)


def test_the_report_names_every_linear_layer():
    report = qwix.report(quantized_model("int8"), chips=("v5e",), params=float_model())
    quantized = {row.path for row in report.rows if row.reason is None}
    layers = [f"attention/{p}_proj" for p in "qkvo"] + [f"mlp/{p}_proj" for p in ("gate", "up", "down")]
    assert quantized == {f"layers/{i}/{layer}" for i in range(TINY.blocks) for layer in layers}
    assert report.unused_rules == ()


GOOD = schemes.Result(
    perplexity=19.40, device_mb=538.1, linear_weight_ratio=0.14, answer="It is Paris.", seconds=1.0
)


@pytest.mark.parametrize("name", schemes.SCHEMES)
def test_results_that_fall_short_are_named(name: str):
    replace = functools.partial(dataclasses.replace, GOOD)
    assert schemes.shortfalls(name, GOOD) == []
    assert "perplexity" in schemes.shortfalls(name, replace(perplexity=32.0))[0]
    assert "perplexity" in schemes.shortfalls(name, replace(perplexity=float("nan")))[0]
    assert "perplexity" in schemes.shortfalls(name, replace(perplexity=1.5))[0]
    assert "float32" in schemes.shortfalls(name, replace(linear_weight_ratio=1.01))[0]
    assert bool(schemes.shortfalls(name, replace(answer="Lyon"))) == schemes.SCHEMES[name].names_paris


def test_the_file_is_smollm2_135m():
    config = load.read_config(load.open_file())
    assert config.norm_epsilon == pytest.approx(Config().norm_epsilon, rel=EPS)
    assert config == Config(norm_epsilon=config.norm_epsilon)
    state = nnx.state(nnx.eval_shape(lambda: SmolLM2(config, rngs=nnx.Rngs(0))))
    names = {load.tensor_name(path) for path, _ in nnx.to_flat_state(state)}
    assert names == {tensor.name for tensor in load.open_file().tensors}


@pytest.mark.parametrize("name", ["blk.0.attn_k.weight", "blk.29.ffn_down.weight"])
def test_matrices_are_read_as_the_format_says(name: str):
    (tensor,) = (tensor for tensor in load.open_file().tensors if tensor.name == name)
    # Q4_1: per 32 values a float16 scale and minimum, then 16 bytes, low nibbles before high ones.
    outputs = tensor.data.shape[0]
    blocks = np.asarray(tensor.data).reshape(outputs, -1, 20)
    scale, low = (blocks[..., i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    nibbles = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1).astype(np.float32)
    expected = (scale * nibbles + low).reshape(outputs, -1).T
    np.testing.assert_array_equal(load.read_tensor(tensor, transpose=True), expected)


def test_the_tokenizer_knows_the_chat_template():
    tokenizer = load.load_tokenizer()
    prompt = generate.chat("What is 12 + 30?")
    ids = tokenizer.encode(prompt).ids
    assert [tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>")] == [1, 2]
    assert ids.count(1) == 3 and ids.count(2) == 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt
    digits = [tokenizer.encode(digit).ids[0] for digit in "1230"]
    assert [i for i in ids if i in digits] == digits


@pytest.mark.parametrize("module", [model_module, load, schemes], ids=lambda module: module.__name__)
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0
