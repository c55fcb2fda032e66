"""Training inside JAX's and Flax's transformations, and next to the float model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import qwix
from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 16))
FULL = qwix.QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8")
CONFIG = DotGeneralQtConfig(
    lhs_qtype="int8", rhs_qtype="int8", dlhs_grad_qtype="int8", drhs_grad_qtype="int8"
)
DOT = (((1,), (0,)), ((), ()))


def dot(x, w):
    return dot_general_qt(x, w, DOT, CONFIG)


@jax.jit
def helper(x, w):
    return jnp.dot(x, w)


class One(nn.Module):
    how: str
    size: int = 16

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (x.shape[-1], self.size))
        return {"dot": jnp.dot, "@": lambda x, w: x @ w, "jit": helper, "lax.dot": lax.dot}[self.how](x, w)


def linen(model, rule=FULL, x=X):
    quantized = qwix.quantize_model(model, qwix.QtProvider(rule))
    return quantized, quantized.init(KEY, x)


@pytest.mark.parametrize("float_first", [True, False])
@pytest.mark.parametrize("how", ["dot", "@", "jit", "lax.dot"])
def test_neither_model_sees_the_others_traces(how, float_first):
    jax.clear_caches()
    model = One(how)
    params = model.init(KEY, X)
    quantized = qwix.quantize_model(model, qwix.QtProvider(FULL))
    run = {False: lambda: quantized.apply(params, X), True: lambda: model.apply(params, X)}
    first = run[float_first]()
    second = run[not float_first]()
    of_float, of_quantized = (first, second) if float_first else (second, first)
    w = params["params"]["w"]
    assert (of_float == jnp.dot(X, w)).all()
    assert (of_quantized == dot(X, w)).all() and (of_quantized != of_float).any()


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_an_activation_shaped_like_the_weight_is_an_activation(kind):
    x = jax.random.normal(KEY, (16, 16))
    if kind == "linen":
        model, variables = linen(nn.Dense(16, use_bias=False), x=x)
        out, w = jax.jit(model.apply)(variables, x), variables["params"]["kernel"]
    else:
        model = qwix.quantize_model(
            nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(0)), qwix.QtProvider(FULL), x
        )
        out, w = model(x), model.kernel[...]
    assert (out == dot(x, w)).all()


class TwoAlike(nnx.Module):
    def __init__(self):
        self.a = nnx.Param(jax.random.normal(jax.random.key(1), (16, 16)))
        self.b = nnx.Param(jax.random.normal(jax.random.key(2), (16, 16)))

    def __call__(self, x):
        return x @ (self.a[...] * 1).T.T @ self.b[...].T


def test_params_of_one_shape_are_told_apart():
    model = qwix.quantize_model(TwoAlike(), qwix.QtProvider(FULL), X)
    records = model._qwix_provider.records
    assert [r.weight for r in records.values()] == [None, "b"]  # a * 1 is computed, not a param
    assert all(r.is_quantized for r in records.values())


def test_a_rule_for_activations_alone_quantizes_them():
    model, variables = linen(One("@"), qwix.QtRule(act_qtype="int8"))
    config = DotGeneralQtConfig(lhs_qtype="int8", use_original_residuals=True)
    expected = dot_general_qt(X, variables["params"]["w"], DOT, config)
    assert (model.apply(variables, X) == expected).all()
    assert (expected != X @ variables["params"]["w"]).any()


class ManyOperands(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jax.random.normal(KEY, (16, 8)))
        self.v = nnx.Param(jax.random.normal(KEY, (8, 16)))

    def __call__(self, x):
        return jnp.einsum("ab,bc,cd->ad", x, self.w[...], self.v[...]) + jnp.einsum("ab->b", x)


def test_an_einsum_has_any_number_of_operands():
    model = qwix.quantize_model(ManyOperands(), qwix.QtProvider(FULL), X)
    expected = dot(dot(X, model.w[...]), model.v[...]) + X.sum(0)
    bound = 4 * np.finfo(np.float32).eps * (abs(X) @ abs(model.w[...]) @ abs(model.v[...]) + 4)
    assert (abs(model(X) - expected) <= bound).all()
    assert [r.op for r in model._qwix_provider.records.values()] == ["einsum", "einsum"]


def test_the_preferred_type_is_that_of_the_result():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((16, 8), jnp.bfloat16))

        def __call__(self, x):
            return lax.dot_general(x, self.w[...], DOT, preferred_element_type=jnp.float32)

    model = qwix.quantize_model(Model(), qwix.QtProvider(FULL))
    assert model(X.astype(jnp.bfloat16)).dtype == jnp.float32


class Conv(nnx.Module):
    def __init__(self, groups=1):
        self.conv = nnx.Conv(8, 8, (3, 3), feature_group_count=groups, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.conv(x)


IMAGES = jax.random.normal(KEY, (2, 4, 4, 8)) + 1


@pytest.mark.parametrize("groups", [2, 8])
def test_grouped_convolutions_have_gradients(groups):
    model = qwix.quantize_model(Conv(groups), qwix.QtProvider(FULL))
    loss = lambda model: (model(IMAGES) ** 2).sum()
    got, of_float = nnx.grad(loss)(model), nnx.grad(loss)(Conv(groups))
    a, b = got.conv.kernel[...], of_float.conv.kernel[...]
    assert a.shape == b.shape and abs(a - b).max() <= 0.05 * abs(b).max()


def test_statistics_of_convolutions_are_kept_under_jit_and_grad():
    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8", act_static_scale=True)
    model = qwix.quantize_model(Conv(), qwix.QtProvider(rule), IMAGES)
    nnx.jit(nnx.grad(lambda model: (model(IMAGES) ** 2).sum()))(model)
    stat = model.conv.conv_general_dilated0_lhs.get_value()
    assert stat["count"] == 1
    expected = abs(IMAGES).max((1, 2, 3)).mean()
    assert abs(stat["sum_of_absmax"] - expected) <= 4 * np.finfo(np.float32).eps * expected


@pytest.mark.parametrize(
    "qtype, method", [("int8", "minmax"), ("int8", "absmax"), ("int5", "absmax"), ("nf4", "absmax")]
)
def test_any_weight_has_quantized_gradients(qtype, method):
    rule = qwix.QtRule(
        weight_qtype=qtype,
        weight_calibration_method=method,
        act_qtype="int8",
        act_calibration_method=method,  # both operands asymmetric
        bwd_qtype="int8",
    )
    model, variables = linen(One("@"), rule)
    loss = lambda p: (model.apply({"params": p}, X) * jnp.cos(X)).sum()
    got = jax.grad(loss)(variables["params"])["w"]
    expected = X.T @ jnp.cos(X)
    assert abs(got - expected).max() <= 0.03 * (abs(X.T) @ abs(jnp.cos(X))).max()


@jax.custom_vjp
def halved_gradient(x, w):
    return x @ w


halved_gradient.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T / 2, res[0].T @ g / 2))


def test_a_function_with_its_own_gradient_keeps_it_and_is_quantized():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jax.random.normal(KEY, (16, 8)))

        def __call__(self, x):
            return halved_gradient(x, self.w[...])

    model = qwix.quantize_model(Model(), qwix.QtProvider(FULL), X)
    assert (model(X) == dot(X, model.w[...])).all()
    got = nnx.grad(lambda model: model(X).sum())(model).w[...]
    assert (got == X.T @ jnp.ones((4, 8)) / 2).all()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(x))), None


class Stack(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.how == "remat" else Block
        if self.how == "loop":
            for i in range(3):
                x, _ = Block(name=f"layer{i}")(x, None)
            return x
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="layers")(x, None)[0]


@pytest.mark.parametrize("how", ["scan", "remat"])
def test_scanned_layers_train_as_unrolled_ones(how):
    model, variables = linen(Stack(how))
    loop = qwix.quantize_model(Stack("loop"), qwix.QtProvider(FULL))
    layers = variables["params"]["layers"]
    unrolled = {f"layer{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(3)}
    loss = lambda model: lambda p: (model.apply({"params": p}, X) ** 2).sum()
    traced = jax.jit(jax.value_and_grad(loss(model))).trace({"layers": layers})
    value, grads = traced.lower().compile()({"layers": layers})
    expected, expected_grads = jax.jit(jax.value_and_grad(loss(loop)))(unrolled)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(expected_grads[f"layer{i}"] for i in range(3)))
    assert abs(value - expected) <= 1e-6 * expected
    # A rounding that falls the other way is one step of the grid of one gradient.
    close = jax.tree.map(lambda a, b: abs(a - b).max() <= abs(b).max() / 127, grads["layers"], stacked)
    assert all(jax.tree.leaves(close))
    names = [str(eqn.primitive) for eqn in traced.jaxpr.eqns]
    assert names.count("scan") == 2  # forward and backward, neither unrolled
    assert ("remat" in str(traced.jaxpr)) == (how == "remat")


def test_a_remat_policy_can_keep_the_quantized_operands_by_name():
    """The first layer's weight isn't among them: its input needs no gradient."""

    class Model(nn.Module):
        policy: object

        @nn.compact
        def __call__(self, x):
            return nn.remat(Block, policy=self.policy)()(x, None)[0]

    def kept(policy):
        model = qwix.quantize_model(Model(policy), qwix.QtProvider(FULL))
        loss = lambda p: (model.apply({"params": p}, X) ** 2).sum()
        params = jax.eval_shape(model.init, KEY, X)["params"]
        leaves = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))
        return sorted(leaf.shape for leaf in leaves if leaf.dtype == jnp.int8)

    by_name = jax.checkpoint_policies.save_only_these_names("qwix_lhs", "qwix_rhs")
    assert kept(by_name) == [(4, 16), (4, 32), (32, 16)]
    assert kept(None) == []


def test_a_rematerialized_scan_keeps_only_the_layers_inputs():
    saved, x = {}, jax.random.normal(KEY, (64, 16))
    for how in ("scan", "remat"):
        model, variables = linen(Stack(how))
        loss = lambda p, model=model: (model.apply({"params": p}, x) ** 2).sum()
        _, vjp = jax.vjp(loss, variables["params"])
        saved[how] = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "nbytes"))
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))
    assert saved["remat"] <= params + 4 * x.nbytes + 64 < saved["scan"]


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return x + self.linear(x)


class NnxStack(nnx.Module):
    def __init__(self, how):
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock))(nnx.Rngs(0))
        self.how = how

    def __call__(self, x):
        call = nnx.remat(NnxBlock.__call__) if self.how == "remat" else NnxBlock.__call__
        if self.how == "vmap":
            return nnx.vmap(lambda layer, x: call(layer, x), in_axes=(0, None))(self.layers, x).sum(0)
        scan = nnx.scan(lambda x, layer: call(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x, self.layers)


@pytest.mark.parametrize("how", ["scan", "remat", "vmap"])
def test_stacked_nnx_layers_train(how):
    model = qwix.quantize_model(NnxStack(how), qwix.QtProvider(FULL), X)
    kernels, biases = model.layers.linear.kernel[...], model.layers.linear.bias[...]

    def by_hand(kernels):
        if how == "vmap":
            return sum(X + dot(X, kernels[i]) + biases[i] for i in range(3))
        y = X
        for i in range(3):
            y = y + dot(y, kernels[i]) + biases[i]
        return y

    got = nnx.jit(nnx.grad(lambda model: (model(X) ** 2).sum()))(model).layers.linear.kernel[...]
    expected = jax.jit(jax.grad(lambda k: (by_hand(k) ** 2).sum()))(kernels)
    assert abs(got - expected).max() <= abs(expected).max() / 127
    (record,) = model._qwix_provider.records.values()
    assert (record.path, record.weight, record.reason) == ("layers/linear", "kernel", None)


def test_a_training_step_is_compiled_once():
    rule = qwix.QtRule(
        weight_qtype="int8",
        act_qtype="int8",
        bwd_qtype="int8",
        act_static_scale=True,
        bwd_stochastic_rounding="uniform",
    )
    model = qwix.quantize_model(NnxBlock(nnx.Rngs(0)), qwix.QtProvider(rule), X)
    model.set_attributes(qwix_rngs=nnx.Rngs(0))
    traces = []

    @nnx.jit
    def step(model, x):
        traces.append(1)
        grads = nnx.grad(lambda model: (model(x) ** 2).mean())(model)
        state = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, state, nnx.state(grads)))

    before = model.linear.kernel[...]
    for i in range(3):
        step(model, X + i)
    assert len(traces) == 1
    assert model.linear.dot_general0_lhs.get_value()["count"] == 3
    assert (model.linear.kernel[...] != before).any()


def test_the_model_itself_is_left_as_it_was():
    model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    attributes = set(vars(model))
    qwix.quantize_model(model, qwix.QtProvider(FULL), X)
    assert set(vars(model)) == attributes and type(model) is nnx.Linear


def test_lookups_are_rounded_as_the_quantized_table():
    table = nnx.Embed(10, 16, rngs=nnx.Rngs(0))
    model = qwix.quantize_model(table, qwix.QtProvider(FULL), jnp.array([1]))
    ids = jnp.array([[1, 3], [3, 9]])
    quantized = qwix.quantize_model(table, qwix.PtqProvider(FULL), jnp.array([1]))
    assert (model(ids) == quantized(ids)).all() and (model(ids) != table(ids)).any()
    grad = nnx.grad(lambda model: model(ids).sum())(model).embedding[...]
    assert (grad == jnp.zeros((10, 16)).at[ids].add(1.0)).all()


def test_the_report_says_what_trains_and_what_stays_float():
    class Model(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
            self.b = nnx.Linear(16, 16, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.b(self.a(x))

    rules = [
        qwix.QtRule(module_path="a", weight_qtype="int8", act_qtype="int8", bwd_qtype="int8"),
        qwix.QtRule(module_path="nowhere", weight_qtype="int8"),
    ]
    with pytest.warns(UserWarning, match="'nowhere'.* matched no op"):
        model = qwix.quantize_model(Model(), qwix.QtProvider(rules), X)
    report = qwix.report(model)
    a, b = report.rows
    assert (a.scheme, a.reason, b.reason) == ("w8a8, gradients int8", None, "no rule matches")
    assert a.bytes_after == a.bytes_before == 4 * 16 * 16  # weights stay float
    assert "matched no op" in str(report) or report.unused_rules


def test_a_subclass_defines_an_op_of_its_own():
    class Doubled(qwix.QtProvider):
        def dot_general(self, *args, **kwargs):
            rule, _ = self._get_current_rule_and_op_id("dot_general")
            return lax.dot_general(*args, **kwargs) * (1 if rule is None else 2)

    rule = qwix.QtRule(module_path="layers/Dense_0", weight_qtype="int8", act_qtype="int8")
    model = qwix.quantize_model(Stack("scan"), Doubled(rule))
    variables = model.init(KEY, X)
    layers = variables["params"]["layers"]
    expected = X
    for i in range(3):
        a, b = (jax.tree.map(lambda p, i=i: p[i], layers[name]) for name in ("Dense_0", "Dense_1"))
        hidden = nn.gelu(expected @ b["kernel"] + b["bias"])
        expected = expected + 2 * hidden @ a["kernel"] + a["bias"]  # Dense_0 is made first, and used last
    assert abs(model.apply(variables, X) - expected).max() <= 1e-5 * abs(expected).max()
