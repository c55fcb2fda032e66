"""A mixture of experts, eight of them and two for each token, as models compute it: tokens sorted by expert,
ragged dots, and back. Quantized after training and in training, in NNX and in Linen.

A quantized block is held against the same arithmetic with the direct ops, to the last bit, and against the
float block by what each format can keep of it.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import qwix
from qwix._src.core import qarray, ragged_dot, ragged_dot_qt

LARGE = pytest.mark.large
TOKENS, WIDTH, HIDDEN, EXPERTS, CHOSEN = 24, 32, 64, 8, 2
X = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH))
MATRICES = {
    "gate": (EXPERTS, WIDTH, HIDDEN),
    "up": (EXPERTS, WIDTH, HIDDEN),
    "down": (EXPERTS, HIDDEN, WIDTH),
}


def mixture(x, scores, gate, up, down, dot=lax.ragged_dot):
    """Tokens [t, d] and their scores [t, e] -> [t, d]. The order of the groups is that of the experts."""
    weights, experts = lax.top_k(scores, CHOSEN)
    weights = jax.nn.softmax(weights).reshape(-1, 1)
    order = jnp.argsort(experts.reshape(-1))
    sizes = jnp.bincount(experts.reshape(-1), length=EXPERTS)
    rows = x[order // CHOSEN]
    hidden = jax.nn.silu(dot(rows, gate, sizes)) * dot(rows, up, sizes)
    out = dot(hidden, down, sizes) * weights[order]
    return jnp.zeros_like(x).at[order // CHOSEN].add(out)


class Moe(nnx.Module):
    def __init__(self, rngs):
        self.router = nnx.Linear(WIDTH, EXPERTS, use_bias=False, rngs=rngs)
        initial = lambda shape: nnx.Param(jax.random.normal(rngs.params(), shape) / shape[1] ** 0.5)
        self.gate, self.up, self.down = (initial(shape) for shape in MATRICES.values())

    def __call__(self, x):
        return x + mixture(x, self.router(x), self.gate[...], self.up[...], self.down[...])


class LinenMoe(nn.Module):
    @nn.compact
    def __call__(self, x):
        scores = nn.Dense(EXPERTS, use_bias=False, name="router")(x)
        initial = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        return x + mixture(x, scores, *(self.param(name, initial, s) for name, s in MATRICES.items()))


STATIC = {"act_static_scale": True, "act_batch_axes": ()}  # the largest of all rows, none is clipped
# Format: fields of the rule, and the least signal over noise (dB) of what the block adds. A format whose
# steps are half as fine costs 6 dB; each of the three products adds the noise of its operands.
SCHEMES = {
    "w8a8": ({"weight_qtype": "int8", "act_qtype": "int8"}, 33),
    "w8a8_static": ({"weight_qtype": "int8", "act_qtype": "int8", **STATIC}, 27),
    "w4a16": ({"weight_qtype": "int4", "tile_size": 16}, 16),
    "nf4": ({"weight_qtype": "nf4", "tile_size": 16}, 16.5),
    "fp8": ({"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"}, 24),
}


def rules(scheme):
    """The router stays float: which experts see a token mustn't hang on rounding."""
    return [qwix.QuantizationRule(op_names="ragged_dot", **SCHEMES[scheme][0])]


@functools.cache
def float_model():
    return Moe(nnx.Rngs(0))


SCALES = [f"ragged_dot{i}_lhs_scale" for i in range(3)]


def in_linen(scheme):
    """The quantized block, the float one, the router, the quantized matrices, and static scales."""
    model, key = qwix.quantize_model(LinenMoe(), rules(scheme)), jax.random.key(1)
    params, quantized = LinenMoe().init(key, X)["params"], jax.jit(model.init)(key, X)["params"]
    return (
        lambda x: model.apply({"params": quantized}, x),
        lambda x: LinenMoe().apply({"params": params}, x),
        lambda x: x @ params["router"]["kernel"],
        [quantized[name].unboxed for name in MATRICES],
        [quantized[name].unboxed for name in SCALES if "static" in scheme],
    )


@functools.cache
def in_nnx(scheme):
    model = qwix.quantize_model(float_model(), rules(scheme), X)
    scales = [getattr(model, name).unboxed for name in SCALES if "static" in scheme]
    weights = [getattr(model, name).unboxed for name in MATRICES]
    return model, float_model(), float_model().router, weights, scales


QUICK = [("w8a8", in_nnx), ("w8a8_static", in_linen)]
OTHERS = [(s, f) for s in SCHEMES for f in (in_nnx, in_linen) if (s, f) not in QUICK]


@pytest.mark.parametrize("scheme, framework", QUICK + [pytest.param(*o, marks=LARGE) for o in OTHERS])
def test_quantized_after_training(scheme, framework):
    run, of_float, router, weights, scales = framework(scheme)
    fields, least = SCHEMES[scheme]
    scales = iter(scales)

    def direct(x, w, sizes):
        act = fields.get("act_qtype")
        if "static" in scheme:
            x = qarray.quantize_with_scale_zero_point(x, act, next(scales), None)
        elif act is not None:
            x = qwix.quantize(x, act, channelwise_axes=(0,))
        return ragged_dot.ragged_dot(x, w, sizes)

    @jax.jit
    def both(x):
        return run(x), x + mixture(x, router(x), *weights, dot=direct), of_float(x)

    got, want, exact = both(X)
    assert (got == want).all() and (got != exact).any()
    assert 10 * np.log10(np.square(exact - X).sum() / np.square(got - exact).sum()) >= least


@pytest.mark.parametrize("scheme", ["w8a8", *(pytest.param(s, marks=LARGE) for s in ("w4a16", "nf4"))])
def test_the_report_names_the_experts(scheme):
    report = qwix.report(in_nnx(scheme)[0], params=float_model())
    rows = {row.weight: row for row in report.rows}
    assert {name: row.shape for name, row in rows.items() if row.reason is None} == MATRICES
    bits = 8 if scheme == "w8a8" else 4
    for name, (groups, inputs, outputs) in MATRICES.items():
        scales = groups * outputs * (1 if scheme == "w8a8" else inputs // 16)
        assert rows[name].bytes_after == groups * inputs * outputs * bits // 8 + 4 * scales
        assert rows[name].sqnr_db > 15
    assert rows["kernel"].reason == "no rule matches" and report.unused_rules == ()


@LARGE
def test_an_expert_that_nobody_chose_and_one_that_everybody_chose():
    """Groups of no row and of all rows, with tokens of all experts before."""
    model = in_nnx("w8a8")[0]
    kernel = np.zeros((WIDTH, EXPERTS), np.float32)
    kernel[:, [2, 5]] = 1.0
    lonely = nnx.clone(float_model())
    lonely.router.kernel[...] = jnp.asarray(kernel)
    quantized = qwix.quantize_model(lonely, rules("w8a8"), X)
    x = abs(X)
    got, exact = jax.jit(lambda x: (quantized(x), lonely(x)))(x)
    sizes = jnp.bincount(lax.top_k(lonely.router(x), CHOSEN)[1].reshape(-1), length=EXPERTS)
    assert sizes.tolist() == [0, 0, TOKENS, 0, 0, TOKENS, 0, 0]
    assert 10 * np.log10(np.square(exact - x).sum() / np.square(got - exact).sum()) >= 33
    assert (model.down.unboxed.qvalue == quantized.down.unboxed.qvalue).all()


# --- training

TARGET = jnp.tanh(X @ jax.random.normal(jax.random.key(5), (WIDTH, WIDTH)) / WIDTH**0.5)
FULL = {"weight_qtype": "int8", "act_qtype": "int8", "bwd_qtype": "int8"}


def qt_rules(**fields):
    return [qwix.QtRule(op_names="ragged_dot", **FULL | fields)]


def loss_of(model, x):
    return jnp.square(model(x) - TARGET).mean()


def trained(model, steps):
    """Losses before each step of Adam, and after the last."""
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_of)(model, X)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    return np.array([*losses, float(loss_of(model, X))])


def test_training_falls_as_float_does():
    quantized = trained(qwix.quantize_model(Moe(nnx.Rngs(0)), qwix.QtProvider(qt_rules()), X), 12)
    of_float = trained(Moe(nnx.Rngs(0)), 12)
    assert of_float[-1] < of_float[0] / 2
    assert (quantized != of_float).all()
    # int8 forward and backward: two hundredths of what there is to learn.
    assert (abs(quantized - of_float) <= 0.02 * of_float[0]).all()


@LARGE
@pytest.mark.parametrize(
    "fields", [{}, {"bwd_qtype": None}, {"tile_size": 16, "weight_qtype": "int4"}], ids=str
)
def test_gradients_are_those_of_the_direct_ops(fields):
    rule = FULL | fields
    config = ragged_dot_qt.RaggedDotQtConfig(
        lhs_qtype="int8",
        rhs_qtype=rule["weight_qtype"],
        dlhs_grad_qtype=rule["bwd_qtype"],
        drhs_grad_qtype=rule["bwd_qtype"],
        use_original_residuals=rule["bwd_qtype"] is None,
        tile_size=rule.get("tile_size"),
    )
    dot = lambda x, w, sizes: ragged_dot_qt.ragged_dot_qt(x, w, sizes, config)
    graphdef, state = nnx.split(qwix.quantize_model(Moe(nnx.Rngs(0)), qwix.QtProvider(qt_rules(**fields)), X))
    params = nnx.to_pure_dict(state)

    def expected(params, x):
        scores = x @ params["router"]["kernel"]
        return x + mixture(x, scores, *(params[name] for name in MATRICES), dot=dot)

    def results(fn):
        out, pull = jax.vjp(fn, params, X)
        return out, *pull(TARGET)

    model = lambda params, x: nnx.merge(graphdef, nnx.State(jax.tree.map(nnx.Param, params)))(x)
    got, want = jax.jit(lambda: (results(model), results(expected)))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a == b).all() and (a != 0).any()


@LARGE
def test_linen_trains_and_is_quantized_afterwards():
    """Statistics of a few steps become the static scales of the model that is served."""
    rule = {"weight_qtype": "int8", "act_qtype": "int8", **STATIC}
    model = qwix.quantize_model(LinenMoe(), qwix.QtProvider([qwix.QtRule(op_names="ragged_dot", **rule)]))
    variables = model.init(jax.random.key(1), X)

    @jax.jit
    def step(variables):
        def loss(params):
            out, new = model.apply(variables | {"params": params}, X, mutable=["quant_stats"])
            return jnp.square(out - TARGET).mean(), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.3 * g, variables["params"], grads)
        return {"params": params} | new, value

    losses = []
    for _ in range(4):
        variables, value = step(variables)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True)
    assert all(stat["count"] == 4 for stat in variables["quant_stats"].values())
    served = qwix.quantize_model(LinenMoe(), [qwix.QuantizationRule(op_names="ragged_dot", **rule)])
    abstract = jax.eval_shape(served.init, jax.random.key(1), X)["params"]
    params = qwix.quantize_params(variables["params"], abstract, variables["quant_stats"])
    got = served.apply({"params": params}, X)
    trained_out = model.apply(variables, X)
    exact = LinenMoe().apply({"params": variables["params"]}, X)
    noise = lambda out: float(np.square(out - exact).sum())
    assert 10 * np.log10(np.square(exact - X).sum() / noise(got)) >= 27
    assert (abs(got - trained_out) <= 0.02 * abs(trained_out).max()).all()
