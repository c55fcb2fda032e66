"""conv_general_dilated of quantized operands against the float convolution of what they represent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwix
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
    hlo = jax.jit(_conv).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
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
