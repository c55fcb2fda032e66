"""What all core tests share: a dot's analytic bound, and training that is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix._src.core import layout, qarray
from qwix._src.core.qt_config import QtConfig


def magnitude(x) -> np.ndarray:
    """The largest number that any way of computing with an operand touches: (|q| + |zero point|) * scale."""
    if not isinstance(x, qarray.QArray):
        return np.abs(np.asarray(x, np.float64))
    full = lambda v: np.abs(np.asarray(layout.broadcast_array(v, x.shape), np.float64))
    values = np.abs(np.asarray(qarray.numerics.convert_from(x.qvalue, x.qtype), np.float64))
    if x.zero_point is not None:
        values = values + full(x.zero_point)
    return values * full(x.scale)


def represented(x) -> np.ndarray:
    """The operand's values in float64, computed here and not by `dequantize`."""
    if not isinstance(x, qarray.QArray):
        return np.asarray(x, np.float64)
    full = lambda v: np.asarray(layout.broadcast_array(v, x.shape), np.float64)
    values = np.asarray(qarray.numerics.convert_from(x.qvalue, x.qtype), np.float64)
    if x.zero_point is not None:
        values = values - full(x.zero_point)
    return values * full(x.scale)


@pytest.fixture(scope="session")
def check_einsum():
    """check(out, subscripts, *operands): within the bound of float32 sums, rounded once to out's dtype."""

    def check(out, subscripts, *operands):
        exact = np.einsum(subscripts, *map(represented, operands))
        size = np.einsum(subscripts, *map(magnitude, operands))
        assert out.shape == exact.shape
        terms = max(2, max(int(np.prod(x.shape)) for x in operands))
        bound = (min(terms, 4096) + 16) * np.finfo(np.float32).eps * size
        bound = bound + float(jnp.finfo(out.dtype).eps) * np.abs(exact) + np.finfo(np.float32).tiny
        wrong = ~(np.abs(np.asarray(out, np.float64) - exact) <= bound)
        assert not wrong.any(), (
            f"{wrong.sum()} of {wrong.size} beyond the bound, the worst by "
            f"{np.nanmax(np.abs(np.asarray(out, np.float64) - exact) / bound):.3g} times; {out.dtype=}"
        )

    return check


@pytest.fixture(scope="session")
def normal():
    """normal(seed, *shape, dtype): reproducible values."""
    return lambda seed, *shape, dtype=jnp.float32: jax.random.normal(jax.random.key(seed), shape, dtype)


def powers_of_two(shape) -> np.ndarray:
    """Scales 1, 2, 4, 8, 1, ... of this shape."""
    return 2.0 ** (np.arange(int(np.prod(shape))) % 4).reshape(shape)


@pytest.fixture(scope="session")
def exact_training():
    """Everything that makes quantized training exact, so that it can be compared to integer arithmetic.

    Operands are small integers times powers of two that are known as their scales, gradients small integers
    that a fixed range holds as they are, also after those scales have moved into them.
    """

    def operand(rng, shape, how):
        scale = layout.broadcast_array(jnp.array(powers_of_two(qarray.get_scale_shape(shape, how))), shape)
        return jnp.array(rng.integers(-3, 4, shape), jnp.float32) * scale.astype(jnp.float32)

    known = lambda stat: {"absmax": jnp.array(127.5 * powers_of_two(stat["absmax"].shape), jnp.float32)}
    config = QtConfig(
        lhs_qtype="int8",
        rhs_qtype="int8",
        lhs_collect_quant_stat=known,
        rhs_collect_quant_stat=known,
        dlhs_grad_qtype="int8",
        drhs_grad_qtype="int8",
        dlhs_grad_calibration_method="fixed,127.5",
        drhs_grad_calibration_method="fixed,127.5",
    )
    return operand, config
