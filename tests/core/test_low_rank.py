"""Low-rank updates of a dot's weight, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qwix
from qwix._src.core.low_rank import LowRank, dot_general_low_rank, low_rank_delta

DENSE = (((1,), (0,)), ((), ()))
EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


def _normal(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _wide(x):
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 8])
def test_the_update_is_within_its_bound(dtype, rank):
    x, a, b = _normal(0, (5, 48), dtype), _normal(1, (48, rank), dtype), _normal(2, (rank, 24), dtype)
    got = low_rank_delta(x, LowRank(a, b, 0.25), DENSE)
    assert got.dtype == jnp.float32
    exact = 0.25 * (_wide(x) @ _wide(a)) @ _wide(b)
    bound = (48 + rank + 5) * EPS["float32"] * 0.25 * (abs(_wide(x)) @ abs(_wide(a))) @ abs(_wide(b))
    assert np.all(abs(_wide(got) - exact) <= bound)


def _einsum_case():
    """lhs [free, batch, k0, k1], rhs [k1, free, batch, k0, free]."""
    numbers = (((2, 3), (3, 0)), ((1,), (2,)))
    x, w = _normal(0, (3, 2, 4, 16)), _normal(1, (16, 5, 2, 4, 6))
    return numbers, x, w, _normal(2, (2, 4, 16, 3)), _normal(3, (2, 3, 5, 6))


def test_axes_are_in_the_order_of_the_dimension_numbers():
    numbers, x, w, a, b = _einsum_case()
    mask = jnp.asarray(np.random.default_rng(4).integers(0, 2, (2, 3, 3)), jnp.float32)
    got = low_rank_delta(x, LowRank(a, b, 2.0, mask), numbers)
    x64, a64, b64 = map(_wide, (x, a, b))
    want = 2 * np.einsum("mbij,bijr,bmr,brnp->bmnp", x64, a64, _wide(mask), b64)
    total = 2 * np.einsum("mbij,bijr,bmr,brnp->bmnp", abs(x64), abs(a64), _wide(mask), abs(b64))
    assert np.all(abs(_wide(got) - want) <= (64 + 3 + 5) * EPS["float32"] * total)
    with_base = dot_general_low_rank(x, w, LowRank(a, b, 2.0, mask), numbers)
    base = np.einsum("mbij,jnbip->bmnp", x64, _wide(w))
    total += np.einsum("mbij,jnbip->bmnp", abs(x64), abs(_wide(w)))
    assert np.all(abs(_wide(with_base) - base - want) <= (64 + 3 + 6) * EPS["float32"] * total)
    with pytest.raises(ValueError, match=r"needs a .*\(2, 4, 16, 'rank'\)"):
        low_rank_delta(x, LowRank(a.swapaxes(1, 2), b, 2.0), numbers)


@pytest.mark.parametrize("form", ["float", "qarray", "transposed"])
@pytest.mark.parametrize("act", [False, True])
def test_one_rounding(form, act):
    """In bfloat16 the sum is off by half a last place of the result, not by two roundings of its parts."""
    x, w = _normal(0, (7, 64), "bfloat16"), _normal(1, (64, 32), "bfloat16")
    low_rank = LowRank(_normal(2, (64, 4), "bfloat16"), _normal(3, (4, 32), "bfloat16"), 0.5)
    rhs = qwix.quantize(w, "int8", channelwise_axes=(1,), scale_dtype="float32")
    used = w if form == "float" else rhs if form == "qarray" else qwix.transpose_qarray(rhs, DENSE, "rhs")
    how = qwix.HowToQuantize(qtype="int8", channelwise_axes=(0,)) if act else None
    got = dot_general_low_rank(x, used, low_rank, DENSE, act_how=how, preferred_element_type=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    left = qwix.quantize(x.astype(jnp.float32), "int8", channelwise_axes=(0,)).dequantize() if act else x
    right = w if form == "float" else rhs.dequantize()
    base = _wide(left) @ _wide(right)
    delta = 0.5 * (_wide(x) @ _wide(low_rank.a)) @ _wide(low_rank.b)
    total = abs(_wide(left)) @ abs(_wide(right))
    total += 0.5 * abs(_wide(x)) @ abs(_wide(low_rank.a)) @ abs(_wide(low_rank.b))
    exact = base + delta
    assert np.all(abs(_wide(got) - exact) <= 2.0**-8 * abs(exact) + 80 * EPS["float32"] * total)


def test_transformations():
    x, w = _normal(0, (4, 3, 32)), qwix.quantize(_normal(1, (32, 16)), "int4", channelwise_axes=(1,))
    a, b = _normal(2, (32, 2)), _normal(3, (2, 16))
    one = lambda x, a, b: dot_general_low_rank(x, w, LowRank(a, b, 0.5), DENSE)
    batched = jax.jit(jax.vmap(one, in_axes=(0, None, None)))(x, a, b)
    np.testing.assert_allclose(batched, jnp.stack([one(row, a, b) for row in x]), rtol=1e-5, atol=1e-5)
    leaves, tree = jax.tree.flatten(LowRank(a, b, 0.5))
    assert len(leaves) == 2 and jax.tree.unflatten(tree, leaves).scaling == 0.5


def test_what_is_wrong_is_named():
    x, w = _normal(0, (4, 32)), _normal(1, (32, 16))
    a, b = _normal(2, (32, 2)), _normal(3, (2, 16))
    with pytest.raises(ValueError, match=r"got a \(32, 2\) and b \(3, 16\)"):
        dot_general_low_rank(x, w, LowRank(a, _normal(3, (3, 16)), 1.0), DENSE)
    with pytest.raises(ValueError, match=r"row_mask has shape \(3, 2\); it must be \(4, 2\)"):
        dot_general_low_rank(x, w, LowRank(a, b, 1.0, jnp.ones((3, 2))), DENSE)
    with pytest.raises(TypeError, match="float lhs, got int8"):
        low_rank_delta(jnp.ones((4, 32), jnp.int8), LowRank(a, b, 1.0), DENSE)
    with pytest.raises(TypeError, match="preferred_element_type is int32"):
        rhs = qwix.quantize(w, "int8")
        dot_general_low_rank(x, rhs, LowRank(a, b, 1.0), DENSE, preferred_element_type=jnp.int32)
    with pytest.raises(ValueError, match="Sizes disagree"):
        dot_general_low_rank(x, w.T, LowRank(a, b, 1.0), DENSE)


def test_one_op_where_the_weight_is_quantized():
    """Axes in any order, a batch, and a mask that some rows share; the same as the two dots."""
    numbers, x, w, a, b = _einsum_case()
    rhs = qwix.quantize(w, "int8", channelwise_axes=(1, 2, 4))
    for shape in ((2, 3, 3), (2, 1, 3), (1, 1, 1)):
        mask = jnp.asarray(np.random.default_rng(4).integers(0, 2, shape), jnp.float32)
        low_rank = LowRank(a, b, 2.0, mask)
        run = lambda x, low_rank: dot_general_low_rank(x, rhs, low_rank, numbers)
        assert "qwix_matmul" in str(jax.make_jaxpr(run)(x, low_rank))
        apart = qwix.ops.qdot_general(x, rhs, numbers) + low_rank_delta(x, low_rank, numbers)
        np.testing.assert_allclose(run(x, low_rank), apart, rtol=1e-5, atol=1e-4)


def test_gradients_against_the_two_dots():
    x, w = _normal(0, (4, 3, 32)), qwix.quantize(_normal(1, (32, 16)), "nf4", channelwise_axes=(1,))
    numbers = (((2,), (0,)), ((), ()))
    args = x, _normal(2, (32, 4)), _normal(3, (4, 16)), jnp.asarray([[[0, 1, 1, 0.5]]])
    g = _normal(5, (4, 3, 16))
    fused = lambda x, a, b, mask: dot_general_low_rank(x, w, LowRank(a, b, 0.5, mask), numbers)
    plain = lambda x, a, b, mask: (
        jnp.einsum("bmk,kn->bmn", x, w.dequantize(), precision="highest")
        + low_rank_delta(x, LowRank(a, b, 0.5, mask), numbers, precision="highest")
    )
    got, want = (jax.vjp(f, *args)[1](g) for f in (fused, plain))
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("asked,rhs_dtype", [(False, "int8"), (True, "int8"), (True, "float32")])
def test_explicit_mesh(asked, rhs_dtype, devices):
    """Laid out as the operands or as asked, gradients as what they are of, with the numbers of one device."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2, devices=devices)
    numbers = (((2,), (0,)), ((), ()))
    w = _normal(1, (32, 16))
    w = qwix.quantize(w, "int8", channelwise_axes=(1,)) if rhs_dtype == "int8" else w
    args = _normal(0, (8, 4, 32)), _normal(2, (32, 4)), _normal(3, (4, 16))

    def run(x, a, b, w, out):
        dot = lambda x, a, b: dot_general_low_rank(x, w, LowRank(a, b, 0.5), numbers, out_sharding=out)
        y, pull = jax.vjp(dot, x, a, b)
        return y, *pull(y)

    alone = jax.jit(lambda x, a, b: run(x, a, b, w, None))(*args)
    out = P("a", None, "b")
    specs = P("a", None, None), P(None, None), P(None, "b")
    with jax.set_mesh(mesh):
        place = lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec))
        placed = jax.tree.map(lambda v: place(v, P(None, "b")), w)
        given = [place(v, spec) for v, spec in zip(args, specs, strict=True)]
        got = jax.jit(lambda x, a, b, w: run(x, a, b, w, out if asked else None))(*given, placed)
    for mine, want, spec in zip(got, alone, (out, *specs), strict=True):
        assert mine.sharding.spec == spec
        np.testing.assert_allclose(mine, want, rtol=1e-4, atol=1e-5 * float(abs(want).max()))
