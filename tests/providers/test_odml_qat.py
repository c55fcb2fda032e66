"""OdmlQatProvider: what is quantized, where its statistics are, its gradients, and what it refuses."""

import threading
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import qwix
from qwix import OdmlQatProvider, QuantizationRule

INT8 = QuantizationRule(weight_qtype="int8", act_qtype="int8")
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
ROWS = RNG.normal(size=(4, 16)).astype(np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        y = nn.relu(nn.Conv(4, (3, 3))(x) + x)
        return nn.Dense(3)(y.mean((1, 2)))


class Of(nn.Module):
    """A module that computes fn."""

    fn: object

    @nn.compact
    def __call__(self, *args):
        return self.fn(*args)


def keys(stats):
    flat = traverse_util.flatten_dict(stats, is_leaf=lambda path, tree: "count" in tree)
    return {"/".join(path): stat for path, stat in flat.items()}


def run(fn, x, provider):
    """(what a model of fn computes under the provider, its statistics)."""
    model = qwix.quantize_model(Of(fn), provider)

    def both(x):
        variables = Of(fn).init(jax.random.key(0), x)
        return model.apply(variables, x, mutable=["quant_stats"])

    out, new = jax.jit(both)(x)
    return out, keys(new.get("quant_stats", {}))


def trace(fn, provider):
    """Sees the model's ops, computes nothing."""
    model = qwix.quantize_model(Of(fn), provider)
    jax.eval_shape(model.init, jax.random.key(0), ROWS)


@pytest.fixture(scope="module")
def block():
    model = qwix.quantize_model(Block(), OdmlQatProvider([INT8]))
    return model, jax.jit(model.init)(jax.random.key(0), IMAGES)


BLOCK_KEYS = {
    "Conv_0/conv_general_dilated0_lhs",
    "Conv_1/conv_general_dilated0_lhs",
    "Dense_0/dot_general0_lhs",
    "add0_lhs",
    "relu1",
    "mean0",
    "final_output0",
}


def test_statistics_are_of_what_is_not_fused(block):
    model, variables = block
    assert set(keys(variables["quant_stats"])) == BLOCK_KEYS
    assert all(stat["count"] == 0 for stat in keys(variables["quant_stats"]).values())
    _, new = jax.jit(lambda v, x: model.apply(v, x, mutable=["quant_stats"]))(variables, IMAGES)
    stats = keys(new["quant_stats"])
    low, high = (f(IMAGES, axis=(1, 2, 3)).mean() for f in (np.min, np.max))
    first = stats["Conv_0/conv_general_dilated0_lhs"]
    np.testing.assert_allclose(first["sum_of_min"].item(), low, rtol=1e-6)
    np.testing.assert_allclose(first["sum_of_max"].item(), high, rtol=1e-6)
    assert all(stat["count"] == 1 and stat["sum_of_min"].size == 1 for stat in stats.values())
    jax.eval_shape(model.apply, {**variables, **new}, IMAGES)  # nothing is mutable, nothing changes


def test_a_batch_norm_in_training_has_the_statistics_of_one_in_use(block):
    model, variables = block
    train = lambda v, x: model.apply(v, x, train=True, mutable=["quant_stats", "batch_stats"])
    _, new = jax.jit(train)(variables, IMAGES)
    assert set(keys(new["quant_stats"])) == BLOCK_KEYS
    plain = jax.jit(lambda v, x: Block().apply(v, x, train=True, mutable=["batch_stats"]))(variables, IMAGES)
    off = jax.tree.map(lambda a, b: np.abs(a - b).max(), new["batch_stats"], plain[1]["batch_stats"])
    assert max(jax.tree.leaves(off)) < 0.01  # one step of the images and of the weights


def test_what_it_computes_is_the_integer_arithmetic():
    w = RNG.normal(size=(16, 8)).astype(np.float32)
    out, stats = run(lambda x: x @ jnp.asarray(w), ROWS, OdmlQatProvider([INT8]))

    def grid(x, stat):
        low, high = (np.float32(stat[f"sum_of_{end}"].item()) for end in ("min", "max"))
        step = (high - low) / np.float32(255)
        zero = np.clip(np.round(-128 - low / step), -128, 127)
        return (np.clip(np.round(x / step) + zero, -128, 127) - zero) * step, step

    steps = np.abs(w).max(0) / np.float32(127.5)
    weights = np.clip(np.round(w / steps), -127, 127) * steps
    x, _ = grid(ROWS, stats["dot_general0_lhs"])
    expected, step = grid(x @ weights, stats["final_output0"])
    assert set(stats) == {"dot_general0_lhs", "final_output0"}
    np.testing.assert_array_less(
        np.abs(out - expected), 1.01 * step
    )  # a float sum may round to its neighbour
    assert (np.abs(out - expected) > step / 2).mean() < 0.1


def test_gradients_pass_within_the_range_and_not_outside():
    provider = OdmlQatProvider([INT8], fixed_range_for_inputs=(-1, 1), fixed_range_for_outputs=(-1000, 1000))
    model = qwix.quantize_model(Of(lambda x: x * 2.0), provider)
    x = jnp.array([[0.3, -0.7, 3.0, -2.0]])
    variables = {"quant_stats": {}}
    grad = jax.grad(lambda x: model.apply(variables, x).sum())(x)
    np.testing.assert_allclose(grad, [[2, 2, 0, 0]], rtol=1e-6)


def test_fixed_ranges_take_the_place_of_statistics_and_are_handed_on():
    provider = OdmlQatProvider([INT8], fixed_range_for_inputs=(0, 1), fixed_range_for_outputs=(-4, 8))
    model = qwix.quantize_model(Of(lambda x: nn.Dense(3)(x.reshape(8, 8).T)), provider)
    variables = jax.jit(model.init)(jax.random.key(0), ROWS)
    step = jax.jit(lambda v: model.apply(v, ROWS, mutable=["quant_stats"]))
    for _ in range(3):
        _, new = step(variables)
        variables = {**variables, **new}
    stats = keys(new["quant_stats"])
    assert all(stat["count"] == 1 for stat in stats.values())
    assert (
        stats["Dense_0/dot_general0_lhs"]["sum_of_min"].item(),
        stats["final_output0"]["sum_of_max"].item(),
    ) == (0, 8)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: jax.nn.softmax(x), {"softmax0", "final_output0"}),
        (lambda x: x * jax.nn.sigmoid(x), {"silu0", "silu0_sigmoid", "final_output0"}),
        (lambda x: jnp.tanh(x) + x, {"tanh0", "add0_lhs", "final_output0"}),
        (lambda x: x + x.reshape(4, 16), {"add0_lhs", "final_output0"}),
        (lambda x: x[:, :8] * x[:, 8:], {"multiply0_lhs", "final_output0"}),
        (lambda x: jnp.concatenate([x, 2 * x], 1), {"multiply0_rhs", "final_output0"}),
        (lambda x: jnp.maximum(x, 0).reshape(2, 2, 16), {"relu0", "final_output0"}),
        (lambda x: nn.relu(nn.Dense(8)(x) / 3.0 - 1.0), {"Dense_0/dot_general0_lhs", "final_output0"}),
        (lambda x: x @ x.T, {"dot_general0_lhs", "final_output0"}),
        (lambda x: {"a": x, "b": x}, {"final_output0"}),
    ],
)
def test_names_of_statistics(fn, expected):
    _, stats = run(fn, ROWS, OdmlQatProvider([INT8]))
    assert set(stats) == expected


def test_an_excluded_op_reads_floats_and_the_others_share_their_quantization():
    rules = [QuantizationRule(module_path=".*", op_names=("tanh",)), INT8]
    provider = OdmlQatProvider(rules)
    _, stats = run(lambda x: (nn.Dense(4)(x), jnp.tanh(x), nn.Dense(4)(x)), ROWS, provider)
    assert set(stats) == {
        "Dense_0/dot_general0_lhs", "final_output0", "final_output1", "final_output2",
    }  # fmt: skip
    record = provider.records["", "tanh0"]
    assert not record.is_quantized and record.reason == "no rule quantizes it"


def test_dynamic_ranges_and_weights_alone_need_no_statistics():
    w = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)
    weight_only, stats = run(lambda x: x @ w, ROWS, OdmlQatProvider([QuantizationRule(weight_qtype="int8")]))
    steps = np.abs(w).max(0) / np.float32(127.5)
    rounded = np.clip(np.round(w / steps), -127, 127) * steps
    assert stats == {}
    np.testing.assert_allclose(weight_only, ROWS @ rounded, rtol=1e-5, atol=1e-5)
    rule = QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=False)
    dynamic, stats = run(lambda x: x @ w, ROWS, OdmlQatProvider([rule]))
    rows = qwix.dequantize(
        qwix.quantize(jnp.asarray(ROWS), "int8", channelwise_axes=[0], calibration_method="minmax")
    )
    assert stats == {}
    np.testing.assert_allclose(dynamic, rows @ rounded, rtol=1e-5, atol=1e-5)


@pytest.mark.large
def test_layers_of_a_scan_have_rows_of_statistics():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.relu(nn.Dense(16)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            over = {"params": 0, "quant_stats": 0}
            scanned = nn.scan(nn.remat(Layer), variable_axes=over, split_rngs={"params": True}, length=3)
            return scanned(name="layers")(x, None)[0]

    model = qwix.quantize_model(Stack(), OdmlQatProvider([INT8]))
    variables = jax.jit(model.init)(jax.random.key(0), ROWS)
    loss = lambda v: (model.apply(v, ROWS, mutable=["quant_stats"])[0] ** 2).sum()
    grad = jax.jit(jax.grad(lambda p: loss({**variables, "params": p})))(variables["params"])
    _, new = jax.eval_shape(lambda v: model.apply(v, ROWS, mutable=["quant_stats"]), variables)
    shapes = {key: stat["count"].shape for key, stat in keys(new["quant_stats"]).items()}
    assert shapes == {"layers/Dense_0/dot_general0_lhs": (3,), "layers/add0_rhs": (3,), "final_output0": ()}
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grad))


def test_nnx_and_linen_compute_the_same():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(16, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.last = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x))))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(8, name="first")(x))
            return nn.Dense(3, name="last")(nn.relu(x))

    model = qwix.quantize_model(Model(nnx.Rngs(0)), OdmlQatProvider([INT8]), ROWS)
    out = nnx.jit(lambda model, x: model(x))(model, ROWS)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    variables = {"params": params, "batch_stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))}
    linen = qwix.quantize_model(Linen(), OdmlQatProvider([INT8]))
    expected, new = jax.jit(lambda v, x: linen.apply(v, x, mutable=["quant_stats"]))(variables, ROWS)
    np.testing.assert_array_equal(out, expected)
    stats = nnx.to_pure_dict(nnx.state(model, qwix.QuantStat))
    jax.tree.map(np.testing.assert_array_equal, stats, new["quant_stats"])
    model.set_attributes(disable_quant_stats_update=True)
    nnx.jit(lambda model, x: model(x))(model, ROWS)
    assert model.final_output0["count"] == 1


def test_strict_lists_all_that_breaks_the_chain_and_otherwise_a_warning_does():
    fn = lambda x: jnp.cos(nn.Dense(4)(jnp.sin(x)))
    with pytest.raises(ValueError, match=r"(?s)sin0 in '': LiteRT has a float.*cos0 in ''.*strict=False"):
        trace(fn, OdmlQatProvider([INT8]))
    provider = OdmlQatProvider([INT8], strict=False)
    with pytest.warns(UserWarning, match=r"(?s)sin0 in '': .*cos0 in '': .*stay float"):
        trace(fn, provider)
    assert [(b.path, b.op, b.op_id) for b in provider.breaks] == [("", "sin", "sin0"), ("", "cos", "cos0")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(fn, provider)  # said once
    excluded = OdmlQatProvider([QuantizationRule(op_names=("sin", "cos")), INT8])
    trace(fn, excluded)


def test_a_user_may_add_an_op():
    @jax.jit
    def l2_norm(x):
        return x / jnp.sqrt((x * x).sum(-1, keepdims=True))

    provider = OdmlQatProvider([INT8])
    provider._ops["l2_norm"] = provider._ops["tanh"]
    _, stats = run(lambda x: l2_norm(x), ROWS, provider)
    assert set(stats) == {"tanh0", "final_output0"}
    np.testing.assert_allclose(stats["final_output0"]["sum_of_max"].item(), 127 / 128)


def test_threads_do_not_disturb_each_other():
    fns = [lambda x: x * jnp.tanh(x), lambda x: jax.nn.softmax(x) + x]
    provider = OdmlQatProvider([INT8])
    models = [qwix.quantize_model(Of(fn), provider) for fn in fns]
    traced = lambda i: str(
        jax.make_jaxpr(lambda x: models[i % 2].apply({}, x, mutable=["quant_stats"]))(ROWS)
    )
    expected, found = [traced(0), traced(1)], [""] * 8

    def work(i):
        found[i] = traced(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected * 4 and expected[0] != expected[1]


def test_a_report_says_what_was_done(block):
    text = str(qwix.report(block[0]))
    for part in ("Conv_0", "conv_general_dilated", "int8, activations int8", "mean"):
        assert part in text


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: OdmlQatProvider([QuantizationRule(weight_qtype="int8", tile_size=4)]),
            ValueError,
            "no tiles",
        ),
        (lambda: OdmlQatProvider([QuantizationRule(act_qtype="fp8")]), ValueError, "qtype"),
        (
            lambda: OdmlQatProvider([QuantizationRule(weight_qtype="nf4")]),
            ValueError,
            "Unsupported dtype nf4",
        ),
        (lambda: OdmlQatProvider([INT8], fixed_range_for_inputs=(1, 2)), ValueError, "must contain 0"),
        (lambda: OdmlQatProvider([INT8], fixed_range_for_inputs=3), TypeError, "pair"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
