"""Gradients of quantized convolutions against float64 numeric gradients, for every option.

A convolution is linear in either operand, so a difference quotient in float64 is its gradient up to rounding;
it is taken of `qwix_kernels.conv.reference`, element by element.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix_kernels.conv import problem_of, reference

import qwix
from qwix._src.core import conv_general, qarray
from qwix._src.core.conv_general_qt import ConvGeneralQtConfig, conv_general_qt

NHWC = ("NHWC", "HWIO", "NHWC")
W8A8 = {"lhs_qtype": "int8", "rhs_qtype": "int8"}
MINMAX = W8A8 | {"lhs_calibration_method": "minmax", "rhs_calibration_method": "minmax"}
SHARED = {f"{name}_disable_channelwise_axes": True for name in ("lhs", "rhs", "dlhs_grad", "drhs_grad")}

# (lhs, rhs, geometry)
GEOMETRIES = {
    "plain": ((2, 4, 3, 4), (3, 2, 4, 4), {"padding": ((1, 1), (1, 0))}),
    "strides": ((1, 5, 4, 2), (3, 2, 2, 4), {"padding": ((2, 0), (0, 1)), "strides": (2, 3)}),
    "dilations": (
        (1, 3, 4, 2),
        (2, 3, 2, 4),
        {"padding": ((1, 2), (2, 1)), "lhs_dilation": (2, 1), "rhs_dilation": (2, 2)},
    ),
    "groups": ((1, 4, 3, 4), (2, 2, 2, 4), {"padding": ((0, 1), (1, 0)), "groups": 2}),
    "depthwise": ((1, 4, 3, 4), (3, 3, 1, 4), {"padding": ((1, 1), (1, 1)), "groups": 4}),
    "batch_groups": ((4, 3, 3, 2), (2, 2, 2, 4), {"padding": ((1, 0), (0, 1)), "batch_groups": 2}),
}


def _numeric(lhs: np.ndarray, rhs: np.ndarray, g: np.ndarray, padding, batch_groups=1, **geometry):
    """(d lhs, d rhs) of sum(g * conv(lhs, rhs)) in float64; batch groups written out one by one."""

    def value(x: np.ndarray, w: np.ndarray) -> float:
        outs = []
        for part, kernel in zip(np.split(x, batch_groups), np.split(w, batch_groups, -1), strict=True):
            struct = [jax.ShapeDtypeStruct(v.shape, jnp.float32) for v in (part, kernel)]
            problem = problem_of(*struct, padding=padding, **geometry)
            outs.append(reference.convolve(problem, part, kernel))
        return float((np.concatenate(outs, -1) * g).sum())

    result = []
    for side, x in enumerate((lhs, rhs)):
        d = np.zeros(x.shape)
        for at in np.ndindex(*x.shape):
            unit = np.zeros(x.shape)
            unit[at] = 0.5
            up, down = ((x + s * unit, rhs) if side == 0 else (lhs, x + s * unit) for s in (1, -1))
            d[at] = value(*up) - value(*down)
        result.append(d)
    return result


def _case(name: str, seed: int = 0):
    lhs, rhs, geometry = GEOMETRIES[name]
    rng = np.random.default_rng(seed)
    x, w = (jnp.asarray(rng.standard_normal(s) + 0.5, jnp.float32) for s in (lhs, rhs))
    ones = (1, 1)
    positional = (geometry.get("strides", ones), geometry["padding"])
    positional += (geometry.get("lhs_dilation", ones), geometry.get("rhs_dilation", ones), NHWC)
    positional += (geometry.get("groups", 1), geometry.get("batch_groups", 1))
    return x, w, positional, geometry, rng


def _stored(x: jax.Array, config: dict, side: str) -> np.ndarray:
    """The values that an operand stands for once it is quantized, in float64."""
    if f"{side}_qtype" not in config:
        return np.asarray(x, np.float64)
    axis = 0 if side == "lhs" else x.ndim - 1
    tiles = (
        {x.ndim - 1 if side == "lhs" else x.ndim - 2: config["tile_size"]} if "tile_size" in config else {}
    )
    how = qarray.HowToQuantize(
        qtype=config[f"{side}_qtype"],
        channelwise_axes=() if config.get(f"{side}_disable_channelwise_axes") else (axis,),
        tiled_axes=tiles,
        calibration_method=config.get(f"{side}_calibration_method", "absmax"),
    )
    q = qarray.quantize(x, how)
    spread = lambda v: np.asarray(qarray.broadcast_to(v, q.shape) if v.shape != q.shape else v, np.float64)
    zero = 0.0 if q.zero_point is None else spread(q.zero_point)
    values = np.asarray(qarray.numerics.convert_from(q.qvalue, q.qtype), np.float64)
    return (values - zero) * spread(q.scale)


CONFIGS = [W8A8, MINMAX, {"rhs_qtype": "int4"}, {"lhs_qtype": "int8", "rhs_qtype": "nf4"}]


def _large(cases):
    """Cases that are left to the long run."""
    return [pytest.param(*case, marks=pytest.mark.large) for case in cases]


BRIEF = [(name, MINMAX) for name in GEOMETRIES] + [
    ("groups", config) for config in CONFIGS if config != MINMAX
]
ALL = [(name, config) for name in GEOMETRIES for config in CONFIGS]


@pytest.mark.parametrize(
    ("name", "config"), BRIEF + _large(case for case in ALL if case not in BRIEF), ids=str
)
def test_float_backward(name, config):
    x, w, positional, geometry, rng = _case(name)
    op = lambda x, w: conv_general_qt(x, w, ConvGeneralQtConfig(**config), *positional)
    _check(op, x, w, config, geometry, rng, half=0.0)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize(
    "config",
    [pytest.param(W8A8 | SHARED, marks=pytest.mark.large), MINMAX | SHARED],
    ids=["absmax", "minmax"],
)
def test_quantized_backward(name, config):
    """One scale for all of g: it is off by half a step of its grid at most."""
    x, w, positional, geometry, rng = _case(name, 1)
    config = config | {"dlhs_grad_qtype": "int8", "drhs_grad_qtype": "int8"}
    op = lambda x, w: conv_general_qt(x, w, ConvGeneralQtConfig(**config), *positional)
    _check(op, x, w, config, geometry, rng, half=1 / 255)


def test_tiles_of_the_input_features():
    x, w, positional, geometry, rng = _case("plain", 2)
    config = W8A8 | {"tile_size": 2}
    op = lambda x, w: conv_general_qt(x, w, ConvGeneralQtConfig(**config), *positional)
    _check(op, x, w, config, geometry, rng, half=0.0)


def _check(op, x, w, config, geometry, rng, *, half: float) -> None:
    """`half`: half a step of g's grid over the greatest of its magnitudes."""
    shape = jax.eval_shape(op, x, w).shape
    g = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    _, pull = jax.vjp(op, x, w)
    exact = [_stored(x, config, "lhs"), _stored(w, config, "rhs")]
    wanted = _numeric(*exact, np.asarray(g, np.float64), **geometry)
    # Magnitudes, zero points counted apart from the values that they are taken off.
    sizes = [np.abs(v) + np.abs(v).max() * (config is not None and "minmax" in str(config)) for v in exact]
    rounding = _numeric(*sizes, np.abs(np.asarray(g, np.float64)), **geometry)
    steps = _numeric(*map(np.abs, exact), np.full(shape, half * float(jnp.abs(g).max())), **geometry)
    for got, want, size, step in zip(pull(g), wanted, rounding, steps, strict=True):
        bound = 1.001 * step + 200 * np.finfo(np.float32).eps * size + 1e-9
        np.testing.assert_array_less(np.abs(np.asarray(got, np.float64) - want), bound)


@pytest.mark.parametrize("name", ["plain", "groups", "batch_groups"])
def test_weight_only_gradients_of_the_direct_op(name):
    """`conv_general_dilated` of a float lhs and a QArray: the gradient of the lhs, and of a fused bias."""
    x, w, positional, geometry, rng = _case(name, 3)
    q = qwix.quantize(w, "int8", channelwise_axes=(3,))
    call = lambda x, b: conv_general.conv_general_dilated(x, q, *positional, fused={"bias": b})
    g = jnp.asarray(rng.standard_normal(jax.eval_shape(call, x, jnp.zeros(4)).shape), jnp.float32)
    _, pull = jax.vjp(call, x, jnp.zeros(g.shape[-1]))
    dx, db = pull(g)
    exact = np.asarray(q.dequantize(), np.float64)
    want = _numeric(np.asarray(x, np.float64), exact, np.asarray(g, np.float64), **geometry)[0]
    size = _numeric(
        np.abs(np.asarray(x, np.float64)), np.abs(exact), np.abs(np.asarray(g, np.float64)), **geometry
    )[0]
    np.testing.assert_array_less(np.abs(dx - want), 100 * np.finfo(np.float32).eps * size + 1e-9)
    np.testing.assert_allclose(db, np.asarray(g, np.float64).sum((0, 1, 2)), rtol=1e-5, atol=1e-5)
