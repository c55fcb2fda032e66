"""Rules and the base of providers: what is checked, what matches, how ops are counted."""

import pickle
import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from qwix._src import aux_data, averaging, qconfig
from qwix._src.utils import flax_util

Rule = qwix.QuantizationRule


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (
            {"module_path": "layers/(.*"},
            ValueError,
            r"module_path 'layers/\(\.\*' isn't a regular expression",
        ),
        ({"module_path": 3}, TypeError, "regular expression as text, got 3"),
        ({"weight_qtype": "int9"}, ValueError, "weight_qtype: .*'int9'.*Did you mean 'int8'"),
        ({"act_qtype": "flaot8_e4m3fn"}, ValueError, "act_qtype: .*Did you mean 'float8_e4m3fn'"),
        ({"weight_qtype": jnp.float32}, ValueError, "weight_qtype: "),
        ({"op_names": (1,)}, TypeError, "op_names must be names"),
        ({"tile_size": 0}, ValueError, "tile_size must be a positive count"),
        ({"tile_size": 1.5}, ValueError, "a fraction up to 1.0; got 1.5"),
        ({"tile_size": "64"}, TypeError, "tile_size must be a number"),
        ({"tile_size": {0: -1}}, ValueError, "tile_size"),
        (
            {"weight_calibration_method": "absmin"},
            ValueError,
            "weight_calibration_method: Unsupported calibration",
        ),
    ],
)
def test_rules_are_checked_when_made(fields, error, message):
    with pytest.raises(error, match=message):
        Rule(**fields)


def test_one_op_name_is_a_name_and_not_its_letters():
    rule = Rule(op_names="conv_general_dilated", weight_qtype="int8")
    assert rule.op_names == ("conv_general_dilated",)
    provider = qwix.PtqProvider([rule])
    assert (
        provider.find_rule("", "conv") is None and provider.find_rule("", "conv_general_dilated") is not None
    )


def test_rules_can_be_hashed_and_compared():
    rules = [Rule(weight_qtype="int8", tile_size={0: 4}) for _ in range(2)]
    assert rules[0] == rules[1] and hash(rules[0]) == hash(rules[1])


def test_defaults():
    (rule,) = qwix.QuantizationProvider([Rule(weight_qtype="int8")])._rules
    assert rule.act_static_scale is False and rule.act_calibration_method == "absmax"
    with pytest.raises(ValueError, match="act_static_scale is set to True but act_qtype is None"):
        qwix.QuantizationProvider([Rule(weight_qtype="int8", act_static_scale=True)])


@pytest.mark.parametrize(
    "path, op, expected",
    [
        ("layers/0/mlp", "dot_general", 0),
        ("layers/0/mlp", "einsum", 1),
        ("layers/0/mlp/up", "dot_general", 2),  # the whole path must match
        ("layers/0", "einsum", 2),
        ("other", "einsum", None),
    ],
)
def test_the_first_rule_that_matches_decides(path, op, expected):
    rules = [
        Rule(module_path="layers/.*/mlp", op_names=("dot_general",), weight_qtype="int4"),
        Rule(module_path=".*/mlp", weight_qtype="int8"),
        Rule(module_path="layers/.*", weight_qtype="nf4", tile_size=32),
    ]
    provider = qwix.QuantizationProvider(rules)
    assert provider.find_rule(path, op) is (None if expected is None else provider._rules[expected])


def test_op_ids():
    provider = qwix.QuantizationProvider([Rule(module_path="a", weight_qtype="int8")])
    ask = lambda op, path, **kwargs: provider._get_current_rule_and_op_id(op, path=path, **kwargs)[1]
    with qconfig.running(provider):
        assert [ask("einsum", "a"), ask("einsum", "a"), ask("dot_general", "a")] == [
            "einsum0",
            "einsum1",
            "dot_general0",
        ]
        assert ask("einsum", "b") == "einsum0"  # consumed, although no rule matches
        assert ask("einsum", "a", repeated_call=True) == "einsum1"
        assert ask("einsum", "a", only_rule=True) is None
        assert ask("einsum", "a") == "einsum2"
    with qconfig.running(provider):
        assert ask("einsum", "a") == "einsum0"


def test_get_current_rule():
    seen = []

    class Layer(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(anything, x):
            seen.append(qwix.get_current_rule("my_kernel"))
            return anything.linear(x)

    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([Layer(), Layer()])

        def __call__(anything, x):
            for layer in anything.layers:
                x = layer(x)
            return x

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen.append(qwix.get_current_rule("my_kernel"))
            return nn.Dense(8)(x)

    rules = [
        Rule(module_path="layers/1", op_names=("my_kernel",), weight_qtype="int4"),
        Rule(weight_qtype="int8"),
    ]
    provider = qwix.PtqProvider(rules)
    assert qwix.get_current_rule("my_kernel") is None
    model = qwix.quantize_model(Model(), provider, jnp.ones((1, 8)))
    seen.clear()
    model(jnp.ones((1, 8)))
    assert seen == [provider._rules[1], provider._rules[0]]
    seen.clear()
    linen_rule = Rule(op_names=("my_kernel", "dot_general"), weight_qtype="int8")
    linen = qwix.quantize_model(Linen(), linen_rule)
    linen.apply(linen.init(nnx.Rngs(0).params(), jnp.ones((1, 8))), jnp.ones((1, 8)))
    assert {rule.op_names for rule in seen if rule} == {("my_kernel", "dot_general")}


def test_providers_can_be_pickled():
    provider = qwix.PtqProvider([Rule(weight_qtype="int8", tile_size={0: 4})])
    other = pickle.loads(pickle.dumps(provider))
    assert other._rules == provider._rules and other.token != provider.token
    assert other._qarray is provider._qarray


def test_current_module():
    class Inner(nnx.Module):
        def find(me):
            return flax_util.get_current_module(), flax_util.get_current_module_path()

    class Outer(nnx.Module):
        def __init__(self):
            self.parts = nnx.List([Inner()])

        def other_method(it):
            return it.parts[0].find()

    outer = Outer()
    with flax_util.nnx_paths(outer):
        assert outer.other_method() == (outer.parts[0], ("parts", 0))
    with pytest.raises(ValueError, match="Current module is not known"):
        flax_util.get_current_module()


def test_sharding_of_changed_arrays():
    update = flax_util.update_sharding
    assert update(("a", "b"), split=[0]) == ("a", None, "b")
    assert update(["a", None, "b"], merge=[0]) == ["a", "b"]
    assert update(("a", "b"), transpose=(1, None, 0)) == ("b", None, "a")
    assert update(("a", "b"), shape=(1, 4)) == (None, "b")
    with pytest.raises(ValueError, match="At most one"):
        update(("a",), split=[0], merge=[0])
    with pytest.raises(ValueError, match="Unsupported type: str"):
        flax_util.update_boxed("text")
    box = flax_util.update_boxed(nn.Partitioned(jnp.ones((4, 8)), names=("a", "b")), value=jnp.ones((1, 8)))
    assert box.names == (None, "b")


def test_moving_average():
    average = averaging.SimpleMovingAverage(bootstrap_steps=1)
    stat = average.init({"absmax": jnp.zeros((1,), jnp.bfloat16)})
    default = {"absmax": jnp.full((1,), 9, jnp.bfloat16)}
    for value, expected in ((1.0, 9.0), (3.0, 2.0)):
        stat = average.update(stat, {"absmax": jnp.full((1,), value, jnp.bfloat16)})
        got = average.get_calibration(stat, default)["absmax"]
        assert got.dtype == jnp.bfloat16 and got[0] == expected
    assert stat["count"] == 2 and stat["sum_of_absmax"].dtype == jnp.float32
    with pytest.raises(ValueError, match="Shape mismatch between"):
        average.update(stat, {"absmax": jnp.zeros((2,))})
    assert np.isnan(averaging.SimpleMovingAverage().get_calibration(average.init(default))["absmax"]).all()


def test_facts_about_objects():
    thing, other = type("Thing", (), {})(), type("Thing", (), {})()
    aux_data.set(thing, "name", 1)
    assert aux_data.get(thing, "name") == 1 and aux_data.get(other, "name", None) is None
    with pytest.raises(KeyError):
        aux_data.get(other, "name")
    aux_data.clear(thing)
    aux_data.clear(other)
    assert aux_data.get(thing, "name", None) is None


def test_a_pattern_is_a_regular_expression_for_whole_paths():
    provider = qwix.QuantizationProvider([Rule(module_path=re.escape("a.b"), weight_qtype="int8")])
    assert provider.find_rule("a.b", "einsum") and not provider.find_rule("a/b", "einsum")


@pytest.mark.parametrize("provider", [qwix.QtProvider, qwix.PtqProvider])
@pytest.mark.parametrize(
    "given", ["int8", {"weight_qtype": "int8"}, None, jnp.int8, [Rule(), "int8"]], ids=str
)
def test_what_is_no_rule_is_shown_whole_with_what_to_pass(provider, given):
    shown = "'int8' in [" if isinstance(given, list) else repr(given)
    example = f"{provider.__name__}([qwix.QuantizationRule("
    with pytest.raises(TypeError, match=f"sequence of them, got {re.escape(shown)}.*{re.escape(example)}"):
        provider(given)


@pytest.mark.parametrize("provider", [qwix.PtqProvider, qwix.QtProvider])
def test_a_rule_for_a_kernel_of_ones_own_is_used_when_it_is_asked_for(provider):
    """No warning that nothing was quantized: the kernel does that itself."""

    class Own(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((4, 4)))

        def __call__(self, x):
            seen.append(qwix.get_current_rule("my_kernel"))
            return x + self.w[...]

    seen = []
    qwix.quantize_model(
        Own(), provider([Rule(weight_qtype="int8", op_names=("my_kernel",))]), jnp.ones((4, 4))
    )
    assert seen and seen[-1].weight_qtype == np.dtype("int8")
