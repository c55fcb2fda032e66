"""ragged_dot and ragged_dot_general against a loop over the groups in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import RaggedDotDimensionNumbers

import qwix
from qwix import ops
from qwix._src.core import ragged_dot as ragged
from qwix._src.core.ragged_dot import ragged_dot, ragged_dot_general
from tests.core.conftest import magnitude, represented

SIZES = [[3, 4, 5], [0, 12, 0], [5, 0, 2], [0, 0, 0], [12, 0, 0]]


def _by_group(lhs, rhs, sizes, first=0):
    """[M, N]: rows `first`... of lhs, group by group, in float64; other rows are zero."""
    out, start = np.zeros((lhs.shape[0], rhs.shape[2])), first
    for size, matrix in zip(sizes, rhs, strict=True):
        out[start : start + size] = lhs[start : start + size] @ matrix
        start += size
    return out


def _check(out, exact, size):
    bound = 100 * np.finfo(np.float32).eps * size + float(jnp.finfo(out.dtype).eps) * np.abs(exact) + 1e-30
    assert (np.abs(np.asarray(out, np.float64) - exact) <= bound).all()


def _quantize(x, how, channelwise, axis):
    if how is None:
        return x
    qtype, tile, method = how
    tiles = {axis: tile} if tile else {}
    return qwix.quantize(x, qtype, channelwise_axes=channelwise, tiled_axes=tiles, calibration_method=method)


FORMATS = [
    (None, ("int8", None, "absmax")),
    (("int8", None, "absmax"), ("int8", None, "absmax")),
    (("int8", None, "absmax"), ("int4", 8, "absmax")),
    (("int8", 8, "absmax"), ("int8", 16, "absmax")),
    (("int8", 1, "absmax"), ("int8", 1, "absmax")),
    (("int8", None, "minmax"), ("int8", None, "minmax")),
    (("nf4", None, "absmax"), ("nf4", 8, "absmax")),
    (("float8_e4m3fn", None, "absmax"), ("float8_e4m3fn", None, "absmax")),
    (("uint8", None, "absmax"), None),
]


@pytest.mark.parametrize("channelwise", [(0, 2), pytest.param((), marks=pytest.mark.large)], ids=str)
@pytest.mark.parametrize(
    "lhs, rhs",
    [*FORMATS[2:6], *(pytest.param(*f, marks=pytest.mark.large) for f in FORMATS if f not in FORMATS[2:6])],
    ids=str,
)
def test_every_pair_of_formats(lhs, rhs, channelwise, normal):
    x, w = normal(0, 12, 32), normal(1, 3, 32, 8)
    x = jnp.abs(x) if lhs and lhs[0] == "uint8" else x
    a, b = _quantize(x, lhs, (0,), 1), _quantize(w, rhs, channelwise, 1)
    run = jax.jit(ragged_dot)
    for sizes in SIZES:
        out = run(a, b, jnp.array(sizes))
        _check(out, *(_by_group(f(a), f(b), sizes) for f in (represented, magnitude)))


def test_integers_are_exact_and_multiplied_as_integers(normal):
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((12, 40), (3, 40, 8)))
    out = ragged_dot(jnp.array(x), jnp.array(w), jnp.array([3, 0, 7]))
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, _by_group(x.astype(np.int64), w.astype(np.int64), [3, 0, 7]))
    a, b = (
        _quantize(normal(2, 12, 32), ("int8", None, "absmax"), (0,), 1),
        qwix.quantize(normal(3, 3, 32, 8), "int4"),
    )
    assert "qwix_gmm" in str(jax.make_jaxpr(ragged_dot)(a, b, jnp.array([3, 0, 7])))
    text = jax.jit(ragged_dot).lower(a, b, jnp.array([3, 0, 7])).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert dots and all("xi8>, tensor<" in line and "-> tensor<1x12x4xi32>" in line for line in dots), dots


def test_rows_of_no_group_are_zero_whatever_they_hold(normal):
    x = normal(4, 12, 32).at[9:].set(jnp.nan)
    w = _quantize(normal(5, 3, 32, 8), ("int8", None, "absmax"), (0, 2), 1)
    for lhs in (x, qwix.QArray(jnp.ones((12, 32), jnp.int8), x[:, :1])):
        out = jax.jit(ragged_dot)(lhs, w, jnp.array([4, 0, 5]))
        assert np.isfinite(np.asarray(out)).all() and not np.asarray(out[9:]).any()
    g = normal(6, 12, 8).at[9:].set(jnp.nan)
    numbers = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    out = ragged_dot_general(x, g, jnp.array([4, 0, 5]), numbers)
    np.testing.assert_allclose(out[2], x[4:9].T @ g[4:9], rtol=1e-4, atol=1e-5)
    assert not np.asarray(out[1]).any()


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("quantized", [False, True])
def test_some_groups_of_many(offset, quantized, normal):
    """A device that holds two of four groups computes their rows, at their place."""
    x, w, sizes = normal(7, 12, 32), normal(8, 4, 32, 8), [2, 3, 4, 1]
    local = w[offset : offset + 2]
    if local.shape[0] < 2:  # a group that doesn't exist is empty
        local = jnp.concatenate([local, w[:1]])
    if quantized:
        x, local = (
            _quantize(x, ("int8", 8, "absmax"), (0,), 1),
            _quantize(local, ("int8", 8, "absmax"), (0, 2), 1),
        )
    out = jax.jit(ragged_dot)(x, local, jnp.array(sizes), group_offset=jnp.array([offset]))
    own = [*sizes[offset : offset + 2], 0][:2]
    args = [(f(x), f(local), own, sum(sizes[:offset])) for f in (represented, magnitude)]
    _check(out, *(_by_group(*a) for a in args))


def test_contracting_and_batch_modes(normal):
    sizes = jnp.array([5, 0, 4])
    x, g = normal(9, 12, 6), normal(10, 12, 8)
    contracting = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    for lhs, rhs in ((x, g), tuple(_quantize(v, ("int8", None, "absmax"), (1,), 0) for v in (x, g)),
                     tuple(_quantize(v, ("int8", 4, "absmax"), (1,), 0) for v in (x, g))):  # fmt: skip
        out = jax.jit(lambda a, b: ragged_dot_general(a, b, sizes, contracting))(lhs, rhs)
        a, b = represented(lhs), represented(rhs)
        exact = np.stack([a[:5].T @ b[:5], np.zeros((6, 8)), a[5:9].T @ b[5:9]])
        _check(out, exact, np.abs(a).T @ np.abs(b) * 2)
    late = ragged_dot_general(x, g, sizes, contracting, group_offset=jnp.array(1))
    assert not np.asarray(late[0]).any() and np.asarray(late[2]).any()
    batch = RaggedDotDimensionNumbers((((2,), (1,)), ((0,), (0,))), (0,), ())
    a, b = normal(11, 3, 4, 6), normal(12, 3, 6, 5)
    out = ragged_dot_general(a, b, jnp.array([1, 1]), batch)
    np.testing.assert_allclose(out[:2], a[:2] @ b[:2], rtol=1e-5, atol=1e-5)
    assert not np.asarray(out[2]).any()


def test_sizes_for_each_batch(normal):
    """lhs [B, M, K], rhs [G, B, K, N], sizes [B, G]."""
    numbers = RaggedDotDimensionNumbers((((2,), (2,)), ((0,), (1,))), (1,), (0,))
    x, w, sizes = normal(13, 2, 6, 16), normal(14, 3, 2, 16, 4), np.array([[1, 2, 3], [4, 0, 1]])
    w = qwix.quantize(w, "int8", channelwise_axes=(0, 1, 3))
    x = qwix.quantize(x, "int8", channelwise_axes=(0, 1))
    out = ragged_dot_general(x, w, jnp.array(sizes), numbers)
    for b in range(2):
        parts = [(f(x)[b], f(w)[:, b], sizes[b]) for f in (represented, magnitude)]
        _check(out[b], *(_by_group(*p) for p in parts))


@pytest.mark.parametrize(
    "numbers, sizes, message",
    [
        (ragged.BASIC_DIMENSION_NUMBERS, [1, 2], "has 3 groups along axis 0, group_sizes 2"),
        (RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), ()), [1, 2, 3], "one free axis of groups"),
        (RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0, 1), (0,)), [1, 2, 3], "Exactly one axis"),
        (RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,)), [1, 2, 3], "Sizes disagree"),
        (ragged.BASIC_DIMENSION_NUMBERS, [[1, 2, 3]] * 2, "group_sizes must be"),
    ],
)
def test_what_does_not_fit_is_named(numbers, sizes, message, normal):
    with pytest.raises(ValueError, match=message):
        ragged_dot_general(normal(15, 12, 32), normal(16, 3, 32, 8), jnp.array(sizes), numbers)


def test_results_have_the_dtype_asked_for(normal):
    x, w = normal(17, 12, 32, dtype=jnp.bfloat16), normal(18, 3, 32, 8, dtype=jnp.bfloat16)
    b = qwix.quantize(w, "int8", channelwise_axes=(0, 2))
    sizes = jnp.array([4, 4, 4])
    assert ragged_dot(x, b, sizes).dtype == jnp.bfloat16
    assert ragged_dot(x, b, sizes, preferred_element_type=jnp.float32).dtype == jnp.float32
    np.testing.assert_array_equal(ragged_dot(x, w, sizes), jax.lax.ragged_dot(x, w, sizes))


def _float_layer(x, gate, up, sizes, bias):
    rows = np.asarray(ragged.group_of_rows(x.shape[0], sizes))
    alive = (rows < len(sizes))[:, None]
    each = np.asarray(bias)[np.minimum(rows, len(sizes) - 1)]
    dot = lambda w: np.asarray(jax.lax.ragged_dot(x, w, sizes))
    return np.where(alive, np.asarray(jax.nn.silu(dot(gate))) * (dot(up) + each), 0)


def test_an_experts_first_half_in_one_call(normal):
    x, bias, sizes = normal(19, 12, 32), normal(20, 3, 8), jnp.array([4, 0, 7])
    gate, up = (_quantize(normal(i, 3, 32, 8), ("int8", None, "absmax"), (0, 2), 1) for i in (21, 22))
    out = ops.qragged_dot(x, up, sizes, w_gate=gate, bias=bias)
    want = _float_layer(x, gate.dequantize(), up.dequantize(), sizes, bias)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
    assert not np.asarray(out[11:]).any()
    rows = ops.qragged_dot(x, up, sizes, w_gate=gate, bias=bias, act_qtype="int8")
    size = np.abs(want).max()
    assert np.abs(rows - want).max() < 0.05 * size  # a step of the rows' grid is 1/127 of their maximum


def test_rows_that_are_quantized_on_the_way_are_those_quantized_before(normal):
    x, sizes = normal(23, 12, 32), jnp.array([4, 0, 7])
    w = _quantize(normal(24, 3, 32, 8), ("int8", 8, "absmax"), (0, 2), 1)
    before = qwix.quantize(x, "int8", channelwise_axes=(0,))
    out, want = ops.qragged_dot(x, w, sizes, act_qtype="int8"), ragged_dot(before, w, sizes)
    # Either way a value may lie on the other side of a rounding boundary: one step of its row.
    step = np.asarray(before.scale) * np.abs(np.asarray(w.dequantize())).sum((0, 1))[None].max()
    assert (np.abs(np.asarray(out) - np.asarray(want)) <= step).all()


def test_what_cannot_be_fused_or_named_is_said(normal):
    x, w, sizes = normal(25, 12, 32), normal(26, 3, 32, 8), jnp.array([4, 4, 4])
    with pytest.raises(NotImplementedError, match="neither operand is quantized"):
        ops.qragged_dot(x, w, sizes, bias=jnp.ones(8))
    b = _quantize(w, ("int8", None, "absmax"), (0, 2), 1)
    with pytest.raises(ValueError, match="bias has shape"):
        ops.qragged_dot(x, b, sizes, bias=jnp.ones(7))
    with pytest.raises(TypeError, match="Unknown keyword biass"):
        ops.qragged_dot(x, b, sizes, biass=jnp.ones(8))
    with pytest.raises(ValueError, match="Nothing is fused"):
        numbers = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
        ops.qragged_dot_general(b.qvalue[0], b.qvalue[1], jnp.array([30]), numbers, bias=jnp.ones(8))
    with pytest.raises(NotImplementedError, match="runs on tpu"):
        ops.qragged_dot(x, b, sizes, implementation="mosaic_tpu")


def test_explain_knows_ragged_dots(normal):
    x = jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16)
    w = qwix.QArray(
        jax.ShapeDtypeStruct((8, 2048, 1408), jnp.int8), jax.ShapeDtypeStruct((8, 1, 1408), jnp.bfloat16)
    )
    plan = ops.explain("ragged_dot", x, w, act_qtype="int8", chip="v6e")
    assert plan.chosen == "mosaic_tpu" and plan.problem.scheme == "gmm_w8a8"
    assert ops.explain("ragged_dot", x, w, w_gate=w, chip="cpu").problem.product.fused == "gate silu"
    numbers = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    g = jax.ShapeDtypeStruct((4096, 1408), jnp.int8)
    assert (
        ops.explain("ragged_dot", g, g, dimension_numbers=numbers, chip="v5e").problem.scheme
        == "tgmm_int8_int8"
    )
    with pytest.raises(ValueError, match="No quantized kernel"):
        ops.explain("ragged_dot", x, jax.ShapeDtypeStruct((8, 2048, 64), jnp.bfloat16))
