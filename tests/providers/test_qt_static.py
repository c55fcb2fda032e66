"""States of ops in training: statistics of static scales and masks of sparsity, and what becomes of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qwix

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (8, 16))
NAME = "dot_general0_lhs"


def rule(**fields):
    return qwix.QtRule(**{"weight_qtype": "int8", "act_qtype": "int8", "act_static_scale": True} | fields)


def linear(quantized_by=None, x=X):
    model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    return model if quantized_by is None else qwix.quantize_model(model, qwix.QtProvider(quantized_by), x)


def stat(model):
    return getattr(model, NAME).get_value()


def absmax(x):
    return float(abs(x).max(1).mean())


def test_nnx_statistics_change_until_they_are_disabled():
    model = linear(rule())
    assert stat(model)["count"] == 0  # conversion makes them, and no more
    model(X), model(3 * X)
    assert stat(model)["count"] == 2
    assert abs(stat(model)["sum_of_absmax"] - 4 * absmax(X)) <= 16 * EPS * absmax(X)
    model.set_attributes(disable_quant_stats_update=True)
    before = model(X)
    model(9 * X)
    assert stat(model)["count"] == 2 and (model(X) == before).all()


def test_linen_statistics_change_when_the_collection_is_mutable():
    model = qwix.quantize_model(nn.Dense(16), qwix.QtProvider(rule()))
    variables = model.init(KEY, X)
    assert variables["quant_stats"][NAME]["count"] == 0
    out, new = model.apply(variables, X, mutable=["quant_stats"])
    assert new["quant_stats"][NAME]["count"] == 1
    frozen = {"params": variables["params"], **new}
    assert (model.apply(frozen, X) == out).all()  # the average of one is the one
    assert (model.apply(frozen, 3 * X) != 3 * out).any()  # and doesn't follow the input
    without = {"params": variables["params"]}
    assert (model.apply(without, X) == out).all()  # no statistics: the input's own range


def test_until_the_bootstrap_is_over_each_input_has_its_own_range():
    model = linear(rule(act_bootstrap_steps=1))
    own = linear(rule())(3 * X)
    model(X)
    assert (linear(rule(act_bootstrap_steps=1))(3 * X) == own).all()
    model.set_attributes(disable_quant_stats_update=True)
    assert (model(3 * X) == own).all()  # one update isn't more than one
    model.set_attributes(disable_quant_stats_update=False)
    assert (model(3 * X) != own).any()


def test_an_exponential_average_is_a_field_of_the_rule():
    model = linear(rule(act_averaging="ema,0.5"))
    model(X), model(4 * X)
    expected = 3 * absmax(X)  # (1 * 1 + 2 * 4) / 3
    got = stat(model)
    assert abs(got["sum_of_absmax"] / got["count"] - expected) <= 16 * EPS * expected


@pytest.mark.parametrize("method", ["absmax", "minmax", "rms,3", "percentile,99", "mse"])
def test_after_training_inference_computes_the_same(method):
    """Weights and statistics of training give the outputs of training, bit for bit."""
    trained = linear(rule(act_calibration_method=method, bwd_qtype="int8"))
    for scale in (1, 2, 3):
        trained(scale * X + 1)
    trained.set_attributes(disable_quant_stats_update=True)
    ptq = qwix.PtqProvider(rule(act_calibration_method=method, bwd_qtype="int8"))
    quantized = qwix.quantize_model(linear(), ptq, X)
    params = nnx.to_pure_dict(nnx.state(trained, nnx.Param))
    stats = nnx.to_pure_dict(nnx.state(trained, qwix.QuantStat))
    nnx.update(quantized, qwix.quantize_params(params, quantized, stats))
    assert (quantized(X + 1) == trained(X + 1)).all()


def test_a_trained_linen_model_is_quantized_with_its_statistics():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return nn.Dense(4)(layer(name="layers")(x, None)[0])

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + 3 * nn.Dense(16)(x), None

    model = qwix.quantize_model(Model(), qwix.QtProvider(rule()))
    variables = model.init(KEY, X)
    step = jax.jit(lambda v, x: model.apply(v, x, mutable=["quant_stats"]))
    for scale in (1.0, 2.0):
        _, new = step(variables, scale * X)
        variables = variables | new
    sums = variables["quant_stats"]["layers"]["Dense_0"][NAME]["sum_of_absmax"]
    assert sums.shape == (3, 1, 1) and (jnp.diff(sums[:, 0, 0]) > 0).all()  # each layer has its own
    inference = qwix.quantize_model(Model(), qwix.PtqProvider(rule()))
    abstract = jax.eval_shape(inference.init, KEY, X)["params"]
    params = qwix.quantize_params(variables["params"], abstract, variables["quant_stats"])
    assert (inference.apply({"params": params}, X) == model.apply(variables, X)).all()


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return x + self.linear(x)


@pytest.mark.large
@pytest.mark.parametrize("how", ["vmap", "another axis"])
def test_layers_without_a_place_for_statistics_are_named_and_have_dynamic_ranges(how):
    class Stack(nnx.Module):
        def __init__(self):
            axes = nnx.StateAxes({nnx.Param: 1 if how == "another axis" else 0})
            self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=axes))(nnx.Rngs(0))

        def __call__(self, x):
            if how == "vmap":
                return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x).sum(0)
            axes = nnx.StateAxes({nnx.Param: 1})
            scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
            return scan(x, self.layers)

    with pytest.warns(UserWarning, match=f"dot_general0 in 'layers/linear' .* dynamically.*{how}"):
        model = qwix.quantize_model(Stack(), qwix.QtProvider(rule()), X)
    dynamic = qwix.quantize_model(Stack(), qwix.QtProvider(rule(act_static_scale=None)), X)
    assert (model(X) == dynamic(X)).all()
    assert not jax.tree.leaves(nnx.state(model, qwix.QuantStat))


def test_statistics_of_a_sharded_batch_are_those_of_the_whole(devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    sharded = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
    model = qwix.quantize_model(nn.Dense(16), qwix.QtProvider(rule(bwd_qtype="int8")))
    variables = jax.device_put(model.init(KEY, X), NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def step(variables, x):
        def loss(params):
            out, new = model.apply(variables | {"params": params}, x, mutable=["quant_stats"])
            return (out**2).mean(), new

        return jax.grad(loss, has_aux=True)(variables["params"])

    (grads, new), (expected, whole) = step(variables, sharded), step(variables, X)
    got, want = (s["quant_stats"][NAME]["sum_of_absmax"] for s in (new, whole))
    assert abs(got - want) <= 8 * EPS * want
    assert got.sharding.is_fully_replicated
    assert abs(grads["kernel"] - expected["kernel"]).max() <= abs(expected["kernel"]).max() / 127


def test_sparsity_follows_its_curriculum():
    sparsity = qwix.SparsityRule(
        weight_sparsity_n=1,
        weight_sparsity_m=4,
        weight_sparsity_start_step=1,
        weight_sparsity_update_step=2,
    )
    fields = {"weight_qtype": "int8", "additional_qt_config": {"sparsity_rule": sparsity}}
    model = linear(qwix.QtRule(**fields))
    kernels = [jax.random.normal(jax.random.key(i), (16, 16)) for i in range(4)]
    masks = []
    for kernel in kernels:
        model.kernel.set_value(kernel)
        model(X)
        masks.append(model.dot_general0_sparsity.get_value()["mask"])
    largest = lambda w: (abs(w).reshape(-1, 4) == abs(w).reshape(-1, 4).max(1, keepdims=True)).reshape(
        w.shape
    )
    assert masks[0].all()  # step 0 is before the start
    assert (masks[1] == largest(kernels[1])).all()
    assert (masks[2] == masks[1]).all()  # not renewed at step 2
    assert (masks[3] == largest(kernels[3])).all()
    assert model.dot_general0_sparsity.get_value()["step"] == 4
    grad = nnx.grad(lambda model: model(X).sum())(model).kernel[...]
    assert (grad[~masks[3]] == 0).all() and (grad[masks[3]] != 0).any()
