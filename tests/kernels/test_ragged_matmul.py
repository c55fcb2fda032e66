"""gmm and tgmm through their portable path: every scheme, any group sizes, JAX's transformations, bad input.

Integer accumulators are bit-equal to int64; floats are within the derived bound of the matmul of each group.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix_kernels import ragged_matmul
from qwix_kernels.problem import Extras, RowQuantize, Tensor
from qwix_kernels.ragged_matmul import gmm, reference, tgmm

from tests.kernels.test_matmul_tpu_interpret import BOUND, stored, tensor

G, M, K, N = 3, 24, 64, 16
SIZES = [5, 0, 11]


def case(rng, rhs, tiles=(K, 1), *, lhs="float32", act=None, transposed=False, out="float32", **kwargs):
    """(lhs, rhs, options of gmm)"""
    shape, tiles = ((G, N, K), tiles[::-1]) if transposed else ((G, K, N), tiles)
    how = None if act is None else RowQuantize(act[0], BOUND[act[0]], act[1])
    options = {"quantize_lhs": how, "rhs_transposed": transposed, "out_dtype": out}
    return Tensor(stored(rng, lhs, (M, K))), tensor(rng, rhs, shape, tiles, **kwargs), options


def assert_right(x, w, options, sizes, extras=None, offset=None, run=gmm):
    problem = ragged_matmul.gmm_problem_of(x, w, jnp.asarray(sizes), extras, group_offset=offset, **options)
    got = np.asarray(run(x, w, jnp.asarray(sizes), extras, group_offset=offset, **options)).astype(np.float64)
    first = sum(sizes[:offset]) if offset else 0
    mine = sizes[offset : offset + problem.matrices] if offset is not None else sizes
    given = problem, x, w, mine, extras or Extras(), first
    want = reference.gmm(*given)
    if problem.product.out_dtype == "int32":
        np.testing.assert_array_equal(got, want)
        return
    wrong = ~(np.abs(got - want) <= reference.gmm_error_bound(*given))
    assert not wrong.any(), (wrong.sum(), got[wrong][:3], want[wrong][:3])


SCHEMES = {
    "w8a8": {"rhs": "int8", "act": ("int8", 0)},
    "w8a8_g16": {"rhs": "int8", "tiles": (16, 1), "act": ("int8", 16)},
    "w4a8_g32": {"rhs": "int4", "tiles": (32, 1), "act": ("int8", 0)},
    "w8a16": {"rhs": "int8", "transposed": True},
    "w4a16_g32_n4": {"rhs": "int4", "tiles": (32, 4), "zero_point": True},
    "wf8af8": {"rhs": "float8_e4m3fn", "act": ("float8_e4m3fn", 0)},
    "wnf4a16_g32": {"rhs": "nf4", "tiles": (32, 1), "lhs": "bfloat16", "out": "bfloat16"},
    "wmxfp8": {"rhs": "float8_e4m3fn", "tiles": (32, 1), "scale_dtype": "float8_e8m0fnu"},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(name):
    assert_right(*case(np.random.default_rng(0), **SCHEMES[name]), SIZES)


def test_what_is_fused_has_the_groups_entries():
    rng = np.random.default_rng(1)
    x, w, options = case(rng, "int8", act=("int8", 0))
    of_group = lambda: jnp.asarray(rng.standard_normal((G, 1, N)), jnp.float32)
    _, gate, _ = case(rng, "int8")
    extras = Extras(bias=of_group(), gate=gate, gate_bias=jnp.ones(N), residual=jnp.ones((1, M, N)))
    problem = ragged_matmul.gmm_problem_of(x, w, jnp.asarray(SIZES), extras, activation="silu", **options)
    got = gmm(x, w, jnp.asarray(SIZES), extras, activation="silu", **options)
    want = reference.gmm(problem, x, w, SIZES, extras)
    assert (np.abs(got - want) <= reference.gmm_error_bound(problem, x, w, SIZES, extras)).all()
    assert not np.asarray(got[16:]).any()


_jitted = jax.jit(functools.partial(gmm, out_dtype=jnp.int32), static_argnames="group_offset")


def sizes_of(groups: int):
    """Empty ones, one big one, few or many rows, more rows than there are."""
    small = st.integers(0, M // groups)
    return st.one_of(
        st.lists(small, min_size=groups, max_size=groups),
        st.sampled_from([[0] * groups, [M] + [0] * (groups - 1), [0] * (groups - 1) + [M], [M] * groups]),
    )


@hypothesis.settings(max_examples=25)
@hypothesis.given(sizes_of(4), st.integers(0, 2**16))
def test_integers_are_exact_for_any_sizes(sizes, seed):
    rng = np.random.default_rng(seed)
    x, w = stored(rng, "int8", (M, K)), stored(rng, "int8", (4, K, N))
    sizes = np.diff(np.minimum(np.cumsum([0, *sizes]), M)).tolist()
    problem = ragged_matmul.gmm_problem_of(x, w, jnp.asarray(sizes))
    np.testing.assert_array_equal(
        _jitted(x, w, jnp.asarray(sizes)), reference.gmm(problem, Tensor(x), Tensor(w), sizes)
    )


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_some_matrices_of_many(offset):
    """A device that holds three of five groups; one that holds a group which does not exist."""
    assert_right(*case(np.random.default_rng(2), "int8", act=("int8", 0)), [3, 4, 0, 5, 2], offset=offset)


def test_rows_of_no_group_may_hold_anything():
    x, w, options = case(np.random.default_rng(3), "int8", act=("int8", 0))
    dirty = Tensor(x.values.at[16:].set(jnp.nan))
    clean = gmm(x, w, jnp.asarray(SIZES), **options)
    np.testing.assert_array_equal(gmm(dirty, w, jnp.asarray(SIZES), **options), clean)
    g = jnp.ones((M, N)).at[16:].set(jnp.inf)
    assert np.isfinite(np.asarray(tgmm(dirty, g, jnp.asarray(SIZES)))).all()


@pytest.mark.parametrize(
    ("lhs", "g", "scaled", "out"),
    [
        ("int8", "int8", False, "int32"),
        ("int8", "int8", True, "float32"),
        ("float32", "int8", True, "bfloat16"),
        ("float8_e4m3fn", "float8_e5m2", True, "float32"),
    ],
)
def test_products_of_groups(lhs, g, scaled, out):
    rng = np.random.default_rng(4)
    scales = lambda size: jnp.asarray(rng.uniform(0.01, 0.1, (1, size)), jnp.float32) if scaled else None
    left = Tensor(stored(rng, lhs, (M, 8)), scales(8) if lhs != "float32" else None)
    right = Tensor(stored(rng, g, (M, N)), scales(N))
    problem = ragged_matmul.tgmm_problem_of(left, right, jnp.asarray(SIZES), out_dtype=out)
    got = np.asarray(tgmm(left, right, jnp.asarray(SIZES), out_dtype=out)).astype(np.float64)
    want = reference.tgmm(problem, left, right, SIZES)
    assert (np.abs(got - want) <= reference.tgmm_error_bound(problem, left, right, SIZES)).all()
    assert not got[1].any()
    some = tgmm(left, right, jnp.asarray(SIZES), group_offset=1, matrices=2, out_dtype=out)
    np.testing.assert_array_equal(some.astype(jnp.float32), got[1:].astype(np.float32))


def by_group(x, w, sizes):
    """What a gmm is, by a mask for each group: a reference for gradients."""
    ends = jnp.cumsum(sizes)
    rows = jnp.arange(x.shape[0])[:, None]
    parts = [
        jnp.where((rows >= end - size) & (rows < end), x, 0) @ w[i]
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    return sum(parts)


def test_gradients_are_those_of_the_float_product():
    rng = np.random.default_rng(5)
    x, w, g = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((M, 8), (G, 8, 4), (M, 4)))
    sizes = jnp.asarray(SIZES)
    want = jax.vjp(lambda x, w: by_group(x, w, sizes), x, w)[1](g)
    for ours, theirs in zip(
        jax.jit(lambda x, w: jax.vjp(lambda x, w: gmm(x, w, sizes), x, w)[1](g))(x, w), want, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)
    turned = jax.grad(lambda x, w: jnp.sum(gmm(x, w.mT, sizes, rhs_transposed=True) * g), argnums=1)(x, w)
    np.testing.assert_allclose(turned, want[1], rtol=2e-6, atol=2e-6)
    # And of the product of each group.
    d = jnp.asarray(rng.standard_normal((G, 8, 4)), jnp.float32)
    ours = jax.grad(lambda x, g: jnp.sum(tgmm(x, g, sizes) * d), argnums=(0, 1))(x, g)
    np.testing.assert_allclose(ours[1], by_group(x, d, sizes), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(ours[0], by_group(g, d.mT, sizes), rtol=2e-6, atol=2e-6)


def test_gradients_of_what_is_fused():
    rng = np.random.default_rng(6)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x, w, v, b, sizes = normal(M, 8), normal(G, 8, 4), normal(G, 8, 4), normal(G, 1, 4), jnp.asarray(SIZES)
    alive = jnp.arange(M)[:, None] < sum(SIZES)

    def fused(x, w, v, b):
        return gmm(x, w, sizes, Extras(gate=Tensor(v), bias=b, gate_bias=b), activation="silu").sum()

    def plain(x, w, v, b):
        rows = by_group(jnp.ones((M, 1)), b, sizes)
        z = jax.nn.silu(by_group(x, v, sizes) + rows) * (by_group(x, w, sizes) + rows)
        return jnp.where(alive, z, 0).sum()

    ours = jax.jit(jax.grad(fused, argnums=(0, 1, 2, 3)))(x, w, v, b)
    for mine, theirs in zip(ours, jax.grad(plain, argnums=(0, 1, 2, 3))(x, w, v, b), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own_weights", [False, pytest.param(True, marks=pytest.mark.large)])
def test_vmap_makes_more_groups_and_no_loop(own_weights):
    rng = np.random.default_rng(7)
    x, w = stored(rng, "int8", (2, M, K)), stored(rng, "int8", (2, G, K, N))
    sizes = jnp.asarray([SIZES, [0, 20, 4]])
    axes = (0, 0 if own_weights else None, 0)
    given = w if own_weights else w[0]
    run = jax.vmap(functools.partial(gmm, out_dtype=jnp.int32), axes)
    assert str(jax.make_jaxpr(run)(x, given, sizes)).count("qwix_gmm") == 1
    for i, out in enumerate(run(x, given, sizes)):
        np.testing.assert_array_equal(
            out, gmm(x[i], w[i if own_weights else 0], sizes[i], out_dtype=jnp.int32)
        )
    each = jax.vmap(tgmm)(x[..., :8], x[..., 8:12], sizes)
    np.testing.assert_array_equal(each[1], tgmm(x[1, :, :8], x[1, :, 8:12], sizes[1]))


def test_vmap_of_a_bias_alone():
    x, w, options = case(np.random.default_rng(8), "int8")
    biases = jnp.arange(2.0 * N).reshape(2, 1, 1, N)
    run = lambda b: gmm(x, w, jnp.asarray(SIZES), Extras(bias=b), **options)
    for i, out in enumerate(jax.vmap(run)(biases)):
        np.testing.assert_array_equal(out, run(biases[i]))


@pytest.mark.parametrize(
    ("lhs", "rhs", "sizes", "options", "message"),
    [
        ((1, 4, 8), (2, 8, 4), [2, 2], {}, "lhs must have 2 axes"),
        ((4, 8), (8, 4), [2, 2], {}, "rhs must have 3 axes"),
        ((4, 8), (2, 8, 4), [2, 2, 0], {}, "Give group_offset if rhs holds some"),
        ((4, 8), (2, 6, 4), [2, 2], {}, "K disagrees"),
        ((4, 8), (2, 8, 4), [2.0, 2.0], {}, "vector of integers"),
        ((4, 8), (2, 8, 4), [2, 2], {"implementation": "mosaic"}, "did you mean 'mosaic_tpu'"),
        ((4, 8), (2, 8, 4), [2, 2], {"extras": Extras(bias=jnp.ones((3, 1, 4)))}, "bias has shape"),
    ],
)
def test_what_does_not_fit_is_named(lhs, rhs, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        gmm(jnp.ones(lhs, jnp.int8), jnp.ones(rhs, jnp.int8), jnp.asarray(sizes), **options)


def test_a_named_kernel_says_why_it_cannot_run_here():
    with pytest.raises(NotImplementedError, match="runs on tpu, not on cpu"):
        gmm(jnp.ones((4, 8)), jnp.ones((2, 8, 4)), jnp.asarray([2, 2]), implementation="mosaic_tpu")


def test_nothing_to_sum_is_zero():
    assert gmm(jnp.ones((0, 8)), jnp.ones((2, 8, 4)), jnp.asarray([0, 0])).shape == (0, 4)
    out = gmm(jnp.ones((3, 0)), jnp.ones((2, 0, 4)), jnp.asarray([1, 1]), Extras(bias=jnp.ones(4)))
    np.testing.assert_array_equal(out, [[1] * 4, [1] * 4, [0] * 4])
