"""Training ops on a mesh with explicit axes: laid out as asked, and the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qwix
from qwix._src.core.conv_general_qt import ConvGeneralQtConfig, conv_general_qt
from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt

# Fixed ranges: the greatest value of a dynamic one lies between two integers, and its last bit decides.
FIXED = {f"{side}_calibration_method": "fixed,5" for side in ("lhs", "rhs", "dlhs_grad", "drhs_grad")}
W8A8 = {"lhs_qtype": "int8", "rhs_qtype": "int8", "disable_gradient_clipping": True, **FIXED}
INT8 = W8A8 | {"dlhs_grad_qtype": "int8", "drhs_grad_qtype": "int8"}
QAT = W8A8 | {"use_original_residuals": True, "tile_size": 8}
DENSE = (((2,), (0,)), ((), ()))
WIDE = {"window_strides": (1,), "padding": "SAME", "dimension_numbers": ("NWC", "WIO", "NWC")}


@pytest.fixture(scope="module")
def mesh(devices):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2, devices=devices)


def _all(fn, x, w):
    """The result and both gradients."""
    return jax.jit(lambda x, w: jax.value_and_grad(lambda x, w: _sum(fn(x, w)), (0, 1), has_aux=True)(x, w))(
        x, w
    )


def _sum(out):
    return (out * jnp.cos(jnp.arange(out.shape[-1], dtype=out.dtype))).sum(), out


def _check(fn, x, w, mesh, lhs, rhs, out):
    """`fn(x, w, out_sharding)`: as on one device, and laid out as said. The sums of g's ranges may differ."""
    (_, alone), alone_grads = _all(lambda x, w: fn(x, w, None), x, w)
    with jax.set_mesh(mesh):
        place = lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec))
        (_, got), grads = _all(lambda x, w: fn(x, w, out), place(x, lhs), place(w, rhs))
    for array, spec in zip((got, *grads), (out, lhs, rhs), strict=True):
        assert array.sharding.spec == P(*spec, *[None] * (array.ndim - len(spec)))
    if lhs[-1] is None:
        np.testing.assert_array_equal(got, alone)  # integers, scaled alike
    else:  # scaled parts of sums, added up
        np.testing.assert_allclose(got, alone, rtol=1e-6, atol=1e-6 * float(abs(alone).max()))
    for ours, reference in zip(grads, alone_grads, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5 * float(abs(reference).max()))


@pytest.mark.parametrize(
    "config, lhs, rhs, out",
    {
        "rows and columns": (INT8, P("a", None, None), P(None, "b"), P("a", None, "b")),
        "weights cut as in FSDP": (INT8, P("a", None, None), P("a", "b"), P("a", None, None)),
        "the sum, float gradients": pytest.param(
            QAT, P("a", None, "b"), P("b", None), P("a", None, None), marks=pytest.mark.large
        ),
    }.values(),
)
def test_a_dot_and_its_gradients_are_laid_out_as_their_operands(config, lhs, rhs, out, mesh, normal):
    config = DotGeneralQtConfig(**config)
    dot = lambda x, w, out: dot_general_qt(x, w, DENSE, config, out_sharding=out)
    _check(dot, normal(0, 8, 4, 32), normal(1, 32, 16), mesh, lhs, rhs, out)


@pytest.mark.large
def test_a_convolution_and_its_gradients_are_laid_out_as_their_operands(mesh, normal):
    config = ConvGeneralQtConfig(**INT8)
    conv = lambda x, w, out: conv_general_qt(x, w, config, **WIDE, out_sharding=out)
    _check(conv, normal(4, 8, 5, 8), normal(5, 3, 8, 16), mesh, P("a", None, None), P(), P("a", None, None))


def test_a_quantized_einsum_whose_result_is_transposed_is_laid_out_as_asked(mesh, normal):
    """Its activation is quantized there, too."""
    x, w = normal(6, 8, 4, 32), qwix.quantize(normal(7, 32, 16), "int8", channelwise_axes=(1,))
    how = qwix.HowToQuantize(qtype="int4", channelwise_axes=(0, 1))
    alone = jax.jit(lambda x: qwix.einsum("btd,df->bft", x, w, act_how=how))(x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("a", None, None)))
        fn = lambda x: qwix.einsum("btd,df->bft", x, w, act_how=how, out_sharding=P("a", "b", None))
        got = jax.jit(fn)(placed)
    assert got.sharding.spec == P("a", "b", None)
    np.testing.assert_array_equal(got, alone)
