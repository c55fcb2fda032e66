"""qwix.ops with what is fused round a dot: the same as one op after the other, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwix
from qwix import ops


@pytest.fixture(scope="module")
def layer():
    keys = jax.random.split(jax.random.key(0), 6)
    w, v = (qwix.quantize(jax.random.normal(k, (64, 32)), "int8", channelwise_axes=(1,)) for k in keys[:2])
    x = jax.random.normal(keys[2], (2, 3, 64))
    bias, residual = jax.random.normal(keys[3], (32,)), jax.random.normal(keys[4], (2, 3, 32))
    return x, w, v, bias, residual


def rms_norm(x, weight, eps=1e-6):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight


# float32 sums of 64 products of normal numbers, twice rounded: 1e-5 is (K + 16) eps times their magnitude.
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_one_dot_with_everything(layer):
    x, w, _, bias, residual = layer
    norm = jnp.linspace(0.5, 2, 64)
    got = ops.qdot(x, w, bias=bias, activation="silu", residual=residual, norm_weight=norm)
    close(got, jax.nn.silu(ops.qdot(rms_norm(x, norm), w) + bias) + residual)


@pytest.mark.parametrize("act_qtype", [None, "int8", "float8_e4m3fn"])
def test_gated(layer, act_qtype):
    x, w, v, bias, _ = layer
    got = ops.qgated_dot(x, v, w, gate_bias=bias, bias=2 * bias, act_qtype=act_qtype)
    gate, up = (ops.qdot(x, y, act_qtype=act_qtype) for y in (v, w))
    close(got, jax.nn.silu(gate + bias) * (up + 2 * bias))


@pytest.mark.parametrize("tile", [None, 8])
@pytest.mark.parametrize("qtype", ["int8", "int4", "float8_e4m3fn"])
def test_a_quantized_result_feeds_the_next_dot(layer, qtype, tile):
    x, w, v, *_ = layer
    hidden = ops.qdot(x, w, activation="relu", out_qtype=qtype, out_tile_size=tile)
    plain = ops.qdot(x, w, activation="relu")
    tiles = {2: tile} if tile else {}
    axes = (0, 1)
    want = qwix.quantize(plain, qtype, channelwise_axes=axes, tiled_axes=tiles)
    assert hidden.qtype == want.qtype and hidden.scale.shape == want.scale.shape
    close(hidden.scale, want.scale)
    # A division and a product with the reciprocal may round to neighbours.
    assert (hidden.qvalue.astype(jnp.float32) == want.qvalue.astype(jnp.float32)).mean() > 0.98
    down = v.swapaxes(0, 1)
    close(ops.qdot(hidden, down), ops.qdot(hidden.dequantize(), down))
    assert ops.qdot(hidden, down).shape == x.shape


def test_static_scales(layer):
    x, w, *_ = layer
    scale = jnp.abs(x).max() / 127.5
    got = ops.qdot(x, w, act_qtype="int8", act_scale=scale)
    stored = jnp.clip(jnp.round(x * (1 / scale)), -128, 127).astype(jnp.int8)
    close(got, ops.qdot(qwix.QArray(stored, scale.reshape(1, 1, 1)), w))
    tiled = ops.qdot(x, w, act_qtype="int8", act_tile_size=32, act_scale=jnp.array([1.0, 1.0]) * scale)
    close(tiled, got)
    out = ops.qdot(x, w, out_qtype="int8", out_scale=0.25)
    assert out.scale.shape == (1, 1, 1) and float(out.scale[0, 0, 0]) == 0.25
    assert jnp.abs(out.dequantize() - ops.qdot(x, w)).max() <= 0.125 * (1 + 1e-5) or out.qvalue.max() == 127


def test_power_of_two_scales(layer):
    x, w, *_ = layer
    out = ops.qdot(x, w, act_qtype="float8_e4m3fn", act_tile_size=32, act_scale_dtype="float8_e8m0fnu")
    plain = ops.qdot(x, w)
    # e4m3 keeps 4 bits: each factor is off by 2^-4 of itself at most.
    allowed = np.abs(x) @ np.abs(np.asarray(w.dequantize())) / 16
    assert (np.abs(out - plain) <= allowed).all() and (out != plain).any()


def test_gradients_reach_every_float(layer):
    x, w, v, bias, residual = layer
    norm = jnp.ones(64)

    def fused(x, bias, residual, norm):
        return ops.qgated_dot(x, v, w, bias=bias, residual=residual, norm_weight=norm).sum()

    def apart(x, bias, residual, norm):
        y = rms_norm(x, norm)
        return (jax.nn.silu(ops.qdot(y, v)) * (ops.qdot(y, w) + bias) + residual).sum()

    got, want = (jax.grad(f, (0, 1, 2, 3))(x, bias, residual, norm) for f in (fused, apart))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_several_free_and_batch_axes(layer):
    x, *_ = layer
    w = qwix.quantize(jax.random.normal(jax.random.key(7), (64, 4, 8)), "int4", channelwise_axes=(1, 2))
    bias = jnp.arange(32.0).reshape(4, 8)
    numbers = (((2,), (0,)), ((), ()))
    got = ops.qdot_general(x, w, numbers, bias=bias, activation="relu")
    close(got, jax.nn.relu(ops.qdot_general(x, w, numbers) + bias))
    out = ops.qdot_general(x, w, numbers, out_qtype="int8")
    assert out.shape == (2, 3, 4, 8) and out.scale.shape == (2, 3, 1, 1)


def test_explain(layer):
    x, w, _, bias, _ = layer
    shape = jax.ShapeDtypeStruct
    big = qwix.QArray(shape((4096, 14336), jnp.int8), shape((1, 14336), jnp.bfloat16))
    lhs = ((1024, 4096), "bfloat16")
    e = ops.explain("gated_dot", lhs, big, w_gate=big, chip="v6e", act_qtype="int8", activation="silu")
    assert e.chosen == "mosaic_tpu" and e.problem.fused == "gate silu"
    apart = ops.explain("dot", lhs, big, chip="v6e", act_qtype="int8")
    assert e.estimate.static_us < 2.2 * apart.estimate.static_us
    e = ops.explain("dot", x, w, bias=bias, norm_weight=((64,), "float32"), out_qtype="int8", chip="cpu")
    assert e.chosen == "xla" and e.problem.fused == "rms_norm bias ->int8:0"
    with pytest.raises(ValueError, match="'gated_dot', which needs it"):
        ops.explain("gated_dot", x, w)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "Unknown activation 'swish'"),
        ({"bias": jnp.zeros(64)}, ValueError, r"bias has shape \(64,\); .* free axes of rhs, \(32,\)"),
        ({"residual": jnp.zeros((6, 32))}, ValueError, r"residual has shape \(6, 32\); the result"),
        ({"norm_weight": jnp.zeros(32)}, ValueError, r"norm_weight has shape \(32,\); it must be \(64,\)"),
        ({"act_scale": 0.1}, ValueError, "act_scale needs act_qtype"),
        ({"act_scale": 0.1, "act_qtype": "nf4"}, ValueError, "act_scale needs act_qtype"),
        ({"act_scale": jnp.ones(3), "act_qtype": "int8"}, ValueError, r"lhs_scale has shape \(1, 1, 3\)"),
        ({"out_scale": 0.1}, ValueError, "out_scale is given without out_qtype"),
        ({"out_qtype": "nf4"}, ValueError, "a result is quantized to an integer or a float8"),
        ({"out_qtype": "int8", "out_tile_size": 5}, ValueError, "does not divide N=32"),
        ({"gelu": True}, TypeError, "Unknown keyword gelu; what can be fused: act_scale"),
    ],
)  # fmt: skip
def test_bad_input(layer, options, error, message):
    x, w, *_ = layer
    with pytest.raises(error, match=message):
        ops.qdot(x, w, **options)


def test_gate_must_be_like_rhs(layer):
    x, w, *_ = layer
    other = qwix.quantize(jnp.ones((64, 32)), "int4", channelwise_axes=(1,))
    with pytest.raises(ValueError, match="gate must be quantized and shaped like rhs"):
        ops.qgated_dot(x, other, w)
    with pytest.raises(ValueError, match="weights of gate and rhs must have one shape"):
        ops.qgated_dot(x, w[:, :16], w)
    with pytest.raises(TypeError, match="Unknown keyword gelu"):
        ops.qgated_dot(x, w, w, gelu=True)
    with pytest.raises(ValueError, match="norm_weight normalises a float lhs"):
        ops.qdot(qwix.quantize(x, "int8"), w, norm_weight=jnp.ones(64))
