"""TransposedQArray: reversible bit for bit, free where the axes are in order, usable as an operand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwix
from qwix._src.core import transposed_qarray
from qwix._src.core.dot_general import matmul_problem


def _same(a, b) -> bool:
    equal = lambda x, y: x.dtype == y.dtype and x.shape == y.shape and bool((x == y).all())
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        map(equal, jax.tree.leaves(a), jax.tree.leaves(b))
    )


@st.composite
def operands(draw):
    """A QArray with any scales, zero points or none, and dimension numbers that fit one side of it."""
    ndim = draw(st.integers(1, 5))
    shape = tuple(draw(st.sampled_from([1, 2, 3, 4])) for _ in range(ndim))
    scale = tuple(draw(st.sampled_from([d for d in (1, 2, 3, 4) if n % d == 0])) for n in shape)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = jnp.array(rng.integers(-8, 8, shape), draw(st.sampled_from([jnp.int4, jnp.int8])))
    zero_point = jnp.array(rng.integers(-8, 8, scale), values.dtype) if draw(st.booleans()) else None
    q = qwix.QArray(values, jnp.array(rng.normal(size=scale), jnp.float32), zero_point)
    axes = draw(st.permutations(range(ndim)))
    n_contracting = draw(st.integers(0, ndim))
    contracting = tuple(axes[:n_contracting])
    batch = tuple(axes[n_contracting : draw(st.integers(n_contracting, ndim))])
    other = lambda used: tuple(range(len(used)))
    side = draw(st.sampled_from(["lhs", "rhs"]))
    pair = (contracting, other(contracting)), (batch, tuple(n + len(contracting) for n in other(batch)))
    return q, (pair if side == "lhs" else tuple(p[::-1] for p in pair)), side


@settings(max_examples=80)
@given(operands(), st.data())
def test_to_qarray_is_the_original_bit_for_bit(case, data):
    q, numbers, side = case
    k_last = data.draw(st.sampled_from([None, False, True])) if side == "rhs" else None
    packed = qwix.transpose_qarray(q, numbers, side, k_last=k_last)
    assert k_last in (None, packed.layout.k_last)
    assert packed.qvalue.ndim == packed.scale.ndim == 3
    assert all(n % s == 0 for n, s in zip(packed.qvalue.shape, packed.scale.shape, strict=True))
    assert _same(packed.to_qarray(), q)
    assert packed.shape == q.shape


@pytest.mark.parametrize("qtype", ["nf4", "int3", "mxfp8", "float8_e5m2", "int1"])
def test_the_qtype_survives(qtype, normal):
    q = qwix.quantize(normal(0, 8, 64, 4), qtype, channelwise_axes=(2,), tiled_axes={1: 32})
    packed = qwix.transpose_qarray(q, (((2, 3), (0, 1)), ((), ())), "rhs")
    assert _same(packed.to_qarray(), q)
    assert packed.nbytes == q.nbytes + (packed.scale.size - q.scale.size) * q.scale.dtype.itemsize


@pytest.mark.parametrize(
    "shape, scale, numbers, side, merged",
    [
        ((64, 32), (2, 32), (((1,), (0,)), ((), ())), "rhs", (1, 64, 32)),  # dense
        ((64, 4, 8), (2, 4, 8), (((2,), (0,)), ((), ())), "rhs", (1, 64, 32)),  # btd,dnh->btnh
        ((4, 8, 64), (1, 1, 64), (((2, 3), (0, 1)), ((), ())), "rhs", (1, 32, 64)),  # btnh,nhd->btd
        ((32, 64), (32, 2), (((1,), (1,)), ((), ())), "rhs", (1, 32, 64)),  # tied embedding: x @ table.T
        ((4, 64, 32), (4, 2, 32), (((2,), (1,)), ((0,), (0,))), "rhs", (4, 64, 32)),  # experts
        ((2, 3, 64), (2, 3, 1), (((2,), (0,)), ((), ())), "lhs", (1, 6, 64)),  # activations
    ],
)
def test_layouts_in_order_cost_no_transpose(shape, scale, numbers, side, merged):
    q = qwix.QArray(jnp.zeros(shape, jnp.int8), jnp.ones(scale))
    pack = jax.jit(lambda q: qwix.transpose_qarray(q, numbers, side))
    assert pack(q).qvalue.shape == merged
    assert "transpose" not in pack.lower(q).as_text()
    hlo = pack.lower(q).compile().as_text()
    assert " transpose(" not in hlo and " gather(" not in hlo


def test_an_operand_that_is_laid_out_already_gives_the_same_numbers(normal):
    x, w = normal(1, 3, 4, 8), normal(2, 4, 8, 16)
    q = qwix.quantize(w, "int4", channelwise_axes=(2,), tiled_axes={1: 4}, calibration_method="minmax")
    numbers = (((1, 2), (0, 1)), ((), ()))
    packed = qwix.transpose_qarray(q, numbers, "rhs")
    plain = qwix.dot_general(x, q, numbers)
    np.testing.assert_array_equal(qwix.dot_general(x, packed, numbers), plain)
    np.testing.assert_array_equal(qwix.einsum("abc,bcd->ad", x, packed), plain)
    # Made for another dot, it is undone and laid out anew.
    other = (((0,), (2,)), ((), ()))
    y = normal(3, 16)
    np.testing.assert_array_equal(qwix.dot_general(y, packed, other), qwix.dot_general(y, q, other))
    np.testing.assert_array_equal(packed.dequantize(), q.dequantize())


@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_k_is_last_or_not_as_asked_and_the_numbers_stay(qtype, normal):
    x, w = normal(1, 3, 8).astype(jnp.bfloat16), normal(2, 8, 6)
    numbers = (((1,), (0,)), ((), ()))
    q = qwix.quantize(w, qtype, channelwise_axes=(1,), calibration_method="minmax")
    turned = qwix.transpose_qarray(q, numbers, "rhs", k_last=True)
    assert turned.qvalue.shape == (1, 6, 8) and turned.scale.shape == turned.zero_point.shape == (1, 6, 1)
    how = qwix.HowToQuantize(qtype="int8", channelwise_axes=(0,))
    dot = lambda w: jax.jit(lambda x, w: qwix.dot_general(x, w, numbers, act_how=how))
    np.testing.assert_array_equal(dot(turned)(x, turned), dot(q)(x, q))  # sums of integers
    program = str(jax.make_jaxpr(dot(turned))(x, turned))
    assert "rhs_transposed=True" in program and " transpose[" not in program
    assert matmul_problem(x, turned, numbers, act_qtype="int8").rhs_transposed


def test_a_stack_is_undone_and_laid_out_as_one(normal):
    q = qwix.quantize(normal(5, 3, 8, 4), "int4", channelwise_axes=(0, 2), tiled_axes={1: 2})
    numbers = (((0,), (0,)), ((), ()))
    pack = lambda q: qwix.transpose_qarray(q, numbers, "rhs", k_last=True)
    packed = jax.vmap(pack)(q)
    assert packed.shape == (3, 8, 4) and packed.ndim == 3 and packed.qvalue.shape == (3, 1, 4, 8)
    assert _same(packed.to_qarray(), q)
    assert _same(transposed_qarray.TransposedQArray.of(q, packed.layout, "rhs"), packed)
    assert _same(packed.in_order(), q.transpose(0, 2, 1))


def test_stacked_layers_are_laid_out_by_vmap_and_scanned(normal):
    x, w = normal(4, 8), normal(5, 3, 8, 8)
    q = qwix.quantize(w, "int8", channelwise_axes=(0, 2))
    numbers = (((0,), (0,)), ((), ()))
    packed = jax.vmap(lambda q: qwix.transpose_qarray(q, numbers, "rhs"))(q)
    step = lambda x, layer: (qwix.dot_general(x, layer, numbers), None)
    np.testing.assert_array_equal(jax.lax.scan(step, x, packed)[0], jax.lax.scan(step, x, q)[0])


def test_sharding_of_the_free_axis_stays(devices):
    mesh = jax.sharding.Mesh(np.array(devices), ("x",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    q = jax.device_put(qwix.quantize(jnp.ones((16, 32)), "int8", channelwise_axes=(1,)), spec)
    packed = jax.jit(lambda q: qwix.transpose_qarray(q, (((1,), (0,)), ((), ())), "rhs"))(q)
    assert packed.qvalue.sharding.shard_shape(packed.qvalue.shape) == (1, 16, 4)
    assert packed.scale.sharding.shard_shape(packed.scale.shape) == (1, 1, 4)


def test_bad_sides_and_axes_are_refused():
    q = qwix.quantize(jnp.ones((4, 8)), "int8")
    with pytest.raises(ValueError, match="'lhs' or 'rhs'"):
        qwix.transpose_qarray(q, (((1,), (0,)), ((), ())), "left")
    with pytest.raises(ValueError, match="K is the last axis of every lhs"):
        qwix.transpose_qarray(q, (((1,), (0,)), ((), ())), "lhs", k_last=False)
    with pytest.raises(ValueError, match="out of range"):
        qwix.transpose_qarray(q, (((1,), (2,)), ((), ())), "rhs")


def test_layout_pairs_are_in_the_order_of_the_rhs():
    make = transposed_qarray.make_layout
    numbers = (((2, 1), (0, 1)), ((0,), (2,)))
    assert make((5, 3, 4), numbers, "lhs").contracting == (2, 1)
    rhs = make((4, 3, 5, 7), numbers, "rhs")
    assert rhs.contracting == (0, 1) and rhs.batch == (2,) and rhs.free == (3,) and not rhs.k_last
