"""einsum: every form that jax.numpy takes, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwix
from qwix._src.core import einsum as einsum_lib
from qwix._src.core import einsum_info

SIZES = dict(zip("abcdefgh", (2, 3, 4, 6, 5, 2, 1, 8), strict=True))


def _operand(term, seed, qtype=None, tile=None):
    x = jax.random.normal(jax.random.key(seed), tuple(SIZES[c] for c in term))
    return x if qtype is None else qwix.quantize(x, qtype, tiled_axes={len(term) - 1: tile} if tile else None)


def test_info_of_one_step():
    info = einsum_info.EinsumInfo.parse("abc,bcd->acd")
    assert info.dimension_numbers == (((1,), (0,)), ((2,), (1,))) and info.output_perm == (1, 0, 2)
    info = einsum_info.EinsumInfo.parse("...a,ab->...b", (2, 2))
    assert info.dimension_numbers == (((1,), (0,)), ((), ())) and info.output_perm is None
    for unsupported in ("ab->a", "aab,bc->ac", "a,b,c->abc"):
        with pytest.raises(NotImplementedError):
            einsum_info.EinsumInfo.parse(unsupported)


@pytest.mark.parametrize(
    "subscripts",
    [
        "ab,bc->ac", "ab,bc->ca", "ab,bc->c", "ab,bc->", "ab,cb->ac", "abd,dc->abc", "bda,bdc->bac",
        "ab,cd->abcd", "aab,bc->ac", "ab,ab->ab", "ab,b->a", "gb,bc->gc", "acb,bc->a",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kinds", [("int8", "int4"), ("int8", None)])
def test_two_operands(subscripts, kinds, check_einsum):
    terms = subscripts.split("->")[0].split(",")
    if terms[0] == "aab":
        x = jax.random.normal(jax.random.key(0), (2, 2, 3))
        a = x if kinds[0] is None else qwix.quantize(x, kinds[0])
        b = _operand(terms[1], 1, kinds[1])
    else:
        a, b = (_operand(t, n, k) for n, (t, k) in enumerate(zip(terms, kinds, strict=True)))
    check_einsum(qwix.einsum(subscripts, a, b), subscripts, a, b)


def test_one_sided_reductions_have_the_right_shape(normal, check_einsum):
    """A label of one operand alone that the output lacks is summed over."""
    a = qwix.quantize(normal(0, 4, 8), "int8", channelwise_axes=(0,))
    w = qwix.quantize(normal(1, 8, 16), "int8", channelwise_axes=(1,))
    out = qwix.einsum("ab,bc->c", a, w)
    assert out.shape == (16,)
    check_einsum(out, "ab,bc->c", a, w)


def test_ellipsis_and_implicit_output(normal):
    x, w = normal(2, 2, 3, 8), qwix.quantize(normal(3, 8, 4), "int8", channelwise_axes=(1,))
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
    for out in (
        qwix.einsum("...d,df->...f", x, w),
        qwix.einsum("...d,df", x, w),
        qwix.einsum("abd,df", x, w),
        qwix.einsum(x, [0, 1, 2], w, [2, 3], [0, 1, 3]),
        qwix.einsum(x, [..., 2], w, [2, 3]),
        qwix.einsum(" abd, df -> abf ", x, w),
    ):
        assert out.shape == exact.shape
        np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)
    batched = qwix.quantize(normal(4, 1, 8, 4), "int8")
    out = qwix.einsum("...ij,...jk->...ik", x[:, None], batched)
    np.testing.assert_allclose(out, np.matmul(x[:, None], batched.dequantize()), rtol=1e-5, atol=1e-5)


def test_three_operands_and_one(normal):
    a, b, c = normal(5, 4, 8), normal(6, 8, 6), normal(7, 6, 3)
    qb, qc = qwix.quantize(b, "int8", channelwise_axes=(1,)), qwix.quantize(c, "int4", channelwise_axes=(1,))
    exact = np.linalg.multi_dot([np.asarray(x, np.float64) for x in (a, qb.dequantize(), qc.dequantize())])
    for optimize in ("auto", "greedy", False, [(1, 2), (0, 1)]):
        out = qwix.einsum("ab,bc,cd->ad", a, qb, qc, optimize=optimize)
        np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(qwix.einsum("ab->b", qb), qb.dequantize().sum(0), rtol=1e-6)
    np.testing.assert_array_equal(qwix.einsum("ab->ba", qb), qb.dequantize().T)


def test_integers_are_exact():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (3, 50)), rng.integers(-128, 128, (50, 4))
    for subscripts in ("ab,bc->ac", "ab,bc->c", "ab,bc->ca"):
        out = qwix.einsum(subscripts, jnp.array(a, jnp.int8), jnp.array(b, jnp.int8))
        assert out.dtype == jnp.int32
        np.testing.assert_array_equal(out, np.einsum(subscripts, a, b))


def test_sizes_that_only_divide_each_other_are_rejected():
    w = qwix.quantize(jnp.ones((4, 3)), "int8")
    with pytest.raises(ValueError, match="Cannot broadcast axis 'b' of sizes 8 and 4"):
        qwix.einsum("ab,bc->ac", jnp.ones((2, 8)), w)


@pytest.mark.parametrize(
    "subscripts", ["ab,bc->ad", "ab->a", "abc,bc->a", "ab,bc->aa", "a(b),bc->ac", "..a,ab->b"]
)
def test_subscripts_that_do_not_fit_are_refused(subscripts):
    with pytest.raises(ValueError, match="einsum"):
        qwix.einsum(subscripts, jnp.ones((2, 4)), qwix.quantize(jnp.ones((4, 3)), "int8"))


def test_floats_are_left_to_jax(normal):
    x, w = normal(8, 2, 8, dtype=jnp.bfloat16), normal(9, 8, 4)
    np.testing.assert_array_equal(qwix.einsum("ab,bc->ac", x, w), jnp.einsum("ab,bc->ac", x, w))


def test_how_to_quantize_an_operand():
    how = lambda **k: einsum_lib.get_how_to_quantize(qtype="int8", ndims=(3, 3), **k)
    dense = how(einsum_str="btd,dnh->btnh", for_lhs=False, tile_size=4)
    assert dense.channelwise_axes == (1, 2) and dense.tiled_axes == {0: 4}
    mapped = how(einsum_str="btd,dnh->btnh", for_lhs=False, tile_size={0: 4, -1: 2})
    assert mapped.channelwise_axes == (1,) and mapped.tiled_axes == {0: 4, 2: 2}


def test_weight_on_the_left_needs_no_transpose_of_it(normal, check_einsum):
    w, x = qwix.quantize(normal(10, 6, 8), "int8", channelwise_axes=(0,)), normal(11, 3, 8)
    check_einsum(qwix.einsum("fd,bd->bf", w, x), "fd,bd->bf", w, x)
    hlo = jax.jit(lambda w, x: qwix.einsum("fd,bd->bf", w, x)).lower(w, x).as_text()
    assert "stablehlo.transpose" not in hlo


def test_dynamic_quantization_of_the_float_side(normal):
    x, w = normal(12, 3, 64), qwix.quantize(normal(13, 64, 6), "int8", channelwise_axes=(1,))
    how = einsum_lib.get_how_to_quantize(
        einsum_str="ab,bc->ac", ndims=(2, 2), for_lhs=True, tile_size=None, qtype="int8"
    )
    expected = qwix.dot_general(x, w, (((1,), (0,)), ((), ())), act_how=how)
    np.testing.assert_array_equal(qwix.einsum("ab,bc->ac", x, w, act_how=how), expected)
    reduced = qwix.einsum("ab,bc->c", x, w, act_how=how)
    np.testing.assert_allclose(reduced, expected.sum(0), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="act_how"):
        qwix.einsum("ab,bc->ac", w.T, w, act_how=how)


@st.composite
def programs(draw):
    """Two or three terms over a few letters, and an output of some of theirs."""
    terms = [
        "".join(draw(st.lists(st.sampled_from("abcdg"), min_size=1, max_size=3, unique=True)))
        for _ in range(draw(st.integers(2, 3)))
    ]
    out = "".join(draw(st.permutations(sorted(set("".join(terms)))))[: draw(st.integers(0, 4))])
    kinds = [draw(st.sampled_from([None, "int8", "int4"])) for _ in terms]
    return f"{','.join(terms)}->{out}", [
        _operand(t, n, k) for n, (t, k) in enumerate(zip(terms, kinds, strict=True))
    ]


@settings(max_examples=18)
@given(program=programs())
def test_any_einsum(program, check_einsum):
    subscripts, operands = program
    check_einsum(qwix.einsum(subscripts, *operands), subscripts, *operands)
