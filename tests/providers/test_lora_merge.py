"""Merging adapters into weights and taking them out, and several adapters on one base model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from qwix import lora

NORMAL = jax.nn.initializers.normal(1.0)
RULE = {"rank": 2, "alpha": 1.0, "lora_b_initializer": NORMAL}
X = jax.random.normal(jax.random.key(0), (6, 16))
IDS = np.array([1, -1, 0, 1, 0, -1], np.int32)


class Model(nnx.Module):
    """A table, a convolution over positions, a matrix and a tied head."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(32, 16, rngs=rngs)
        self.conv = nnx.Conv(16, 16, kernel_size=(3,), feature_group_count=2, use_bias=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 16, use_bias=False, rngs=rngs)])

    def __call__(self, tokens):
        return self.embed.attend(self.layers[0](self.conv(self.embed(tokens))))


INT8 = qwix.QuantizationRule(weight_qtype="int8")
TOKENS = jax.random.randint(jax.random.key(1), (6, 5), 0, 32)


def adapted(seed=1, rank=2, **rule):
    provider = qwix.LoraProvider(**RULE | {"rank": rank, "alpha": rank / 2} | rule)
    return qwix.apply_lora_to_model(Model(nnx.Rngs(0)), provider, TOKENS, rngs=nnx.Rngs(seed))


def relative(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def test_float_weights_merge_and_unmerge():
    model = adapted()
    out = model(TOKENS)
    merged = lora.merge(model)
    assert set(merged.sqnr_db.values()) == {np.inf}
    assert set(merged.sqnr_db) == {"embed/embedding", "conv/kernel", "layers/0/kernel"}
    assert lora.adapters_of(merged.model) == {} and lora.adapters_of(model) != {}
    assert relative(merged.model(TOKENS), out) < 1e-6
    # In float32, W + AB - AB is W to the last bits of AB.
    back = lora.unmerge(merged.model, lora.adapters_of(model)).model
    assert relative(back(TOKENS), out) < 1e-6
    size = float(jnp.abs(model.layers[0].kernel_lora_a[...] @ model.layers[0].kernel_lora_b[...]).max())
    difference = vars(back.layers[0])["kernel"][...] - vars(model.layers[0])["kernel"][...]
    assert float(jnp.abs(difference).max()) < 2**-22 * size


@pytest.mark.parametrize("double", [pytest.param(False, marks=pytest.mark.large), True])
def test_quantized_weights_are_quantized_again(double):
    model = adapted(weight_qtype="int8", double_quantize=double)
    merged = lora.merge(model)
    stored = vars(merged.model.layers[0])["kernel"]
    assert stored.unboxed.qvalue.dtype == jnp.int8
    exact = qwix.dequantize(vars(model.layers[0])["kernel"].unboxed) + 0.5 * (
        model.layers[0].kernel_lora_a[...] @ model.layers[0].kernel_lora_b[...]
    )
    lost = exact - qwix.dequantize(stored.unboxed)
    step = jnp.abs(exact).max(0) / 127
    # Half a step; the doubly quantized scale itself is off by at most 1/127 of the largest there is.
    assert jnp.all(jnp.abs(lost) <= 0.5 * step + (step.max() if double else 1e-6 * step))
    quality = 10 * np.log10(float(jnp.sum(exact**2) / jnp.sum(lost**2)))
    assert merged.sqnr_db["layers/0/kernel"] == pytest.approx(quality, abs=1e-3)
    assert relative(merged.model(TOKENS), model(TOKENS)) < 0.05


def test_quantized_weights_can_become_floats():
    model = adapted(weight_qtype="int4", act_qtype="int8")
    merged = lora.merge(model, requantize=False)
    assert isinstance(vars(merged.model.layers[0])["kernel"], nnx.Param)
    assert set(merged.sqnr_db.values()) == {np.inf}
    exact = lora.merge(adapted(weight_qtype="int4"), requantize=False).model
    np.testing.assert_array_equal(merged.model(TOKENS), exact(TOKENS))  # floats: no activation is quantized
    again = qwix.quantize_model(merged.model, qwix.QuantizationRule(weight_qtype="int8"), TOKENS)
    assert relative(again(TOKENS), exact(TOKENS)) < 0.02


def test_linen_params():
    module = nn.Dense(8, use_bias=False)
    model = qwix.apply_lora_to_model(module, qwix.LoraProvider(**RULE, weight_qtype="int8"))
    params = model.init(jax.random.key(0), X)["params"]
    out = model.apply({"params": params}, X)
    merged = lora.merge(model, params)
    assert sorted(merged.params) == ["kernel"] and merged.model is None
    assert relative(model.apply({"params": merged.params}, X), out) < 0.02
    floats = lora.merge(model, params, requantize=False).params
    assert relative(module.apply({"params": floats}, X), out) < 1e-6
    back = lora.unmerge(model, lora.adapters_of(params), merged.params)
    assert sorted(back.params) == sorted(params)
    assert relative(model.apply({"params": back.params}, X), out) < 0.04


def test_dora_merges_but_does_not_unmerge():
    model = adapted(use_dora=True)
    merged = lora.merge(model)
    assert relative(merged.model(TOKENS), model(TOKENS)) < 1e-5
    with pytest.raises(ValueError, match="DoRA can't be unmerged"):
        lora.unmerge(merged.model, lora.adapters_of(model))


@pytest.mark.parametrize("rule", [pytest.param({}, marks=pytest.mark.large), {"weight_qtype": "int8"}])
def test_rows_choose_their_adapter(rule):
    models = {"math": adapted(1, **rule), "code": adapted(2, rank=4, **rule)}
    outs = [m(TOKENS) for m in models.values()]
    base = qwix.apply_lora_to_model(
        Model(nnx.Rngs(0)), qwix.LoraProvider(rank=1, alpha=1.0, **rule), TOKENS, rngs=nnx.Rngs(0)
    )(TOKENS)
    adapters = {name: lora.adapters_of(m) for name, m in models.items()}
    both = lora.stack(models["math"], adapters, alphas={"code": 2.0})
    assert both.layers[0].kernel_lora_a.shape == (16, 6)
    want = [*outs, base]
    close = lambda got, wanted: relative(got, wanted) < 2e-6
    assert close(both(TOKENS, adapter="math"), outs[0]) and close(both(TOKENS, adapter=1), outs[1])
    assert close(both(TOKENS, adapter=None), base)
    mixed = nnx.jit(lambda m, x, ids: m(x, adapter=ids))(both, TOKENS, jnp.asarray(IDS))
    for row, chosen in enumerate(IDS):
        assert close(mixed[row], want[chosen][row])
        assert not close(mixed[row], want[chosen - 1][row])
    names = [None if i < 0 else ["math", "code"][i] for i in IDS]
    np.testing.assert_allclose(both(TOKENS, adapter=names), mixed, rtol=2e-5, atol=2e-5)


def test_a_weight_that_one_adapter_leaves_alone():
    model = adapted()
    given = lora.adapters_of(model)
    part = {"layers": given["layers"]}
    both = lora.stack(model, {"all": given, "part": part})
    single = lora.with_adapters(adapted(3), given)
    for path in ("embed", "conv"):
        for name in [n for n in vars(getattr(single, path)) if n.endswith("_lora_b")]:
            vars(getattr(single, path))[name].set_value(
                jnp.zeros_like(vars(getattr(single, path))[name][...])
            )
    assert relative(both(TOKENS, adapter="part"), single(TOKENS)) < 2e-6


def test_linen_rows():
    model = qwix.apply_lora_to_model(nn.Dense(8, use_bias=False), qwix.LoraProvider(**RULE))
    first, second = (model.init(jax.random.key(i), X)["params"] for i in range(2))
    second = first | {k: v for k, v in second.items() if "_lora_" in k}
    adapters = {"a": lora.adapters_of(first), "b": lora.adapters_of(second)}
    both, params = lora.stack(model, adapters, first)
    out = jax.jit(lambda ids: both.apply({"params": params}, X, adapter=ids))(jnp.array([0, 1] * 3))
    want = [model.apply({"params": p}, X) for p in (first, second)]
    for row in range(6):
        np.testing.assert_allclose(out[row], want[row % 2][row], rtol=2e-5, atol=2e-5)


def test_bad_input():
    model = adapted()
    given = lora.adapters_of(model)
    both = lora.stack(model, {"a": given, "b": given})
    half = {"kernel_lora_a": given["conv"]["kernel_lora_a"]}
    other = {"conv": {name: array[:1] for name, array in given["conv"].items()}}
    for call, error, match in [
        (lambda: both(TOKENS), ValueError, r"say which with model\(..., adapter=name\)"),
        (lambda: both(TOKENS, adapter="c"), ValueError, r"no adapter 'c'; the model has \['a', 'b'\]"),
        (lambda: both(TOKENS, adapter=2), ValueError, "adapter=2 is none of the 2 adapters"),
        (lambda: both(TOKENS, adapter=[0, 1, 0, 1]), ValueError, "adapter has 4 entries"),
        (lambda: both(TOKENS, adapter=1.5), TypeError, "adapter is a name, a number"),
        (lambda: lora.merge(both), ValueError, "Several adapters are stacked"),
        (lambda: lora.stack(model, {}), ValueError, "at least one adapter"),
        (
            lambda: lora.stack(model, {"a": {"other": given["conv"]}}),
            ValueError,
            "no adapter for 'other/kernel'",
        ),
        (
            lambda: lora.stack(adapted(use_dora=True), {"a": lora.adapters_of(adapted(use_dora=True))}),
            ValueError,
            "DoRA",
        ),
        (lambda: lora.stack(model, [given]), ValueError, "Give at least one adapter"),
        (lambda: lora.stack(model, {"a": given}, alphas={"b": 1.0}), ValueError, "alphas has 'b'"),
        (lambda: lora.stack(model, {"a": [1]}), TypeError, "Adapters are nested dicts"),
        (lambda: lora.stack(model, {"a": {"conv": half}}), ValueError, "lacks 'conv/kernel_lora_b'"),
        (lambda: lora.unmerge(lora.merge(model).model, other), ValueError, "Is it of another model"),
        (lambda: qwix.quantize_model(model, qwix.PtqProvider(INT8), TOKENS), ValueError, "Merge them first"),
        (lambda: qwix.PtqProvider(qwix.LoraRule(rank=1, alpha=1.0)), TypeError, "gives no weight an adapter"),
        (lambda: lora.merge(Model(nnx.Rngs(0))), TypeError, "apply_lora_to_model made"),
        (lambda: lora.merge(lora.merge(model).model), ValueError, "no adapters to merge"),
        (lambda: lora.unmerge(model, given), ValueError, "isn't merged"),
        (lambda: lora.merge(model, {}), TypeError, "no params with an NNX model"),
    ]:
        with pytest.raises(error, match=match):
            call()
    np.testing.assert_array_equal(model(TOKENS), adapted()(TOKENS))
