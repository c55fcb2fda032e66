"""QArray's members: shapes of scales through reshape, indexing and transposes; bytes; validation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import qwix
from qwix._src.core import layout, qarray


def _make(shape, scale_shape, zero_point=False) -> qwix.QArray:
    values = jnp.arange(np.prod(shape)).reshape(shape).astype(jnp.int8)
    scale = 1 + jnp.arange(np.prod(scale_shape), dtype=jnp.float32).reshape(scale_shape)
    return qwix.QArray(values, scale, (scale % 5).astype(jnp.int8) if zero_point else None)


@pytest.mark.parametrize(
    "old, scale, new, expected",
    [
        ((2, 2, 6), (2, 1, 3), (4, 1, 3, 2), (2, 1, 3, 1)),
        ((2, 2, 6), (2, 1, 3), (2, 1, 2, 6), (2, 1, 1, 3)),
        ((2, 2, 6), (2, 1, 3), (1, 4, 6), (1, 2, 3)),
        ((4, 1, 3, 2), (2, 1, 3, 1), (4, 6), (2, 3)),
        ((4, 8), (4, 2), (32,), (8,)),
        ((32,), (8,), (4, 8), (4, 2)),
        ((2, 3), (1, 1), (6, 1), (1, 1)),
        ((0, 4), (1, 4), (0, 2, 2), (1, 2, 2)),
    ],
)
def test_reshape_moves_the_scale_along(old, scale, new, expected):
    q = _make(old, scale)
    r = q.reshape(*new)
    assert r.scale.shape == expected
    np.testing.assert_array_equal(r.dequantize(), q.dequantize().reshape(new))


def test_reshape_takes_one_unknown_size():
    q = _make((8, 6), (4, 1))
    assert q.reshape(2, -1, 6).shape == (2, 4, 6) and q.reshape((-1,)).scale.shape == (4,)
    for wrong in ((5, -1), (-1, -1), (7, 6)):
        with pytest.raises(ValueError, match="Cannot reshape"):
            q.reshape(wrong)


def test_reshape_refuses_to_mix_scales():
    with pytest.raises(ValueError, match=r"Cannot reshape \(4, 6\) into \(24,\) for \(1, 3\)"):
        _make((4, 6), (1, 3)).reshape(24)


sizes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@st.composite
def qarrays(draw):
    shape = tuple(draw(sizes))
    scale = tuple(draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])) for n in shape)
    return _make(shape, scale, draw(st.booleans()))


@settings(max_examples=35)
@given(qarrays(), st.data())
def test_reshape_is_right_or_refused(q, data):
    new = data.draw(st.permutations(q.shape))
    merged = data.draw(st.integers(0, len(new) - 1))
    new = (*new[:merged], int(np.prod(new[merged : merged + 2])), *new[merged + 2 :])
    try:
        r = q.reshape(new)
    except ValueError:
        assume(False)
    np.testing.assert_array_equal(r.dequantize(), q.dequantize().reshape(new))


@st.composite
def indices(draw, shape):
    items = []
    for n in shape[: draw(st.integers(0, len(shape)))]:
        whole = st.just(slice(None))
        part = st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda t: slice(*sorted(t)))
        one = st.integers(-n, n - 1)
        items.append(draw(st.one_of(whole, part, one)))
    if draw(st.booleans()):
        items.append(...)
    if draw(st.booleans()):
        items.insert(0, None)
    return tuple(items)


@settings(max_examples=60)
@given(qarrays(), st.data())
def test_indexing_is_that_of_the_dequantized_array_or_refused(q, data):
    idx = data.draw(indices(q.shape))
    try:
        r = q[idx]
    except ValueError as e:
        assert "Aligned bounds" in str(e) or "Unsupported indexing" in str(e)
        return
    np.testing.assert_array_equal(r.dequantize(), q.dequantize()[idx])


def test_aligned_slices_keep_the_tiling():
    q = _make((128, 8), (4, 8), zero_point=True)
    r = q[32:96]
    assert r.scale.shape == (2, 8) and r.zero_point.shape == (2, 8)
    assert q[40:50].scale.shape == (1, 8)  # within one tile
    with pytest.raises(
        ValueError, match=r"cuts tiles of 32. Aligned bounds are multiples of 32.*such as 0:96"
    ):
        q[16:96]


def test_rows_are_gathered_with_their_scales():
    q = _make((12, 8), (4, 1))
    rows = jnp.array([[3, 0], [11, 5]])
    np.testing.assert_array_equal(q[rows].dequantize(), q.dequantize()[rows])
    np.testing.assert_array_equal(jax.jit(lambda q, i: q[i])(q, rows).dequantize(), q.dequantize()[rows])
    mask = np.arange(12) % 5 == 0
    np.testing.assert_array_equal(q[mask].dequantize(), q.dequantize()[mask])
    per_tensor = _make((12, 8), (1, 1))
    assert per_tensor[rows[0]].scale.shape == (1, 1)


def test_iteration_ends():
    q = _make((3, 4), (3, 1))
    assert len(q) == 3 and [r.shape for r in q] == [(4,)] * 3
    with pytest.raises(IndexError, match="out of range for axis 1 of size 4"):
        q[:, 4]
    with pytest.raises(IndexError, match="rank 2"):
        q[0, 0, 0]


def test_transposes_and_sizes():
    q = _make((4, 6, 8), (2, 1, 8))
    assert q.T.scale.shape == (8, 1, 2) and q.mT.shape == (4, 8, 6) and q.swapaxes(0, 1).shape == (6, 4, 8)
    assert q.transpose(1, 0, 2).scale.shape == q.transpose((1, 0, 2)).scale.shape == (1, 2, 8)
    assert (
        q.size == 192 and q.ndim == 3 and q.scale_tile_shape == (2, 6, 1) and q.zero_point_tile_shape is None
    )
    assert q.astype(jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "qtype, expected", [("int4", 32 * 64 // 2), ("int8", 32 * 64), ("nf4", 32 * 64 // 2)]
)
def test_nbytes_are_device_bytes(qtype, expected):
    q = qwix.quantize(jnp.ones((32, 64), jnp.bfloat16), qtype, tiled_axes={1: 32})
    assert q.nbytes == expected + 2 * 2
    z = qwix.quantize(jnp.ones((32, 64)), "int4", channelwise_axes=(0,), calibration_method="minmax")
    assert z.nbytes == 32 * 64 // 2 + 32 * 4 + 32 // 2


def test_repr_is_short():
    assert repr(_make((4, 6), (4, 1))) == "QArray(int8[4,6], scale=float32[4,1])"
    assert "qtype=nf4" in repr(qwix.quantize(jnp.ones(4), "nf4"))


@pytest.mark.parametrize(
    "q, message",
    [
        (qwix.QArray(jnp.zeros((4, 6), jnp.int8), jnp.ones(4)), "same rank"),
        (qwix.QArray(jnp.zeros((4, 6), jnp.int8), jnp.ones((3, 1))), "should be broadcastable"),
        (qwix.QArray(jnp.zeros((4, 6), jnp.int32), jnp.ones((4, 1))), "not a valid type for qvalue"),
        (qwix.QArray(jnp.zeros((4, 6), jnp.int8), jnp.ones((4, 1), jnp.int8)), "not a valid type for scale"),
        (qwix.QArray(jnp.zeros((4, 6), jnp.int8), jnp.ones((4, 1)), jnp.zeros(4, jnp.int8)), "Zero point"),
        (
            qwix.QArray(jnp.zeros((4, 6), jnp.int8), jnp.ones((4, 1)), jnp.zeros((4, 1))),
            "Zero point has dtype",
        ),
        (
            qwix.QArray(jnp.zeros((4, 6), jnp.int8), jnp.ones((4, 1)), jnp.zeros((2, 1), jnp.int8)),
            "scale's shape",
        ),
        (qwix.QArray(jnp.zeros((4, 6), jnp.int8), jnp.ones((4, 1)), None, "nf4"), "is stored as uint4"),
        (qwix.QArray(jnp.zeros((4, 6), jnp.int8), jnp.ones((4, 1)), None, "int9"), "Did you mean"),
    ],
)
def test_fields_that_disagree_are_named(q, message):
    with pytest.raises(ValueError, match=message):
        qwix.dequantize(q)
    with pytest.raises(ValueError, match=message):
        qwix.dot(jnp.ones((2, 4)), q)


def test_a_tree_of_other_things_is_a_qarray_too():
    q = _make((4, 6), (4, 1))
    shapes = jax.tree.map(jnp.shape, q)
    assert shapes.qvalue == (4, 6) and shapes.qtype == q.qtype
    assert jax.tree.structure(jax.eval_shape(lambda: q)) == jax.tree.structure(q)
    assert qwix.is_quantized(q) and not qwix.is_quantized(q.scale)


def test_scan_over_stacked_layers():
    q = _make((3, 4, 6), (3, 2, 1))
    total, _ = jax.lax.scan(lambda c, layer: (c + layer.dequantize(), None), jnp.zeros((4, 6)), q)
    np.testing.assert_array_equal(total, q.dequantize().sum(0))


def test_generic_broadcast_and_transpose_helpers():
    x = jnp.arange(12.0).reshape(4, 3)
    out = layout.call_with_generic_broadcast(jnp.add, x, jnp.array([[10.0], [20.0]]))
    np.testing.assert_array_equal(out, x + jnp.array([[10.0]] * 2 + [[20.0]] * 2))
    with pytest.raises(ValueError, match="Cannot broadcast between"):
        layout.call_with_generic_broadcast(jnp.add, x, jnp.ones((3, 3)))
    with pytest.raises(ValueError, match=r"Cannot transpose \(4, 3\)"):
        qarray.transpose_array(x, (0,))
    assert qarray.transpose_array(jnp.ones((4, 1, 3)), (2, None, 0)).shape == (3, 1, 4)
    assert qarray.split_axis(x, {0: 0.5}).shape == (2, 2, 3)
    assert qarray.broadcast_to(_make((1, 4), (1, 2)), (3, 4)).scale.shape == (3, 4)


def test_accumulators():
    a8, a16 = _make((4, 4), (1, 1)), qwix.quantize(jnp.ones((4, 4)), "int16")
    types = lambda *x, p=None: qarray.get_accumulator_and_result_type(*x, preferred_element_type=p)
    assert types(a8, a8) == (jnp.int32, jnp.float32)
    assert types(a16, a16) == (jnp.float32, jnp.float32)  # int32 would overflow
    assert types(jnp.ones(2, jnp.int8), jnp.ones(2, jnp.int4)) == (jnp.int32, jnp.int32)
    assert types(jnp.ones(2, jnp.bfloat16), a8.astype(jnp.bfloat16)) == (jnp.bfloat16, jnp.bfloat16)
    assert types(a8, a8, p=jnp.bfloat16) == (jnp.int32, jnp.bfloat16)
