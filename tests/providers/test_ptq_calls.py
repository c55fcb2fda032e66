"""Functions with custom derivatives and shard_map inside a model; and calling parts of a converted model."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec

import qwix

EPS = float(np.finfo(np.float32).eps)
X = jax.random.normal(jax.random.key(1), (4, 8))
INT8 = qwix.QuantizationRule(weight_qtype="int8")
W8A8 = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")


@jax.custom_vjp
def vjp_linear(x, w):
    return x @ w


vjp_linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))


@jax.custom_jvp
def jvp_linear(x, w):
    return x @ w


jvp_linear.defjvp(lambda p, t: (jvp_linear(*p), t[0] @ p[1] + p[0] @ t[1]))


@jax.custom_jvp
def scaled(x, s):
    return x * s


scaled.defjvp(lambda p, t: (scaled(*p), 7 * t[0]))


@jax.custom_vjp
def self_product(x):
    return x @ x.T


self_product.defvjp(lambda x: (x @ x.T, x), lambda x, g: (g @ x,))


def closed_over(x, w):
    f = jax.custom_jvp(lambda x: x @ w)
    f.defjvp(lambda p, t: (f(*p), t[0] @ w))
    return f(x)


def on_a_mesh(x, w):
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    spec = PartitionSpec()
    return jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(x, w)


def on_a_mesh_closed_over(x, w):
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    return jax.shard_map(lambda x: x @ w, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())(x)


class Model(nnx.Module):
    def __init__(self, op):
        self.w = nnx.Param(jax.random.normal(jax.random.key(0), (8, 8)))
        self.s = nnx.Param(jnp.ones(8))
        self.op = op

    def __call__(self, x):
        return self.op(scaled(jax.nn.relu(x), self.s[...]), self.w[...])


@pytest.mark.parametrize(
    "op",
    [
        vjp_linear,
        jvp_linear,
        closed_over,
        jax.jit(vjp_linear),
        jax.checkpoint(jvp_linear),
        jax.vmap(vjp_linear, (0, None)),
    ],
    ids=["vjp", "jvp", "closed_over", "jit", "remat", "vmap"],
)
def test_custom_derivatives(op):
    provider = qwix.PtqProvider([INT8])
    model = qwix.quantize_model(Model(op), provider, X)
    (record,) = provider.records.values()
    assert record.is_quantized and (record.op_id, record.weight) == ("dot_general0", "w")
    w = qwix.dequantize(model.w.unboxed)
    bound = 4 * 8 * EPS * (jnp.maximum(X, 0) @ abs(w))
    for run in (model, jax.jit(model)):
        assert jnp.all(abs(run(X) - jnp.maximum(X, 0) @ w) <= bound)
    # What doesn't eat a weight in a contraction keeps its own derivative: relu's, and that of `scaled`.
    found = jax.grad(lambda x: model(x).sum())(X)
    assert jnp.all(abs(found - 7 * (X > 0) * w.sum(1)) <= 4 * 8 * EPS * 7 * abs(w).sum(1))


@pytest.mark.parametrize("op", [on_a_mesh, on_a_mesh_closed_over])
def test_shard_map_stays_float_and_is_recorded(op):
    provider = qwix.PtqProvider([INT8])
    with pytest.warns(UserWarning, match="No op of the model was quantized"):
        model = qwix.quantize_model(Model(op), provider, X)
    (record,) = provider.records.values()
    assert (record.op, record.weight, record.weight_shape) == ("shard_map", "w", (8, 8))
    assert "inside shard_map" in record.reason
    assert (model(X) == Model(op)(X)).all()
    assert str(qwix.report(model)).count("shard_map") >= 1


def test_custom_derivatives_of_activations_are_recorded():
    class Products(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self_product(self.linear(x))

    provider = qwix.PtqProvider([W8A8])
    qwix.quantize_model(Products(), provider, X)
    records = {r.op: r for r in provider.records.values()}
    assert records["dot_general"].is_quantized and "inside custom_vjp" in records["custom_vjp_call"].reason


class Parts(nnx.Module):
    """Called from outside by its parts, as serving code does."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(8, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def body(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def __call__(self, ids):
        return self.embed.attend(self.body(self.embed(ids)))


def count_int8_dots(fn, *args):
    def count(jaxpr):
        inner = [j for eqn in jaxpr.eqns for j in jaxprs_in_params(eqn.params)]
        own = sum(
            bool(e.params["problem"].quantize_lhs) for e in jaxpr.eqns if e.primitive.name == "qwix_matmul"
        )
        return own + sum(map(count, inner))

    return count(jax.make_jaxpr(fn)(*args).jaxpr)


@pytest.mark.parametrize(
    "part, dots",
    [
        (lambda m: m.layers[0], 1),
        (lambda m: m.embed.attend, 1),
        (lambda m: m.body, 2),
        (lambda m: lambda x: m.layers[1](m.layers[0](x)), 2),
    ],
    ids=["layer", "attend", "unlisted_method", "two_layers"],
)
def test_parts_of_a_converted_model_are_quantized(part, dots):
    provider = qwix.PtqProvider([W8A8])
    model = qwix.quantize_model(Parts(), provider, jnp.arange(4))
    known = set(provider.records)
    called = part(model)
    assert count_int8_dots(called, X) == dots
    assert jnp.all(called(X) != part(Parts())(X))
    assert jnp.all(abs(jax.jit(called)(X) - called(X)) <= 64 * EPS * abs(called(X)).max())
    assert set(provider.records) == known  # the same paths as inside the model
    assert type(model.norm) is nnx.LayerNorm and isinstance(model.layers[0], nnx.Linear)


def test_equal_parts_have_equal_types():
    model = qwix.quantize_model(Parts(), W8A8, jnp.arange(4))
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nnx.clone(model)):
        first, second = other.layers
        assert type(first) is type(second)
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), nnx.state(first), nnx.state(second))
        assert jax.tree.leaves(stacked)[0].shape[0] == 2
        assert (other(jnp.arange(4)) == model(jnp.arange(4))).all()


def test_parts_of_a_converted_model_are_converted_anew():
    model = qwix.quantize_model(Parts(), W8A8, jnp.arange(4))
    float_rule = qwix.QuantizationRule(module_path="embed", weight_qtype="int8")
    again = qwix.quantize_model(model, qwix.PtqProvider([float_rule]), jnp.arange(4))
    assert type(again.layers[0])._unquantized_type is nnx.Linear
    assert type(again.embed)._qwix_provider is type(again)._qwix_provider


class TwoUses(nnx.Module):
    """One param, contracted along either axis: no scales suit both."""

    def __init__(self):
        self.w = nnx.Param(jax.random.normal(jax.random.key(0), (8, 8)))

    def __call__(self, x):
        return x @ self.w[...] + x @ self.w[...].T


def test_a_weight_that_two_ops_want_otherwise_warns():
    provider = qwix.PtqProvider([INT8])
    with pytest.warns(UserWarning, match=r"dot_general1 in '' stays float: its weight 'w' is quantized for"):
        model = qwix.quantize_model(TwoUses(), provider, X)
    w = qwix.dequantize(model.w.unboxed)
    assert jnp.all(abs(model(X) - X @ (w + w.T)) <= 8 * 8 * EPS * (abs(X) @ (abs(w) + abs(w.T))))


def test_linen_modules_inside_nnx_stay_float_and_say_so():
    class Hybrid(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.dense = nnx.bridge.ToNNX(nn.Dense(8), rngs=nnx.Rngs(0)).lazy_init(X)

        def __call__(self, x):
            return self.dense(self.linear(x))

    provider = qwix.PtqProvider([INT8])
    with pytest.warns(UserWarning, match=r"params of 'dense' stay float: it's a Linen module"):
        model = qwix.quantize_model(Hybrid(), provider, X)
    assert model(X).shape == (4, 8) and isinstance(model.dense.kernel, nnx.Param)
    assert provider.records["linear", "dot_general0"].is_quantized


class Containers(nnx.Module):
    """Params in every kind of container."""

    def __init__(self, seed=0):
        keys = iter(jax.random.split(jax.random.key(seed), 4))
        make = lambda: nnx.Param(jax.random.normal(next(keys), (8, 8)) / 8)
        self.list = nnx.List([make()])
        self.dict = nnx.Dict({"w": make()})
        self.plain = nnx.data({"w": make(), "deep": [make()]})

    def __call__(self, x):
        x = x @ self.list[0] @ self.dict["w"]
        return x @ self.plain["w"][...] @ self.plain["deep"][0]


def test_params_in_containers():
    provider = qwix.PtqProvider([INT8])
    model = qwix.quantize_model(Containers(), provider, X)
    records = {(r.path, r.weight) for r in provider.records.values() if r.is_quantized}
    assert records == {("list", "0"), ("dict", "w"), ("plain", "w"), ("plain/deep", "0")}
    assert isinstance(Containers().plain["w"], nnx.Param) and isinstance(model.plain["w"], qwix.WithAux)
    params = nnx.to_pure_dict(nnx.state(Containers(1), nnx.Param))
    nnx.update(model, qwix.quantize_params(params, model))
    expected = qwix.quantize_model(Containers(1), INT8, X)
    assert (model(X) == expected(X)).all() and (jax.jit(model)(X) == model(X)).all()
