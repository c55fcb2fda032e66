"""Matmuls over meshes: the numbers of one device, in shards, with the collectives that there must be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from qwix_kernels.matmul import matmul, problem_of, reference
from qwix_kernels.problem import Extras, RowQuantize, Tensor

B, M, K, N = 2, 16, 64, 32
INT8 = RowQuantize("int8", 127.5)
FP8 = RowQuantize("float8_e4m3fn", 448.0)
RNG = np.random.default_rng(0)
LARGE = functools.partial(pytest.param, marks=pytest.mark.large)


def floats(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def weight(dtype="int8", tiles=1, columns=N, zero=False, codebook=None):
    """[1, K, N] with a scale for each of `tiles` runs of K and `columns` runs of N."""
    shape = (1, tiles, columns)
    scale = jnp.asarray(RNG.uniform(0.01, 0.02, shape), jnp.float32)
    if dtype.startswith("float8"):
        return Tensor(floats(1, K, N).astype(dtype), scale)
    low, high = (0, 16) if codebook else (-8, 8)
    values = lambda shape: jnp.asarray(RNG.integers(low, high, shape), dtype)
    return Tensor(values((1, K, N)), scale, values(shape) if zero else None, codebook)


X = floats(B, M, K)
SCHEMES = {
    "w8a8": (weight(), {"quantize_lhs": INT8}),
    "w8a8 static": (
        weight(),
        {
            "quantize_lhs": dataclasses.replace(INT8, static=True),
            "extras": Extras(lhs_scale=jnp.full((1, 1, 1), 0.02)),
        },
    ),
    "w4a16 tiles of 16": (weight("int4", 4), {}),
    "w4a8 tiles of 32": (weight("int4", 2), {"quantize_lhs": dataclasses.replace(INT8, tile_k=32)}),
    "fp8": (weight("float8_e4m3fn"), {"quantize_lhs": FP8}),
    "nf4": (weight("uint4", 2, codebook="nf4"), {}),
    "blocks with zero points": (weight("int8", 4, N // 8, zero=True), {"quantize_lhs": INT8}),
}
# Layouts of lhs and rhs, of the result, and whether sums are added up.
ROWS = (P("x", None, None), P(None, None, "y"), P("x", None, "y"), False)
SUMS = (P(None, "x", "y"), P(None, "y", None), P(None, "x", None), True)


def check_scheme(on, route, name, layout, shape=(2, 4)):
    """Within the bound of float64, as on one device where sums are whole; only what must be is reduced."""
    w, options = SCHEMES[name]
    lhs, rhs, out, summed = layout
    extras = options.get("extras") or Extras()
    given = {k: v for k, v in options.items() if k != "extras"}
    fn = lambda x, w: matmul(x, w, extras, **given)
    mesh = on.mesh_of(route, shape)
    got, found = on.run(mesh, fn, on.place(mesh, X, lhs), on.place(mesh, w, rhs))
    cutting = lambda spec: [e for e in spec if e and mesh.shape[e] > 1]
    assert cutting(on.spec_of(got)) == cutting(out)
    rows = given.get("quantize_lhs")
    parts = mesh.shape["y"] if summed else 1
    of_rows = bool(rows and not rows.static and (K // parts) % (rows.tile_k or K))
    sums = int(parts > 1)
    assert found == ({"all-reduce": sums + of_rows} if sums else {})
    problem = problem_of(X, w, extras, **given)
    want = reference.run(problem, Tensor(X), w, extras)
    assert (abs(np.asarray(got) - want) <= reference.error_bound(problem, Tensor(X), w, extras)).all()
    if parts == 1:
        np.testing.assert_allclose(got, jax.jit(fn)(X, w), rtol=4e-7, atol=1e-6)


LAYOUTS = {"rows and columns": ROWS, "sums": SUMS}
QUICK = [
    *[("explicit", name, "sums") for name in SCHEMES],
    ("auto", "w4a16 tiles of 16", "sums"),
    ("auto", "w8a8", "rows and columns"),
    ("explicit", "blocks with zero points", "rows and columns"),
]


@pytest.mark.parametrize(("route", "name", "layout"), QUICK)
def test_schemes(route, name, layout, on):
    check_scheme(on, route, name, LAYOUTS[layout])


@pytest.mark.large
@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (8, 1), (1, 8)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("route", ["explicit", "auto"])
def test_all_schemes_on_all_meshes(route, name, layout, shape, on):
    lhs, rhs, out, summed = LAYOUTS[layout]
    if shape[0] > B and not summed:
        lhs, out = P(None, "x", None), P(None, "x", "y")
    check_scheme(on, route, name, (lhs, rhs, out, summed), shape)


@pytest.mark.parametrize("route", ["explicit", LARGE("auto")])
def test_integers_are_added_up_exactly(route, on):
    x, w = (jnp.asarray(RNG.integers(-128, 128, s), jnp.int8) for s in ((B, M, K), (1, K, N)))
    mesh = on.mesh_of(route)
    got, found = on.run(mesh, matmul, on.place(mesh, x, P(None, None, "y")), on.place(mesh, w, P(None, "y")))
    assert found == {"all-reduce": 1} and got.dtype == jnp.int32
    np.testing.assert_array_equal(got, reference.run(problem_of(x, w), Tensor(x), Tensor(w)))


@pytest.mark.parametrize(
    ("route", "wanted"),
    [
        ("explicit", P("x", None, "y")),
        ("auto", P("x", "y", None)),
        pytest.param("explicit", P("x", "y", None), marks=pytest.mark.large),
        pytest.param("auto", P("x", None, "y"), marks=pytest.mark.large),
    ],
)
def test_sums_are_scattered_where_the_result_is_cut(route, wanted, on):
    w, mesh = SCHEMES["w4a16 tiles of 16"][0], on.mesh_of(route)

    def fn(x, w):
        if route == "explicit":
            return matmul(x, w, out_sharding=wanted)
        return jax.lax.with_sharding_constraint(matmul(x, w), wanted)

    got, found = on.run(mesh, fn, on.place(mesh, X, P("x", None, "y")), on.place(mesh, w, P(None, "y", None)))
    assert on.spec_of(got) == wanted and found == {"reduce-scatter": 1}
    np.testing.assert_allclose(got, matmul(X, w), rtol=1e-5, atol=1e-5)


# The rows of a shard of a matmul whose weights are cut the other way: what's gathered is never the weight,
# unless it's cut along an axis that the rows have, too (FSDP), and then as it's stored.
@pytest.mark.parametrize("route", [LARGE("explicit"), "auto"])
@pytest.mark.parametrize(
    ("lhs", "rhs", "gathered"),
    [
        (P("x", None, "y"), P(None, None, "y"), "f32[1,16,64]"),
        (P("x", None, None), P(None, "x", "y"), "s8[1,64,8]"),
    ],
)
def test_what_is_gathered(route, lhs, rhs, gathered, on):
    mesh, (w, options) = on.mesh_of(route), SCHEMES["w8a8"]
    fn = functools.partial(matmul, **options)
    args = on.place(mesh, X, lhs), on.place(mesh, w, rhs)
    with jax.set_mesh(mesh):
        text = jax.jit(fn).lower(*args).compile().as_text()
    (line,) = [s for s in text.splitlines() if " all-gather(" in s]
    assert gathered in line and " all-reduce(" not in text


FUSED = {
    "gate, biases and residual": {
        "extras": Extras(
            bias=floats(1, 1, N), gate=weight(), gate_bias=floats(1, 1, N), residual=floats(B, M, N)
        ),
        "options": {"activation": "silu", "quantize_lhs": INT8},
    },
    "norm": {
        "extras": Extras(norm_weight=floats(1, 1, K)),
        "options": {"quantize_lhs": dataclasses.replace(INT8, tile_k=32)},
    },
    "low rank": {
        "extras": Extras(
            low_rank_a=floats(1, K, 4), low_rank_b=floats(1, 4, N), low_rank_mask=floats(B, M, 4)
        ),
        "options": {"low_rank_scaling": 0.5, "quantize_lhs": INT8},
    },
    "columns and noise": {
        "extras": Extras(lhs_columns=abs(floats(1, 1, K)), lhs_noise=floats(B, M, 1) / 8),
        "options": {"quantize_lhs": dataclasses.replace(INT8, columns=True, noise=True)},
    },
}


@pytest.mark.parametrize("name", [*list(FUSED)[:2], *map(LARGE, list(FUSED)[2:])])
@pytest.mark.parametrize("route", ["explicit", LARGE("auto")])
def test_what_is_fused_comes_after_the_sums(route, name, on):
    w, extras = weight(), FUSED[name]["extras"]
    fn = functools.partial(matmul, **FUSED[name]["options"])
    mesh = on.mesh_of(route)
    args = (
        on.place(mesh, X, P("x", None, "y")),
        on.place(mesh, w, P(None, "y", None)),
        on.place(mesh, extras, P()),
    )
    got, found = on.run(mesh, fn, *args)
    of_rows = 2 if name == "norm" else 1  # its mean square; tiles of 32 lie in two shards of 16
    assert found == {"all-reduce": 1 + of_rows}
    want = jax.jit(fn)(X, w, extras)
    # A value on a rounding boundary may become the next one where its row's norm has another last bit.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-2 if name == "norm" else 1e-4)


@pytest.mark.parametrize("tile", [pytest.param(0, marks=pytest.mark.large), 16])
@pytest.mark.parametrize("route", ["explicit", pytest.param("auto", marks=pytest.mark.large)])
def test_a_result_quantized_along_a_cut_axis(route, tile, on):
    """N is cut into 4 parts of 8: a whole row, or a tile of 16, needs the greatest of several shards."""
    w, mesh = weight(), on.mesh_of(route)
    fn = functools.partial(
        matmul, quantize_lhs=INT8, quantize_out=dataclasses.replace(INT8, tile_k=tile), activation="relu"
    )
    got, found = on.run(mesh, fn, on.place(mesh, X, P("x")), on.place(mesh, w, P(None, None, "y")))
    want = jax.jit(fn)(X, w)
    assert found == {"all-reduce": 1} and on.spec_of(got.values) == P("x", None, "y")
    np.testing.assert_array_equal(got.values, want.values)
    np.testing.assert_array_equal(got.scale, want.scale)


@pytest.mark.parametrize(
    ("lhs", "rhs"),
    [
        pytest.param(P("x", None, None), P(None, None, "y"), marks=pytest.mark.large),
        (P("x", None, "y"), P(None, "y", None)),
    ],
)
@pytest.mark.parametrize("route", ["explicit", "auto"])
def test_gradients(route, lhs, rhs, on):
    """Of rows and of a float weight, laid out as these where types say it."""
    w, g, mesh = floats(1, K, N), floats(B, M, N), on.mesh_of(route)
    loss = lambda x, w, g: (matmul(x, w, quantize_lhs=INT8, activation="silu") * g).sum()
    grad = jax.grad(loss, (0, 1))
    out = P("x", None, None) if rhs[1] else P("x", None, "y")
    got, found = on.run(mesh, grad, on.place(mesh, X, lhs), on.place(mesh, w, rhs), on.place(mesh, g, out))
    assert "all-gather" not in found
    for ours, alone, spec in zip(got, jax.jit(grad)(X, w, g), (lhs, rhs), strict=True):
        assert on.spec_of(ours) == P(*spec) or route == "auto"
        assert (abs(ours - alone) <= 1e-5 * abs(alone).max()).all()


def test_inside_shard_map_that_checks_what_varies(on):
    """Forward and backward; the sums over a cut K are the caller's."""
    w, mesh = weight(), on.mesh_of("auto")

    def shard(x, q, s):
        return jax.lax.psum(matmul(x, Tensor(q, s), out_dtype="float32"), "y")

    specs = P("x", None, "y"), P(None, "y", None), P()
    fn = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P("x"))
    got, found = on.run(mesh, fn, X, w.values, w.scale)
    assert found == {"all-reduce": 1}
    np.testing.assert_allclose(got, matmul(X, w), rtol=1e-5, atol=1e-5)
    grad = jax.grad(lambda x: jnp.sin(fn(x, w.values, w.scale)).sum())
    want = jax.jit(jax.grad(lambda x: jnp.sin(matmul(x, w)).sum()))(X)
    assert (abs(jax.jit(grad)(X) - want) <= 1e-5 * abs(want).max()).all()


@pytest.mark.parametrize("route", [LARGE("explicit"), "auto"])
def test_batches_and_vmap(route, on):
    """A batch of weights cut over the mesh, and a vmapped op: one op in shards, nothing exchanged."""
    x, w, mesh = floats(8, 4, K), floats(8, K, N), on.mesh_of(route)
    args = on.place(mesh, x, P("y")), on.place(mesh, w, P("y"))
    got, found = on.run(mesh, functools.partial(matmul, quantize_lhs=INT8), *args)
    want = matmul(x, w, quantize_lhs=INT8)
    assert not found and on.spec_of(got)[0] == "y"
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    if route == "auto":
        mapped = jax.vmap(lambda x, w: matmul(x[None], w[None], quantize_lhs=INT8)[0])
        got, found = on.run(mesh, mapped, *args)
        assert not found
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_an_export_is_cut_by_the_compiler(on):
    """Which a call that asks back could not be: it's no part of what is stored."""
    mesh, (w, options) = on.mesh_of("auto"), SCHEMES["w8a8"]
    columns = P(None, None, "y")
    args = on.place(mesh, X, P("x")), *(on.place(mesh, a, columns) for a in (w.values, w.scale))
    exported = jax.export.export(jax.jit(lambda x, q, s: matmul(x, Tensor(q, s), **options)))(*args)
    got = jax.export.deserialize(exported.serialize()).call(*args)
    np.testing.assert_allclose(got, matmul(X, w, **options), rtol=1e-6, atol=1e-6)


def test_one_device_is_lowered_as_ever():
    text = jax.jit(lambda x: matmul(x, weight(), quantize_lhs=INT8)).lower(X).as_text()
    assert "CustomSPMDPartitioning" not in text and "manual" not in text
