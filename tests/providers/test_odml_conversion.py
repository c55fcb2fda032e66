"""OdmlConversionProvider: LiteRT's converter makes integer programs of it, which agree in its interpreter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from qwix import OdmlConversionProvider, OdmlQatProvider, QuantizationRule
from qwix.odml import Signature, convert

INT8 = QuantizationRule(weight_qtype="int8", act_qtype="int8")
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
ROWS = RNG.normal(size=(4, 16)).astype(np.float32)
WORDS = RNG.normal(size=(2, 6, 16)).astype(np.float32)


class Of(nn.Module):
    """A module that computes fn."""

    fn: object

    @nn.compact
    def __call__(self, *args):
        return self.fn(*args)


def calibrated(model, x, rules=(INT8,), **options):
    """(the provider, variables with statistics, the fake-quantized output)."""
    provider = OdmlQatProvider(list(rules), **options)
    trained = qwix.quantize_model(model, provider)

    def both(x):
        variables = model.init(jax.random.key(0), x)
        _, new = trained.apply(variables, x, mutable=["quant_stats"])
        variables = {**variables, **new}
        return variables, trained.apply(variables, x)

    variables, out = jax.jit(both)(x)
    return provider, variables, np.asarray(out)


def converted(model, provider, variables):
    """The function that the converter reads."""
    given = jax.device_get(variables)  # arrays of numpy do
    conversion = provider.for_conversion(given.get("params", {}), given.pop("quant_stats", {}))
    model = qwix.quantize_model(model, conversion)
    return lambda x: model.apply(given, x)


def check(model, x, steps=2, *, ops=None, rules=(INT8,), **options):
    """Converts a model, and compares it in LiteRT's interpreter; returns its summary."""
    provider, variables, expected = calibrated(model, x, rules, **options)
    file = convert(Signature(converted(model, provider, variables), (x,)), strict=True)
    out = file.run({"x": x})["output"]
    stat = variables["quant_stats"]["final_output0"]
    low, high = stat.get("sum_of_min", 0), stat.get("sum_of_max", stat.get("sum_of_absmax"))
    step = np.asarray(high - low).item() / (255 if "sum_of_min" in stat else 32768)
    assert np.abs(out - expected).max() <= (steps + 0.01) * step
    summary = file.summary()
    if ops is not None:
        assert [op.name for op in summary.ops][1:-1] == ops.split()
    return summary


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = x + nn.relu6(nn.Conv(4, (3, 3), feature_group_count=4)(x))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


def test_a_cnn_is_integer_from_end_to_end():
    check(Cnn(), IMAGES, ops="CONV_2D MAX_POOL_2D DEPTHWISE_CONV_2D ADD RESHAPE FULLY_CONNECTED")


def test_constants_after_a_contraction_are_in_its_weight_and_bias():
    scale, shift = np.linspace(-2, 3, 5, dtype=np.float32), np.linspace(1, -4, 5, dtype=np.float32)
    fn = lambda x: nn.relu((3.0 - (nn.Dense(5)(x) * scale + shift)) / 7.0)
    check(Of(fn), ROWS, ops="FULLY_CONNECTED")


def test_a_bias_may_be_one_number():
    check(Of(lambda x: nn.Dense(5)(x) - 1.0), ROWS, ops="FULLY_CONNECTED")


@pytest.mark.large
def test_weights_have_channels_on_either_side():
    w = jnp.asarray(RNG.normal(size=(3, 5, 16)) * 10.0 ** np.arange(5)[:, None] / 100, jnp.float32)
    left = check(Of(lambda x: jnp.einsum("hnd,btd->bhnt", w, x)), WORDS)
    right = check(Of(lambda x: jnp.einsum("btd,hnd->bthn", x, w)), WORDS)
    for summary in (left, right):
        assert [op.constants for op in summary.ops if op.name == "FULLY_CONNECTED"] == [("int8",)]


@pytest.mark.large
def test_attention_is_integer():
    summary = check(Of(lambda x: nn.MultiHeadDotProductAttention(4)(x, x)), WORDS)
    assert [op.name for op in summary.ops].count("BATCH_MATMUL") == 2


def test_a_softmax_whose_maximum_was_moved_about_is_one_op():
    """jax.nn.dot_product_attention, as Flax's NNX calls it, maps a softmax over the groups of heads."""
    fn = lambda x: jax.nn.dot_product_attention(*(nn.DenseGeneral((2, 8), name=name)(x) for name in "qkv"))
    names = [op.name for op in check(Of(fn), WORDS).ops]
    assert names.count("SOFTMAX") == 1 and "REDUCE_MAX" not in names


@pytest.mark.large
def test_norms_and_activations_are_integer():
    fn = lambda x: nn.Dense(8)(jax.nn.silu(nn.RMSNorm()(nn.LayerNorm()(x))))
    check(Of(fn), WORDS, steps=3)


@pytest.mark.large
def test_layers_of_a_scan_are_one_after_the_other():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.relu(nn.Dense(16)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            over = {"params": 0, "quant_stats": 0}
            scanned = nn.scan(Layer, variable_axes=over, split_rngs={"params": True}, length=2)
            return scanned(name="layers")(x, None)[0]

    check(Stack(), ROWS, ops="FULLY_CONNECTED ADD FULLY_CONNECTED ADD")


@pytest.mark.parametrize(
    ("weight_qtype", "act_qtype", "dtype"),
    [
        ("int4", "int8", jnp.float32),
        pytest.param("int8", "int16", jnp.float32, marks=pytest.mark.large),
        pytest.param("int8", "int8", jnp.bfloat16, marks=pytest.mark.large),
    ],
)
def test_other_types(weight_qtype, act_qtype, dtype):
    rule = QuantizationRule(weight_qtype=weight_qtype, act_qtype=act_qtype)
    fn = lambda x: nn.Dense(4, dtype=dtype)(nn.relu(nn.Dense(8, dtype=dtype)(x))).astype(jnp.float32)
    summary = check(Of(fn), ROWS, 2, rules=[rule], ops="FULLY_CONNECTED FULLY_CONNECTED")
    op = summary.ops[1]
    assert (op.inputs, op.constants[0]) == ((act_qtype,), weight_qtype)


def test_convolutions_of_int16_have_wide_biases():
    rule = QuantizationRule(weight_qtype="int8", act_qtype="int16")
    fn = lambda x: nn.Conv(3, (3, 3), feature_group_count=3)(nn.relu(nn.Conv(3, (3, 3), use_bias=False)(x)))
    summary = check(Of(fn), IMAGES, 2, rules=[rule], ops="CONV_2D DEPTHWISE_CONV_2D")
    assert all(op.constants == ("int8", "int64") for op in summary.ops[1:-1])


@pytest.mark.large
def test_a_stack_of_weights_is_a_batch():
    w = jnp.asarray(RNG.normal(size=(2, 16, 5)), jnp.float32)
    check(Of(lambda x: jnp.einsum("bij,bjk->bik", x, w)), WORDS, ops="BATCH_MATMUL")


@pytest.mark.parametrize("act_qtype", ["int8", None])
def test_weights_are_integers_where_activations_are_floats(act_qtype):
    static = None if act_qtype is None else False
    rule = QuantizationRule(weight_qtype="int8", act_qtype=act_qtype, act_static_scale=static)
    provider, variables, expected = calibrated(Of(lambda x: nn.Dense(64)(x)), ROWS, [rule])
    file = convert(Signature(converted(Of(lambda x: nn.Dense(64)(x)), provider, variables), (ROWS,)))
    out = file.run({"x": ROWS})["output"]
    assert ((out - expected) ** 2).sum() < (expected**2).sum() * 10**-3.5  # rows are rounded by LiteRT's rule
    assert any("int8" in op.constants for op in file.summary().ops)


def test_an_nnx_model_converts_what_it_was_trained_as():

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(10, 16, rngs=rngs)
            self.dense = nnx.Linear(16, 4, rngs=rngs)

        def __call__(self, ids):
            return jax.nn.softmax(self.dense(self.embed(ids)))

    ids = np.array([[1, 2, 9], [0, 5, 5]], np.int32)
    provider = OdmlQatProvider([INT8])
    model = qwix.quantize_model(Model(nnx.Rngs(0)), provider, ids)
    nnx.jit(lambda model, x: model(x))(model, ids)
    expected = np.asarray(model(ids))
    params, stats = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, qwix.QuantStat))
    conversion = qwix.quantize_model(model, provider.for_conversion(params, stats), ids)
    graphdef, state = nnx.split(conversion)
    file = convert(Signature(lambda x: nnx.merge(graphdef, state)(x), (ids,)), strict=True)
    assert np.abs(file.run({"x": ids})["output"] - expected).max() <= 2.01 / 256


@pytest.mark.large
def test_without_a_converter_the_function_is_that_of_training():
    provider, variables, expected = calibrated(Cnn(), IMAGES)
    fn = converted(Cnn(), provider, variables)
    text = str(jax.make_jaxpr(fn)(IMAGES))
    assert text.count("quant.fake_quant") > 8
    step = variables["quant_stats"]["final_output0"]
    step = np.asarray(step["sum_of_max"] - step["sum_of_min"]).item() / 255
    assert np.abs(jax.jit(fn)(IMAGES) - expected).max() <= 1.01 * step


@pytest.fixture(scope="module")
def dense():
    return calibrated(Of(lambda x: nn.Dense(3)(x)), ROWS)


def convert_with(dense, change):
    provider, variables, _ = dense
    params, stats = change(jax.device_get(variables["params"]), jax.device_get(variables["quant_stats"]))
    model = qwix.quantize_model(Of(lambda x: nn.Dense(3)(x)), provider.for_conversion(params, stats))
    jax.eval_shape(lambda x: model.apply({"params": variables["params"]}, x), ROWS)


def without(stats, path):
    return {key: without(value, path[1:]) if key == path[0] and len(path) > 1 else value
            for key, value in stats.items() if key != path[0] or len(path) > 1}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, s: (p, {}), ValueError, "quant_stats is not initialized for Dense_0/dot_general0_lhs"),
        (lambda p, s: (p, without(s, ["final_output0"])), ValueError, "not initialized for final_output0"),
        (lambda p, s: (p, jax.tree.map(np.zeros_like, s)), ValueError, "not initialized for .*count is 0"),
        (
            lambda p, s: (p, jax.tree.map(lambda x: x * np.nan, s) | {}),
            ValueError,
            "Invalid scale.*isn't finite",
        ),
        (lambda p, s: (jax.tree.map(lambda x: np.full_like(x, np.inf), p), s), ValueError, "Invalid scale"),
        (lambda p, s: ({"Dense_0": {"kernel": "x"}}, s), TypeError, "parameter Dense_0/kernel has type"),
    ],
)
def test_what_was_not_calibrated_or_is_not_finite_is_refused(dense, change, error, message):
    with pytest.raises(error, match=message):
        convert_with(dense, change)


def test_params_may_be_given_when_the_program_runs_but_then_the_provider_has_them(dense):
    provider, variables, expected = dense
    model = qwix.quantize_model(
        Of(lambda x: nn.Dense(3)(x)), provider.for_conversion(variables["params"], variables["quant_stats"])
    )
    out = jax.jit(lambda p, x: model.apply({"params": p}, x))(variables["params"], ROWS)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    empty = qwix.quantize_model(
        Of(lambda x: nn.Dense(3)(x)), OdmlConversionProvider([INT8], {}, variables["quant_stats"])
    )
    with pytest.raises(ValueError, match=r"A weight of shape .16, 3. is traced"):
        jax.jit(lambda p, x: empty.apply({"params": p}, x))(variables["params"], ROWS)
