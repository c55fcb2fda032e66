"""matmul as a JAX operation: its transformations, its gradient, its shardings, and what it refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from qwix_kernels import dispatch
from qwix_kernels.matmul import RowQuantize, Tensor, matmul, problem_of

ROWS = RowQuantize("int8", 127.5)


def weight(batch=1, k=64, n=8, tiles=2, dtype=jnp.int4, transposed=False):
    rng = np.random.default_rng(k + n)
    order = (0, 2, 1) if transposed else (0, 1, 2)
    values = jnp.asarray(rng.integers(-8, 8, (batch, k, n)), dtype).transpose(order)
    scale = jnp.asarray(rng.uniform(0.5, 1, (batch, tiles, n)), jnp.float32).transpose(order)
    return Tensor(values, scale)


def rows(batch=1, m=6, k=64, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(7).standard_normal((batch, m, k)), dtype)


def dequantized(w, transposed=False):
    scale = jnp.repeat(w.scale, w.values.shape[1] // w.scale.shape[1], 1)
    values = w.values.astype(jnp.float32) * jnp.repeat(scale, w.values.shape[2] // w.scale.shape[2], 2)
    return values.swapaxes(1, 2) if transposed else values


def primitives(fun, *args):
    """(name, problem or None) of each equation, those of inner jaxprs included."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name, eqn.params.get("problem")
            for inner in jaxprs_in_params(eqn.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(fun)(*args).jaxpr))


def bound_problems(fun, *args):
    return [problem for name, problem in primitives(fun, *args) if name == "qwix_matmul"]


@pytest.mark.parametrize("how", [None, ROWS])
def test_same_result_in_jit_scan_remat_and_vmap(how):
    x, w = rows(batch=3), weight()
    f = functools.partial(matmul, quantize_lhs=how)
    want = np.asarray(f(x, w))
    np.testing.assert_array_equal(jax.jit(f)(x, w), want)
    np.testing.assert_array_equal(jax.checkpoint(f)(x, w), want)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, x: (c, f(x[None], w)[0]), 0, x)[1], want)
    np.testing.assert_allclose(jax.vmap(lambda x: f(x[None], w)[0])(x), want, rtol=1e-6)
    shape = jax.eval_shape(f, x, w)
    assert (shape.shape, shape.dtype) == (want.shape, want.dtype)


def test_a_shared_weight_is_one_matrix():
    x, w = rows(batch=5), weight()
    (problem,) = bound_problems(matmul, x, w)
    assert (problem.lhs.batch, problem.m, problem.rhs.batch) == (5, 6, 1)
    text = jax.jit(matmul).lower(x, w).as_text()
    assert re.findall(r"call @multiply.* : \(tensor<(.*?)>", text) == ["1x30x64xf32"]


@pytest.mark.parametrize(
    ("axes", "batches", "want"),
    [
        ((0, None), (1, 1), (4, 6)),  # activations over one weight: more rows when it's lowered
        ((0, 0), (1, 1), (4, 6)),  # a weight each: a batch
        ((None, 0), (1, 1), (4, 6)),
        ((0, None), (3, 3), (3, 24)),  # over a batch of weights: more rows of each
        ((0, 0), (3, 3), (12, 6)),
        ((0, 0), (1, 3), (12, 6)),
        ((None, 0), (3, 3), (12, 6)),
    ],
)
def test_vmap_is_one_matmul(axes, batches, want):
    stack = lambda a: jnp.stack([jnp.roll(a, i, 1) for i in range(4)])
    x, w = rows(batch=batches[0]), weight(batch=batches[1])
    xs = stack(x) if axes[0] == 0 else x
    ws = jax.tree.map(stack, w) if axes[1] == 0 else w
    mapped = jax.vmap(matmul, axes)
    (problem,) = bound_problems(mapped, xs, ws)
    assert (problem.batch, problem.m) == want
    pick = lambda tree, axis, i: jax.tree.map(lambda a: a[i], tree) if axis == 0 else tree
    singles = [matmul(pick(xs, axes[0], i), pick(ws, axes[1], i)) for i in range(4)]
    np.testing.assert_allclose(mapped(xs, ws), jnp.stack(singles), rtol=1e-5, atol=1e-5)


def test_vmap_of_scales_alone():
    x, w = rows(), weight()
    scales = jnp.stack([w.scale, 2 * w.scale])
    got = jax.vmap(lambda s: matmul(x, Tensor(w.values, s)))(scales)
    np.testing.assert_array_equal(got[1], 2 * got[0])  # a power of two: exactly


def test_no_second_compilation(caplog):
    f = jax.jit(lambda x, w: matmul(x, w, quantize_lhs=ROWS))
    x, w = rows(), weight()
    f(x, w)
    matmul(x, w)
    with jax.log_compiles():
        f(x, w)
        matmul(x, w)
    assert not [r for r in caplog.records if "Compiling" in r.message]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradient_of_a_float_lhs(transposed, batch):
    x, w = rows(batch=3), weight(batch=batch, transposed=transposed)
    g = rows(batch=3, m=6, k=8)
    loss = lambda x: (matmul(x, w, rhs_transposed=transposed) * g).sum()
    want = jnp.einsum("bmn,bkn->bmk", g, jnp.broadcast_to(dequantized(w, transposed), (3, 64, 8)))
    np.testing.assert_allclose(jax.grad(loss)(x), want, rtol=1e-5, atol=1e-5)
    problem = bound_problems(jax.grad(loss), x)[-1]
    assert problem.rhs_transposed != transposed and problem.rhs.is_quantized  # the stored weight, as it lies


def test_gradient_goes_straight_through_row_quantization():
    x, w = rows(), weight()
    plain = jax.grad(lambda x: matmul(x, w).sum())(x)
    np.testing.assert_array_equal(jax.grad(lambda x: matmul(x, w, quantize_lhs=ROWS).sum())(x), plain)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_of_a_float_rhs(transposed):
    x, w = rows(batch=3), dequantized(weight(transposed=transposed))
    ours = lambda w: jnp.sin(matmul(x, w, rhs_transposed=transposed)).sum()
    plain = lambda w: jnp.sin(x @ (w.swapaxes(1, 2) if transposed else w)).sum()
    got, want = jax.grad(ours)(w), jax.grad(plain)(w)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_quantized_operands_have_no_gradient():
    x, w = rows(), weight()
    got = jax.grad(lambda s: matmul(x, Tensor(w.values, s)).sum())(w.scale)
    assert got.shape == w.scale.shape and not np.asarray(got).any()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("x_spec", [P("x", None, None), P(None, "x", None), P(None, None, "x")])
@pytest.mark.parametrize("w_spec", [P(None, None, "y"), P(None, None, None)])
def test_sharded_operands(axis_type, x_spec, w_spec):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    x, w = rows(batch=2), weight()
    f = functools.partial(matmul, quantize_lhs=ROWS)
    want = f(x, w)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    sharded = put(x, x_spec), Tensor(put(w.values, w_spec), put(w.scale, w_spec))
    with jax.set_mesh(mesh):
        got = jax.jit(f)(*sharded)
        if axis_type == AxisType.Explicit:
            assert jax.typeof(got).sharding.spec == P(x_spec[0], x_spec[1], w_spec[2])
    if x_spec[2] is None:
        np.testing.assert_array_equal(got, want)
    else:  # two sums of K, added up
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("check", [True, False])
def test_shard_map(check):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    x, w = rows(batch=2), weight()
    f = jax.shard_map(
        lambda x, q, s: matmul(x, Tensor(q, s), quantize_lhs=ROWS),
        mesh=mesh,
        in_specs=(P("x"), P(None, None, "y"), P(None, None, "y")),
        out_specs=P("x", None, "y"),
        check_vma=check,
    )
    np.testing.assert_array_equal(jax.jit(f)(x, w.values, w.scale), matmul(x, w, quantize_lhs=ROWS))
    got = jax.jit(jax.grad(lambda x: f(x, w.values, w.scale).sum()))(x)
    np.testing.assert_allclose(got, jax.grad(lambda x: matmul(x, w).sum())(x), rtol=1e-5, atol=1e-5)


def test_donated_operands():
    x = rows(k=8)
    w = Tensor(jnp.eye(8, dtype=jnp.int8)[None], jnp.ones((1, 1, 1)))
    want = np.array(x)  # a copy: a view would keep the buffer alive
    got = jax.jit(matmul, donate_argnums=0)(x, w)
    np.testing.assert_array_equal(got, want)
    assert x.is_deleted()


def test_export_for_a_cpu_of_any_number_of_rows():
    w = weight()
    (m,) = jax.export.symbolic_shape("m")
    exported = jax.export.export(jax.jit(matmul))(jax.ShapeDtypeStruct((1, m, 64), jnp.float32), w)
    for size in (1, 6):
        x = rows(m=size)
        np.testing.assert_allclose(exported.call(x, w), matmul(x, w), rtol=1e-6, atol=1e-6)


def test_one_export_for_cpu_and_gpu():
    w, x = weight(), rows()
    dispatch._WARNED.clear()
    with pytest.warns(UserWarning, match="runs through xla on gpu"):
        exported = jax.export.export(jax.jit(matmul), platforms=["cpu", "cuda"])(x, w)
    np.testing.assert_array_equal(exported.call(x, w), matmul(x, w))


def test_a_named_kernel_is_refused_when_lowered_for_a_cpu():
    x, w = rows(), weight()
    f = jax.jit(lambda x, w: matmul(x, w, implementation="mosaic_tpu"))
    assert jax.eval_shape(f, x, w).shape == (1, 6, 8)  # traced for any platform
    with pytest.raises(NotImplementedError, match=r"mosaic_tpu: runs on tpu, not on cpu.*m=6, k=64, n=8"):
        f(x, w)
    matmul(x, w, implementation=("mosaic_tpu", "xla"))


X, W = jnp.ones((1, 4, 64)), jnp.ones((1, 64, 8), jnp.int8)
ones = functools.partial(jnp.ones, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("lhs", "rhs", "options", "error", "message"),
    [
        (X[0], W, {}, ValueError, r"lhs must have 3 axes .*got shape \(4, 64\)"),
        (X, W[:, :32], {}, ValueError, r"K disagrees.*64 against 32"),
        (X, W, {"rhs_transposed": True}, ValueError, r"\[batch, N, K\] is \(1, 64, 8\): 64 against 8"),
        (ones((3, 4, 64)), jnp.ones((2, 64, 8)), {}, ValueError, "lhs has 3, rhs 2"),
        (X, Tensor(W, ones((1, 3, 8))), {}, ValueError, r"scale of rhs has shape \(1, 3, 8\).*\(1, 64, 8\)"),
        (X, Tensor(W, ones((64, 8))), {}, ValueError, r"scale of rhs has shape \(64, 8\)"),
        (X, Tensor(W, jnp.ones((1, 1, 8), jnp.int8)), {}, TypeError, "must be floating, got int8"),
        (X, Tensor(W, None, W), {}, ValueError, "zero point and no scale"),
        (X, Tensor(W, ones((1, 1, 8)), W), {}, ValueError, "they must be equal"),
        (X, Tensor(W, ones((1, 1, 8)), ones((1, 1, 8))), {}, TypeError, "has dtype float32, its values int8"),
        (X, Tensor(W, ones((1, 1, 8)), None, "nf5"), {}, ValueError, "codebook 'nf5'; known: nf4"),
        (X, Tensor(W.astype(jnp.int4), None, None, "nf4"), {}, TypeError, "needs uint4 or wider, got int4"),
        (X, W.astype(jnp.int32), {}, TypeError, "rhs has dtype int32"),
        (X, W, {"out_dtype": "int32"}, TypeError, "out_dtype is int32; it must be a float"),
        (W.mT, W, {"quantize_lhs": ROWS}, ValueError, "quantize_lhs needs a plain float lhs"),
        (
            X,
            W,
            {"quantize_lhs": RowQuantize("int8", 127.5, 48)},
            ValueError,
            r"K=64.*\[1, 2, 4, 8, 16, 32, 64\]",
        ),
        (X, W, {"quantize_lhs": RowQuantize("int8", 0.0)}, ValueError, "must be positive"),
        (X, W, {"precision": "best"}, ValueError, "precision must be None"),
        (X, W, {"implementation": "mosaic"}, ValueError, "did you mean 'mosaic_tpu'"),
        (X, W, {"implementation": ()}, ValueError, "implementation is empty"),
    ],
)
def test_bad_input(lhs, rhs, options, error, message):
    with pytest.raises(error, match=message):
        matmul(lhs, rhs, **options)


@pytest.mark.parametrize(
    ("lhs", "rhs", "want"),
    [
        (W.mT, W, "int32"),
        (X.astype(jnp.bfloat16), Tensor(W, jnp.ones((1, 1, 8), jnp.bfloat16)), "bfloat16"),
        (X.astype(jnp.bfloat16), Tensor(W, ones((1, 1, 8))), "float32"),
        (W.mT, Tensor(W, jnp.ones((1, 1, 8), jnp.bfloat16)), "bfloat16"),
        (W.mT.astype(jnp.float8_e4m3fn), W.astype(jnp.float8_e4m3fn), "bfloat16"),
    ],
)
def test_default_output_dtype(lhs, rhs, want):
    assert problem_of(lhs, rhs).out_dtype == want
    assert matmul(lhs, rhs).dtype == want
