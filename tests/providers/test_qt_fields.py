"""Every field of a rule does on every op what the op itself does with that config: bit for bit, in the result
and in both gradients. And it makes a difference.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import qwix
from qwix._src.core.conv_general_qt import conv_general_qt
from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt
from qwix._src.core.ragged_dot_qt import ragged_dot_qt
from qwix._src.core.stochastic_rounding import get_noise_fn

GROUPS = jnp.array([5, 3])
DOT = (((1,), (0,)), ((), ()))
EINSUM = (((2,), (0,)), ((), ()))
CONV = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


OPS = {  # the float op, the same in training, lhs, weight
    "dot_general": (
        lambda x, w: lax.dot_general(x, w, DOT),
        lambda x, w, c: dot_general_qt(x, w, DOT, c),
        normal(0, (8, 16)),
        normal(1, (16, 8)),
    ),
    "einsum": (
        lambda x, w: jnp.einsum("btd,dh->bth", x, w),
        lambda x, w, c: dot_general_qt(x, w, EINSUM, c),
        normal(2, (2, 4, 16)),
        normal(3, (16, 8)),
    ),
    "conv_general_dilated": (
        lambda x, w: lax.conv_general_dilated(x, w, **CONV),
        lambda x, w, c: conv_general_qt(x, w, c, **CONV),
        normal(4, (2, 4, 4, 8)),
        normal(5, (3, 3, 8, 8)),
    ),
    "ragged_dot": (
        lambda x, w: lax.ragged_dot(x, w, GROUPS),
        lambda x, w, c: ragged_dot_qt(x, w, GROUPS, c),
        normal(6, (8, 16)),
        normal(7, (2, 16, 8)),
    ),
}
FULL = {"weight_qtype": "int8", "act_qtype": "int8", "bwd_qtype": "int8"}
FULL_CONFIG = {"lhs_qtype": "int8", "rhs_qtype": "int8", "dlhs_grad_qtype": "int8", "drhs_grad_qtype": "int8"}
# name: (fields of the rule, fields of the config)
FIELDS = {
    "weight_qtype": ({"weight_qtype": "int4"}, {"rhs_qtype": "int4"}),
    "act_qtype": ({"act_qtype": "int4"}, {"lhs_qtype": "int4"}),
    "bwd_qtype": (
        {"bwd_qtype": "int4"},
        {"dlhs_grad_qtype": "int4", "drhs_grad_qtype": "int4"},
    ),
    "no_bwd_qtype": (
        {"bwd_qtype": None},
        {"dlhs_grad_qtype": None, "drhs_grad_qtype": None, "use_original_residuals": True},
    ),
    "weight_calibration_method": (
        {"weight_calibration_method": "rms,2"},
        {"rhs_calibration_method": "rms,2"},
    ),
    "act_calibration_method": ({"act_calibration_method": "minmax"}, {"lhs_calibration_method": "minmax"}),
    "bwd_calibration_method": (
        {"bwd_calibration_method": "absmax,0.5"},
        {"dlhs_grad_calibration_method": "absmax,0.5", "drhs_grad_calibration_method": "absmax,0.5"},
    ),
    "tile_size": ({"tile_size": 4}, {"tile_size": 4}),
    "bwd_weight_grad_tile_size": ({"bwd_weight_grad_tile_size": 2}, {"drhs_tile_size": 2}),
    "disable_channelwise_axes": (
        {"disable_channelwise_axes": True},
        {f"{side}_disable_channelwise_axes": True for side in ("lhs", "rhs", "dlhs_grad", "drhs_grad")},
    ),
    "additional_qt_config": (
        {"additional_qt_config": {"dlhs_grad_qtype": "int4", "disable_gradient_clipping": True}},
        {"dlhs_grad_qtype": "int4", "disable_gradient_clipping": True},
    ),
    "residuals": (
        {"weight_qtype": None, "additional_qt_config": {"dlhs_residual_qtype": "int4"}},
        {"rhs_qtype": None, "dlhs_residual_qtype": "int4"},
    ),
    "sparsity_rule": (
        {
            "additional_qt_config": {
                "sparsity_rule": qwix.SparsityRule(weight_sparsity_n=2, weight_sparsity_m=4)
            }
        },
        {"sparsity_rule": qwix.SparsityRule(weight_sparsity_n=2, weight_sparsity_m=4)},
    ),
}
# Ops for which a field can make no difference: the rows of groups have no tiles, and two images are one.
SKIPPED = {("ragged_dot", "bwd_weight_grad_tile_size"), ("conv_general_dilated", "bwd_weight_grad_tile_size")}


class Model(nnx.Module):
    def __init__(self, op, w):
        self.op, self.w = nnx.static(op), nnx.Param(w)

    def __call__(self, x):
        return self.op(x, self.w[...])


def results(fn, x, w):
    g = jnp.cos(jnp.arange(fn(x, w).size)).reshape(fn(x, w).shape)
    out, vjp = jax.vjp(fn, x, w)
    return out, *vjp(g)


def trained(op, w, rule, key=None):
    """(x, w) -> the result of a model with one op."""
    model = qwix.quantize_model(Model(op, w), qwix.QtProvider(rule))
    if key is not None:
        model.set_attributes(qwix_rngs=nnx.Rngs(stochastic_rounding=key))
    graphdef, state = nnx.split(model)

    def fn(x, w):
        new = nnx.merge(graphdef, jax.tree.map(lambda s: s, state))
        new.w.set_value(w)
        return new(x)

    return fn


def assert_equal(left, right, name=""):
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype and (a == b).all(), (name, abs(a - b).max(), abs(b).max())


@pytest.mark.parametrize("op", OPS)
def test_fields_do_what_the_op_does_with_them(op):
    plain, quantized, x, w = OPS[op]
    fields = {name: both for name, both in FIELDS.items() if (op, name) not in SKIPPED}

    @jax.jit
    def all_results(x, w):
        by_name = {}
        for name, (rule_fields, config_fields) in ({"base": ({}, {})} | fields).items():
            config = DotGeneralQtConfig(**FULL_CONFIG | config_fields)
            of_model = trained(plain, w, qwix.QtRule(**FULL | rule_fields))
            expected = results(lambda x, w, config=config: quantized(x, w, config), x, w)
            by_name[name] = results(of_model, x, w), expected
        return by_name

    all_of_them = all_results(x, w)
    base, _ = all_of_them["base"]
    for name, (got, expected) in all_of_them.items():
        assert_equal(got, expected, name)
        assert name == "base" or any((a != b).any() for a, b in zip(got, base, strict=True)), name


@pytest.mark.large
@pytest.mark.parametrize("op", OPS)
def test_fields_of_static_ranges_reach_every_op(op):
    """By the average that two steps leave, and by whether the second step uses it."""
    plain, _, x, w = OPS[op]
    whole, by_row = abs(x).max(), abs(x).max(tuple(range(1, x.ndim))).mean()
    shared = qwix.QtRule(**FULL, act_calibration_method=f"fixed,{3 * whole}")
    fixed = qwix.quantize_model(Model(plain, w), qwix.QtProvider(shared))(
        3 * x
    )  # the second step's own range
    for fields, average, is_own in (
        ({}, 2 * by_row, False),
        ({"act_batch_axes": ()}, 2 * whole, False),
        ({"act_averaging": "ema,0.5"}, (by_row + 2 * 3 * by_row) / 3, False),
        ({"act_batch_axes": (), "act_bootstrap_steps": 2}, 2 * whole, True),
    ):
        model = qwix.quantize_model(
            Model(plain, w), qwix.QtProvider(qwix.QtRule(**FULL, act_static_scale=True, **fields))
        )
        model(x)
        out = model(3 * x)
        stat = getattr(model, f"{op}0_lhs").get_value()
        got = stat["sum_of_absmax"].ravel()[0] / stat["count"]
        assert abs(got - average) <= 1e-6 * average, fields
        close = abs(out - fixed).max() <= 1e-5 * abs(fixed).max()
        assert bool(close) == is_own, fields


@pytest.mark.parametrize("method", ["uniform", "low_bit_uniform"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_rounded_at_random(op, method):
    plain, _, x, w = OPS[op]
    rule = qwix.QtRule(**FULL, bwd_stochastic_rounding=method, channelwise_noise_axes=(0, 1))
    make = lambda seed: results(trained(plain, w, rule, seed), x, w)
    noisy, again, other = jax.jit(lambda: (make(3), make(3), make(4)))()
    assert_equal(noisy, again)  # the key decides
    assert (noisy[0] == other[0]).all()  # nothing is random in the forward pass
    assert (noisy[1] != other[1]).any() and (noisy[2] != other[2]).any()


def test_without_a_key_random_rounding_is_an_error_of_the_gradient_only():
    plain, _, x, w = OPS["dot_general"]
    rule = qwix.QtRule(**FULL, bwd_stochastic_rounding="uniform")
    fn = trained(plain, w, rule)
    assert (fn(x, w) == trained(plain, w, qwix.QtRule(**FULL))(x, w)).all()
    with pytest.raises(ValueError, match="stochastic_rounding needs a random key"):
        jax.grad(lambda w: fn(x, w).sum())(w)


def test_noise_follows_the_exchange_of_sides():
    """A weight on the left goes to the right; the noise varies along the axes of the op as it was called."""
    w, x = normal(0, (8, 16)), normal(1, (16, 4))
    rule = qwix.QtRule(**FULL, bwd_stochastic_rounding="uniform", channelwise_noise_axes=(0,))
    fn = trained(lambda x, w: w @ x, w, rule, 0)
    dx, dw = jax.grad(lambda x, w: (fn(x, w) ** 2).sum(), argnums=(0, 1))(x, w)
    assert dx.shape == x.shape and dw.shape == w.shape
    assert get_noise_fn("uniform", jax.random.key(0), (0,))((8, 4)).shape == (8, 1)


@pytest.mark.parametrize(
    "name, fn",
    {
        "matmul operator": lambda x, w: x @ w,
        "dot": lambda x, w: jnp.dot(x, w),
        "lax.dot": lambda x, w: lax.dot(x, w),
        "inner": lambda x, w: jnp.inner(x, w.T),
        "tensordot": lambda x, w: jnp.tensordot(x, w, 1),
        "weight on the left": lambda x, w: (w.T @ x.T).T,
        "jitted": jax.jit(lambda x, w: x @ w.astype(jnp.float32)),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_every_spelling_of_a_dot_is_one(name, fn):
    x, w = normal(0, (4, 16)), normal(1, (16, 8))
    quantized = trained(fn, w, qwix.QtRule(**FULL))
    config = DotGeneralQtConfig(**FULL_CONFIG)
    expected = results(lambda x, w: dot_general_qt(x, w, DOT, config), x, w)
    got = results(quantized, x, w)
    assert (got[0] == expected[0]).all()  # integers, scaled by the same scales
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert (abs(a - b) <= 2.0**-6 * abs(b).max()).all()  # g, quantized along its own axes
    assert (got[0] != fn(x, w)).any()
