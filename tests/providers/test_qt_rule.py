"""Rules of training: what they refuse, and averages of statistics."""

import jax.numpy as jnp
import numpy as np
import pytest

import qwix
from qwix._src import averaging
from qwix._src.qt_rule import as_qt_rule

EPS = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"bwd_qtype": "int9"}, ValueError, "bwd_qtype: .*int8"),
        ({"bwd_calibration_method": "absmx"}, ValueError, "bwd_calibration_method"),
        ({"bwd_weight_grad_tile_size": 0}, ValueError, "bwd_weight_grad_tile_size must be a positive"),
        ({"bwd_weight_grad_tile_size": {0: 4}}, TypeError, "dlhs_tile_size"),
        ({"bwd_qtype": "int8", "bwd_stochastic_rounding": "unifrom"}, ValueError, "did you mean 'uniform'"),
        ({"bwd_stochastic_rounding": "uniform"}, ValueError, "but bwd_qtype is None"),
        ({"channelwise_noise_axes": ("a",)}, TypeError, "numbers of axes"),
        ({"act_averaging": "ema"}, ValueError, "ema,0.99"),
        ({"act_averaging": "ema,1.5"}, ValueError, "between 0 and 1"),
        ({"act_bootstrap_steps": -1}, ValueError, "act_bootstrap_steps"),
        ({"additional_qt_config": {"dlhs_grad_qtpye": "int8"}}, TypeError, "did you mean 'dlhs_grad_qtype'"),
        ({"additional_qt_config": {"dlhs_grad_qtype": "int9"}}, ValueError, "additional_qt_config"),
        ({"additional_qt_config": {"sparsity_rule": 2}}, TypeError, "SparsityRule"),
        ({"act_static_scale": True}, ValueError, "act_qtype is None"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_a_rule_that_could_never_work_says_so(fields, error, words):
    with pytest.raises(error, match=words):
        qwix.QtProvider(qwix.QtRule(weight_qtype="int8", **fields))


def test_a_rule_of_another_kind_is_refused_by_the_names_it_adds():
    import dataclasses

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(qwix.QuantizationRule):
        rank: int = 4

    with pytest.raises(TypeError, match="Other also says rank"):
        qwix.QtProvider([Other()])


def test_plain_rules_train_with_float_gradients():
    rule = qwix.QuantizationRule(module_path="a", weight_qtype="int4", tile_size={0: 8})
    assert as_qt_rule(rule) == qwix.QtRule(module_path="a", weight_qtype="int4", tile_size={0: 8})
    assert qwix.QtProvider(rule).rules[0].bwd_qtype is None


def test_rules_come_from_files_too():
    (rule,) = qwix.load_rules(
        {"weight_qtype": "int8", "bwd_qtype": "int8", "additional_qt_config": {"tile_size": 8}}, qwix.QtRule
    )
    assert rule.extra["tile_size"] == 8 and hash(rule) == hash(rule)


def test_an_exponential_average_weighs_by_age():
    decay, values = 0.9, [3.0, 1.0, 4.0, 1.5]
    average = averaging.parse_averaging(f"ema,{decay}")
    stat = average.init({"absmax": jnp.zeros((1, 1))})
    for value in values:
        stat = average.update(stat, {"absmax": jnp.full((1, 1), value)})
    weights = decay ** np.arange(len(values))[::-1]
    expected = np.average(values, weights=weights)
    for reader in (average, qwix.SimpleMovingAverage()):  # whoever reads it need not know
        assert abs(reader.get_calibration(stat)["absmax"][0, 0] - expected) <= 16 * EPS * max(values)


def test_a_constant_stays_what_it_is_in_an_exponential_average():
    average = qwix.ExponentialMovingAverage(0.999)
    stat = average.init({"absmax": jnp.zeros(1)})
    for _ in range(50):
        stat = average.update(stat, {"absmax": jnp.full(1, 0.1)})
    assert abs(average.get_calibration(stat)["absmax"][0] - 0.1) <= 16 * EPS * 0.1
