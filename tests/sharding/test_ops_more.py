"""Grouped matmuls, convolutions and quantization over meshes: the numbers of one device, in shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from qwix_kernels.conv import conv
from qwix_kernels.conv.problem import ConvExtras
from qwix_kernels.problem import Extras, RowQuantize, Tensor
from qwix_kernels.quantize import quantize
from qwix_kernels.ragged_matmul import gmm, tgmm

G, M, K, N = 4, 48, 64, 32
SIZES = jnp.array([7, 0, 20, 13])  # and 8 rows of no group
INT8 = RowQuantize("int8", 127.5)
RNG = np.random.default_rng(1)
ROUTES = ["explicit", "auto"]


def floats(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def stored(*shape, scale):
    values = jnp.asarray(RNG.integers(-127, 128, shape), jnp.int8)
    return Tensor(values, jnp.asarray(RNG.uniform(0.01, 0.02, scale), jnp.float32))


X, W = floats(M, K), stored(G, K, N, scale=(G, 2, N))
ALL = Extras(bias=floats(G, 1, N), gate=W, gate_bias=floats(G, 1, N), residual=floats(1, M, N))
# Layouts of rows and experts, that of the result, and the collectives that there must be.
RAGGED = {
    "tokens, columns": (P("x"), P(None, None, "y"), P("x", "y"), {}),
    "sums": (P("x", "y"), P(None, "y"), P("x", None), {"all-reduce": 2}),
    "experts": (P(), P("y"), P(None, None), {"all-reduce": 1}),
    # Tokens and experts over the same devices: rows come and go, weights stay.
    "tokens and experts": (P("y"), P("y", None, "x"), P("y", "x"), {"all-gather": 1, "reduce-scatter": 1}),
}


def close(got, want, bound=1e-6):
    assert (abs(np.asarray(got) - want) <= bound * abs(np.asarray(want)).max()).all()


QUICK = [("explicit", "sums"), ("explicit", "tokens and experts"), ("auto", "experts")]
SLOW = [both for name in RAGGED for route in ROUTES if (both := (route, name)) not in QUICK]


@pytest.mark.parametrize(
    ("route", "name"), [*QUICK, *[pytest.param(*both, marks=pytest.mark.large) for both in SLOW]]
)
def test_grouped_matmuls(route, name, on):
    lhs, rhs, out, collectives = RAGGED[name]
    fn, mesh = functools.partial(gmm, quantize_lhs=INT8), on.mesh_of(route)
    args = on.place(mesh, X, lhs), on.place(mesh, W, rhs), on.place(mesh, SIZES, P())
    got, found = on.run(mesh, fn, *args)
    assert found == collectives and (on.spec_of(got) == out or route == "auto")
    want = jax.jit(fn)(X, W, SIZES)
    close(got, want)
    assert not np.asarray(got)[40:].any()
    if name != "sums":  # K is whole
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    "name", [*["sums"], *[pytest.param(n, marks=pytest.mark.large) for n in RAGGED if n != "sums"]]
)
@pytest.mark.parametrize("route", ["explicit", pytest.param("auto", marks=pytest.mark.large)])
def test_what_is_fused_with_a_grouped_matmul(route, name, on):
    lhs, rhs, *_ = RAGGED[name]
    fn, mesh = functools.partial(gmm, activation="silu"), on.mesh_of(route)
    args = (
        on.place(mesh, X, lhs),
        on.place(mesh, W, rhs),
        on.place(mesh, SIZES, P()),
        on.place(mesh, ALL, P()),
    )
    got, found = on.run(mesh, fn, *args)
    close(got, jax.jit(fn)(X, W, SIZES, ALL))
    assert not np.asarray(got)[40:].any()
    assert sum(found.values()) <= (2 if name == "tokens and experts" else 1)


@pytest.mark.parametrize("route", ROUTES)
def test_products_by_group_over_cut_rows(route, on):
    g, mesh = floats(M, N), on.mesh_of(route)
    args = on.place(mesh, X, P("x", "y")), on.place(mesh, g, P("x")), on.place(mesh, SIZES, P())
    got, found = on.run(mesh, tgmm, *args)
    assert found == {"all-reduce": 1} and on.spec_of(got) == P(None, "y", None)
    close(got, jax.jit(tgmm)(X, g, SIZES))


@pytest.mark.large
@pytest.mark.parametrize("route", ROUTES)
def test_gradients_of_experts(route, on):
    """Tokens and experts over the same axis: the weight's gradient lies as the weight does."""
    w, g, mesh = floats(G, K, N), floats(M, N), on.mesh_of(route)
    loss = lambda x, w, sizes, g: (jnp.tanh(gmm(x, w, sizes, quantize_lhs=INT8)) * g).sum()
    lhs, rhs = P("x", None), P("x", None, "y")
    args = [on.place(mesh, a, s) for a, s in ((X, lhs), (w, rhs), (SIZES, P()), (g, P("x", "y")))]
    grad = jax.grad(loss, (0, 1))
    got, found = on.run(mesh, grad, *args)
    for ours, alone, spec in zip(got, jax.jit(grad)(X, w, SIZES, g), (lhs, rhs), strict=True):
        close(ours, alone, 1e-5)
        assert on.spec_of(ours) == spec or route == "auto"
    assert "all-to-all" not in found


IMAGES = floats(4, 6, 6, 16)
KERNEL = stored(3, 3, 16, 24, scale=(1, 1, 2, 24))
SAME = {"quantize_lhs": INT8, "padding": ((1, 1), (1, 1))}
CONV = {
    "images, outputs": (P("x"), P(None, None, None, "y"), P("x", None, None, "y"), {}),
    "inputs": (P("x", None, None, "y"), P(None, None, "y"), P("x", None, None, None), {"all-reduce": 2}),
}


@pytest.mark.parametrize(
    ("route", "name"),
    [
        ("explicit", "inputs"),
        ("auto", "inputs"),
        ("auto", "images, outputs"),
        pytest.param("explicit", "images, outputs", marks=pytest.mark.large),
    ],
)
def test_convolutions(route, name, on):
    lhs, rhs, out, collectives = CONV[name]
    extras, mesh = ConvExtras(bias=floats(24)), on.mesh_of(route)
    fn = functools.partial(conv, **SAME, activation="relu")
    args = on.place(mesh, IMAGES, lhs), on.place(mesh, KERNEL, rhs), on.place(mesh, extras, P())
    got, found = on.run(mesh, fn, *args)
    assert found == collectives and on.spec_of(got) == out
    close(got, jax.jit(fn)(IMAGES, KERNEL, extras))


@pytest.mark.parametrize("route", ["explicit", pytest.param("auto", marks=pytest.mark.large)])
def test_a_depthwise_convolution_is_cut_by_features(route, on):
    """Nothing but the images' greatest magnitudes is exchanged; and those of a result that is quantized."""
    w, mesh = stored(3, 3, 1, 16, scale=(1, 1, 1, 16)), on.mesh_of(route)
    fn = functools.partial(conv, **SAME, groups=16, quantize_out=INT8)
    spec = P("x", None, None, "y")
    args = on.place(mesh, IMAGES, spec), on.place(mesh, w, P(None, None, None, "y"))
    got, found = on.run(mesh, fn, *args)
    want = jax.jit(fn)(IMAGES, w)
    assert found == {"all-reduce": 2} and on.spec_of(got.values) == spec
    np.testing.assert_array_equal(got.values, want.values)
    np.testing.assert_array_equal(got.scale, want.scale)


@pytest.mark.parametrize("of", ["rows", "columns"])
@pytest.mark.parametrize("route", ROUTES)
def test_quantization_takes_one_maximum_of_what_is_cut(route, of, on):
    x, mesh = floats(2, 64, 32), on.mesh_of(route)
    fn = lambda x: quantize(x, "int8", 127.5, of)
    got, found = on.run(mesh, fn, on.place(mesh, x, P(None, "y", "x")))
    assert found == {"all-reduce": 1} and on.spec_of(got[0]) == P(None, "y", "x")
    for ours, alone in zip(got, jax.jit(fn)(x), strict=True):
        np.testing.assert_array_equal(ours, alone)


def test_ops_inside_shard_map_that_checks_what_varies(on):
    """Experts on their devices by `group_offset`, images on theirs; forward and backward."""
    mesh = on.mesh_of("auto")

    def experts(x, w, sizes):
        offset = jax.lax.axis_index("y") * w.shape[0]
        return jax.lax.psum(gmm(x, w, sizes, group_offset=offset), "y")

    w = floats(G, K, N)
    fn = jax.shard_map(experts, mesh=mesh, in_specs=(P(), P("y"), P()), out_specs=P())
    got, found = on.run(mesh, fn, X, w, SIZES)
    assert found == {"all-reduce": 1}
    close(got, jax.jit(gmm)(X, w, SIZES))
    loss = lambda fn: lambda w: jnp.sin(fn(X, w, SIZES)).sum()
    close(jax.jit(jax.grad(loss(fn)))(w), jax.jit(jax.grad(loss(gmm)))(w), 1e-5)
    images = jax.shard_map(
        functools.partial(conv, **SAME),
        mesh=mesh,
        in_specs=(P("x"), P(None, None, None, "y")),
        out_specs=P("x", None, None, "y"),
    )
    kernel = stored(3, 3, 16, 24, scale=(1, 1, 1, 24))
    got, found = on.run(mesh, images, IMAGES, kernel)
    assert not found
    close(got, jax.jit(functools.partial(conv, **SAME))(IMAGES, kernel))
