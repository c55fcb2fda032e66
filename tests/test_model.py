"""quantize_model on whole models: what is converted, what is left alone, and what a wrong call says."""

import copy
import pickle
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import qwix
from qwix._src.utils import flax_util

INT8 = qwix.QuantizationRule(weight_qtype="int8")
W8A8 = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
X = jax.random.normal(jax.random.key(1), (4, 8))
EPS = float(np.finfo(np.float32).eps)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(this, x):  # no method of these models calls its receiver `self`
        return jnp.tanh(this.linear(x))


class Stacked(nnx.Module):
    """Three blocks whose params are stacked, run by a scan or a vmap."""

    def __init__(self, rngs, how):
        make = nnx.vmap(Block, in_axes=(0,), out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)
        self.how = how

    def __call__(this, x):
        if this.how == "vmap":
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(this.layers, x).sum(0)
        body = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return body(this.layers, x)


class Wrapped(nnx.Module):
    """Layers in a list, under nnx.remat and nnx.jit."""

    def __init__(self, rngs):
        self.first = Block(rngs)
        self.layers = nnx.List([Block(rngs), Block(rngs)])

    def __call__(this, x):
        x = nnx.remat(Block.__call__)(this.first, x)
        for layer in this.layers:
            x = nnx.jit(lambda layer, x: layer(x))(layer, x)
        return x


class Tied(nnx.Module):
    """An embedding used both ways, one module twice, and one param in two modules."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 8, rngs=rngs)
        self.block = self.again = Block(rngs)
        self.head = nnx.Linear(8, 8, rngs=rngs)
        self.head.kernel = self.block.linear.kernel

    def __call__(this, ids):
        x = this.block(this.embed(ids))
        return this.embed.attend(this.head(this.again(x)))


def dequantized(model):
    """The float model whose weights are what the quantized model's stand for."""
    graphdef, state = nnx.split(model)
    twin = nnx.merge(graphdef, state)
    for _, module in nnx.iter_modules(twin):
        object.__setattr__(module, "__class__", getattr(type(module), "_unquantized_type", type(module)))
        for name, value in list(vars(module).items()):
            if isinstance(value, qwix.WithAux):
                setattr(module, name, nnx.Param(qwix.dequantize(value.unboxed)))
    return twin


def run_jitted(model, x):
    return nnx.jit(lambda model, x: model(x))(model, x)


def assert_close(found, expected, depth=4):
    """Weight-only and tanh between layers: each layer adds 4 K eps of its (at most 8) sum of magnitudes."""
    assert jnp.all(abs(found - expected) <= depth * 4 * 8 * 8 * EPS)


@pytest.mark.parametrize(
    "make, weights",
    [
        (lambda: Stacked(nnx.Rngs(0), "scan"), {"layers/linear": (3, 8, 8)}),
        (lambda: Stacked(nnx.Rngs(0), "vmap"), {"layers/linear": (3, 8, 8)}),
        (lambda: Wrapped(nnx.Rngs(0)), {f"{p}/linear": (8, 8) for p in ("first", "layers/0", "layers/1")}),
    ],
    ids=["scan", "vmap", "wrapped"],
)
def test_nnx_transformations(make, weights):
    provider = qwix.PtqProvider([INT8])
    model = qwix.quantize_model(make(), provider, X)
    records = {r.path: r for r in provider.records.values()}
    assert {path: r.weight_shape for path, r in records.items()} == weights
    assert all(r.is_quantized and r.sqnr_db > 40 for r in records.values())
    expected = dequantized(model)(X)
    assert_close(model(X), expected)
    assert_close(run_jitted(model, X), expected)
    act = qwix.quantize_model(make(), W8A8, X)
    assert jnp.all(abs(act(X) - expected) < 0.3) and jnp.any(act(X) != model(X))


def test_scanned_scales_are_per_layer():
    kernel = qwix.quantize_model(Stacked(nnx.Rngs(0), "scan"), INT8, X).layers.linear.kernel.array
    assert kernel.qvalue.shape == (3, 8, 8) and kernel.scale.shape == (3, 1, 8)


def test_fixed_ranges_in_a_scan():
    """The method knows one scale for all; a scan needs one per layer."""
    rule = qwix.QuantizationRule(weight_qtype="int8", weight_calibration_method="fixed,1")
    model = qwix.quantize_model(Stacked(nnx.Rngs(0), "scan"), rule, X)
    assert model.layers.linear.kernel.array.scale.shape == (3, 1, 1)
    assert_close(model(X), dequantized(model)(X))


def test_tied_embedding_and_shared_params():
    provider, ids = qwix.PtqProvider([INT8]), jnp.array([3, 1, 1, 9])
    model = qwix.quantize_model(Tied(nnx.Rngs(0)), provider, ids)
    assert model.block is model.again
    assert model.head.kernel.array.qvalue is model.block.linear.kernel.array.qvalue
    assert model.embed.embedding.array.scale.shape == (10, 1)
    ops = {(r.path, r.op): r for r in provider.records.values()}
    assert ops["embed", "take"].is_quantized and ops["embed", "dot_general"].is_quantized
    expected = dequantized(model)(ids)
    assert jnp.all(abs(model(ids) - expected) <= 1e-5 * abs(expected).max())
    rows = qwix.dequantize(model.embed.embedding.unboxed)[ids]
    assert (model.embed(ids) == rows).all()  # outside of the model's own call, too


def test_the_input_model_is_untouched_and_nothing_is_copied():
    model = Wrapped(nnx.Rngs(0))
    model.untouched = nnx.Param(jnp.arange(3.0))
    before = nnx.to_flat_state(nnx.state(model))
    quantized = qwix.quantize_model(model, INT8, X)
    after = nnx.to_flat_state(nnx.state(model))
    for (path, old), (_, new) in zip(before, after, strict=True):
        assert old.get_raw_value() is new.get_raw_value(), path
    assert type(model) is Wrapped and isinstance(quantized, Wrapped)
    assert quantized.untouched.get_raw_value() is model.untouched.get_raw_value()
    assert quantized.untouched is not model.untouched


def test_errors_leave_everything_as_it_was():
    class Half(nnx.Module):
        def __init__(self):
            self.good = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.bad = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
            self.bad.kernel[...] = self.bad.kernel[...].at[2, 3].set(jnp.nan)

        def __call__(self, x):
            return self.bad(self.good(x))

    model = Half()
    with pytest.raises(ValueError, match=r"'bad/kernel'.*aren't finite, the first at \(2, 3\)"):
        qwix.quantize_model(model, INT8, X)
    assert isinstance(model.good.kernel, nnx.Param) and type(model) is Half


@pytest.mark.parametrize("first", ["float", "quantized"])
@pytest.mark.parametrize("jit", [False, True])
def test_jit_caches_are_not_shared_with_the_float_model(first, jit):
    """jnp.dot, matmul and `@` are jitted functions, and so is a user's helper: whoever is first, both are
    right."""

    @jax.jit
    def helper(x, w):
        return jnp.matmul(x, w) + jnp.dot(x, w) + x @ w

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jax.random.normal(jax.random.key(3), (8, 8)))

        def __call__(self, x):
            return helper(x, self.w[...])

    model = Model()
    quantized = qwix.quantize_model(model, W8A8, X)
    runs = {"float": model, "quantized": quantized}
    if jit:
        runs = {name: lambda x, m=m: run_jitted(m, x) for name, m in runs.items()}
    exact = 3 * np.asarray(X, np.float64) @ np.asarray(model.w[...], np.float64)
    got = {name: runs[name](X) for name in sorted(runs, reverse=first == "quantized")}
    error = {name: float(abs(y - exact).max() / abs(exact).max()) for name, y in got.items()}
    assert error["float"] < 1e-5 < 1e-3 < error["quantized"] < 0.05


def test_pallas_kernels_are_left_alone():
    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], w_ref[...])

    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0))
            self.w = nnx.Param(jnp.eye(8))

        def __call__(self, x):
            call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((4, 8), jnp.float32), interpret=True)
            return call(self.linear(x), self.w[...])

    provider = qwix.PtqProvider([W8A8])
    model = qwix.quantize_model(Model(), provider, X)
    assert isinstance(model.w, nnx.Param)
    assert [r.path for r in provider.records.values()] == ["linear"]
    assert (model(X) == model.linear(X)).all() or jnp.any(model(X) != Model()(X))
    assert str(jax.make_jaxpr(model)(X)).count("pallas_call") == 1


def test_mesh_kernels_are_left_alone():
    """`pl.kernel` has a primitive of its own; what's in its body is no op of the model."""

    def body(x_ref, w_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], w_ref[...])

    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.w = nnx.Param(jnp.eye(8))

        def __call__(self, x):
            mesh = pltpu.TensorCoreMesh(axis_name="core", num_cores=1)
            kernel = pl.kernel(body, jax.ShapeDtypeStruct((4, 8), jnp.float32), mesh=mesh)
            return kernel(self.linear(x), self.w[...])

    provider = qwix.PtqProvider([W8A8])
    model = qwix.quantize_model(Model(), provider, X)
    assert isinstance(model.w, nnx.Param)
    assert [r.path for r in provider.records.values()] == ["linear"]
    (before, after) = (
        next(e for e in jax.make_jaxpr(m)(X).eqns if e.primitive.name == "mpmd_map") for m in (Model(), model)
    )
    assert str(before.params["jaxprs"]) == str(after.params["jaxprs"])


def test_find_param_is_about_identity_not_shape():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((4, 4)))
            self.other = nnx.Param(jnp.ones((4, 4)))

        def __call__(self, x):
            return flax_util.find_param(self.other.get_raw_value()), flax_util.find_param(x)

    assert Model()(jnp.ones((4, 4))) == ("other", None)


def test_other_ops_get_the_float_value_and_state_can_change():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jax.random.normal(jax.random.key(0), (8, 8)))
            self.cache = nnx.Cache(jnp.zeros((4, 8)))

        def __call__(self, x):
            y = x @ self.w + x @ (self.w * 2.0) + self.w.T.sum() + jnp.linalg.norm(self.w[...])
            self.cache[...] = y
            return y

    provider = qwix.PtqProvider([INT8])
    model = qwix.quantize_model(Model(), provider, X)
    expected = dequantized(model)(X)
    assert jnp.all(abs(model(X) - expected) <= 1e-5 * abs(expected).max())
    assert (model.cache[...] == model(X)).all()
    reasons = sorted(str(r.reason) for r in provider.records.values())
    assert reasons == ["None", "no operand is a weight, and the rule has no act_qtype"]


def test_without_inputs():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.embed = nnx.Embed(10, 8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.einsum = nnx.Einsum("btd,dhk->bthk", (8, 2, 4), (2, 4), rngs=rngs)
            self.linear = nnx.LinearGeneral((2, 4), (3, 5), axis=(-2, -1), rngs=rngs)
            self.conv = nnx.Conv(5, 6, (3,), rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            return self.conv(self.linear(self.einsum(self.attention(x)))[:, :, 0])

    ids = jnp.arange(6).reshape(2, 3)
    blind = qwix.quantize_model(Model(), W8A8)
    seen = qwix.quantize_model(Model(), W8A8, ids)
    for one, other in zip(jax.tree.leaves(nnx.state(blind)), jax.tree.leaves(nnx.state(seen)), strict=True):
        assert one.dtype == other.dtype and (one == other).all()


def test_without_inputs_own_params_are_named():
    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.mine = nnx.Param(jnp.ones((8, 8)))

    with pytest.warns(UserWarning, match=r"These params stay float.*: mine\. Call"):
        qwix.quantize_model(Model(), INT8)


def test_sample_inputs_may_be_abstract_and_flags_stay_flags():
    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.noise = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

        def __call__(self, x, *, train, rngs):
            return self.noise(x) * rngs.params.normal() if train else self.linear(x)

    x, rngs = jax.ShapeDtypeStruct((4, 8), jnp.float32), nnx.Rngs(0)
    model = qwix.quantize_model(Model(), qwix.PtqProvider([INT8]), x, train=False, rngs=rngs)
    assert isinstance(model.linear.kernel, qwix.WithAux) and isinstance(model.noise.kernel, nnx.Param)
    assert rngs.params.count[...] == 0


def test_abstract_and_jitted_conversion():
    make = lambda: nnx.Sequential(
        nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 4, rngs=nnx.Rngs(1))
    )
    expected = qwix.quantize_model(make(), INT8, X)
    jitted = nnx.jit(lambda m: qwix.quantize_model(m, INT8, X))(make())
    abstract = qwix.quantize_model(nnx.eval_shape(make), INT8, jax.ShapeDtypeStruct((4, 8), jnp.float32))
    assert isinstance(abstract.layers[0].kernel.array.qvalue.get_raw_value(), jax.ShapeDtypeStruct)
    nnx.update(abstract, qwix.quantize_params(nnx.to_pure_dict(nnx.state(make(), nnx.Param)), abstract))
    for other in (jitted, abstract):
        assert (other(X) == expected(X)).all()


@pytest.mark.parametrize("way", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, nnx.clone])
def test_copies_of_nnx_models(way):
    model = qwix.quantize_model(Wrapped(nnx.Rngs(0)), W8A8, X)
    other = way(model)
    assert type(other).__name__ == "Wrapped" and (other(X) == model(X)).all()


def test_methods():
    class Model(nnx.Module):
        def __init__(self):
            self.encoder = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.decoder = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

        def encode(self, x):
            return self.encoder(x)

        def decode(self, x):
            return self.decoder(x)

    model = qwix.quantize_model(Model(), W8A8, X, methods=("encode", "decode"))
    expected = Model().decode(X)
    assert 0 < abs(model.decode(X) - expected).max() < 0.1
    with pytest.raises(ValueError, match=r"no method 'encod' to quantize. Its methods: .*encode"):
        qwix.quantize_model(Model(), W8A8, X, methods=("encod",))


def test_converting_again_starts_from_the_original_class():
    model = qwix.quantize_model(Block(nnx.Rngs(0)), INT8, X)
    again = qwix.quantize_model(model, W8A8, X)
    assert type(again)._unquantized_type is Block
    assert (again.linear.kernel.array.qvalue[...] == model.linear.kernel.array.qvalue[...]).all()


def test_gradients_flow_through_the_input():
    model = qwix.quantize_model(Block(nnx.Rngs(0)), INT8, X)
    loss = lambda model: lambda x: model(x).sum()
    found, expected = jax.grad(loss(model))(X), jax.grad(loss(dequantized(model)))(X)
    assert jnp.all(abs(found - expected) <= 1e-5)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: qwix.quantize_model(nn.Dense(4), INT8, X), ValueError, "must not be provided for linen"),
        (lambda: qwix.quantize_model(nn.Dense(4), INT8, methods=("f",)), ValueError, "no method 'f'"),
        (lambda: qwix.quantize_model(lambda x: x, INT8), ValueError, "Unsupported model type: function"),
        (
            lambda: qwix.quantize_model(Block(nnx.Rngs(0)), [{}], X),
            TypeError,
            r"takes a QuantizationRule or a sequence of them, got \{\} in \[\{\}\]",
        ),
        (
            lambda: qwix.quantize_model(Stacked(nnx.Rngs(0), "scan"), tiled(3), X),
            ValueError,
            r"'layers/linear/kernel' of shape \(8, 8\).*tile of 3.*sizes that do: 1, 2, 4, 8",
        ),
        (
            lambda: qwix.quantize_model(
                Block(nnx.Rngs(0)), qwix.QuantizationRule(weight_qtype="mxfp8", tile_size=8), X
            ),
            ValueError,
            "'linear/kernel'.*requires a tile size of 32",
        ),
    ],
    ids=["linen_inputs", "method", "type", "rule", "tile", "block_format"],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def tiled(size):
    return qwix.QuantizationRule(weight_qtype="int8", tile_size=size)


def test_rules_that_match_nothing_warn_once():
    rules = [INT8, qwix.QuantizationRule(module_path="nowhere/.*", weight_qtype="int4")]
    provider = qwix.PtqProvider(rules[::-1])
    with pytest.raises(ValueError, match="not completed yet"):
        provider.get_unused_rules()
    with pytest.warns(
        UserWarning, match=r"nowhere/.*matched no op. Module paths with ops: 'linear'"
    ) as caught:
        qwix.quantize_model(Block(nnx.Rngs(0)), provider, X)
    assert len(caught) == 1
    assert [r.module_path for r in provider.get_unused_rules()] == ["nowhere/.*"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qwix.quantize_model(Block(nnx.Rngs(0)), provider, X)


def test_a_misspelt_op_name_is_noticed():
    rule = qwix.QuantizationRule(weight_qtype="int8", op_names=("dot_generel",))
    with pytest.warns(UserWarning, match="did you mean 'dot_general'"):
        qwix.quantize_model(Block(nnx.Rngs(0)), qwix.PtqProvider([rule, INT8]), X)


def test_a_model_with_no_layer_to_quantize_warns():
    class Model(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(8))

        def __call__(self, x):
            return x * self.scale

    with pytest.warns(UserWarning) as caught:
        qwix.quantize_model(Model(), INT8, X)
    assert any("No op of the model was quantized" in str(w.message) for w in caught)


def test_act_only_rules_say_why_they_do_nothing():
    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            y = self.linear(x)
            return jnp.einsum("ab,cb->ac", y, y), jnp.outer(x[0], x[1])

    provider = qwix.PtqProvider([qwix.QuantizationRule(act_qtype="int8")])
    model = qwix.quantize_model(Model(), provider, X)
    records = {key: r for key, r in provider.records.items()}
    assert "gains nothing" in records["linear", "dot_general0"].reason
    assert records["", "einsum0"].is_quantized and records["", "einsum0"].problem.scheme == "w8a8"
    y = Model().linear(X)
    error = abs(model(X)[0] - y @ y.T).max()
    assert 0 < error <= 1.01 * 8 * float(abs(y).max()) ** 2 / 127.5


def test_options_of_an_op_are_kept():
    """The result's dtype is the one that the op asks for, and precision reaches the kernel."""

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((8, 8), jnp.bfloat16))

        def __call__(self, x):
            return jax.lax.dot_general(
                x,
                self.w[...],
                (((1,), (0,)), ((), ())),
                precision="highest",
                preferred_element_type=jnp.float32,
            )

    seen = {}

    def dot_general(*args, **kwargs):
        seen.update(kwargs)
        return qwix.dot_general(*args, **kwargs)

    provider = qwix.PtqProvider([W8A8], _dot_general_fn=dot_general)
    out = qwix.quantize_model(Model(), provider, X.astype(jnp.bfloat16))(X.astype(jnp.bfloat16))
    assert out.dtype == jnp.float32 == seen["preferred_element_type"]
    assert "HIGHEST" in str(seen["precision"]).upper()
    assert seen["act_how"].channelwise_axes == (0,)


def test_partition_names_follow_the_weight():
    make = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("rows", "columns"), eager_sharding=False)
    model = nnx.Linear(8, 8, kernel_init=make, rngs=nnx.Rngs(0))
    weight = qwix.quantize_model(model, INT8, X).kernel.array
    assert weight.qvalue.get_metadata("out_sharding") == ("rows", "columns")
    assert weight.scale.get_metadata("out_sharding") == (None, "columns")
    weight = qwix.quantize_model(model, tiled(4), X).kernel.array
    assert weight.scale.shape == (2, 8) and weight.scale.get_metadata("out_sharding") == ("rows", "columns")
