"""ragged_dot_qt: forward and both gradients, exactly in integers and against the float op."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import RaggedDotDimensionNumbers

import qwix
from qwix._src.core import qarray, stochastic_rounding
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.ragged_dot_qt import RaggedDotQtConfig, ragged_dot_general_qt, ragged_dot_qt

W8A8 = {"lhs_qtype": "int8", "rhs_qtype": "int8"}
INT8 = W8A8 | {"dlhs_grad_qtype": "int8", "drhs_grad_qtype": "int8"}
SIZES = [3, 0, 5, 2]


def _vjp(config, x, w, g, sizes=SIZES, offset=None, f=ragged_dot_qt):
    @jax.jit
    def run(x, w, g, sizes):
        dot = lambda x, w: f(x, w, sizes, config, group_offset=offset)
        out, pull = jax.vjp(dot, x, w)
        return out, *pull(g)

    return run(x, w, g, jnp.array(sizes))


def _float(x, w, sizes, config, group_offset):
    return jax.lax.ragged_dot(x, w, sizes)


@pytest.fixture(scope="module")
def case(normal):
    """Twelve rows, of which the last two are in no group."""
    return normal(0, 12, 32), normal(1, 4, 32, 8), normal(2, 12, 8)


@pytest.mark.parametrize("sizes", [SIZES, [12, 0, 0, 0], [0, 0, 0, 0], [0, 4, 4, 4]], ids=str)
def test_integers_are_exact(sizes, exact_training):
    operand, config = exact_training
    rng = np.random.default_rng(0)
    x = operand(rng, (12, 16), HowToQuantize(qtype="int8", channelwise_axes=(0,)))
    w = operand(rng, (4, 16, 8), HowToQuantize(qtype="int8", channelwise_axes=(0, 2)))
    g = jnp.array(rng.integers(-3, 4, (12, 8)), jnp.float32)
    expected = _vjp(None, x, w, g, sizes, f=_float)  # integers below 2^24
    for ours, reference in zip(_vjp(config, x, w, g, sizes), expected, strict=True):
        np.testing.assert_array_equal(ours, reference)


LARGE = pytest.mark.large


@pytest.mark.parametrize(
    "grad", [pytest.param(None, marks=LARGE), "int8", pytest.param("float8_e5m2", marks=LARGE)]
)
@pytest.mark.parametrize(
    "options",
    [
        {"rhs_qtype": "int8"},
        {"rhs_qtype": "nf4", "tile_size": 8},
        W8A8 | {"tile_size": 16},
        pytest.param(
            W8A8 | {"lhs_disable_channelwise_axes": True, "rhs_disable_channelwise_axes": True},
            marks=pytest.mark.large,
        ),
        pytest.param(
            W8A8 | {"lhs_calibration_method": "minmax", "rhs_calibration_method": "minmax"},
            marks=pytest.mark.large,
        ),
        W8A8 | {"lhs_calibration_method": "rms,6", "disable_gradient_clipping": True},
    ],
    ids=str,
)
def test_gradients_are_those_of_the_represented_values(options, grad, case):
    x, w, g = case
    config = RaggedDotQtConfig(**options, dlhs_grad_qtype=grad, drhs_grad_qtype=grad)
    stored = []
    for value, side, channelwise in ((x.at[10:].set(0), "lhs", (0,)), (w, "rhs", (0, 2))):
        if f"{side}_qtype" not in options:
            stored.append(value)
            continue
        how = HowToQuantize(
            qtype=options[f"{side}_qtype"],
            channelwise_axes=() if f"{side}_disable_channelwise_axes" in options else channelwise,
            tiled_axes={1: options["tile_size"]} if "tile_size" in options else {},
            calibration_method=options.get(f"{side}_calibration_method", "absmax"),
        )
        stored.append(qarray.quantize(value, how).dequantize())
    exact = _vjp(None, *stored, g, f=_float)
    sizes = _vjp(None, *map(jnp.abs, stored), jnp.abs(g), f=_float)
    result = _vjp(config, x, w, g)
    assert all(np.isfinite(np.asarray(v)).all() for v in result)
    bounds = [1e-5 * np.asarray(v) + 1e-5 for v in sizes]
    if grad:  # each value of g is off by at most an eighth of it (e5m2), or half a step of its row's grid
        spread = [jnp.abs(v) for v in stored]
        relative = {"float8_e5m2": 1 / 8, "int8": 0}[grad]
        ratio = float(np.abs(w).max() / np.abs(w).max(1).min()) if "rhs_qtype" in options else 1.0
        step = 0 if relative else float(jnp.abs(g).max()) / 255 * max(ratio, 4)
        off = _vjp(None, *spread, relative * jnp.abs(g) + step + 1e-4, f=_float)
        bounds = [bounds[0], *(b + np.asarray(o) for b, o in zip(bounds[1:], off[1:], strict=True))]
    for ours, reference, bound in zip(result, exact, bounds, strict=True):
        assert (np.abs(ours - reference) <= bound).all()
    assert not np.asarray(result[1][10:]).any() and not np.asarray(result[2][1]).any()


def test_rows_of_no_group_do_not_count(case):
    """Neither in the result, nor in ranges that rows share, nor in gradients."""
    x, w, g = case
    config = RaggedDotQtConfig(**INT8, lhs_disable_channelwise_axes=True)
    clean = _vjp(config, x.at[10:].set(0), w, g.at[10:].set(0))
    dirty = _vjp(config, x.at[10:].set(1e6), w, g.at[10:].set(1e6))
    for ours, reference in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(ours, reference)


def test_groups_that_live_elsewhere(case):
    x, w, g = case
    whole = _vjp(RaggedDotQtConfig(**W8A8), x, w, g)
    parts = [_vjp(RaggedDotQtConfig(**W8A8), x, w[i : i + 2], g, offset=jnp.array([i])) for i in (0, 2)]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    close(parts[0][0] + parts[1][0], whole[0])
    close(parts[0][1] + parts[1][1], whole[1])
    close(jnp.concatenate([parts[0][2], parts[1][2]]), whole[2])


@pytest.mark.large
def test_every_field_matters(case):
    x, w, g = case
    noise = stochastic_rounding.get_noise_fn("uniform", jax.random.key(0), (0, 1))
    base = _vjp(RaggedDotQtConfig(**INT8), x, w, g)
    for changed, options in [
        ((0, 1, 2), {"tile_size": 8}),
        ((0, 2), {"lhs_calibration_method": "absmax,0.7"}),
        ((0, 1), {"rhs_calibration_method": "fixed,3"}),
        ((0, 2), {"lhs_collect_quant_stat": lambda stat: {"absmax": jnp.full((1, 1), 5.0)}}),
        ((0, 1), {"rhs_disable_channelwise_axes": True}),
        ((1,), {"dlhs_stochastic_rounding_noise_fn": noise}),
        ((2,), {"drhs_stochastic_rounding_noise_fn": noise}),
        ((1,), {"dlhs_tile_size": 4}),
        ((2,), {"drhs_grad_disable_channelwise_axes": True}),
        ((1, 2), {"use_original_residuals": True}),
    ]:
        result = _vjp(RaggedDotQtConfig(**INT8 | options), x, w, g)
        for i in changed:
            assert (np.asarray(result[i]) != np.asarray(base[i])).any(), (options, i)


def test_wrong_fields_are_refused():
    with pytest.raises(ValueError, match="Unsupported calibration"):
        RaggedDotQtConfig(lhs_calibration_method="bogus")


def test_other_axes_are_trained_as_the_basic_ones(case):
    """lhs [K, M, 2] and rhs [K, N, G]: what is before the ragged axis is contracted, the groups come last."""
    x, w, g = case
    numbers = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (1,), (2,))
    config = RaggedDotQtConfig(**INT8)

    def other(x, w, sizes, config, group_offset):
        turned = jnp.stack([x, x], 1).transpose(2, 0, 1), w.transpose(1, 2, 0)
        out = ragged_dot_general_qt(*turned, sizes, numbers, config, group_offset=group_offset)
        return out[:, 0] + out[:, 1]

    ours, basic = _vjp(config, x, w, g, f=other), _vjp(config, x, w, g)
    np.testing.assert_allclose(ours[0], 2 * basic[0], rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(ours[1:], basic[1:], strict=True):
        np.testing.assert_allclose(mine, 2 * theirs, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="ragged contracting axis"):
        ragged_dot_general_qt(x, g, jnp.array(SIZES), _CONTRACTING, config)


_CONTRACTING = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def test_only_quantized_operands_are_kept(case):
    x, w, _ = case
    dot = lambda x, w: ragged_dot_qt(x, w, jnp.array(SIZES), RaggedDotQtConfig(**INT8))
    leaves = jax.tree.leaves(jax.eval_shape(lambda x, w: jax.vjp(dot, x, w)[1], x, w))
    assert sorted(v.dtype.name for v in leaves if v.size > 100) == ["int8", "int8"]


def test_weights_that_are_quantized_already(case):
    x, w, g = case
    stored = qwix.quantize(w, "int4", channelwise_axes=(0, 2))
    dot = lambda x: ragged_dot_qt(x, stored, jnp.array(SIZES), RaggedDotQtConfig(lhs_qtype="int8"))
    out, pull = jax.vjp(dot, x)
    exact = jax.lax.ragged_dot(g, stored.dequantize().mT, jnp.array(SIZES))
    np.testing.assert_allclose(pull(g)[0], exact, rtol=1e-4, atol=1e-5)
    assert out.shape == (12, 8)
