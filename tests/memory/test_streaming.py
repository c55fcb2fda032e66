"""Weights are quantized one at a time: what is alive, and what the compiled quantizer takes, is counted."""

import gc
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

import qwix
from qwix._src import weight_quantizer
from qwix._src.weight_quantizer import Form, quantize_weight

LAYERS, WIDTH = 6, 256
LAYER = WIDTH * WIDTH * 4  # bytes of a float layer
RULE = qwix.QuantizationRule(weight_qtype="int8")
SLACK = 4096 * LAYERS  # biases, scalars, facts


class Stack(nnx.Module):
    def __init__(self, rngs, layers=LAYERS, width=WIDTH, dtype=jnp.float32):
        make = lambda: nnx.Linear(width, width, rngs=rngs, param_dtype=dtype)
        self.layers = nnx.List([make() for _ in range(layers)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x = nn.Dense(WIDTH, name=f"layer{i}")(x)
        return x


def live():
    """Bytes of all arrays that anybody holds."""
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())


class Peak:
    """Counts what is alive whenever a weight has been quantized: its float and its result are both there."""

    def __init__(self, monkeypatch):
        self.start, self.most = live(), 0
        program = weight_quantizer._program

        def counted(*args):
            compiled = program(*args)

            def run(array):
                result = compiled(array)
                if not isinstance(array, jax.core.Tracer):
                    self.most = max(self.most, live() - self.start)
                return result

            return run

        monkeypatch.setattr(weight_quantizer, "_program", counted)


def stream(rows=range(LAYERS), seed=0):
    """As a reader of a checkpoint makes them: it holds one array itself."""
    for i in rows:
        rng = np.random.default_rng(seed + i)
        yield ("layers", i, "kernel"), rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)
        yield ("layers", i, "bias"), np.zeros(WIDTH, np.float32)


def abstract_stack(**kwargs):
    return qwix.quantize_model(nnx.eval_shape(lambda: Stack(nnx.Rngs(0), **kwargs)), RULE)


def test_a_stream_takes_the_quantized_model_and_one_layer(monkeypatch):
    model = abstract_stack()
    quantized = qwix.device_bytes(model)
    peak = Peak(monkeypatch)
    made = qwix.quantize_params(stream(), model)
    assert LAYER < peak.most <= quantized + LAYER + SLACK
    assert live() - peak.start <= quantized + SLACK
    nnx.update(model, made)
    weight = dict(stream())["layers", 3, "kernel"]
    expected = qwix.quantize(weight, "int8", channelwise_axes=(1,))
    jax.tree.map(np.testing.assert_array_equal, model.layers[3].kernel.unboxed, expected)


def test_what_is_given_away_at_once_takes_one_layer(monkeypatch):
    model, peak, bytes_seen = abstract_stack(), Peak(monkeypatch), 0
    for _, array in qwix.quantize_stream(stream(), model):
        bytes_seen += array.nbytes
        del array
    assert bytes_seen == qwix.device_bytes(model)
    assert LAYER < peak.most <= 2 * LAYER + SLACK


@pytest.mark.parametrize("donate", [pytest.param(False, marks=pytest.mark.large), True])
def test_a_model_at_hand(monkeypatch, donate):
    model = Stack(nnx.Rngs(0))
    x = jnp.ones((2, WIDTH))
    floats, expected = LAYERS * LAYER, qwix.quantize_model(model, RULE)(x)
    peak = Peak(monkeypatch)
    quantized = qwix.quantize_model(model, RULE, donate=donate)
    size = qwix.device_bytes(quantized)
    # Beside the float model: a layer, or the quantized model too. (A layer's result is beside its float.)
    assert peak.most <= (LAYER + SLACK if donate else size + SLACK)
    assert live() - peak.start <= size - (floats if donate else 0) + SLACK
    assert model.layers[0].kernel[...].is_deleted() == donate
    assert (quantized(x) == expected).all()


def test_linen_params_are_donated(monkeypatch):
    model, x = LinenStack(), jnp.ones((2, WIDTH))
    quantized = qwix.quantize_model(model, RULE)
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    params = model.init(jax.random.key(0), x)["params"]
    peak = Peak(monkeypatch)
    made = qwix.quantize_params(params, abstract, donate=True)
    assert peak.most <= LAYER + SLACK
    assert live() - peak.start <= qwix.device_bytes(made) - LAYERS * LAYER + SLACK
    assert params["layer0"]["kernel"].is_deleted() and not params["layer0"]["bias"].is_deleted()
    with pytest.raises(ValueError, match=r"'layer0/kernel' was deleted: was it donated before\?"):
        qwix.quantize_params(params, abstract)


def test_init_drops_each_float_weight(monkeypatch):
    peak = Peak(monkeypatch)
    made = qwix.quantize_model(LinenStack(), RULE).init(jax.random.key(0), jnp.ones((2, WIDTH)))
    assert live() - peak.start <= qwix.device_bytes(made) + SLACK
    assert peak.most <= LAYERS * LAYER + LAYER + SLACK


def test_an_array_that_another_param_holds_is_kept_until_both_are_done():
    class Tied(nnx.Module):
        def __init__(self):
            self.one, self.two = (nnx.Linear(8, 8, rngs=nnx.Rngs(0)) for _ in range(2))
            self.two.kernel = nnx.Param(self.one.kernel[...])
            self.copy = nnx.Variable(self.two.bias[...])

        def __call__(self, x):
            return self.two(self.one(x))

    model = Tied()
    quantized = qwix.quantize_model(model, RULE, donate=True)
    assert model.one.kernel[...].is_deleted()
    assert quantized(jnp.ones((1, 8))).shape == (1, 8)


def test_a_weight_that_cannot_be_quantized_costs_no_other():
    model = Stack(nnx.Rngs(0), layers=2, width=8)
    model.layers[1].kernel[0, 0] = jnp.nan
    with pytest.raises(ValueError, match=r"layers/1/kernel.* aren't finite"):
        qwix.quantize_model(model, RULE, donate=True)
    assert not any(x.is_deleted() for x in jax.tree.leaves(nnx.state(model)))
    params = {"layers": {0: {"kernel": jnp.ones((8, 8))}, 1: {"kernel": jnp.ones((8, 9))}}}
    with pytest.raises(ValueError, match=r"layers/1/kernel has shape \(8, 9\), but .* is \(8, 8\)"):
        qwix.quantize_params(params, abstract_stack(layers=2, width=8), donate=True)
    assert not params["layers"][0]["kernel"].is_deleted()


HOWS = {
    "int8": qwix.HowToQuantize(qtype="int8", channelwise_axes=(1,)),
    "int4 tiles": qwix.HowToQuantize(qtype="int4", channelwise_axes=(-1,), tiled_axes={0: 32}),
    "parts": qwix.HowToQuantize(qtype="nf4", channelwise_axes=(1,), tiled_axes={-2: 1 / 13}),
    "minmax": qwix.HowToQuantize(qtype="int8", channelwise_axes=(0,), calibration_method="minmax"),
    "fixed": qwix.HowToQuantize(qtype="int8", calibration_method="fixed,-2,2"),
    "percentile": qwix.HowToQuantize(qtype="int8", channelwise_axes=(1,), calibration_method="percentile,99"),
    "fp8": qwix.HowToQuantize(qtype="float8_e4m3fn", channelwise_axes=(1,)),
}


LARGE = [pytest.param(name, marks=pytest.mark.large) for name in ("parts", "minmax", "percentile", "fp8")]


@pytest.mark.parametrize("name", ["int8", "int4 tiles", "fixed", *LARGE])
def test_pieces_give_the_bits_of_the_whole(monkeypatch, name):
    """416 x 200: pieces of a size that divides neither, so the last one overlaps."""
    how, w = HOWS[name], jax.random.normal(jax.random.key(0), (416, 200), jnp.bfloat16)
    form = Form.like(jax.eval_shape(lambda: qwix._src.core.qarray.quantize(w, how)), how)
    whole, sqnr = quantize_weight(w, form, name="w", quality=True)
    monkeypatch.setattr(weight_quantizer, "CHUNK_BYTES", w.nbytes / 5.5)
    cut = weight_quantizer.cut_of(w, form)
    assert cut is not None and w.shape[cut.axis] % cut.length
    pieces, again = quantize_weight(w, form, name="w", quality=True)
    jax.tree.map(np.testing.assert_array_equal, pieces, whole)
    assert again == pytest.approx(sqnr, abs=1e-3)
    with pytest.raises(ValueError, match=r"w of shape \(416, 200\) holds 1 values .* at \(383, 1\)"):
        quantize_weight(w.at[383, 1].set(jnp.inf), form, name="w")


@pytest.mark.parametrize("name", ["int8", "int4 tiles", *LARGE])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.large)])
def test_temporaries_are_those_of_pieces(monkeypatch, name, dtype):
    """Uncut, the float32 copies of a bfloat16 weight are four times its size."""
    how, w = HOWS[name], jnp.zeros((4608, 1024), dtype)
    form = Form.like(jax.eval_shape(lambda: qwix._src.core.qarray.quantize(w, how)), how)
    monkeypatch.setattr(weight_quantizer, "CHUNK_BYTES", w.nbytes // 16)
    cut = weight_quantizer.cut_of(w, form)
    program = weight_quantizer._program(form, qwix._src.core.qarray, cut, True, None, None)
    analysis = program.lower(w).compile().memory_analysis()
    assert analysis.temp_size_in_bytes <= w.nbytes
    assert analysis.argument_size_in_bytes == w.nbytes


def test_safetensors_shards(tmp_path):
    """Two files, read tensor by tensor, with the names and the layout of another framework."""
    model = abstract_stack()
    tensors = {"/".join(map(str, path)): array for path, array in stream()}
    turned = {k.replace("/", "."): np.ascontiguousarray(v.T) for k, v in tensors.items()}
    for shard in range(2):
        part = {k: v for i, (k, v) in enumerate(turned.items()) if i % 2 == shard}
        safetensors.numpy.save_file(part, tmp_path / f"model-{shard}.safetensors")

    def read():
        for file in sorted(tmp_path.glob("*.safetensors")):
            with safetensors.safe_open(file, framework="numpy") as f:
                for key in f.keys():  # noqa: SIM118 (it is no dict)
                    yield key.replace(".", "/"), f.get_tensor(key).T

    nnx.update(model, qwix.quantize_params(read(), model))
    expected = abstract_stack()
    nnx.update(expected, qwix.quantize_params(dict_of(stream()), expected))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(expected))


def dict_of(pairs):
    tree = {"layers": {}}
    for (_, i, name), array in pairs:
        tree["layers"].setdefault(i, {})[name] = array
    return tree


def test_orbax_layer_by_layer(tmp_path):
    """Partial restores: one layer of the checkpoint is in memory."""
    tree = jax.tree.map(jnp.asarray, {"layers": {str(i): v for i, v in dict_of(stream())["layers"].items()}})
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", tree)

        def read():
            for i in range(LAYERS):
                item = {"layers": {str(i): jax.tree.map(np.empty_like, tree["layers"][str(i)])}}
                how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
                args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
                yield checkpointer.restore(tmp_path / "params", args)

        model = abstract_stack()
        made = qwix.quantize_params(read(), model)
    assert sorted(made["layers"]) == [*range(LAYERS)]
    expected = qwix.quantize(tree["layers"]["2"]["kernel"], "int8", channelwise_axes=(1,))
    got = made["layers"][2]["kernel"]["array"]
    np.testing.assert_array_equal(got["qvalue"], expected.qvalue)


def test_just_some_layers():
    made = qwix.quantize_params(stream(rows=[4]), abstract_stack())
    assert set(made["layers"]) == {4}


def test_a_large_model_plans_without_arrays():
    """A 70B-shaped stack: abstract weights, abstract quantized ones, bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = live()
        make = lambda: Stack(nnx.Rngs(0), layers=8, width=94_000, dtype=jnp.bfloat16)
        rule = qwix.QuantizationRule(weight_qtype="int4", tile_size=2000)
        model = qwix.quantize_model(nnx.eval_shape(make), rule)
        params = 8 * 94_000**2
        assert params > 70e9
        assert qwix.device_bytes(model) == params // 2 + 8 * (94_000**2 // 2000 + 94_000) * 2
        assert qwix.report(model).totals.bytes_before == 2 * params
        assert live() - before < SLACK


BAD = {
    "twice": ([("layers/0/bias", np.zeros(WIDTH)), ("layers/0/bias", 0)], ValueError, "is a int"),
    "again": ([("layers/0/bias", np.zeros(WIDTH))] * 2, ValueError, "'layers/0/bias' came twice"),
    "number": ([3], TypeError, "nor an iterable of .path, array. pairs or such dicts: it gave a int"),
    "array": (np.ones(3), TypeError, "it's a ndarray. An iterable gives"),
    "unknown": ([("layers/0/kernl", np.ones((2, 2)))], ValueError, "nearest there is 'layers/0/kernel'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_streams(name):
    weights, error, message = BAD[name]
    with pytest.raises((error, TypeError), match=message):
        qwix.quantize_params(weights, abstract_stack())


def test_bad_donations():
    with pytest.raises(ValueError, match="a linen module has no arrays"):
        qwix.quantize_model(LinenStack(), RULE, donate=True)
    with pytest.raises(ValueError, match="QtProvider keeps the float weights"):
        rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8")
        qwix.quantize_model(Stack(nnx.Rngs(0), width=8), qwix.QtProvider(rule), donate=True)
    with pytest.raises(ValueError, match="donate_argnums"):
        jax.eval_shape(lambda m: qwix.quantize_model(m, RULE, donate=True), Stack(nnx.Rngs(0), width=8))
