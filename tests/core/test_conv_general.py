"""conv_general_dilated of quantized operands against the float convolution of what they represent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwix
from qwix import ops
from qwix._src.core import conv_general

NHWC = ("NHWC", "HWIO", "NHWC")


def _conv(x, w, f=qwix.conv_general_dilated, **options):
    return f(x, w, (1, 2), "SAME", dimension_numbers=NHWC, **options)


@pytest.mark.parametrize("lhs", [None, "int8", "nf4", "minmax"])
@pytest.mark.parametrize("rhs", ["int8", "int4", "nf4", "minmax"])
def test_any_pair_of_formats(lhs, rhs, normal):
    make = lambda x, q, axis: (
        x if q is None
        else qwix.quantize(x, "int8", channelwise_axes=(axis,), calibration_method="minmax") if q == "minmax"
        else qwix.quantize(x, q, channelwise_axes=(axis,))
    )  # fmt: skip
    x, w = make(normal(0, 2, 6, 6, 4) + 1, lhs, 0), make(normal(1, 3, 3, 4, 5), rhs, 3)
    values = [jnp.asarray(v.dequantize() if isinstance(v, qwix.QArray) else v) for v in (x, w)]
    exact = _conv(*values, f=jax.lax.conv_general_dilated, precision="highest")
    size = _conv(*map(jnp.abs, values), f=jax.lax.conv_general_dilated)
    assert (np.abs(_conv(x, w) - exact) <= 60 * np.finfo(np.float32).eps * size + 1e-6).all()


def test_integers_are_convolved_as_integers(normal):
    x, w = qwix.quantize(normal(2, 2, 6, 6, 4), "int8"), qwix.quantize(normal(3, 3, 3, 4, 5), "int4")
    run = jax.jit(functools.partial(_conv, implementation="xla"))
    hlo = run.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "xi8>, tensor<3x3x4x5xi8>) -> tensor<2x6x3x5xi32>" in hlo
    raw = _conv(x.qvalue, w.qvalue.astype(jnp.int8))
    assert raw.dtype == jnp.int32
    np.testing.assert_allclose(_conv(x, w), raw * float(x.scale.max()) * float(w.scale.max()), rtol=1e-6)


def test_groups_and_how_to_quantize(normal):
    x, w = normal(4, 2, 5, 5, 4), normal(5, 3, 3, 1, 8)
    numbers = jax.lax.conv_dimension_numbers(x.shape, w.shape, NHWC)
    how = lambda lhs: conv_general.get_how_to_quantize(dimension_numbers=numbers, for_lhs=lhs, qtype="int8")
    q = [conv_general.qarray.quantize(v, how(side)) for v, side in ((x, True), (w, False))]
    assert q[0].scale.shape == (2, 1, 1, 1) and q[1].scale.shape == (1, 1, 1, 8)
    out = _conv(*q, feature_group_count=4)
    exact = _conv(*(v.dequantize() for v in q), f=jax.lax.conv_general_dilated, feature_group_count=4)
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


LAYOUTS = [
    (("NCHW", "OIHW", "NCHW"), (2, 4, 6, 5), (6, 4, 3, 2), (1, 1)),
    (("HWNC", "OHWI", "CHWN"), (6, 5, 2, 4), (6, 3, 2, 2), (2, 1)),
    (("NHWC", "HWIO", "NHWC"), (4, 6, 5, 2), (3, 2, 2, 6), (1, 2)),
    (("NCDHW", "OIDHW", "NCDHW"), (2, 2, 3, 4, 3), (4, 1, 2, 2, 1), (2, 1)),
    (("NWC", "WIO", "NWC"), (4, 7, 3), (3, 3, 4), (1, 2)),
]


@pytest.mark.parametrize(("numbers", "lhs", "rhs", "groups"), LAYOUTS, ids=lambda x: str(x[0]))
def test_layouts_groups_and_zero_points(numbers, lhs, rhs, groups, normal):
    """Scales of images, outputs and runs of input features, zero points on both sides."""
    spec = jax.lax.conv_dimension_numbers(lhs, rhs, numbers)
    tile = {spec.rhs_spec[1]: 1}
    x = qwix.quantize(
        normal(6, *lhs) + 1, "int8", channelwise_axes=spec.lhs_spec[:1], calibration_method="minmax"
    )
    w = qwix.quantize(
        normal(7, *rhs),
        "int8",
        channelwise_axes=spec.rhs_spec[:1],
        tiled_axes=tile,
        calibration_method="minmax",
    )
    rank = len(lhs) - 2
    geometry = ([1, 2, 1][:rank], [(1, 1), (0, 2), (1, 0)][:rank], None, [2, 1, 1][:rank], numbers, *groups)
    out = qwix.conv_general_dilated(x, w, *geometry)
    values = [v.dequantize() for v in (x, w)]
    exact = jax.lax.conv_general_dilated(*values, *geometry, precision="highest")
    size = jax.lax.conv_general_dilated(*[jnp.abs(v) + 3 for v in values], *geometry)
    assert out.shape == exact.shape
    assert (np.abs(out - exact) <= 100 * np.finfo(np.float32).eps * size).all()


def test_the_direct_op_in_another_layout(normal):
    """Quantized on the way, fused and quantized again: the same numbers as in the canonical layout."""
    x, w = normal(8, 2, 6, 5, 4), qwix.quantize(normal(9, 3, 3, 4, 6), "int8", channelwise_axes=(3,))
    fused = {"bias": normal(10, 6), "activation": "silu", "out_qtype": "int8"}
    here = ops.qconv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC, act_qtype="int8", **fused)
    there = ops.qconv_general_dilated(
        x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1), (1, 1), "SAME", act_qtype="int8", **fused
    )
    assert here.scale.shape == there.scale.shape == (2, 1, 1, 1)
    np.testing.assert_array_equal(here.qvalue, there.qvalue.transpose(0, 2, 3, 1))
    tiled = ops.qconv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=NHWC, act_qtype="int8", act_tile_size=2
    )
    assert tiled.shape == (2, 6, 5, 6)


def test_explain():
    shape = jax.ShapeDtypeStruct
    w = qwix.QArray(shape((3, 3, 256, 256), jnp.int8), shape((1, 1, 1, 256), jnp.bfloat16))
    geometry = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC}
    ask = lambda **options: ops.explain(
        "conv_general_dilated", ((8, 56, 56, 256), "bfloat16"), w, act_qtype="int8", chip="v6e", **options
    )
    plan = ask(geometry=geometry, bias=shape((256,), jnp.float32), activation="relu6")
    assert plan.chosen == "mosaic_tpu" and plan.problem.fused == "bias relu6" and "copies" in str(plan)
    with pytest.raises(ValueError, match="needs geometry"):
        ask()
    with pytest.raises(ValueError, match="No quantized kernel"):
        floats = ((1, 4, 4, 2), "float32"), ((3, 3, 2, 2), "float32")
        ops.explain("conv_general_dilated", *floats, chip="v6e", geometry=geometry)


BAD = [
    ({"batch_group_count": 3}, r"batch_group_count=3 must divide the 2 images of lhs and the 5 output"),
    ({"batch_group_count": 2, "feature_group_count": 2}, "must be 1, got 2 and 2"),
    ({"feature_group_count": 2}, "has 4 features .* takes 4 in each of 2 groups"),
    ({"rhs_dilation": (1,)}, r"rhs_dilation \(1,\) need 2 numbers"),
    ({"lhs_dilation": (2, 2)}, "give the pads"),
    ({"act_qtype": "int8", "act_scale": jnp.ones((1, 1))}, "act_scale must be a float"),
    ({"out_scale": 0.1}, "out_scale is given without out_qtype"),
    ({"bias": jnp.ones(3)}, r"bias has shape \(3,\)"),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=lambda x: str(x)[:30])
def test_what_disagrees_is_named(options, said, normal):
    w = qwix.quantize(normal(11, 3, 3, 4, 5), "int8")
    with pytest.raises(ValueError, match=said):
        ops.qconv_general_dilated(
            normal(12, 2, 6, 6, 4), w, (1, 1), "SAME", dimension_numbers=NHWC, **options
        )


def test_an_unknown_padding_is_named(normal):
    x, w = normal(0, 1, 6, 6, 4), qwix.quantize(normal(1, 3, 3, 4, 8), "int8", channelwise_axes=(3,))
    with pytest.raises(ValueError, match=r"SAME, SAME_LOWER, VALID, .* got 'SAMEE'"):
        qwix.conv_general_dilated(x, w, (1, 1), "SAMEE", dimension_numbers=("NHWC", "HWIO", "NHWC"))
