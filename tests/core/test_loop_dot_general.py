"""Dots of blocks, as kernels do them: every format against float64, integers exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwix_kernels.problem import NF4

from qwix._src.core import loop_dot_general as module
from qwix._src.core import qarray

EPS = float(jnp.finfo(jnp.float32).eps)
# One compile for all of it: without jit, JAX compiles each little op of a new shape.
loop_dot_general = jax.jit(
    module.loop_dot_general, static_argnames=["dimension_numbers", "precision", "preferred_element_type"]
)
MATMUL = (((1,), (0,)), ((), ()))
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 64)).astype(np.float32)
W = RNG.normal(size=(64, 24)).astype(np.float32)


def represented(x) -> np.ndarray:
    """What an operand stands for, in float64, by numpy alone."""
    if not isinstance(x, qarray.QArray):
        return np.asarray(x, np.float64)
    values = np.asarray(x.qvalue).astype(np.float64)
    if x.qtype == "nf4":
        values = np.asarray(NF4, np.float32).astype(np.float64)[np.asarray(x.qvalue).astype(int)]

    def spread(part):
        part = np.asarray(part).astype(np.float64)
        for axis, n in enumerate(x.shape):
            part = np.repeat(part, n // part.shape[axis], axis)
        return part

    if x.zero_point is not None:
        values = values - spread(x.zero_point)
    return values * spread(x.scale)


def quantized(x, qtype, channels=(), tiles=None, method="absmax", dtype=None):
    return qarray.quantize_api(
        jnp.asarray(x),
        qtype,
        channelwise_axes=channels,
        tiled_axes=tiles or {},
        calibration_method=method,
        scale_dtype=dtype,
    )


def assert_is_product(out, lhs, rhs, dims=MATMUL):
    """Within the rounding of a float32 sum of K terms, and of the scales' three products."""
    a, b = represented(lhs), represented(rhs)
    exact = _dot64(a, b, dims)
    size = _dot64(np.abs(a), np.abs(b), dims)
    k = int(np.prod([a.shape[i] for i in dims[0][0]]))
    np.testing.assert_array_less(np.abs(np.asarray(out, np.float64) - exact), (k + 4) * EPS * size + 1e-30)


def _dot64(a, b, dims):
    (lc, rc), (lb, rb) = dims
    letters = iter("abcdefghijklmnop")
    left = [next(letters) for _ in a.shape]
    right = [next(letters) for _ in b.shape]
    for i, j in zip((*lc, *lb), (*rc, *rb), strict=True):
        right[j] = left[i]
    batch = [left[i] for i in lb]
    rest = [c for i, c in enumerate(left) if i not in (*lc, *lb)]
    rest += [c for i, c in enumerate(right) if i not in (*rc, *rb)]
    return np.einsum(f"{''.join(left)},{''.join(right)}->{''.join(batch + rest)}", a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "rhs",
    [
        quantized(W, "int8", [1]),
        quantized(W, "int8", [1], {0: 16}),
        quantized(W, "int8", [], {0: 16, 1: 8}),
        quantized(W, "int8", [1], {0: 16}, "minmax"),
        quantized(W, "int4", [1], {0: 32}, "minmax"),
        quantized(W, "int4", [1], {0: 32}),
        quantized(W, "int3", [1]),
        quantized(W, "int1", [1]),
        quantized(np.abs(W), "uint8", [1]),
        quantized(W, "int16", [1], {0: 32}),
        quantized(W, "float8_e4m3fn", [1]),
        quantized(W, "float8_e5m2", [1], {0: 16}),
        quantized(W, "mxfp4", [1], {0: 32}),
        quantized(W, "nf4", [1], {0: 16}),
        quantized(W, "int8", [1], {0: 1}),  # a scale per element: dequantized first
        quantized(W, "int4", [1], {0: 4}, "minmax"),
    ],
    ids=lambda q: f"{q.qtype}-{'x'.join(map(str, q.scale.shape))}-{'zp' if q.zero_point is not None else ''}",
)
def test_float_lhs(rhs, dtype):
    lhs = jnp.asarray(X, dtype)
    out = loop_dot_general(lhs, rhs, MATMUL, precision="highest", preferred_element_type=jnp.float32)
    assert_is_product(out, lhs, rhs)


@pytest.mark.parametrize(
    "lhs",
    [
        quantized(X, "int8", [0]),
        quantized(X, "int8", [0], {1: 16}, "minmax"),
        quantized(np.abs(X), "uint8", [0]),
        quantized(X, "float8_e4m3fn", [0], {1: 32}),
        quantized(X, "nf4", [0], {1: 32}),
        quantized(X, "int16", [0]),
    ],
    ids=lambda q: f"{q.qtype}-{'x'.join(map(str, q.scale.shape))}-{'zp' if q.zero_point is not None else ''}",
)
@pytest.mark.parametrize(
    "rhs",
    [
        quantized(W, "int8", [1], {0: 16}, "minmax"),
        quantized(W, "int4", [], {0: 32, 1: 8}),
        quantized(W, "float8_e5m2", [1]),
        quantized(W, "nf4", [1], {0: 16}),
        quantized(W, "int16", [1]),
    ],
    ids=lambda q: f"{q.qtype}-{'x'.join(map(str, q.scale.shape))}-{'zp' if q.zero_point is not None else ''}",
)
def test_two_quantized(lhs, rhs):
    assert_is_product(loop_dot_general(lhs, rhs, MATMUL), lhs, rhs)


def test_tiles_that_do_not_divide_each_other():
    lhs, rhs = quantized(X[:, :48], "int8", [0], {1: 16}), quantized(W[:48], "int8", [1], {0: 24})
    assert_is_product(loop_dot_general(lhs, rhs, MATMUL), lhs, rhs)


@settings(max_examples=30)
@given(data=st.data())
def test_integers_are_exact(data):
    """With scales of 1 the result is the integer that numpy computes, zero points included."""
    m, n, tile, tiles = (data.draw(st.sampled_from(sizes)) for sizes in ((1, 5), (1, 3), (1, 7, 16), (1, 3)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    qtypes = [data.draw(st.sampled_from(["int4", "int8", "uint4", "uint8"])) for _ in range(2)]
    with_zero = [data.draw(st.booleans()) for _ in range(2)]
    k = tile * tiles

    def operand(shape, axis, qtype, zero):
        info = jnp.iinfo(qtype)
        draw = lambda s: jnp.asarray(rng.integers(int(info.min), int(info.max) + 1, s), qtype)
        scale_shape = [tiles if i == axis else s for i, s in enumerate(shape)]
        return qarray.QArray(draw(shape), jnp.ones(scale_shape), draw(scale_shape) if zero else None)

    lhs = operand((m, k), 1, qtypes[0], with_zero[0])
    rhs = operand((k, n), 0, qtypes[1], with_zero[1])
    expected = represented(lhs).astype(np.int64) @ represented(rhs).astype(np.int64)
    np.testing.assert_array_equal(np.asarray(loop_dot_general(lhs, rhs, MATMUL), np.int64), expected)


@pytest.mark.parametrize(
    ("shapes", "dims"),
    [
        (((3, 5, 16), (3, 16, 4)), (((2,), (1,)), ((0,), (0,)))),
        (((5, 16, 3), (4, 3, 16)), (((1,), (2,)), ((2,), (1,)))),
        (((5, 16), (4, 16)), (((-1,), (-1,)), ((), ()))),
        (((5, 8, 16), (16, 8, 4)), (((1, 2), (1, 0)), ((), ()))),
        (((5, 3), (4,)), (((), ()), ((), ()))),
        (((16,), (16,)), (((0,), (0,)), ((), ()))),
    ],
)
@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_dimension_numbers(shapes, dims, method):
    """Batches, several contracting axes, transposed sides, outer and inner products."""
    (lc, rc), _ = dims
    sides = []
    for shape, contracting in zip(shapes, (lc, rc), strict=True):
        tiles = {i % len(shape): 8 for i in contracting}
        channels = [i for i in range(len(shape)) if i not in tiles]
        sides.append(quantized(RNG.normal(size=shape).astype(np.float32), "int8", channels, tiles, method))
    ndims = [len(shape) for shape in shapes]
    positive = (
        tuple(tuple(i % n for i in axes) for axes, n in zip(dims[0], ndims, strict=True)),
        dims[1],
    )
    out = loop_dot_general(*sides, dims)
    assert out.shape == _dot64(*map(represented, sides), positive).shape
    assert_is_product(out, *sides, positive)


def test_result_types():
    lhs, rhs = (
        jnp.ones((4, 8), jnp.bfloat16),
        quantized(np.ones((8, 4), np.float32), "int8", dtype=jnp.bfloat16),
    )
    assert loop_dot_general(lhs, rhs, MATMUL).dtype == jnp.bfloat16
    assert loop_dot_general(lhs, rhs, MATMUL, preferred_element_type=jnp.float32).dtype == jnp.float32
    assert loop_dot_general(lhs.astype(jnp.int8), rhs.qvalue, MATMUL).dtype == jnp.int32


def test_plain_arrays():
    """4-bit integers too, which a CPU's own dot refuses; unsigned bytes are not read as signed."""
    a = jnp.asarray(RNG.integers(-8, 8, (4, 16)), jnp.int4)
    b = jnp.asarray(RNG.integers(0, 256, (16, 4)), jnp.uint8)
    expected = np.asarray(a).astype(np.int64) @ np.asarray(b).astype(np.int64)
    np.testing.assert_array_equal(np.asarray(loop_dot_general(a, b, MATMUL)), expected)


def test_nothing_to_sum():
    rhs = qarray.QArray(jnp.zeros((0, 4), jnp.int8), jnp.ones((1, 4)))
    out = loop_dot_general(jnp.zeros((2, 0)), rhs, MATMUL)
    np.testing.assert_array_equal(np.asarray(out), np.zeros((2, 4)))


def test_sizes_that_disagree():
    with pytest.raises(
        ValueError, match=r"must agree in size, got lhs.shape=\(16, 64\), rhs.shape=\(24, 64\)"
    ):
        loop_dot_general(jnp.asarray(X), quantized(W.T, "int8"), MATMUL)


def test_the_dot_runs_on_stored_integers():
    """One dot per tile, on int8, and nothing wider: that is the point of the loop."""
    lhs, rhs = quantized(X, "int8", [0], {1: 32}), quantized(W, "int4", [1], {0: 32}, "minmax")
    jaxpr = jax.make_jaxpr(lambda a, b: module.loop_dot_general(a, b, MATMUL))(lhs, rhs)
    dots = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert [[v.aval.dtype for v in eqn.invars] for eqn in dots] == [[jnp.int8, jnp.int8]] * 2
    assert all(eqn.outvars[0].aval.dtype == jnp.int32 for eqn in dots)
