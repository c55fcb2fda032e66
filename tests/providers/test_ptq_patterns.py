"""Every way of writing a product with a weight, in both module systems, eager and jitted.

A weight-only model must compute what the float model computes with the dequantized weight, up to rounding:
each pattern is linear in the weight, so a sum of K products of float32 differs by at most 4 K eps times the
same sum of magnitudes.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.lax import dot_general as early_dot_general
from jax.numpy import dot as early_dot
from jax.numpy import einsum as early_einsum

import qwix

K = 8
EPS = float(np.finfo(np.float32).eps)
MATMUL = (((1,), (0,)), ((), ()))
IDS = jnp.array([[3, 0, 7], [1, 1, 5]])


@jax.jit
def helper(x, w):
    return jnp.dot(x, w) + 0 * x


@jax.jit
def einsum_helper(x, w):
    return jnp.einsum("ab,bc->ac", x, w)


# The weight is square and has the shape of the activation, so that no shape tells them apart.
PATTERNS = {
    "operator": lambda x, w: x @ w,
    "operator_3d": lambda x, w: jnp.stack([x, 2 * x]) @ w,
    "vector": lambda x, w: x[0] @ w,
    "matmul": lambda x, w: jnp.matmul(x, w),
    "dot": lambda x, w: jnp.dot(x, w),
    "inner": lambda x, w: jnp.inner(x, w),
    "tensordot": lambda x, w: jnp.tensordot(x, w, axes=1),
    "vecdot_axes": lambda x, w: jnp.tensordot(x, w, axes=[[0], [1]]),
    "lax_dot": lambda x, w: lax.dot(x, w),
    "lax_dot_general": lambda x, w: lax.dot_general(x, w, MATMUL),
    "einsum": lambda x, w: jnp.einsum("ab,bc->ac", x, w),
    "einsum_ellipsis": lambda x, w: jnp.einsum("...a,ab->...b", x, w),
    "einsum_reduced": lambda x, w: jnp.einsum("ab,bc->c", x, w),
    "einsum_interleaved": lambda x, w: jnp.einsum(x, [0, 1], w, [1, 2], [0, 2]),
    "einsum_of_three": lambda x, w: jnp.einsum("ab,bc,ad->dc", x, w, x),
    "weight_left": lambda x, w: w @ x,
    "weight_left_general": lambda x, w: lax.dot_general(w, x, MATMUL),
    "weight_left_einsum": lambda x, w: jnp.einsum("ab,cb->ac", w, x),
    "transposed": lambda x, w: x @ w.T,
    "jnp_transpose": lambda x, w: x @ jnp.transpose(w),
    "reshaped": lambda x, w: jnp.einsum("ab,bcd->acd", x, w.reshape(K, 2, K // 2)),
    "merged": lambda x, w: x @ w.reshape(2, K // 2, K).reshape(K, K),
    "cast": lambda x, w: x.astype(jnp.float16) @ w.astype(jnp.float16).astype(jnp.float32),
    "helper": helper,
    "einsum_helper": einsum_helper,
    "early_names": lambda x, w: early_dot(x, w) + early_einsum("ab,bc->ac", x, w),
    "early_dot_general": lambda x, w: early_dot_general(x, w, MATMUL),
    "checkpoint": lambda x, w: jax.checkpoint(lambda x, w: x @ w)(x, w),
    "scan_const": lambda x, w: lax.scan(lambda c, row: (c, row @ w), 0.0, x)[1],
    "cond": lambda x, w: lax.cond(x.sum() > 1e9, lambda x, w: x - 1, lambda x, w: x @ w, x, w),
    "while": lambda x, w: lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1],
    "vmap": lambda x, w: jax.vmap(lambda row: row @ w)(x),
    "sliced": lambda x, w: x @ w[:, :4],
    "take": lambda x, w: jnp.take(w, IDS, axis=0),
    "table_index": lambda x, w: w[IDS],
    "take_columns": lambda x, w: jnp.take(w, IDS, axis=1),
    "one_hot": lambda x, w: jax.nn.one_hot(IDS, K) @ w,
}


class NnxModel(nnx.Module):
    def __init__(this, pattern, w):
        this.pattern = pattern
        this.w = nnx.Param(w)

    def __call__(this, x):
        return PATTERNS[this.pattern](x, this.w[...])


class LinenModel(nn.Module):
    pattern: str

    @nn.compact
    def __call__(this, x):
        return PATTERNS[this.pattern](x, this.param("w", nn.initializers.normal(1.0), (K, K)))


@functools.cache
def arrays():
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (K, K)), jax.random.normal(keys[1], (K, K))


def converted(framework, pattern, **rule):
    """(run, jitted run, the quantized weight, provider) of the model of a pattern."""
    x, w = arrays()
    provider = qwix.PtqProvider([qwix.QuantizationRule(weight_qtype="int8", **rule)])
    if framework == "nnx":
        model = qwix.quantize_model(NnxModel(pattern, w), provider, x)
        return model, lambda x: nnx.jit(lambda m, x: m(x))(model, x), model.w, provider
    model = qwix.quantize_model(LinenModel(pattern), provider)
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = qwix.quantize_params({"w": w}, abstract)
    run = lambda x: model.apply({"params": params}, x)
    return run, jax.jit(run), params["w"], provider


@pytest.mark.parametrize("framework", ["nnx", "linen"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_weight_only(pattern, framework):
    x, w = arrays()
    run, jitted, weight, provider = converted(framework, pattern)
    assert weight.array.qvalue.dtype == jnp.int8
    assert weight.shape == w.shape
    assert all(r.is_quantized for r in provider.records.values() if r.weight), provider.records
    dequantized = qwix.dequantize(weight.unboxed)
    expected = PATTERNS[pattern](x, dequantized)
    lengths = (4 + K) * K if pattern in ("einsum_of_three", "early_names", "cast") else 4 * K
    eps = 2.0**-10 if pattern == "cast" else EPS
    bound = lengths * eps * PATTERNS[pattern](abs(x), abs(dequantized)) + 1e-30
    for got in (run(x), run(x), jitted(x)):
        assert got.dtype == expected.dtype
        assert jnp.all(abs(got - expected) <= abs(bound)), abs(got - expected).max()


@pytest.mark.parametrize("framework", ["nnx", "linen"])
@pytest.mark.parametrize(
    "pattern",
    [
        "operator",
        "weight_left",
        "weight_left_einsum",
        "reshaped",
        "helper",
        "scan_const",
        "einsum_of_three",
        "one_hot",
    ],
)
def test_activations_too(pattern, framework):
    """W8A8: each side is off by at most half a step of 1/127.5 of its largest value."""
    x, w = arrays()
    run, jitted, _, provider = converted(framework, pattern, act_qtype="int8")
    expected = PATTERNS[pattern](x, w)
    worst = abs(x).max() * abs(w).max() / 127.5
    terms = (
        K**3 * abs(x).max()
        if pattern == "einsum_of_three"
        else K * K
        if pattern == "einsum_reduced"
        else 2 * K
    )
    for got in (run(x), jitted(x)):
        assert jnp.all(abs(got - expected) <= 1.01 * terms * worst)
    if pattern != "one_hot":
        assert jnp.any(run(x) != expected)
    assert any(r.act_qtype is not None for r in provider.records.values())
