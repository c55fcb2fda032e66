"""conv_general_qt: every geometry, forward and both gradients, exactly in integers and within bounds."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwix
from qwix._src.core import conv_general, numerics, qarray
from qwix._src.core.conv_general_qt import ConvGeneralQtConfig, conv_general_qt

W8A8 = {"lhs_qtype": "int8", "rhs_qtype": "int8"}
INT8 = W8A8 | {"dlhs_grad_qtype": "int8", "drhs_grad_qtype": "int8"}
NHWC = ("NHWC", "HWIO", "NHWC")
SAME = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC}


def _vjp(conv, x, w, g=None):
    @jax.jit
    def run(x, w, g):
        out, pull = jax.vjp(conv, x, w)
        return out, *pull(jnp.ones_like(out) if g is None else g)

    return run(x, w, g)


@st.composite
def convolutions(draw):
    """(shapes, options) of a small convolution of one or two spatial axes."""
    rank = draw(st.integers(1, 2))
    pick = lambda *values: draw(st.sampled_from(values))
    groups, kind = pick(1, 2), pick("feature", "batch")
    features, outputs, images = pick(2, 4), pick(2, 4), pick(2, 4)
    letters = "HW"[:rank]
    numbers = pick(
        ("N" + letters + "C", letters + "IO", "N" + letters + "C"),
        ("NC" + letters, "OI" + letters, "NC" + letters),
    )
    sizes = {c: draw(st.integers(4, 7)) for c in letters}
    kernel = {c: draw(st.integers(1, 3)) for c in letters}
    per_axis = lambda *values: tuple(pick(*values) for _ in letters)
    options = {
        "window_strides": per_axis(1, 2),
        "padding": [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in letters],
        "lhs_dilation": per_axis(1, 1, 2),
        "rhs_dilation": per_axis(1, 1, 2),
        "dimension_numbers": numbers,
        f"{kind}_group_count": groups,
    }
    inputs = features // groups if kind == "feature" else features
    lhs = tuple({"N": images, "C": features, **sizes}[c] for c in numbers[0])
    rhs = tuple({"I": inputs, "O": outputs, **kernel}[c] for c in numbers[1])
    return (lhs, rhs), options


@settings(max_examples=8)
@given(case=convolutions(), seed=st.integers(0, 9))
def test_integers_are_exact_in_any_geometry(case, seed, exact_training):
    (lhs, rhs), options = case
    operand, config = exact_training
    rng = np.random.default_rng(seed)
    numbers = jax.lax.conv_dimension_numbers(lhs, rhs, options["dimension_numbers"])
    how = functools.partial(conv_general.get_how_to_quantize, dimension_numbers=numbers, qtype="int8")
    x, w = operand(rng, lhs, how(for_lhs=True)), operand(rng, rhs, how(for_lhs=False))
    exact = lambda x, w: jax.lax.conv_general_dilated(x, w, **options, precision="highest")
    g = jnp.array(rng.integers(-3, 4, jax.eval_shape(exact, x, w).shape), jnp.float32)
    # All numbers are integers below 2^24: float32 sums of them are exact.
    expected = _vjp(exact, x, w, g)
    for ours, reference in zip(
        _vjp(lambda x, w: conv_general_qt(x, w, config, **options), x, w, g), expected, strict=True
    ):
        np.testing.assert_array_equal(ours, reference)


FORMATS = [
    W8A8,
    {"rhs_qtype": "int4"},
    {"lhs_qtype": "int8", "rhs_qtype": "nf4"},
    {"lhs_qtype": "int8", "rhs_qtype": "int5", "tile_size": 2},
    W8A8 | {"lhs_calibration_method": "minmax", "rhs_calibration_method": "minmax"},
    {"lhs_qtype": "float8_e4m3fn", "rhs_qtype": "float8_e4m3fn"},
]


@pytest.mark.parametrize("grad", [None, "int8"])
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_gradients_of_every_format(options, grad, normal):
    """Within the rounding of g: half a step of the grid of g s for each value, and float32's own."""
    groups = 1 if "tile_size" in options else 2
    x, w = normal(0, 2, 6, 5, 4) + 1, normal(1, 3, 2, 4 // groups, 6)
    config = ConvGeneralQtConfig(**options, dlhs_grad_qtype=grad, drhs_grad_qtype=grad)
    conv = lambda x, w, f=jax.lax.conv_general_dilated: f(x, w, **SAME, feature_group_count=groups)
    stored = []
    for value, side in ((x, "lhs"), (w, "rhs")):
        method = options.get(f"{side}_calibration_method", "absmax")
        axis = {"lhs": 0, "rhs": 3}[side]
        tiles = (
            {value.ndim - 1 if side == "lhs" else 2: options["tile_size"]} if "tile_size" in options else {}
        )
        q = f"{side}_qtype"
        how = q in options and qarray.HowToQuantize(
            qtype=options[q], channelwise_axes=(axis,), tiled_axes=tiles, calibration_method=method
        )
        stored.append(qarray.quantize(value, how) if how else value)
    dense = [v.dequantize() if isinstance(v, qwix.QArray) else v for v in stored]
    g = normal(2, 2, 6, 5, 6)
    out, dx, dw = _vjp(lambda x, w: conv(x, w, functools.partial(conv_general_qt, config=config)), x, w, g)
    exact = _vjp(conv, *dense, g)
    size = _vjp(conv, *map(jnp.abs, dense), jnp.abs(g))
    tiny = [200 * np.finfo(np.float32).eps * np.asarray(v) + 1e-6 for v in size]
    np.testing.assert_array_less(np.abs(out - exact[0]), tiny[0] + 1e-5)
    error_x = error_w = jnp.zeros_like(g)
    if grad:
        error_x, error_w = _steps(g, stored[1], 3, (1, 2, 3), 3), _steps(g, stored[0], 0, (0, 1, 2), 0)
    bound_x = _vjp(conv, *map(jnp.abs, dense), error_x)[1] + tiny[1]
    bound_w = _vjp(conv, *map(jnp.abs, dense), error_w)[2] + tiny[2]
    np.testing.assert_array_less(np.abs(dx - exact[1]), 1.01 * bound_x)
    np.testing.assert_array_less(np.abs(dw - exact[2]), 1.01 * bound_w)


def _by_hand(x, w, groups):
    """The convolution of `SAME` with batch groups: each run of images has output features of its own."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    (n, height, width, _), out = x.shape, w.shape[3] // groups
    pads = [(k - 1) // 2 for k in w.shape[:2]]
    x = np.pad(x, ((0, 0), *[(p, k - 1 - p) for p, k in zip(pads, w.shape[:2], strict=True)], (0, 0)))
    result = np.zeros((n // groups, height, width, groups * out))
    for i, images in enumerate(np.split(x, groups)):
        for (a, b), _ in np.ndenumerate(w[:, :, 0, 0]):
            kernel = w[a, b, :, i * out : (i + 1) * out]
            result[..., i * out : (i + 1) * out] += images[:, a : a + height, b : b + width] @ kernel
    return result


@pytest.mark.large
@pytest.mark.parametrize("grad", [None, "int8"])
def test_gradients_with_batch_groups_against_float64(grad, normal):
    """<dw, v> is <g, conv(x, v)> in any direction v, up to half a step of g in each term; the same for dx."""
    x, w, g = normal(11, 4, 5, 4, 3), normal(12, 3, 2, 3, 6), normal(13, 2, 5, 4, 6)
    u, v = normal(14, *x.shape), normal(15, *w.shape)
    shared = {f"{side}_disable_channelwise_axes": True for side in ("lhs", "rhs")}
    config = ConvGeneralQtConfig(**W8A8, **shared, dlhs_grad_qtype=grad, drhs_grad_qtype=grad)
    stored = [qarray.quantize(y, qarray.HowToQuantize(qtype="int8")).dequantize() for y in (x, w)]
    _, dx, dw = _vjp(lambda x, w: conv_general_qt(x, w, config, **SAME, batch_group_count=2), x, w, g)
    half = float(jnp.abs(g).max()) / 255 if grad else 0
    for got, direction, change in (
        (dx, u, _by_hand(u, stored[1], 2)),
        (dw, v, _by_hand(stored[0], v, 2)),
    ):
        exact = (np.asarray(g, np.float64) * change).sum()
        bound = 1.01 * half * np.abs(change).sum() + 1e-5 * np.abs(np.asarray(g) * change).sum()
        assert abs((np.asarray(got, np.float64) * np.asarray(direction)).sum() - exact) <= bound


def _steps(g, other, axis, over, place):
    """Half a step of g's grid, in g's own units, given the operand whose scales along `axis` move into it."""
    scale = jnp.ones((1,) * g.ndim)
    if isinstance(other, qwix.QArray) and other.scale.size == other.scale.shape[axis]:
        scale = other.scale.reshape([-1 if a == place else 1 for a in range(g.ndim)])
    half = jnp.abs(g * scale).max(over, keepdims=True) / numerics.get_symmetric_bound("int8") / 2
    return jnp.broadcast_to(half / scale, g.shape)


def test_only_quantized_operands_are_kept(normal):
    x, w = normal(3, 4, 8, 8, 4), normal(4, 3, 3, 4, 8)

    def kept(**options):
        config = ConvGeneralQtConfig(**options)
        pull = jax.eval_shape(
            lambda x, w: jax.vjp(lambda x, w: conv_general_qt(x, w, config, **SAME), x, w)[1], x, w
        )
        return sorted((v.dtype.name, v.size) for v in jax.tree.leaves(pull) if v.size > 8)

    assert kept(**INT8) == [("int8", w.size), ("int8", x.size)]
    assert kept(**INT8, use_original_residuals=True) == [("float32", w.size), ("float32", x.size)]


def test_integers_reach_all_three_convolutions(normal):
    x, w = normal(5, 2, 8, 8, 4), normal(6, 3, 3, 4, 8)
    step = jax.value_and_grad(
        lambda x, w: conv_general_qt(x, w, ConvGeneralQtConfig(**INT8), **SAME).sum(), (0, 1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no kernel for this platform
        text = jax.jit(step).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == 3 and all("xi8>" in line and "xi32>" in line for line in convolutions)


def test_dtypes_strings_and_clipping(normal):
    x, w = normal(7, 2, 8, 8, 4, dtype=jnp.bfloat16), normal(8, 3, 3, 4, 8)
    config = ConvGeneralQtConfig(**INT8)
    out, dx, dw = _vjp(
        lambda x, w: conv_general_qt(x, w, config, **SAME, preferred_element_type=jnp.bfloat16), x, w
    )
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    with pytest.raises(ValueError, match="give the pads"):
        conv_general_qt(x, w, config, **SAME, lhs_dilation=(2, 1))
    clipped = config.replace(lhs_calibration_method="fixed,1")
    dx = _vjp(lambda x, w: conv_general_qt(x, w, clipped, **SAME), x, w)[1]
    np.testing.assert_array_equal(np.asarray(dx == 0), np.abs(np.asarray(x, np.float32)) > 1)


def test_statistics_under_jit_of_grad(normal):
    """The hook runs in the trace that owns the statistics, not inside of the custom derivative."""
    x, w = normal(9, 2, 8, 8, 4), normal(10, 3, 3, 4, 8)

    def loss(w):
        seen = []
        collect = lambda stat: seen.append(stat["absmax"]) or stat
        config = ConvGeneralQtConfig(**W8A8, lhs_collect_quant_stat=collect)
        return conv_general_qt(x, w, config, **SAME).sum(), seen[0]

    _, stat = jax.jit(jax.grad(loss, has_aux=True))(w)
    np.testing.assert_array_equal(stat[:, 0, 0, 0], jnp.abs(x).max((1, 2, 3)))
