"""Linen models: init makes quantized params, quantize_params makes them from float ones, apply computes."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

import qwix

INT8 = qwix.QuantizationRule(weight_qtype="int8")
STATIC = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 8))
EPS = float(np.finfo(np.float32).eps)


class Layer(nn.Module):
    @nn.compact
    def __call__(this, x, _=None):
        return jnp.tanh(nn.Dense(8)(x)), None


class Model(nn.Module):
    """A scanned, a rematerialized and a vmapped layer."""

    @nn.compact
    def __call__(this, x):
        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="stack")(x, None)
        x, _ = nn.remat(Layer)(name="again")(x)
        heads = nn.vmap(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2, in_axes=None
        )
        return heads(name="heads")(x)[0]


class Tied(nn.Module):
    def setup(this):
        this.embed = nn.Embed(10, 8)
        this.dense = nn.Dense(8)

    def __call__(this, ids):
        return this.embed.attend(this.dense(this.embed(ids)))

    def look_up(this, ids):
        return this.embed(ids)


def convert(model, rules, *inputs):
    """(float params, quantized model, quantized params)."""
    params = model.init(KEY, *inputs)["params"]
    quantized = qwix.quantize_model(model, rules)
    abstract = jax.eval_shape(quantized.init, KEY, *inputs)["params"]
    return params, quantized, qwix.quantize_params(meta.unbox(params), abstract)


def dequantized(params):
    is_aux = lambda x: isinstance(x, qwix.WithAux)
    return jax.tree.map(lambda x: qwix.dequantize(x.array) if is_aux(x) else x, params, is_leaf=is_aux)


def test_transformations():
    provider = qwix.PtqProvider([INT8])
    params, model, quantized = convert(Model(), provider, X)
    records = {r.path: r for r in provider.records.values()}
    assert {p: r.weight_shape for p, r in records.items()} == {
        "stack/Dense_0": (3, 8, 8),
        "again/Dense_0": (8, 8),
        "heads/Dense_0": (2, 8, 8),
    }
    assert quantized["stack"]["Dense_0"]["kernel"].array.scale.shape == (3, 1, 8)
    assert quantized["heads"]["Dense_0"]["kernel"].array.scale.shape == (2, 1, 8)
    expected = Model().apply({"params": dequantized(quantized)}, X)
    for apply in (model.apply, jax.jit(model.apply)):
        assert jnp.all(abs(apply({"params": quantized}, X) - expected) <= 5 * 4 * 8 * 8 * EPS)
    again = model.init(KEY, X)["params"]  # what init makes is what quantize_params makes
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(quantized), strict=True):
        assert (one == other).all()
    assert jax.tree.structure(again) == jax.tree.structure(quantized)
    assert params["stack"]["Dense_0"]["kernel"].dtype == jnp.float32


def test_init_returns_the_quantized_output():
    model = qwix.quantize_model(Model(), qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8"))
    output, variables = model.init_with_output(KEY, X)
    assert (output == model.apply(variables, X)).all()
    assert jnp.any(output != Model().apply(Model().init(KEY, X), X))


def test_embedding_and_methods():
    ids = jnp.array([[1, 9, 1]])
    converted = qwix.quantize_model(Tied(), INT8, methods=("__call__", "look_up"))
    variables = converted.init(KEY, ids)
    table = variables["params"]["embed"]["embedding"]
    assert table.array.scale.shape == (10, 1)
    rows = converted.apply(variables, ids, method="look_up")
    assert (rows == qwix.dequantize(table.array)[ids]).all()
    expected = Tied().apply({"params": dequantized(variables["params"])}, ids)
    assert jnp.all(abs(converted.apply(variables, ids) - expected) <= 1e-5 * abs(expected).max())


def test_other_collections_are_initialized_once():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls = self.variable("state", "calls", lambda: jnp.zeros((), jnp.int32))
            calls.value += 1
            return nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))

    model = qwix.quantize_model(Counting(), INT8)
    expected = Counting().init(KEY, X)
    variables = model.init(KEY, X)
    assert variables["state"]["calls"] == expected["state"]["calls"] == 1
    assert set(variables) == set(expected)
    _, changed = model.apply(variables, X, mutable=["state", "batch_stats"])
    assert changed["state"]["calls"] == 2


def test_unbound_and_nested():
    """A quantized module inside a float one; paths count from the quantized one."""

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(self.inner(x))

    provider = qwix.PtqProvider([qwix.QuantizationRule(module_path="again/.*", weight_qtype="int8")])
    outer = Outer(qwix.quantize_model(Model(), provider))
    variables = outer.init(KEY, X)
    quantized = variables["params"]["inner"]["again"]["Dense_0"]["kernel"]
    assert isinstance(quantized, qwix.WithAux)
    assert not isinstance(variables["params"]["inner"]["stack"]["Dense_0"]["kernel"], qwix.WithAux)
    assert not isinstance(variables["params"]["Dense_0"]["kernel"], qwix.WithAux)
    expected = Outer(Model()).apply({"params": dequantized(variables["params"])}, X)
    assert jnp.all(abs(outer.apply(variables, X) - expected) <= 6 * 4 * 8 * 8 * EPS)


def test_pickle():
    _, model, params = convert(Model(), [INT8], X)
    other = pickle.loads(pickle.dumps(model))
    assert (other.apply({"params": params}, X) == model.apply({"params": params}, X)).all()


def test_partitioned_params_keep_their_names():
    make = nn.with_partitioning(nn.initializers.lecun_normal(), ("rows", "columns"))
    model = qwix.quantize_model(nn.Dense(8, kernel_init=make), INT8)
    variables = model.init(KEY, X)
    weight = variables["params"]["kernel"].array
    assert weight.qvalue.names == ("rows", "columns") and weight.scale.names == (None, "columns")
    spec = nn.get_partition_spec(variables)["params"]["kernel"].array
    assert spec.scale == jax.sharding.PartitionSpec(None, "columns")
    assert model.apply(variables, X).shape == (4, 8)


def statistics(**stats):
    average = qwix.SimpleMovingAverage()
    stats = {key: jnp.full((1, 1), value) for key, value in stats.items()}
    return average.update(average.init(stats), stats)


def test_static_scales_from_statistics():
    params = nn.Dense(8).init(KEY, X)["params"]
    model = qwix.quantize_model(nn.Dense(8), STATIC)
    abstract = jax.eval_shape(model.init, KEY, X)["params"]
    largest = float(abs(X).max())
    quantized = qwix.quantize_params(params, abstract, {"dot_general0_lhs": statistics(absmax=largest)})
    assert jax.tree.structure(quantized) == jax.tree.structure(abstract)
    scale = quantized["dot_general0_lhs_scale"].array
    assert scale.shape == (1, 1) and abs(scale[0, 0] - largest / 127.5) <= EPS * largest
    x = qwix.dequantize(qwix.quantize(X, "int8"))
    expected = x @ qwix.dequantize(quantized["kernel"].array)
    assert jnp.all(abs(model.apply({"params": quantized}, X) - expected) <= 4 * 8 * EPS * 8 * largest)
    twice = model.apply({"params": quantized}, 2 * X)  # the scale doesn't move: values beyond it are clipped
    assert jnp.any(abs(twice - 2 * expected) > 0.1)
    with pytest.raises(ValueError, match=r"has no dot_general0_lhs_scale in ''"):
        model.apply({"params": qwix.quantize_params(params, abstract)}, X)


def test_static_scales_with_zero_points_from_init():
    rule = qwix.QuantizationRule(
        weight_qtype="int8", act_qtype="int8", act_static_scale=True, act_calibration_method="minmax"
    )
    model = qwix.quantize_model(nn.Dense(8), rule)
    positive = abs(X)
    variables = model.init(KEY, positive)
    names = {"kernel", "bias", "dot_general0_lhs_scale", "dot_general0_lhs_zero_point"}
    assert set(variables["params"]) == names
    error = abs(
        model.apply(variables, positive) - nn.Dense(8).apply(nn.Dense(8).init(KEY, positive), positive)
    ).max()
    assert 0 < error < 0.5  # the mean of the rows' ranges clips the largest value


def bad_calls():
    params = {"layer": {"kernel": jnp.ones((8, 8)), "bias": jnp.zeros(8)}}

    class Small(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="layer")(x)

    model = qwix.quantize_model(Small(), STATIC)
    abstract = jax.eval_shape(model.init, KEY, X)["params"]
    call = lambda *args, **kwargs: lambda: qwix.quantize_params(*args, **kwargs)
    kernel = params["layer"]["kernel"]
    empty = {"layer": {"dot_general0_lhs": {"count": jnp.int32(0), "sum_of_absmax": jnp.zeros((1, 1))}}}
    return {
        "float_params": (
            lambda: model.apply({"params": params}, X),
            ValueError,
            "unquantized param.*'layer/kernel'",
        ),
        "other_model": (
            call({"layr": {"kernel": kernel}}, abstract),
            ValueError,
            "nearest there is 'layer/kernel'",
        ),
        "shape": (
            call({"layer": {"kernel": jnp.ones((4, 8))}}, abstract),
            ValueError,
            r"layer/kernel has shape \(4, 8\)",
        ),
        "bias": (
            call({"layer": {"bias": jnp.ones(3)}}, abstract),
            ValueError,
            r"layer/bias has shape \(3,\)",
        ),
        "list": (call([kernel], abstract), TypeError, "not a pure dict of jax.Array"),
        "leaf": (call({"layer": {"kernel": 1.0}}, abstract), TypeError, "'layer/kernel' is a float"),
        "nan": (
            call({"layer": {"kernel": kernel.at[1, 2].set(jnp.nan)}}, abstract),
            ValueError,
            r"at \(1, 2\)",
        ),
        "no_data": (call(params, abstract, empty), ValueError, "not initialized for layer/dot_general0_lhs"),
        "no_such_op": (
            call(params, abstract, {"layer": {"dot_general7_lhs": statistics(absmax=1.0)}}),
            ValueError,
            "nearest there is 'layer/dot_general0_lhs_scale'",
        ),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_bad_params(case):
    call, error, message = bad_calls()[case]
    with pytest.raises(error, match=message):
        call()


def test_extra_params_and_parts_and_numpy():
    _, model, quantized = convert(Model(), [INT8], X)
    abstract = jax.eval_shape(model.init, KEY, X)["params"]
    kernel = np.ones((8, 8), np.float32)
    got = qwix.quantize_params(
        {"again": {"Dense_0": {"kernel": kernel}}, "extra": {"w": kernel}}, abstract, allow_extra_params=True
    )
    assert list(got) == ["again"]
    assert got["again"]["Dense_0"]["kernel"].info == quantized["again"]["Dense_0"]["kernel"].info
    assert (got["again"]["Dense_0"]["kernel"].array.qvalue == 127).all()
