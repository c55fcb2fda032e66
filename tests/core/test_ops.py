"""qwix.ops: the direct API, and explain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwix
from qwix import ops


@pytest.fixture(scope="module")
def weights():
    w = jax.random.normal(jax.random.key(0), (64, 8))
    return qwix.quantize(w, "int4", channelwise_axes=(1,), tiled_axes={0: 32})


def test_the_three_ops_agree(weights, normal, check_einsum):
    x = normal(1, 3, 64)
    out = ops.qdot(x, weights)
    check_einsum(out, "mk,kn->mn", x, weights)
    np.testing.assert_array_equal(ops.qdot_general(x, weights, (((1,), (0,)), ((), ()))), out)
    np.testing.assert_array_equal(ops.qeinsum("mk,kn->mn", x, weights), out)
    quantized = ops.qdot(x, weights, act_qtype="int8", act_tile_size=32)
    np.testing.assert_array_equal(
        ops.qeinsum("mk,kn->mn", x, weights, act_qtype="int8", act_tile_size=32), quantized
    )
    assert 0 < np.abs(quantized - out).max() < 0.3


def test_the_float_side_may_be_on_the_right(weights, normal, check_einsum):
    x = normal(2, 64, 3)
    out = ops.qdot(weights.T, x, act_qtype="int8")
    q = qwix.quantize(x, "int8", channelwise_axes=(1,))
    check_einsum(out, "mk,kn->mn", weights.T, q)
    np.testing.assert_allclose(
        ops.qeinsum("kn,km->mn", weights, x, act_qtype="int8").T, out, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="there is none"):
        ops.qdot(weights.T, weights, act_qtype="int8")


def test_two_floats_with_a_dynamic_lhs(normal):
    x, w = normal(3, 3, 64), normal(4, 64, 5)
    out = ops.qdot(x, w, act_qtype="float8_e4m3fn", preferred_element_type=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out, np.float64) - np.asarray(x) @ np.asarray(w))
    assert (error <= (np.abs(x) / 16 + 1e-2) @ np.abs(np.asarray(w)) + 0.1).all()


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "v7x", "cpu"])
def test_explain_answers_for_chips_that_are_not_here(chip):
    shape = jax.ShapeDtypeStruct
    w = qwix.QArray(shape((4096, 4096), jnp.int8), shape((1, 4096), jnp.bfloat16))
    e = ops.explain("dot", ((1024, 4096), "bfloat16"), w, chip=chip, act_qtype="int8")
    assert e.chosen in ("mosaic_tpu", "xla") and (e.chosen == "xla") >= (chip == "cpu")
    assert e.estimate.static_us > 0 and e.problem.scheme == "w8a8"
    refused = [name for name, reason in e.rejected if reason]
    assert refused == (["mosaic_tpu", "mosaic_gpu"] if e.chosen == "xla" else [])
    einsum = ops.explain("btd,df->btf", ((2, 512, 4096), "bfloat16"), w, chip=chip, act_qtype="int8")
    assert einsum.problem == e.problem and einsum.chosen == e.chosen


def test_explain_runs_nothing(weights):
    with jax.disable_jit(), jax.transfer_guard("disallow"):
        e = ops.explain(
            "dot_general", ((3, 64), "float32"), weights, dimension_numbers=(((1,), (0,)), ((), ()))
        )
    assert e.problem.scheme == "w4a32_g32"


def test_explain_refuses_what_no_kernel_computes(weights):
    with pytest.raises(ValueError, match="No quantized kernel"):
        ops.explain("dot", ((3, 64), "float32"), ((64, 8), "float32"), chip="v5e")
    with pytest.raises(ValueError, match="op is 'matmul'"):
        ops.explain("matmul", ((3, 64), "float32"), weights)
    with pytest.raises(ValueError, match="needs dimension_numbers"):
        ops.explain("dot_general", ((3, 64), "float32"), weights)
