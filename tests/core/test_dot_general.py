"""dot_general and dot: every pair of formats, exact integers, an analytic bound for the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwix
from qwix._src.core import dot_general as dot_lib
from qwix._src.core import dot_plan, mxfp_dot
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.transposed_qarray import make_layout

DENSE = (((1,), (0,)), ((), ()))
PAIRS = [
    ("int8", "int8"), ("int8", "int4"), ("int4", "int4"), (None, "int8"), (None, "int4"), (None, "nf4"),
    (None, "float8_e4m3fn"), ("nf4", None), ("nf4", "nf4"), ("int8", "nf4"), ("int16", "int16"),
    ("float8_e4m3fn", "float8_e4m3fn"), ("float8_e5m2", "int8"), ("int3", "int6"), ("int1", None),
    ("uint8", "int8"), (None, "mxfp4"), ("mxfp8", "int8"), (None, "float4_e2m1fn"), ("int8", None),
]  # fmt: skip


def _quantize(x, qtype, axis, tile=None, **options):
    """Channelwise along everything but the contracting axis, which may be tiled."""
    if qtype is None:
        return x
    others = tuple(a for a in range(x.ndim) if a != axis)
    return qwix.quantize(
        x, qtype, channelwise_axes=others, tiled_axes={axis: tile} if tile else None, **options
    )


@pytest.mark.parametrize("lhs, rhs", PAIRS)
def test_every_pair_of_formats_is_within_the_bound(lhs, rhs, normal, check_einsum):
    a, b = _quantize(normal(0, 6, 64), lhs, 1, 32), _quantize(normal(1, 64, 5), rhs, 0, 32)
    check_einsum(qwix.dot_general(a, b, DENSE), "mk,kn->mn", a, b)


@pytest.mark.parametrize("dtypes", [("int8", "int8"), ("int4", "int8"), ("int4", "int4"), ("uint8", "int8")])
def test_plain_integers_are_exact(dtypes):
    rng = np.random.default_rng(0)
    info = [jnp.iinfo(d) for d in dtypes]
    a, b = (
        rng.integers(info[0].min, info[0].max + 1, (3, 300)),
        rng.integers(info[1].min, info[1].max + 1, (300, 7)),
    )
    out = qwix.dot_general(jnp.array(a, dtypes[0]), jnp.array(b, dtypes[1]), DENSE)
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, a @ b)


def test_int16_does_not_overflow(check_einsum, normal):
    """512 products of the largest values: 2^39, far beyond int32."""
    a = qwix.quantize(jnp.full((2, 512), 3.0).at[0].set(normal(0, 512)), "int16", channelwise_axes=(0,))
    b = qwix.quantize(jnp.full((512, 3), -2.0), "int16", channelwise_axes=(1,))
    assert int(a.qvalue[1].min()) == 32767 and int(b.qvalue.max()) == -32768
    check_einsum(qwix.dot_general(a, b, DENSE), "mk,kn->mn", a, b)
    tiled = _quantize(normal(1, 4, 256), "int16", 1, 128), _quantize(normal(2, 256, 4), "int16", 0, 128)
    check_einsum(qwix.dot_general(*tiled, DENSE), "mk,kn->mn", *tiled)


@pytest.mark.parametrize("lhs_method", ["absmax", "minmax"])
@pytest.mark.parametrize("tiles", [(None, None), (16, 32), (8, None)])
def test_zero_points_on_either_or_both_sides(lhs_method, tiles, normal, check_einsum):
    a = _quantize(normal(3, 5, 64) + 2, "int8", 1, tiles[0], calibration_method=lhs_method)
    b = _quantize(normal(4, 64, 6) - 1, "int4", 0, tiles[1], calibration_method="minmax")
    check_einsum(qwix.dot_general(a, b, DENSE), "mk,kn->mn", a, b)


@pytest.mark.parametrize(
    "a_tiles, b_tiles",
    [
        ({0: 2, 1: 16}, {0: 8, 1: 3}),  # 2-D tiles, different sizes
        ({1: 1}, {0: 4}),  # a scale per element of K
        ({1: 64}, {}),
        ({}, {0: 1, 1: 1}),
    ],
)
def test_tiles_of_any_shape(a_tiles, b_tiles, normal, check_einsum):
    a = qwix.quantize(normal(5, 4, 64), "int8", tiled_axes=a_tiles)
    b = qwix.quantize(normal(6, 64, 6), "int4", tiled_axes=b_tiles)
    check_einsum(qwix.dot_general(a, b, DENSE), "mk,kn->mn", a, b)
    x = normal(7, 4, 64)
    check_einsum(qwix.dot_general(x, b, DENSE), "mk,kn->mn", x, b)


@st.composite
def dots(draw):
    """Two operands with up to two axes in each group, in any order, with any scales."""
    groups = {c: draw(st.sampled_from([1, 2, 3, 4, 6])) for c in "abcdefgh"}
    batch, contracting = "ab"[: draw(st.integers(0, 2))], "cd"[: draw(st.integers(0, 2))]
    terms = [
        batch + contracting + "ef"[: draw(st.integers(0, 2))],
        batch + contracting + "gh"[: draw(st.integers(0, 2))],
    ]
    sides = []
    for n, term in enumerate(terms):
        term = "".join(draw(st.permutations(term)))
        shape = tuple(groups[c] for c in term)
        scale = tuple(draw(st.sampled_from([d for d in (1, 2, 3, 4, 6) if s % d == 0])) for s in shape)
        rng = np.random.default_rng(draw(st.integers(0, 9)))
        kind = draw(st.sampled_from(["float", "int8", "int4"] if n else ["int8", "int4"]))
        if kind == "float":
            sides.append((term, jnp.array(rng.normal(size=shape), jnp.float32)))
            continue
        values = jnp.array(rng.integers(-8, 8, shape), kind)
        zero = jnp.array(rng.integers(-8, 8, scale), kind) if draw(st.booleans()) else None
        sides.append((term, qwix.QArray(values, jnp.array(rng.normal(size=scale), jnp.float32), zero)))
    sides = sides[:: draw(st.sampled_from([1, -1]))]
    numbers = tuple(
        tuple(tuple(t.index(c) for c in chars) for t, _ in sides) for chars in (contracting, batch)
    )
    free = "".join(c for t, _ in sides for c in t if c not in batch + contracting)
    return f"{sides[0][0]},{sides[1][0]}->{batch}{free}", numbers, sides[0][1], sides[1][1]


@settings(max_examples=18)
@given(case=dots())
def test_any_axes_and_any_scales(case, check_einsum):
    subscripts, numbers, a, b = case
    check_einsum(qwix.dot_general(a, b, numbers), subscripts, a, b)


def test_negative_axes_count_from_the_back(normal):
    x, w = normal(8, 2, 3, 8), qwix.quantize(normal(9, 8, 4), "int8", channelwise_axes=(1,))
    out = qwix.dot_general(x, w, (((-1,), (-2,)), ((), ())))
    np.testing.assert_array_equal(out, qwix.dot_general(x, w, (((2,), (0,)), ((), ()))))


def test_floats_are_left_to_lax(normal):
    x, w = normal(10, 4, 8, dtype=jnp.bfloat16), normal(11, 8, 4, dtype=jnp.bfloat16)
    ours = jax.jit(lambda x, w: qwix.dot_general(x, w, DENSE, "highest", jnp.float32))
    lax = jax.jit(lambda x, w: jax.lax.dot_general(x, w, DENSE, "highest", jnp.float32))
    strip = lambda f: "\n".join(line for line in f.lower(x, w).as_text().splitlines()[1:])
    assert strip(ours) == strip(lax)


@pytest.mark.parametrize("preferred", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
def test_preferred_element_type_is_the_result(preferred, normal):
    w = qwix.quantize(normal(12, 8, 4, dtype=jnp.bfloat16), "int8", channelwise_axes=(1,))
    x = normal(13, 2, 8, dtype=jnp.bfloat16)
    assert qwix.dot_general(x, w, DENSE, preferred_element_type=preferred).dtype == preferred
    assert qwix.dot_general(x, w, DENSE).dtype == jnp.bfloat16
    assert qwix.einsum("ab,bc->ac", x, w, preferred_element_type=preferred).dtype == preferred


def test_out_sharding_is_honoured(devices, normal):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    w = qwix.quantize(normal(14, 16, 8), "int8", channelwise_axes=(1,))
    with jax.set_mesh(mesh):
        x = jax.device_put(normal(15, 8, 16), jax.NamedSharding(mesh, jax.P(None, "x")))
        spec = jax.P("x", None)
        out = jax.jit(lambda x, w: qwix.dot_general(x, w, DENSE, out_sharding=spec))(x, w)
        assert out.sharding.spec == spec
    np.testing.assert_allclose(out, x @ w.dequantize(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qtype", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("tile", [None, 32])
def test_dynamic_rows_are_as_good_as_their_grid(qtype, tile, normal, check_einsum):
    """|q(x) w - x w| <= sum of |w| times half a step of x's grid, plus rounding."""
    x, w = normal(16, 5, 64) * 3, qwix.quantize(normal(17, 64, 6), "int8", channelwise_axes=(1,))
    how = dot_lib.get_how_to_quantize(
        dimension_numbers=DENSE, ndims=(2, 2), for_lhs=True, tile_size=tile, qtype=qtype
    )
    fused = qwix.dot_general(x, w, DENSE, act_how=how)
    assert dot_plan.row_quantize(how, make_layout(x.shape, DENSE, "lhs")).tile_k == (tile or 0)
    a = _quantize(x, qtype, 1, tile)
    scale = np.repeat(np.asarray(a.scale, np.float64), tile or 64, axis=1)
    half = scale / 2 if qtype != "float8_e4m3fn" else np.maximum(np.abs(x) / 16, scale * 2.0**-10)
    values = np.asarray(w.dequantize(), np.float64)
    bound = (half * 1.001) @ np.abs(values) + 1e-5 * (np.abs(np.asarray(x)) @ np.abs(values))
    assert (np.abs(fused - np.asarray(x, np.float64) @ values) <= bound).all()


def test_dynamic_quantization_that_no_kernel_knows_is_done_before(normal, check_einsum):
    x, w = normal(18, 5, 64), qwix.quantize(normal(19, 64, 6), "int8", channelwise_axes=(1,))
    for how in (
        HowToQuantize(qtype="int8", channelwise_axes=(0,), calibration_method="minmax"),
        HowToQuantize(qtype="int8"),
        HowToQuantize(qtype="nf4", channelwise_axes=(0,), tiled_axes={1: 32}),
    ):
        assert dot_plan.row_quantize(how, make_layout(x.shape, DENSE, "lhs")) is None
        check_einsum(
            qwix.dot_general(x, w, DENSE, act_how=how), "mk,kn->mn", dot_lib.qarray.quantize(x, how), w
        )
    with pytest.raises(ValueError, match="act_how quantizes a float lhs"):
        qwix.dot_general(w, x.T, (((0,), (0,)), ((), ())), act_how=how)


def test_block_formats_use_scaled_matmul(monkeypatch, normal, check_einsum):
    calls = []
    original = jax.nn.scaled_matmul
    monkeypatch.setattr(jax.nn, "scaled_matmul", lambda *a, **k: calls.append(1) or original(*a, **k))
    for qtype, tile in (("mxfp8", 32), ("mxfp4", 32), ("nvfp4", 16)):
        a, b = _quantize(normal(20, 6, 64), qtype, 1, tile), _quantize(normal(21, 64, 5), qtype, 0, tile)
        check_einsum(qwix.dot_general(a, b, DENSE), "mk,kn->mn", a, b)
    assert len(calls) == 3
    batched = (((2,), (1,)), ((0,), (0,)))
    a, b = _quantize(normal(22, 2, 3, 64), "mxfp8", 2, 32), _quantize(normal(23, 2, 64, 4), "mxfp8", 1, 32)
    check_einsum(qwix.dot_general(a, b, batched), "bmk,bkn->bmn", a, b)
    assert len(calls) == 4
    with_tiles_elsewhere = qwix.quantize(normal(24, 64, 32), "mxfp8", tiled_axes={1: 32})
    assert mxfp_dot.mxfp_dot_general(a[0], with_tiles_elsewhere, DENSE) is None


def test_an_error_in_scaled_matmul_is_not_swallowed(monkeypatch, normal):
    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(jax.nn, "scaled_matmul", broken)
    a, b = _quantize(normal(20, 6, 64), "mxfp8", 1, 32), _quantize(normal(21, 64, 5), "mxfp8", 0, 32)
    with pytest.raises(RuntimeError, match="broken"):
        qwix.dot_general(a, b, DENSE)


def test_empty_operands(normal):
    w = qwix.quantize(normal(25, 8, 4), "int8", channelwise_axes=(1,))
    assert qwix.dot_general(jnp.ones((0, 8)), w, DENSE).shape == (0, 4)
    nothing = qwix.quantize(jnp.ones((0, 4)), "int8", channelwise_axes=(1,))
    np.testing.assert_array_equal(qwix.dot_general(jnp.ones((3, 0)), nothing, DENSE), jnp.zeros((3, 4)))


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((((1,), (1,)), ((), ())), "Sizes disagree: axis 1 of lhs .* is 8, axis 1 of rhs .* is 4"),
        ((((1,), ()), ((), ())), "must pair the axes"),
        ((((1, 1), (0, 0)), ((), ())), "twice"),
        ((((2,), (0,)), ((), ())), "out of range"),
        (((1,), (0,)), "must be"),
    ],
)
def test_axes_that_do_not_fit_are_named(numbers, message, normal):
    w = qwix.quantize(normal(26, 8, 4), "int8")
    with pytest.raises(ValueError, match=message):
        qwix.dot_general(jnp.ones((2, 8)), w, numbers)


def test_operands_of_other_types_are_refused():
    with pytest.raises(TypeError, match="lhs must be an array"):
        qwix.dot_general([[1.0]], jnp.ones((1, 1)), DENSE)


def test_a_named_implementation_runs_or_raises(normal):
    w = qwix.quantize(normal(27, 8, 4), "int8", channelwise_axes=(1,))
    x = jnp.ones((2, 8))
    expected = qwix.dot_general(x, w, DENSE)
    np.testing.assert_array_equal(qwix.dot_general(x, w, DENSE, implementation="xla"), expected)
    with pytest.raises(NotImplementedError, match="mosaic_tpu"):
        jax.block_until_ready(qwix.dot_general(x, w, DENSE, implementation="mosaic_tpu"))
    with pytest.raises(NotImplementedError, match="is empty"):
        qwix.dot_general(x[:0], w, DENSE, implementation="xla")


@pytest.mark.parametrize(
    "a, b", [((8,), (8, 4)), ((2, 8), (8,)), ((8,), (8,)), ((2, 3, 8), (5, 8, 4)), ((), (8, 4))]
)
def test_dot_contracts_what_numpy_does(a, b, normal):
    x, w = normal(28, *a), qwix.quantize(normal(29, *b), "int8")
    expected = np.dot(np.asarray(x, np.float64), np.asarray(w.dequantize(), np.float64))
    out = qwix.dot(x, w)
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-5)


def test_transformations(normal):
    x = normal(30, 3, 5, 8)
    w = qwix.quantize(normal(31, 8, 4), "int4", channelwise_axes=(1,), tiled_axes={0: 4})
    dense = functools.partial(qwix.dot_general, dimension_numbers=DENSE)
    alone = jnp.stack([dense(v, w) for v in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(dense, (0, None)))(x, w), alone, rtol=1e-6, atol=1e-6)
    assert jax.eval_shape(dense, x[0], w).shape == (5, 4)
    scanned = jax.lax.scan(lambda c, v: (c, dense(v, w)), 0, x)[1]
    np.testing.assert_allclose(scanned, alone, rtol=1e-6, atol=1e-6)
    loss = lambda f: lambda x: (f(x) ** 2).sum()
    ours = jax.grad(loss(jax.checkpoint(lambda v: dense(v, w))))(x[0])
    exact = jax.grad(loss(lambda v: v @ w.dequantize()))(x[0])
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


def test_dynamic_rows_have_a_straight_through_gradient(normal):
    x, w = normal(32, 4, 8), qwix.quantize(normal(33, 8, 4), "int8", channelwise_axes=(1,))
    how = HowToQuantize(qtype="int8", channelwise_axes=(0,))
    g = jax.grad(lambda x: qwix.dot_general(x, w, DENSE, act_how=how).sum())(x)
    np.testing.assert_allclose(g, jnp.ones((4, 4)) @ w.dequantize().T, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:w8a32 runs through xla")  # so small a dot does on a TPU
def test_export_serves_several_platforms(normal):
    x, w = normal(34, 4, 8), qwix.quantize(normal(35, 8, 4), "int8", channelwise_axes=(1,))
    leaves, tree = jax.tree.flatten(w)
    run = jax.jit(lambda x, *leaves: qwix.dot(x, jax.tree.unflatten(tree, leaves)))
    exported = jax.export.export(run, platforms=("cpu", "tpu"))(x, *leaves)
    np.testing.assert_array_equal(exported.call(x, *leaves), qwix.dot(x, w))


def test_a_second_call_compiles_nothing(normal):
    w = qwix.quantize(normal(36, 8, 4), "int8", channelwise_axes=(1,))
    run = jax.jit(lambda x, w: qwix.dot(x, w))
    run(normal(37, 4, 8), w)
    run(normal(38, 4, 8), qwix.quantize(normal(39, 8, 4), jnp.int8, channelwise_axes=(-1,)))
    assert run._cache_size() == 1


def test_matmul_problem_needs_only_shapes():
    shape = jax.ShapeDtypeStruct
    w = qwix.QArray(shape((64, 4, 8), jnp.int4), shape((2, 4, 8), jnp.bfloat16))
    x = shape((2, 16, 64), jnp.bfloat16)
    numbers = (((2,), (0,)), ((), ()))
    problem = dot_lib.matmul_problem(x, w, numbers)
    assert (problem.m, problem.k, problem.n, problem.scheme) == (32, 64, 32, "w4a16_g32")
    assert dot_lib.matmul_problem(x, w, numbers, act_qtype="int8", act_tile_size=32).quantize_lhs.tile_k == 32
    assert dot_lib.matmul_problem(x, shape((64, 8), jnp.bfloat16), numbers) is None
    minmax = dot_lib.matmul_problem(x, w, numbers, act_qtype="int8", act_calibration_method="minmax")
    assert minmax.quantize_lhs is None and minmax.lhs.zero_point
