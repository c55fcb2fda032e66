"""Models on a mesh with explicit axes: einsums that say their layout, and statistics of a whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qwix

EPS = float(np.finfo(np.float32).eps)
X = jax.random.normal(jax.random.key(0), (8, 4, 32))
W = jax.random.normal(jax.random.key(1), (32, 16))
INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
RULES = {
    "training": qwix.QtProvider(qwix.QtRule(**INT8, bwd_qtype="int8")),
    "inference": qwix.PtqProvider(qwix.QuantizationRule(**INT8)),
}


@pytest.fixture(scope="module")
def mesh(devices):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=devices)


class Einsum(nnx.Module):
    def __init__(self, w, out=None):
        self.w, self.out = nnx.Param(w), nnx.static(out)

    def __call__(self, x):
        return jnp.einsum("btd,df->bft", x, self.w[...], out_sharding=self.out)


def placed(mesh, x, *axes):
    return jax.device_put(x, NamedSharding(mesh, P(*axes)))


@pytest.mark.parametrize("name", ["training", pytest.param("inference", marks=pytest.mark.large)])
def test_an_einsum_is_quantized_and_laid_out_as_it_says(name, mesh):
    """The batch is cut along `data`, the weight along both, and the result's axes are in another order."""
    out = P("data", "model", None)
    alone = jax.jit(qwix.quantize_model(Einsum(W), RULES[name], X))(X)
    with jax.set_mesh(mesh):
        x, w = placed(mesh, X, "data", None, None), placed(mesh, W, "data", "model")
        model = qwix.quantize_model(Einsum(w, out), RULES[name], x)
        got = jax.jit(model)(x)
        assert got.sharding.spec == out
        assert (abs(got - alone) <= 4 * EPS * abs(alone)).all()  # the same integers, and their two scales
        if name == "training":
            grads = nnx.jit(nnx.grad(lambda model, x: (model(x) ** 2).sum(), argnums=(0, 1)))(model, x)
            shardings = grads[0].w[...].sharding.spec, grads[1].sharding.spec
            assert shardings == (P("data", "model"), P("data", None, None))
    assert all(row.reason is None for row in qwix.report(model).rows)


@pytest.mark.large
def test_statistics_of_a_batch_on_an_explicit_mesh_are_those_of_the_whole(mesh):
    rule = qwix.QtRule(**INT8, bwd_qtype="int8", act_static_scale=True)
    x = X.reshape(32, 32)

    def after_a_step(x):
        linear = nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0))
        model = qwix.quantize_model(linear, qwix.QtProvider(rule), x)
        nnx.jit(lambda model, x: model(x))(model, x)
        return model.dot_general0_lhs.get_value()

    whole = after_a_step(x)
    with jax.set_mesh(mesh):
        got = after_a_step(placed(mesh, x, "data", None))
    assert got["count"] == whole["count"] == 1
    assert got["sum_of_absmax"].sharding.is_fully_replicated
    assert abs(got["sum_of_absmax"] - whole["sum_of_absmax"]) <= 8 * EPS * whole["sum_of_absmax"]
