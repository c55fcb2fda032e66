"""Gradients of dots whose rows are scaled, rounded with noise and quantized inside the matmul."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix_kernels.problem import RowQuantize

from qwix._src.core import qarray, qt_scaling, stochastic_rounding
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.dot_general import dot_general
from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt

DENSE = (((2,), (0,)), ((), ()))


def config(noise=None) -> DotGeneralQtConfig:
    return DotGeneralQtConfig(
        lhs_qtype="int8",
        rhs_qtype="int8",
        dlhs_grad_qtype="int8",
        drhs_grad_qtype="int8",
        dlhs_stochastic_rounding_noise_fn=noise,
    )


def operands():
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 3, 16), (16, 24), (2, 3, 24)))
    return x, w * jnp.exp2(jnp.arange(24) % 7), g


def problems_of(name: str, f, *args) -> list:
    """What the ops called `name` of a program compute."""
    text = jax.make_jaxpr(f)(*args)
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == name:
                found.append(eqn.params["problem"])
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(text.jaxpr)
    return found


def rows_of(f, *args) -> list[RowQuantize | None]:
    """How each matmul of a program quantizes its rows."""
    return [problem.quantize_lhs for problem in problems_of("qwix_matmul", f, *args)]


def gradient(noise=None):
    x, w, g = operands()
    return lambda x, w: jax.vjp(lambda x, w: dot_general_qt(x, w, DENSE, config(noise)), x, w)[1](g), (x, w)


def test_scales_and_noise_go_into_the_matmul():
    """No product of the gradient with the weight's scales is made outside, where only one matmul needs it."""
    x, w, g = operands()
    key = jax.random.key(0)
    for noise in (None, stochastic_rounding.get_noise_fn("uniform", key)):
        f = lambda x, noise=noise: jax.vjp(lambda x: dot_general_qt(x, w, DENSE, config(noise)), x)[1](g)
        (rows,) = [r for r in rows_of(f, x) if r is not None and r.columns]
        assert rows.noise == (noise is not None)
    f, args = gradient(stochastic_rounding.get_noise_fn("uniform", key))
    (rows,) = [r for r in rows_of(f, *args) if r is not None]
    assert rows.columns and rows.noise


def test_a_gradient_that_both_matmuls_quantize_comes_to_them_quantized():
    """Then one pass over it serves both. The result is bit-equal to that of rows quantized on the way."""
    f, (x, w) = gradient()
    assert all(r is None for r in rows_of(f, x, w))
    _, _, g = operands()
    on_the_way = lambda x: jax.vjp(lambda x: dot_general_qt(x, w, DENSE, config()), x)[1](g)[0]
    np.testing.assert_array_equal(jax.jit(f)(x, w)[0], jax.jit(on_the_way)(x))


def test_values_are_widened_beside_what_scales_them():
    """The conversion to float32 follows a choice by the scale, which keeps XLA from moving float32."""
    x = jnp.array([[1.5, -2.0], [jnp.inf, 0.0]], jnp.bfloat16)
    scale = jnp.array([[2.0], [jnp.nan]], jnp.float32)
    eqns = [e.primitive.name for e in jax.make_jaxpr(qt_scaling.widened)(x, scale).eqns]
    got = qt_scaling.widened(x, scale)
    assert got.dtype == jnp.float32 and eqns[-1] == "convert_element_type" and len(eqns) > 1
    np.testing.assert_array_equal(got, [[1.5, -2.0], [np.nan, np.nan]])
    assert qt_scaling.widened(got, scale) is got


def test_noise_along_the_sum_stays_outside():
    noise = stochastic_rounding.get_noise_fn("uniform", jax.random.key(0), (0, 2))
    f, args = gradient(noise)
    assert all(r is None for r in rows_of(f, *args))


def test_gradient_is_that_of_the_scaled_rows():
    """Bit-equal to quantizing g times the scales row by row, then multiplying integers."""
    x, w, g = operands()
    noise = stochastic_rounding.get_noise_fn("uniform", jax.random.key(0))
    got, _ = jax.jit(
        lambda x, w: jax.vjp(lambda x, w: dot_general_qt(x, w, DENSE, config(noise)), x, w)[1](g)
    )(x, w)
    stored = qarray.quantize(w, qarray.HowToQuantize(qtype="int8", channelwise_axes=(1,)))
    scaled = np.asarray(g) * np.asarray(stored.scale)
    scale = np.max(np.abs(scaled), axis=-1, keepdims=True) * (np.float32(1) / np.float32(127.5))
    rounded = np.round(scaled * (1 / scale) + np.asarray(noise(g.shape)))
    sums = np.clip(rounded, -128, 127).astype(np.int64) @ np.asarray(stored.qvalue).astype(np.int64).T
    np.testing.assert_array_equal(got, sums.astype(np.float32) * scale)


def test_one_key_gives_one_gradient_and_another_key_another():
    keys = [jax.random.key(i) for i in (0, 0, 1)]
    noises = [stochastic_rounding.get_noise_fn("uniform", key) for key in keys]
    first, again, other = ((lambda f, args: f(*args)[0])(*gradient(noise)) for noise in noises)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_columns_without_a_kernel_are_multiplied_first():
    """A calibration that no kernel knows: the same as multiplying by hand."""
    x, w, _ = operands()
    columns = jnp.exp2(jnp.arange(16) % 5).reshape(1, 1, 16).astype(jnp.float32)
    how = qarray.HowToQuantize(qtype="int8", channelwise_axes=(0, 1), calibration_method="rms,3")
    q = qarray.quantize(w, qarray.HowToQuantize(qtype="int8", channelwise_axes=(1,)))
    got = dot_general(x, q, DENSE, act_how=how, act_columns=columns)
    np.testing.assert_array_equal(got, dot_general(x * columns, q, DENSE, act_how=how))


def test_a_weight_is_read_once_for_its_scale_and_its_values():
    """By one op, which gives what two passes would."""
    f, (x, w) = gradient()
    (problem,) = problems_of("qwix_quantize", f, x, w)
    assert (problem.rows, problem.columns, problem.scale_of) == (16, 24, "columns")
    how = HowToQuantize(qtype="int8", channelwise_axes=(1,))
    assert qt_scaling.fits_one_pass(w, how)
    for dtype in (jnp.bfloat16, jnp.float32):
        got = jax.jit(qt_scaling.quantize_in_one_pass, static_argnums=1)(w.astype(dtype), how)
        want = jax.jit(qarray.quantize, static_argnums=1)(w.astype(dtype), how)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "how",
    [
        {"qtype": "int3"},
        {"qtype": "nf4"},
        {"qtype": "int8", "calibration_method": "rms,3"},
        {"qtype": "int8", "calibration_method": "absmax,0.9"},
        {"qtype": "int8", "tiled_axes": {0: 32}},
        {"qtype": "int8", "channelwise_axes": ()},
        {"qtype": "int8", "channelwise_axes": (0, 1)},
    ],
)
def test_what_takes_two_passes(how):
    _, w, _ = operands()
    assert not qt_scaling.fits_one_pass(w, HowToQuantize(**({"channelwise_axes": (1,)} | how)))
