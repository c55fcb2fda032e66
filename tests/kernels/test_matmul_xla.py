"""The portable matmul against numpy: integers bit for bit, floats within the derived bound."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwix_kernels.matmul import RowQuantize, Tensor, elementwise, matmul, problem_of, reference, xla

SIZES = (1, 2, 3, 7, 13, 32, 48)
TILES = (1, 2, 5, 16, 32, 40, 64)
QTYPES = ("int8", "int4", "uint8", "uint4", "int2", "float8_e4m3fn", "float8_e5m2", "nf4", "int16")
FLOATS = ("float32", "bfloat16", "float16")


def draw_values(rng, shape, dtype):
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return jnp.asarray(rng.integers(info.min, info.max + 1, shape), dtype)
    return jnp.asarray(rng.standard_normal(shape), dtype)


def draw_tensor(rng, shape, qtype, scale_shape=None, scale_dtype="float32", zero_point=False):
    dtype = "uint4" if qtype == "nf4" else qtype
    values = draw_values(rng, shape, dtype)
    if scale_shape is None:
        return Tensor(values, codebook="nf4" if qtype == "nf4" else None)
    scale = jnp.asarray(rng.uniform(0.01, 1.0, scale_shape) * 2.0 ** rng.integers(-8, 8), scale_dtype)
    zero = draw_values(rng, scale_shape, dtype) if zero_point else None
    return Tensor(values, scale, zero, "nf4" if qtype == "nf4" else None)


def assert_matches(lhs, rhs, **options):
    """matmul of these operands is within the bound of the reference, or equal where it counts integers."""
    problem = problem_of(lhs, rhs, **options)
    left, right = (x if isinstance(x, Tensor) else Tensor(x) for x in (lhs, rhs))
    got = np.asarray(matmul(lhs, rhs, implementation="xla", **options))
    want = reference.run(problem, left, right)
    assert got.shape == want.shape == (problem.batch, problem.m, problem.n)
    if problem.out_dtype == "int32":
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want)
        return
    bound = reference.error_bound(problem, left, right)
    error = np.abs(got.astype(np.float64) - want)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), (
        f"{problem}: at {worst} {got[worst]} vs {want[worst]}, bound {bound[worst]}"
    )


@st.composite
def scaled(draw, side):
    """(qtype, tile along K, tile along the free axis or 0 for all, zero point, scale dtype)"""
    qtype = draw(st.sampled_from(QTYPES), label=f"{side} qtype")
    return (
        qtype,
        draw(st.sampled_from((0, *TILES)), label=f"{side} tile_k"),
        draw(st.sampled_from((0, 1, 1, 2, 3)), label=f"{side} tile_free"),
        not qtype.startswith(("float", "nf4")) and draw(st.booleans(), label=f"{side} zero point"),
        draw(st.sampled_from(FLOATS), label=f"{side} scale dtype"),
    )


def operand(rng, how, batch, free, k, k_first):
    qtype, tile_k, tile_free, zero, scale_dtype = how
    k_scales = k // tile_k if tile_k and k % tile_k == 0 else 1
    free_scales = free // tile_free if tile_free and free % tile_free == 0 else 1
    order = lambda a, b: (batch, b, a) if k_first else (batch, a, b)
    return draw_tensor(rng, order(free, k), qtype, order(free_scales, k_scales), scale_dtype, zero)


@settings(max_examples=40)
@given(
    m=st.sampled_from(SIZES),
    n=st.sampled_from(SIZES),
    k=st.sampled_from((1, 5, 13, 64, 80, 160)),
    batches=st.sampled_from(((1, 1), (3, 3), (2, 1), (1, 2))),
    left=scaled("lhs"),
    right=scaled("rhs"),
    transposed=st.booleans(),
    out=st.sampled_from(("float32", "bfloat16")),
    seed=st.integers(0, 2**31),
)
def test_both_sides_quantized(m, n, k, batches, left, right, transposed, out, seed):
    rng = np.random.default_rng(seed)
    lhs = operand(rng, left, batches[0], m, k, False)
    rhs = operand(rng, right, batches[1], n, k, not transposed)
    if out == "float16":  # its range would overflow: that is the output's, not the product's
        lhs = Tensor(
            lhs.values, lhs.scale * jnp.asarray(2.0**-12, lhs.scale.dtype), lhs.zero_point, lhs.codebook
        )
    assert_matches(lhs, rhs, rhs_transposed=transposed, out_dtype="float32" if out == "float16" else out)


@settings(max_examples=25)
@given(
    m=st.sampled_from(SIZES),
    n=st.sampled_from(SIZES),
    k=st.sampled_from((1, 13, 64, 80)),
    dtype=st.sampled_from(FLOATS),
    right=scaled("rhs"),
    row=st.sampled_from((None, ("int8", 127.5), ("int4", 7.5), ("int8", 31.5), ("float8_e4m3fn", 448.0))),
    row_tile=st.sampled_from((0, 16, 32)),
    transposed=st.booleans(),
    batch=st.sampled_from((1, 2)),
    seed=st.integers(0, 2**31),
)
def test_float_lhs(m, n, k, dtype, right, row, row_tile, transposed, batch, seed):
    rng = np.random.default_rng(seed)
    lhs = draw_values(rng, (batch, m, k), dtype)
    lhs = lhs.at[:, 0].set(0)  # a row of zeros
    rhs = operand(rng, right, 1, n, k, not transposed)
    how = row and RowQuantize(*row, tile_k=row_tile if row_tile and k % row_tile == 0 else 0)
    assert_matches(lhs, rhs, quantize_lhs=how, rhs_transposed=transposed, out_dtype="float32")


@settings(max_examples=25)
@given(
    m=st.sampled_from(SIZES),
    n=st.sampled_from(SIZES),
    k=st.sampled_from((1, 13, 64, 257)),
    dtypes=st.tuples(*[st.sampled_from(("int8", "int4", "uint8", "uint4", "int2", "int16", "uint16"))] * 2),
    transposed=st.booleans(),
    batches=st.sampled_from(((1, 1), (2, 2), (2, 1), (1, 2))),
    seed=st.integers(0, 2**31),
)
def test_accumulators_are_bit_equal(m, n, k, dtypes, transposed, batches, seed):
    rng = np.random.default_rng(seed)
    lhs = draw_values(rng, (batches[0], m, k), dtypes[0])
    rhs = draw_values(rng, (batches[1], n, k) if transposed else (batches[1], k, n), dtypes[1])
    problem = problem_of(lhs, rhs, rhs_transposed=transposed)
    got = np.asarray(matmul(lhs, rhs, rhs_transposed=transposed))
    want = reference.accumulators(problem, Tensor(lhs), Tensor(rhs))
    # What int32 cannot hold is reduced modulo 2**32, like any int32 sum.
    np.testing.assert_array_equal(got, want.astype(np.int32))


@pytest.mark.parametrize("left", ["int8", "uint8"])
def test_extreme_values_at_the_longest_run(left):
    k = 40000  # beyond MAX_RUN, with zero points at the other end of the range
    low, high = jnp.iinfo(left).min, jnp.iinfo(left).max
    lhs = Tensor(jnp.full((1, 2, k), high, left), jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), low, left))
    rhs = Tensor(jnp.full((1, k, 3), -128, jnp.int8), jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 127, jnp.int8))
    assert_matches(lhs, rhs, out_dtype="float32")


def test_int16_products_do_not_overflow():
    rng = np.random.default_rng(0)
    lhs = draw_tensor(rng, (1, 4, 512), "int16", (1, 4, 1))
    rhs = draw_tensor(rng, (1, 512, 4), "int16", (1, 1, 4))
    assert_matches(lhs, rhs)


def test_zero_blocks_give_exact_zeros():
    x = jnp.zeros((1, 3, 64), jnp.float32)
    w = Tensor(jnp.ones((1, 64, 5), jnp.int8), jnp.ones((1, 2, 5)))
    for how in (None, RowQuantize("int8", 127.5), RowQuantize("float8_e4m3fn", 448.0, 32)):
        assert not np.asarray(matmul(x, w, quantize_lhs=how)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", [None, RowQuantize("int8", 127.5), RowQuantize("int8", 127.5, 32)])
def test_a_bad_value_spoils_its_row_and_no_other(bad, how):
    x = jnp.ones((1, 3, 64)).at[0, 1, 7].set(bad)
    w = Tensor(jnp.ones((1, 64, 5), jnp.int8), jnp.ones((1, 2, 5)))
    got = np.asarray(matmul(x, w, quantize_lhs=how))[0]
    assert np.isfinite(got[[0, 2]]).all()
    assert not np.isfinite(got[1]).any()
    assert np.isnan(got[1]).all() or (how is None and np.isinf(bad))


def test_a_nan_scale_spoils_its_column_and_no_other():
    w = Tensor(jnp.ones((1, 64, 3), jnp.int8), jnp.ones((1, 2, 3)).at[0, 1, 1].set(np.nan))
    got = np.asarray(matmul(jnp.ones((1, 2, 64), jnp.int8), w))
    assert np.isnan(got[..., 1]).all() and np.isfinite(got[..., [0, 2]]).all()


def test_float16_scales_do_not_overflow():
    scale = jnp.full((1, 1, 1), 200.0, jnp.float16)  # 200 * 200 fits, 127 * 127 * 64 * 200 would not
    x = Tensor(jnp.full((1, 1, 64), 127, jnp.int8), scale)
    w = Tensor(jnp.full((1, 64, 1), 127, jnp.int8), scale)
    assert_matches(x, w, out_dtype="float32")


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 3, 0)])
@pytest.mark.parametrize("how", [None, RowQuantize("int8", 127.5)])
def test_empty_operands(shape, how):
    m, k, n = shape
    w = Tensor(jnp.ones((1, k, n), jnp.int8), jnp.ones((1, 1, n)))
    got = matmul(jnp.ones((2, m, k)), w, quantize_lhs=how)
    assert got.shape == (2, m, n) and not np.asarray(got).any()


@pytest.mark.parametrize(
    "how", [RowQuantize("int8", 127.5), RowQuantize("int8", 31.5, 16), RowQuantize("int4", 7.5)]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_quantized_as_documented(how, dtype):
    x = draw_values(np.random.default_rng(1), (1, 257, 64), dtype) * jnp.asarray(3, dtype)
    got = jax.jit(lambda x: elementwise.quantize_rows(x, how))(x)
    want = reference.quantize_rows(np.asarray(x), how)
    np.testing.assert_array_equal(got.scale, want.scale)
    np.testing.assert_array_equal(got.values, want.values.astype(got.values.dtype))


def test_subnormal_rows_keep_a_scale_of_one():
    x = jnp.full((1, 1, 32), 1e-22, jnp.float32)
    got = elementwise.quantize_rows(x, RowQuantize("int8", 127.5))
    assert float(got.scale[0, 0, 0]) == 1.0 and not np.asarray(got.values).any()


def compiled_text(fun, *args):
    return jax.jit(fun).lower(*args).compile().as_text()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("qtype", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("how", [None, RowQuantize("int8", 127.5)])
def test_nothing_is_transposed(transposed, qtype, tiles, how):
    shape, scale = ((1, 48, 128), (1, 48, tiles)) if transposed else ((1, 128, 48), (1, tiles, 48))
    w = draw_tensor(np.random.default_rng(0), shape, qtype, scale)
    text = compiled_text(
        lambda x, w: matmul(x, w, quantize_lhs=how, rhs_transposed=transposed), jnp.ones((1, 16, 128)), w
    )
    assert " transpose(" not in text


def test_tiles_are_not_materialised():
    w = draw_tensor(np.random.default_rng(0), (1, 512, 256), "int8", (1, 8, 256))
    x = draw_tensor(np.random.default_rng(0), (1, 256, 512), "int8", (1, 256, 8))
    memory = jax.jit(matmul).lower(x, w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 256 * 256 * 4  # 8 tiles of partial results would be 8 of these


@pytest.mark.parametrize("shared", [False, True], ids=["rows", "all"])
@pytest.mark.parametrize("qtype", ["int8", "uint4"])
def test_many_rows_with_tiles_are_multiplied_block_by_block(qtype, shared):
    rng = np.random.default_rng(0)
    m, k, n = 2 * xla.ROWS_AT_ONCE + 45, 96, 8
    left = draw_tensor(rng, (1, m, k), "int8", (1, 1 if shared else m, 3), zero_point=True)
    right = draw_tensor(rng, (1, k, n), qtype, (1, 3, n), zero_point=True)
    assert_matches(left, right)
    assert f"s32[{m}," not in compiled_text(lambda a, b: matmul(a, b), left, right)


@pytest.mark.parametrize(("qtype", "functions"), [("int8", {"prepare"}), ("int4", {"prepare", "multiply"})])
def test_a_cpu_compiles_once_what_many_matmuls_share(qtype, functions):
    rng = np.random.default_rng(0)
    x = draw_values(rng, (1, 4, 64), "bfloat16")
    wide, narrow = (draw_tensor(rng, (1, 64, n), qtype, (1, 1, n)) for n in (32, 16))
    rows = RowQuantize("int8", 127.0)

    def run(x, wide, narrow):
        return [matmul(x, w, quantize_lhs=rows, out_dtype="float32") for w in (wide, narrow, wide)]

    text = jax.jit(run).lower(x, wide, narrow).as_text()
    shared = re.findall(r"call @(\w+?)(?:_\d+)?\(.*xla_late", text)
    defined = collections.Counter(re.findall(r"func private @(\w+?)(?:_\d+)?\(", text))
    assert set(shared) == functions and shared.count("prepare") == 3 and defined["prepare"] == 1
    assert defined["multiply"] == 2 * ("multiply" in functions)
    for got, w in zip(jax.jit(run)(x, wide, narrow), (wide, narrow, wide), strict=True):
        problem = problem_of(x, w, quantize_lhs=rows, out_dtype="float32")
        inline = jax.jit(lambda x, w, problem=problem: xla.run(problem, Tensor(x), w))
        np.testing.assert_array_equal(got, inline(x, w))


def test_partitioned_programs_share_nothing():
    x, w = jnp.zeros((1, 8, 64)), draw_tensor(np.random.default_rng(0), (1, 64, 32), "int8", (1, 1, 32))
    rows = RowQuantize("int8", 127.0)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.P(None, "x"))
    run = jax.jit(lambda x, w: matmul(x, w, quantize_lhs=rows), in_shardings=(spread, None))
    assert "xla_late" not in run.lower(x, w).as_text()
