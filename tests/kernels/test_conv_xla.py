"""The portable convolution: integers exact in any geometry, scales and zero points where they belong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwix_kernels.conv import ConvExtras, conv, images, problem_of, reference
from qwix_kernels.problem import RowQuantize, Tensor

INT8 = RowQuantize("int8", 127.5)


def stored(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return jnp.asarray(rng.integers(info.min, info.max + 1, shape), jnp.int32).astype(dtype)
    return jnp.asarray(rng.standard_normal(shape) * 3, jnp.float32).astype(dtype)


def tensor(rng, dtype, shape, scale_shape=None, zero=False) -> Tensor:
    codebook = "nf4" if dtype == "nf4" else None
    dtype = "uint4" if codebook else dtype
    if scale_shape is None:
        return Tensor(stored(rng, dtype, shape))
    scale = jnp.asarray(rng.uniform(0.01, 0.1, scale_shape), jnp.float32)
    return Tensor(
        stored(rng, dtype, shape), scale, stored(rng, dtype, scale_shape) if zero else None, codebook
    )


def assert_right(lhs: Tensor, rhs: Tensor, extras: ConvExtras | None = None, **options) -> None:
    """Against float64; integers bit for bit."""
    problem, extras = problem_of(lhs, rhs, extras, **options), extras or ConvExtras()
    got = conv(lhs, rhs, extras, **options)
    want = reference.run(problem, lhs, rhs, extras)
    if problem.out_dtype == "int32":
        np.testing.assert_array_equal(np.asarray(got), want)
        return
    allowed = reference.error_bound(problem, lhs, rhs, extras)
    wrong = np.abs(np.asarray(got, np.float64) - want) / allowed
    assert wrong.shape == problem.out_shape and (wrong <= 1).all(), f"{wrong.max()} times the bound"


@st.composite
def geometries(draw):
    """(lhs shape, rhs shape, options) of one to three spatial axes."""
    rank = draw(st.integers(1, 3))
    pick = lambda *values: draw(st.sampled_from(values))
    sizes = [draw(st.integers(1, 6)) for _ in range(rank)]
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    groups = pick(1, 1, 2, 4)
    inputs = pick(1, 2, 4)
    options = {
        "strides": [pick(1, 2, 3) for _ in range(rank)],
        "padding": [(draw(st.integers(-1, 2)), draw(st.integers(0, 2))) for _ in range(rank)],
        "lhs_dilation": [pick(1, 1, 2) for _ in range(rank)],
        "rhs_dilation": [pick(1, 1, 2) for _ in range(rank)],
        "groups": groups,
    }
    return (pick(1, 2), *sizes, inputs * groups), (*kernel, inputs, groups * pick(1, 2)), options


@settings(max_examples=12)
@given(
    case=geometries(), seed=st.integers(0, 9), dtypes=st.sampled_from([("int8", "int8"), ("uint8", "int4")])
)
def test_accumulators_are_exact(case, seed, dtypes):
    lhs, rhs, options = case
    rng = np.random.default_rng(seed)
    assert_right(tensor(rng, dtypes[0], lhs), tensor(rng, dtypes[1], rhs), **options)


@settings(max_examples=12)
@given(case=geometries(), seed=st.integers(0, 9), data=st.data())
def test_scales_tiles_and_zero_points(case, seed, data):
    """Padding is a real zero on either side of every pair of scales."""
    lhs, rhs, options = case
    rng = np.random.default_rng(seed)
    pick = lambda *values: data.draw(st.sampled_from(values))
    divisors = lambda size: [d for d in range(1, size + 1) if size % d == 0]
    of_lhs = (pick(1, lhs[0]), *(1,) * (len(lhs) - 2), pick(*divisors(lhs[-1])))
    of_rhs = (*(1,) * (len(rhs) - 2), pick(*divisors(rhs[-2])), pick(*divisors(rhs[-1])))
    left = tensor(rng, pick("int8", "uint8"), lhs, of_lhs, zero=pick(True, False))
    right = tensor(rng, pick("int8", "int4"), rhs, of_rhs, zero=pick(True, False))
    assert_right(left, right, **options)


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("zeros", [False, True])
def test_runs_of_features_stay_integers(tile, zeros):
    """More runs than are written out one by one, and few."""
    rng = np.random.default_rng(1)
    lhs = tensor(rng, "int8", (2, 5, 5, 128), (2, 1, 1, 1), zeros)
    rhs = tensor(rng, "int8", (3, 3, 128, 8), (1, 1, 128 // tile, 8), zeros)
    options = {"padding": ((1, 1), (0, 2)), "strides": (1, 2)}
    assert_right(lhs, rhs, **options)
    op = jax.jit(lambda x, w: conv(x, w, **options, implementation="xla"))
    hlo = op.trace(lhs, rhs).lower(lowering_platforms=("cuda",))
    convolutions = [line for line in hlo.as_text().splitlines() if "stablehlo.convolution" in line]
    assert convolutions and all("xi8>" in line and "xi32>" in line for line in convolutions)


FORMATS = [
    ("bfloat16", None, "int8"),
    ("bfloat16", None, "int4"),
    ("float32", None, "nf4"),
    ("float8_e4m3fn", (2, 1, 1, 1), "float8_e4m3fn"),
    ("nf4", (2, 1, 1, 1), "nf4"),
    ("float8_e5m2", (1, 1, 1, 4), "int8"),
]


@pytest.mark.parametrize(("lhs", "scale", "rhs"), FORMATS, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_other_formats(lhs, scale, rhs, groups):
    rng = np.random.default_rng(2)
    x = tensor(rng, lhs, (2, 5, 6, 8), scale)
    assert_right(
        x, tensor(rng, rhs, (3, 2, 8 // groups, 8), (1, 1, 1, 8)), padding=((1, 1), (0, 1)), groups=groups
    )
    assert_right(
        x, tensor(rng, rhs, (3, 2, 8 // groups, 8), (1, 1, 2, 8)), padding=((1, 1), (0, 1)), groups=groups
    )


IMAGES = [INT8, RowQuantize("int4", 7.5), RowQuantize("float8_e4m3fn", 448.0), RowQuantize("int8", 127.5, 4)]


@pytest.mark.parametrize("how", IMAGES, ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_images_quantized_on_the_way(how, static):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((3, 4, 4, 8)), jnp.float32).at[1].set(0)
    how = dataclasses.replace(how, static=static)
    scale = jnp.full((1, 1, 1, 8 // (how.tile_k or 8)), 0.02) if static else None
    extras = ConvExtras(scale, jnp.arange(8.0), None)
    w = tensor(rng, "int8", (3, 3, 8, 8), (1, 1, 1, 8))
    assert_right(Tensor(x), w, extras, padding=((1, 1),) * 2, quantize_lhs=how, activation="silu")
    quantized = images.quantize(x, how, scale)
    np.testing.assert_array_equal(quantized.values, reference.quantize(np.asarray(x), how, scale).values)


def test_nan_stays_in_its_image_and_zeros_are_zeros():
    rng = np.random.default_rng(4)
    x = jnp.zeros((3, 4, 4, 8)).at[0, 0, 0, 0].set(jnp.nan).at[2].set(1.0)
    w = tensor(rng, "int8", (3, 3, 8, 4), (1, 1, 1, 4))
    out = np.asarray(conv(x, w, padding=((1, 1),) * 2, quantize_lhs=INT8))
    assert np.isnan(out[0]).all() and (out[1] == 0).all() and np.isfinite(out[2]).all()


@pytest.mark.parametrize("static", [False, True])
def test_a_result_that_is_quantized(static):
    rng = np.random.default_rng(5)
    x, w = tensor(rng, "int8", (2, 4, 4, 8), (2, 1, 1, 1)), tensor(rng, "int8", (3, 3, 8, 4), (1, 1, 1, 4))
    how = dataclasses.replace(INT8, static=static)
    extras = ConvExtras(bias=jnp.ones(4), out_scale=jnp.full((1, 1, 1, 1), 0.5) if static else None)
    got = conv(x, w, extras, activation="relu", quantize_out=how)
    plain = conv(x, w, ConvExtras(bias=jnp.ones(4)), activation="relu", out_dtype=jnp.float32)
    want = images.quantize(plain, how, extras.out_scale)
    np.testing.assert_array_equal(got.values, want.values)
    np.testing.assert_array_equal(got.scale, want.scale)
    with pytest.raises(ValueError, match="no gradient"):
        jax.grad(lambda b: conv(x, w, dataclasses.replace(extras, bias=b), quantize_out=how).values.sum())(
            extras.bias
        )


def test_transformations():
    """vmap over images, over kernels and over both; jit; export for several platforms."""
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.standard_normal((3, 2, 5, 5, 4)), jnp.float32)
    ws = [tensor(rng, "int8", (3, 3, 4, 6), (1, 1, 1, 6)) for _ in range(3)]
    w = jax.tree.map(lambda *v: jnp.stack(v), *ws)
    op = lambda x, w: conv(x, w, padding=((1, 1),) * 2, quantize_lhs=INT8, implementation="xla")
    each = jnp.stack([op(a, b) for a, b in zip(x, ws, strict=True)])
    np.testing.assert_allclose(jax.vmap(op)(x, w), each, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(op, (0, None)))(x, ws[0])[1], op(x[1], ws[0]), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(op, (1, None), 1)(x, ws[0])[:, 1], op(x[:, 1], ws[0]), rtol=1e-6)
    exported = jax.export.export(jax.jit(op), platforms=("cpu", "cuda"))(x[0], ws[0])
    np.testing.assert_array_equal(exported.call(x[0], ws[0]), jax.jit(op)(x[0], ws[0]))


BAD = [
    ((1, 5, 5, 4), (3, 3, 3, 4), {}, "has 4 features and rhs .* takes 3"),
    ((1, 5, 5, 4), (3, 3, 2, 5), {"groups": 2}, "groups must divide"),
    ((1, 5, 5, 4), (3, 3, 4, 4), {"strides": (1, 0)}, r"strides is \(1, 0\)"),
    ((1, 5, 5, 4), (3, 3, 4, 4), {"strides": (1,)}, "needs 2 numbers"),
    ((1, 5, 5, 4), (3, 3, 4, 4), {"padding": ((-3, -3), (0, 0))}, r"padding \(-3, -3\) crops .* 5 elements"),
    ((1, 5, 4), (3, 3, 4, 4), {}, "of one rank"),
    ((1, 5, 5, 4), (3, 3, 4, 4), {"activation": "tanh"}, "Unknown activation 'tanh'"),
    ((1, 5, 5, 4), (3, 3, 4, 4), {"quantize_lhs": INT8}, "plain float lhs"),
]


@pytest.mark.parametrize(("lhs", "rhs", "options", "said"), BAD, ids=lambda x: str(x)[:40])
def test_what_disagrees_is_named(lhs, rhs, options, said):
    struct = jax.ShapeDtypeStruct
    with pytest.raises(ValueError, match=said):
        problem_of(struct(lhs, jnp.int8), struct(rhs, jnp.int8), **options)


def test_scales_along_space_and_unknown_names_are_refused():
    rng = np.random.default_rng(7)
    w = tensor(rng, "int8", (3, 3, 4, 4), (3, 1, 1, 4))
    with pytest.raises(ValueError, match="varies along spatial axes"):
        problem_of(stored(rng, "int8", (1, 5, 5, 4)), w)
    with pytest.raises(ValueError, match="did you mean 'mosaic_tpu'"):
        conv(stored(rng, "int8", (1, 5, 5, 4)), stored(rng, "int8", (3, 3, 4, 4)), implementation="mosaic")
