"""quantize and dequantize: accuracy anchors, scales, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwix
from qwix._src.core import calibration, numerics, qarray, stochastic_rounding

HowToQuantize = calibration.HowToQuantize


def _relative_error(x, q):
    x, y = np.asarray(x, np.float64), np.asarray(q.dequantize(), np.float64)
    return np.abs(x - y).mean() / np.abs(x).mean()


@pytest.mark.parametrize(
    "qtype, options, shift, anchor",
    [
        ("int8", {"channelwise_axes": (0,)}, 0, 0.00766),
        ("int4", {"channelwise_axes": (0,)}, 0, 0.1226),
        ("int8", {"calibration_method": "minmax"}, 1, 0.00522),
        ("nf4", {"tiled_axes": {1: 32}}, 0, 0.0987),
        ("int8", {"calibration_method": "rms,7", "tiled_axes": {1: 1 / 8}}, 0, 0.01734),
        ("int8", {"calibration_method": "fixed,3"}, 0, 0.00766),
        ("mxfp8", {"channelwise_axes": (0,), "tiled_axes": {1: 32}}, 0, 0.02234),
        ("mxfp4", {"channelwise_axes": (0,), "tiled_axes": {1: 32}}, 0, 0.10645),
        ("nvfp4", {"channelwise_axes": (0,), "tiled_axes": {1: 16}}, 0, 0.08936),
    ],
)
def test_mean_error_is_at_most_the_anchor(qtype, options, shift, anchor):
    """Anchors: the mean relative error of bfloat16 normal values when the arithmetic is bfloat16 too."""
    with jax.threefry_partitionable(False):
        x = jax.random.normal(jax.random.key(42), (10, 256), jnp.bfloat16) + shift
    error = _relative_error(x, qwix.quantize(x, qtype, **options))
    assert 0.8 * anchor < error < 1.02 * anchor


def test_minmax_of_a_byte_ramp_is_exact():
    x = jnp.arange(256) / 255
    q = qwix.quantize(x, "int8", calibration_method="minmax")
    assert q.zero_point.tolist() == [-128]
    np.testing.assert_array_equal(q.dequantize(), x)


@pytest.mark.parametrize(
    "qtype, dtype",
    [(q, jnp.float32) for q in numerics.QTYPE_NAMES if q != "float8_e8m0fnu"]
    + [(q, d) for q in ("int8", "nf4", "float8_e4m3fn", "nvfp4") for d in (jnp.bfloat16, jnp.float16)],
)
def test_error_is_within_half_a_step_of_the_grid(qtype, dtype, normal):
    x = normal(0, 6, 64, dtype=dtype)
    x = jnp.abs(x) if qtype.startswith("uint") else x
    tile = {"mxfp8_16": 16, "nvfp4": 16}.get(qtype, 32)
    q = qwix.quantize(x, qtype, channelwise_axes=(0,), tiled_axes={1: tile})
    assert q.qvalue.dtype == numerics.storage_dtype(qtype) and q.scale.shape == (6, 64 // tile)
    assert q.dtype == dtype
    scale = np.repeat(np.asarray(q.scale, np.float64), tile, axis=1)
    values = np.abs(np.asarray(x, np.float64))
    if qtype == "nf4":
        step = 0.31 * scale
    elif qtype == "int1" or qtype == "int16":
        step = 2 * scale
    elif jnp.issubdtype(q.qvalue.dtype, jnp.integer):
        step = 1.0 * scale
    else:  # eps of the format at the value; its smallest step below the normal range
        info = jnp.finfo(q.qvalue.dtype)
        step = np.maximum(float(info.eps) * values, float(info.smallest_subnormal) * scale)
    bound = step / 2 + float(jnp.finfo(dtype).eps) * values
    if qtype in numerics.BLOCK_FORMATS:  # their scales round down, so the largest values saturate
        largest = numerics.get_symmetric_bound(qtype) * scale
        bound = np.maximum(bound, values - largest)
    assert (np.abs(np.asarray(q.dequantize(), np.float64) - np.asarray(x, np.float64)) <= bound).all()


def test_small_float16_values_keep_their_precision(normal):
    """A guard that fits float32 must not flatten float16: the error stays that of the grid."""
    for factor in (1.0, 0.05, 0.01, 2**-9):
        x = (normal(1, 8, 64) * factor).astype(jnp.float16)
        for method in ("absmax", "minmax"):
            q = qwix.quantize(x, "int8", channelwise_axes=(0,), calibration_method=method)
            assert jnp.isfinite(1 / q.scale).all()
            assert _relative_error(x, q) < 0.012, (factor, method)


def test_zero_blocks_have_scale_one_and_stay_zero():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x = jnp.zeros((2, 8), dtype).at[1, 0].set(3)
        q = qwix.quantize(x, "int8", channelwise_axes=(0,))
        assert q.scale[0, 0] == 1
        np.testing.assert_array_equal(q.dequantize()[0], 0)
        for qtype, tile in (("nvfp4", 16), ("mxfp8", 32)):
            z = qwix.quantize(jnp.zeros(32, dtype), qtype, tiled_axes={0: tile})
            np.testing.assert_array_equal(z.dequantize(), 0)


def test_tiny_and_huge_values_stay_finite():
    for value in (1e-30, 1e-18, 1e30, 3e38):
        for qtype in ("int8", "float8_e4m3fn", "nf4"):
            q = qwix.quantize(jnp.full(4, value), qtype)
            assert jnp.isfinite(q.dequantize()).all() and jnp.isfinite(1 / q.scale).all()
    block = qwix.quantize(jnp.full(16, 1e-6), "nvfp4", tiled_axes={0: 16})
    assert jnp.isfinite(block.dequantize()).all()


def test_int1_has_two_levels_of_the_range():
    q = qwix.quantize(jnp.array([-2.0, -0.1, 0.1, 2.0]), "int1")
    np.testing.assert_array_equal(q.dequantize(), [-2, -2, 2, 2])


def test_negative_axes_are_axes_from_the_back(normal):
    x = normal(2, 8, 64)
    a = qwix.quantize(x, "int8", channelwise_axes=(-2,), tiled_axes={-1: 16})
    b = qwix.quantize(x, "int8", channelwise_axes=(0,), tiled_axes={1: 16})
    assert a.scale.shape == (8, 4)
    for m, n in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(m, n)


def test_two_dimensional_tiles(normal):
    q = qwix.quantize(normal(3, 128, 128), "int8", tiled_axes={0: 8, 1: 8})
    assert q.scale.shape == (16, 16) and qarray.get_tiled_axes(q) == {0: 8, 1: 8}


def test_one_treedef_for_every_spelling_of_a_qtype():
    x = jnp.ones(4)
    trees = [jax.tree.structure(qwix.quantize(x, q)) for q in ("int8", jnp.int8, np.dtype("int8"))]
    assert trees[0] == trees[1] == trees[2]
    hows = {HowToQuantize(qtype=q, tiled_axes={0: 2}) for q in ("int8", jnp.int8)}
    assert len(hows) == 1


def test_jit_gives_the_eager_values(normal):
    x = normal(4, 16, 64, dtype=jnp.bfloat16)
    how = HowToQuantize(qtype="int4", channelwise_axes=(0,), tiled_axes={1: 32})
    a, b = qarray.quantize(x, how), jax.jit(qarray.quantize, static_argnums=1)(x, how)
    np.testing.assert_array_equal(a.dequantize(), b.dequantize())


def test_quantize_under_vmap_and_eval_shape(normal):
    x = normal(5, 3, 8, 16)
    how = HowToQuantize(qtype="nf4", tiled_axes={1: 8})
    together = jax.vmap(lambda v: qarray.quantize(v, how))(x)
    alone = [qarray.quantize(v, how) for v in x]
    np.testing.assert_array_equal(together.scale, jnp.stack([q.scale for q in alone]))
    shapes = jax.eval_shape(lambda v: qwix.quantize(v, "int4", tiled_axes={0: 4}), x[0])
    assert shapes.qvalue.dtype == jnp.int4 and shapes.scale.shape == (2, 1)


def test_scale_dtype_is_what_it_dequantizes_to():
    q = qwix.quantize(jnp.ones((4, 4)), "int8", scale_dtype=jnp.bfloat16)
    assert q.dtype == jnp.bfloat16 and q.dequantize().dtype == jnp.bfloat16


@settings(max_examples=6)
@given(st.sampled_from([(0,), (3, 0), (0, 4)]), st.sampled_from(["absmax", "minmax", "rms,3"]))
def test_empty_arrays_have_empty_results(shape, method):
    q = qwix.quantize(jnp.zeros(shape), "int8", channelwise_axes=(0,), calibration_method=method)
    assert q.shape == shape and q.dequantize().shape == shape
    assert not jnp.isnan(q.scale).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(bad):
    x = np.ones((3, 4), np.float32)
    x[1, 2] = x[2, 0] = bad
    with pytest.raises(ValueError, match=r"2 values that aren't finite, the first at \(1, 2\)"):
        qwix.quantize(x, "int8")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("method", ["absmax", "minmax", "rms,3"])
def test_nan_propagates_through_its_scale_in_a_trace(normal, method, dtype):
    """In whole registers as well, where XLA:CPU computes maxima that lose it."""
    for axis, at in ((0, (3, 5)), (1, (5, 3))):
        x = normal(5, 64, 64, dtype=dtype).at[at].set(jnp.nan)
        how = {"channelwise_axes": (axis,), "calibration_method": method}
        y = jax.jit(lambda x, how=how: qwix.quantize(x, "int8", **how).dequantize())(x)
        lost = jnp.isnan(y).all(axis=1 - axis)
        assert lost[3] and lost.sum() == 1 and jnp.isnan(y).sum() == 64


@pytest.mark.parametrize("array", [jnp.ones(4, jnp.int32), np.ones(4, bool), jnp.ones(4, jnp.int8)])
def test_arrays_that_are_not_float_are_refused(array):
    with pytest.raises(ValueError, match="Refuse to quantize"):
        qwix.quantize(array, "int8")


def test_a_tile_that_does_not_divide_names_those_that_do():
    with pytest.raises(ValueError, match=r"cannot be tiled.*axis 0 of size 12.*: 1, 2, 3, 4, 6, 12\."):
        qwix.quantize(jnp.ones((12, 5)), "int8", tiled_axes={0: 8})
    with pytest.raises(ValueError, match="cannot be tiled"):
        qwix.quantize(jnp.ones((12, 5)), "int8", tiled_axes={0: 0})


def test_an_axis_cannot_be_both_channelwise_and_tiled():
    with pytest.raises(ValueError, match="cannot be both channelwise and tiled"):
        qwix.quantize(jnp.ones((12, 5)), "int8", channelwise_axes=(0,), tiled_axes={-2: 4})
    with pytest.raises(ValueError, match="Axis 2 is out of range"):
        qwix.quantize(jnp.ones((12, 5)), "int8", channelwise_axes=(2,))


@pytest.mark.parametrize(
    "method, message",
    [
        ("median", "Unsupported calibration.*percentile, mse"),
        ("percentile", "A percentage is required"),
        ("percentile,101", "A percentage is required"),
        ("mse,0", "lowest fraction"),
        ("mse,0.5,1", "at most one number"),
        ("rms", "A scale factor is required"),
        ("fixed", "A fixed range is required"),
        ("fixed,1,2", "must contain 0"),
        ("absmax,x", "Unsupported calibration"),
    ],
)
def test_calibration_methods_are_checked(method, message):
    with pytest.raises(ValueError, match=message):
        qwix.quantize(jnp.ones(4), "int8", calibration_method=method)


def test_block_formats_need_their_tile():
    with pytest.raises(ValueError, match="requires `tiled_axes`"):
        HowToQuantize(qtype="mxfp8")
    with pytest.raises(ValueError, match="tile size of 16, but axis 0 got 32"):
        HowToQuantize(qtype="nvfp4", tiled_axes={0: 32})


@pytest.mark.parametrize(
    "qtype, absmax", [("mxfp4", (6.5, 7.5)), ("mxfp8", (460, 465)), ("mxfp8_16", (460, 465))]
)
def test_mx_scales_are_powers_of_two(qtype, absmax):
    scale, _ = calibration.compute_scale_zero_point({"absmax": jnp.array(absmax, jnp.float32)}, qtype)
    np.testing.assert_array_equal(scale, [1, 2])


def test_gradient_is_clipped_outside_of_the_calibrated_range():
    x, g = jnp.array([-3.0, -1.0, 0.5, 1.0, 2.0]), jnp.ones(5)
    how = HowToQuantize(qtype="int8", calibration_method="fixed,1")
    cal = calibration.calibrate(x, how)
    clip = lambda method: calibration.clip_gradient_to_calibration(g, x, cal, method)
    np.testing.assert_array_equal(clip("fixed,1"), [0, 1, 1, 1, 0])
    assert clip("absmax") is g
    np.testing.assert_array_equal(calibration.clip_to_calibration(x, cal, {}), [-1, -1, 0.5, 1, 1])


def test_stochastic_rounding_is_unbiased(normal):
    x = normal(6, 4, 4096)
    noise = stochastic_rounding.get_noise_fn("low_bit_uniform", jax.random.key(0), (0, 1))
    how = HowToQuantize(qtype="int3", noise_fn=noise, calibration_method="fixed,4")
    error = qarray.quantize(x, how).dequantize() - x
    step = 4 / 3.5  # uniform noise: the error's variance is at most step^2 / 4
    assert abs(float(error.mean())) < 4 * step / 2 / np.sqrt(x.size)


def test_only_a_qarray_is_dequantized():
    with pytest.raises(TypeError, match="dequantize takes a QArray"):
        qwix.dequantize(jnp.ones((2, 2)))


@pytest.mark.parametrize("axes, tiles", [((1,), {}), ((), {1: 32}), ((), {})])
def test_a_percentile_is_numpys(axes, tiles, normal):
    x = normal(3, 8, 64)
    how = calibration.HowToQuantize(
        qtype="int8", channelwise_axes=axes, tiled_axes=tiles, calibration_method="percentile,90"
    )
    split, over = (x.reshape(8, 2, 32), (0, 2)) if tiles else (x, (0,) if axes else (0, 1))
    expected = np.percentile(np.abs(split), 90, axis=over)
    out = calibration.calibrate(x, how)["absmax"]
    assert out.shape == calibration.get_scale_shape(x.shape, how)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, rtol=1e-6)
    top = dataclasses.replace(how, calibration_method="percentile,100")
    plain = dataclasses.replace(how, calibration_method="absmax")
    np.testing.assert_array_equal(
        calibration.calibrate(x, top)["absmax"], calibration.calibrate(x, plain)["absmax"]
    )
    empty = calibration.calibrate(x[:0], dataclasses.replace(how, channelwise_axes=(), tiled_axes={}))
    np.testing.assert_array_equal(empty["absmax"], [[0.0]])


@pytest.mark.parametrize("qtype", ["int2", "int4", "int8", "nf4", "float8_e4m3fn"])
def test_mse_finds_the_best_of_its_fractions(qtype, normal):
    """No fraction of absmax on the grid gives a smaller error for any channel; few bits clip the outlier."""
    x = normal(4, 256, 4).at[0, 0].set(8.0)
    q = qwix.quantize(x, qtype, channelwise_axes=(1,), calibration_method="mse,0.1")
    error = lambda scale: ((np.asarray(q_of(scale).dequantize(), np.float64) - np.asarray(x)) ** 2).sum(0)
    q_of = lambda scale: qarray.quantize_with_scale_zero_point(x, qtype, scale, None)
    absmax = jnp.abs(x).max(0, keepdims=True)
    scales = [
        calibration.compute_scale_zero_point({"absmax": absmax * np.float32(1 - 0.02 * i)}, qtype)[0]
        for i in range(46)
    ]
    best = np.min([error(s) for s in scales], axis=0)
    assert (error(q.scale) <= best * (1 + 1e-5)).all()
    if qtype == "int4":
        assert float(q.scale[0, 0]) < float(scales[0][0, 0])


def test_mse_and_percentile_propagate_nan(normal):
    x = normal(5, 4, 4).at[0, 0].set(jnp.nan)
    for method in ("mse", "percentile,99"):
        how = calibration.HowToQuantize(qtype="int4", channelwise_axes=(1,), calibration_method=method)
        assert np.isnan(calibration.calibrate(x, how)["absmax"]).tolist() == [[True, False, False, False]]
