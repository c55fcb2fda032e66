"""Static scales of activations: where they come from, where they're stored, and which layer has which."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from qwix._src.utils import flax_util

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 8))
STATIC = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)
MINMAX = qwix.QuantizationRule(
    weight_qtype="int8", act_qtype="int8", act_static_scale=True, act_calibration_method="minmax"
)
NAME = "dot_general0_lhs"


def linear(seed=0):
    return nnx.Linear(8, 8, rngs=nnx.Rngs(seed))


def statistics(**stats):
    average = qwix.SimpleMovingAverage()
    stats = {key: jnp.full((1, 1), value) for key, value in stats.items()}
    return average.update(average.init(stats), stats)


def by_hand(layer, x):
    """The layer with its stored scales, in float32 on the dequantized values."""
    scale = getattr(layer, f"{NAME}_scale").unboxed
    zero_point = getattr(layer, f"{NAME}_zero_point", None)
    zero = 0 if zero_point is None else zero_point.unboxed.astype(jnp.float32)
    q = jnp.clip(jnp.round(x / scale) + zero, -128, 127)
    return ((q - zero) * scale) @ qwix.dequantize(layer.kernel.unboxed) + layer.bias[...]


def assert_like_by_hand(layer, x):
    expected = by_hand(layer, x)
    largest = float(abs(x).max()) * float(abs(qwix.dequantize(layer.kernel.unboxed)).sum(0).max())
    assert jnp.all(abs(layer(x) - expected) <= 4 * 8 * EPS * (largest + 1))


def test_from_sample_inputs():
    model = qwix.quantize_model(linear(), STATIC, X)
    scale = getattr(model, f"{NAME}_scale").unboxed
    assert scale.shape == (1, 1)  # the mean over the rows
    assert abs(scale[0, 0] - jnp.abs(X).max(1).mean() / 127.5) <= 4 * EPS
    assert_like_by_hand(model, X)
    assert_like_by_hand(model, 3 * X)  # the scale doesn't move: what's beyond it is clipped
    assert (jax.jit(model)(X) == model(X)).all()


def test_asymmetric_from_sample_inputs():
    positive = abs(X) + 1
    model = qwix.quantize_model(linear(), MINMAX, positive)
    assert getattr(model, f"{NAME}_zero_point").unboxed.shape == (1, 1)
    assert_like_by_hand(model, positive)


def test_from_statistics_of_training():
    model = linear()
    setattr(model, NAME, flax_util.QuantStat(statistics(absmax=2.0)))
    quantized = qwix.quantize_model(model, STATIC, X)
    assert not hasattr(quantized, NAME) and hasattr(model, NAME)
    assert abs(getattr(quantized, f"{NAME}_scale").unboxed[0, 0] - 2 / 127.5) <= EPS
    assert_like_by_hand(quantized, X)


@pytest.mark.parametrize(
    "rule, stats", [(STATIC, {"absmax": 2.0}), (MINMAX, {"min": -1.0, "max": 3.0})], ids=["absmax", "minmax"]
)
def test_quantize_params_with_statistics(rule, stats):
    model = linear()
    quantized = qwix.quantize_model(linear(1), rule, X)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    new = qwix.quantize_params(params, quantized, {NAME: statistics(**stats)})
    nnx.update(quantized, new)
    span = stats.get("max", 0) - stats.get("min", 0) or 2 * stats["absmax"]
    assert abs(getattr(quantized, f"{NAME}_scale").unboxed[0, 0] - span / 255) <= 4 * EPS
    assert_like_by_hand(quantized, X)


def test_abstract_conversion_has_the_scales_as_shapes():
    expected = qwix.quantize_model(linear(), STATIC, X)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    model = qwix.quantize_model(nnx.eval_shape(linear), STATIC, shape)
    params = nnx.to_pure_dict(nnx.state(linear(), nnx.Param))
    absmax = float(jnp.abs(X).max(1).mean())
    nnx.update(model, qwix.quantize_params(params, model, {NAME: statistics(absmax=absmax)}))
    assert jnp.all(abs(model(X) - expected(X)) <= 64 * EPS * abs(expected(X)).max())


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + 10 * self.linear(x)  # each layer's inputs are larger than the last one's


class Stack(nnx.Module):
    def __init__(self, how="scan"):
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Block))(nnx.Rngs(0))
        self.how = how

    def __call__(self, x):
        call = nnx.remat(Block.__call__) if self.how == "remat" else lambda layer, x: layer(x)
        if self.how == "vmap":
            return nnx.vmap(call, in_axes=(0, None))(self.layers, x).sum(0)
        return nnx.scan(lambda x, layer: call(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )


class Unrolled(nnx.Module):
    def __init__(self):
        graphdef, state = nnx.split(Stack().layers)
        rows = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(3)]
        self.layers = nnx.List([nnx.merge(graphdef, row) for row in rows])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("how", ["scan", "remat"])
def test_each_layer_of_a_scan_has_its_own_scale(how):
    model, expected = qwix.quantize_model(Stack(how), STATIC, X), qwix.quantize_model(Unrolled(), STATIC, X)
    found = getattr(model.layers.linear, f"{NAME}_scale").unboxed
    rows = [getattr(layer.linear, f"{NAME}_scale").unboxed for layer in expected.layers]
    assert found.shape == (3, 1, 1) and 2 * found[0, 0, 0] < found[2, 0, 0]
    assert jnp.all(abs(found - jnp.stack(rows)) <= 64 * EPS * found)
    step = float(found[-1, 0, 0]) * 10  # a value on the edge may fall to the other side in one of them
    for x in (X, 2 * X):
        out = expected(x)
        assert jnp.mean(abs(model(x) - out) > 64 * EPS * abs(out).max()) < 0.2
        assert jnp.all(abs(model(x) - out) <= step)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + 10 * nn.Dense(8, name="linear")(x), None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return body(name="layers")(x, None)[0]


def test_each_layer_of_a_linen_scan_has_its_own_scale():
    model = qwix.quantize_model(LinenStack(), STATIC)
    out, variables = model.init_with_output(KEY, X)
    scale = variables["params"]["layers"]["linear"][f"{NAME}_scale"].array
    assert scale.shape == (3, 1, 1) and 2 * scale[0, 0, 0] < scale[2, 0, 0]
    assert jnp.all(abs(model.apply(variables, X) - out) <= 64 * EPS * abs(out).max())
    params = LinenStack().init(KEY, X)["params"]
    abstract = jax.eval_shape(model.init, KEY, X)["params"]
    stats = qwix.SimpleMovingAverage()
    ranges = {"absmax": jnp.arange(1.0, 4.0).reshape(3, 1, 1)}
    stat = stats.update(stats.init(ranges), ranges)
    given = qwix.quantize_params(params, abstract, {"layers": {"linear": {NAME: stat}}})
    found = given["layers"]["linear"][f"{NAME}_scale"].array
    assert jnp.all(abs(found.ravel() - jnp.arange(1.0, 4.0) / 127.5) <= EPS)
    assert model.apply({"params": given}, X).shape == X.shape


def test_no_static_scale_under_vmap_or_in_loops():
    """One op computes several layers, or an unknown number of times: its range is that of each input."""

    class Loop(nnx.Module):
        def __init__(self):
            self.linear = linear()

        def __call__(self, x):
            return jax.lax.fori_loop(0, 2, lambda _, x: self.linear(x), x)

    dynamic = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")

    class Columns(nnx.Module):
        """Layers that are stacked along axis 1."""

        def __init__(self):
            axes = nnx.StateAxes({nnx.Param: 1})
            self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Block, out_axes=axes))(nnx.Rngs(0))

        def __call__(self, x):
            axes = nnx.StateAxes({nnx.Param: 1})
            scan = nnx.scan(lambda x, f: f(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
            return scan(x, self.layers)

    for make, why in ((lambda: Stack("vmap"), "vmap"), (Loop, "in a loop"), (Columns, "another axis")):
        provider = qwix.PtqProvider([STATIC])
        with pytest.warns(UserWarning, match=f"quantized dynamically.*{why}"):
            model = qwix.quantize_model(make(), provider, X)
        assert (model(X) == qwix.quantize_model(make(), dynamic, X)(X)).all()
        (record,) = provider.records.values()
        assert record.is_quantized and why in record.dynamic_because
        assert [row.schema for row in qwix.report(model).rows] == ["dynamic-range"]


def test_statistics_of_stacked_layers():
    model = Stack()
    stat = {"count": jnp.array([1, 2, 1]), "sum_of_absmax": jnp.array([1.0, 4.0, 3.0]).reshape(3, 1, 1)}
    setattr(model.layers.linear, NAME, flax_util.QuantStat(stat))
    quantized = qwix.quantize_model(model, STATIC, X)
    scale = getattr(quantized.layers.linear, f"{NAME}_scale").unboxed
    assert not hasattr(quantized.layers.linear, NAME) and scale.shape == (3, 1, 1)
    assert jnp.all(abs(scale.ravel() - jnp.array([1.0, 2.0, 3.0]) / 127.5) <= EPS)
