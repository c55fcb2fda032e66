"""Adapters on meshes: they are sharded as their weights are, without a line of the user's.

The models are called as MaxText and Tunix call theirs: keyword inputs, scanned or remat'ed layers, einsum
modules, a mesh in scope.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qwix
from qwix import lora

TOKENS = jnp.arange(32).reshape(4, 8) % 16
POSITIONS = jnp.broadcast_to(jnp.arange(8), (4, 8))


def mesh(kind):
    return jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(kind, kind))


class Einsum(nnx.Module):
    def __init__(self, spec, shape, sharding, rngs):
        init = nnx.with_partitioning(nnx.initializers.normal(0.2), sharding, eager_sharding=False)
        self.spec, self.w = spec, nnx.Param(init(rngs.params(), shape), out_sharding=sharding)

    def __call__(self, x):
        return jnp.einsum(self.spec, x, self.w[...])


class Block(nnx.Module):
    """Attention's projections as Gemma has them, and a gated MLP."""

    def __init__(self, rngs):
        self.q_einsum = Einsum("BTD,NDH->BTNH", (4, 16, 8), ("tp", "fsdp", None), rngs)
        self.kv_einsum = Einsum("BSD,CKDH->CBSKH", (2, 4, 16, 8), (None, "tp", "fsdp", None), rngs)
        self.o_einsum = Einsum("BTNH,NHD->BTD", (4, 8, 16), ("tp", None, "fsdp"), rngs)
        linear = lambda *shape, names: nnx.Linear(
            *shape,
            use_bias=False,
            rngs=rngs,
            kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), names, eager_sharding=False),
        )
        self.gate_proj = linear(16, 32, names=("fsdp", "tp"))
        self.down_proj = linear(32, 16, names=("tp", "fsdp"))

    def __call__(self, x):
        query, (key, value) = self.q_einsum(x), self.kv_einsum(x)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.o_einsum(mixed)
        return x + self.down_proj(nnx.silu(self.gate_proj(x)))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 16, rngs=rngs)
        self.layers = nnx.List([Block(rngs)])

    def __call__(self, decoder_input_tokens, decoder_positions):
        x = self.embed(decoder_input_tokens) + jnp.sin(decoder_positions[..., None])
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: layer(x))(layer, x)
        return x


INPUTS = {"decoder_input_tokens": TOKENS, "decoder_positions": POSITIONS}
RULE = {
    "module_path": ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj",
    "rank": 4,
    "alpha": 2.0,
    "weight_qtype": "nf4",
    "tile_size": 8,
}


def placed(model, on):
    """The model with its weights on the mesh, as their partition names say."""

    def place(variable):
        names = variable.get_metadata().get("out_sharding") or ()
        return variable.copy(jax.device_put(variable.get_value(), NamedSharding(on, P(*names))))

    graphdef, state = nnx.split(model)
    is_variable = lambda x: isinstance(x, nnx.Variable)
    return nnx.merge(graphdef, jax.tree.map(place, state, is_leaf=is_variable))


def step(model, optimizer):
    def loss(model):
        return jnp.mean(jnp.square(model(**INPUTS) - 1))

    value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, gradients)
    return value


def trained(model, steps=3):
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.LoRAParam)
    run = nnx.jit(step)
    return [float(run(model, optimizer)) for _ in range(steps)]


def test_adapters_are_sharded_as_their_weights_and_train_as_on_one_device():
    provider = lambda: qwix.LoraProvider(**RULE | {"weight_qtype": "int8"})
    alone = qwix.apply_lora_to_model(Decoder(nnx.Rngs(0)), provider(), rngs=nnx.Rngs(1), **INPUTS)
    on = mesh(AxisType.Auto)
    with jax.set_mesh(on):
        base = placed(Decoder(nnx.Rngs(0)), on)
        model = qwix.apply_lora_to_model(base, provider(), rngs=nnx.Rngs(1), **INPUTS)
        block = model.layers[0]
        spec = lambda x: (*x[...].sharding.spec, *[None] * (x.ndim - len(x[...].sharding.spec)))
        assert spec(block.gate_proj.kernel_lora_a) == ("fsdp", None)
        assert spec(block.gate_proj.kernel_lora_b) == (None, "tp")
        assert spec(block.q_einsum.w_lora_a) == ("fsdp", None)
        assert spec(block.q_einsum.w_lora_b) == (None, "tp", None)
        assert spec(block.kv_einsum.w_lora_b) == (None, None, "tp", None)
        assert spec(vars(block.gate_proj)["kernel"].array.qvalue) == ("fsdp", "tp")
        assert not hasattr(block.o_einsum, "w_lora_a")
        losses = trained(model)
        assert spec(block.gate_proj.kernel_lora_a) == ("fsdp", None)
    np.testing.assert_allclose(losses, trained(alone), rtol=1e-5)
    assert losses[-1] < losses[0]


def test_partition_names_give_the_sharding_of_a_whole_state():
    on = mesh(AxisType.Auto)
    model = qwix.apply_lora_to_model(
        Decoder(nnx.Rngs(0)), qwix.LoraProvider(**RULE), rngs=nnx.Rngs(1), **INPUTS
    )
    out = model(**INPUTS)
    graphdef, state = nnx.split(model)
    with jax.set_mesh(on):
        specs = nnx.get_partition_spec(state)
        assert specs["layers"][0]["down_proj"]["kernel_lora_a"].get_value() == P("tp", None)
        sharded = jax.device_put(state, nnx.get_named_sharding(state, on))
        got = nnx.merge(graphdef, sharded)(**INPUTS)
    np.testing.assert_allclose(got, out, rtol=1e-5, atol=1e-5)


def test_explicit_mesh():
    on = mesh(AxisType.Explicit)

    class Projection(nnx.Module):
        def __init__(self, rngs, out=None):
            self.up = nnx.Linear(16, 32, use_bias=False, rngs=rngs)
            self.out = nnx.static(out)

        def __call__(self, x):
            return jnp.einsum("bd,df->bf", x, self.up.kernel[...], out_sharding=self.out)

    x = jax.random.normal(jax.random.key(0), (4, 16))
    rule = RULE | {"module_path": ".*", "lora_b_initializer": jax.nn.initializers.normal(1.0)}
    alone = qwix.apply_lora_to_model(Projection(nnx.Rngs(0)), qwix.LoraProvider(**rule), x, rngs=nnx.Rngs(1))
    with jax.set_mesh(on):
        base = Projection(nnx.Rngs(0), P("fsdp", "tp"))
        base.up.kernel.set_value(jax.device_put(base.up.kernel.get_value(), P(None, "tp")))
        rows = jax.device_put(x, P("fsdp", None))
        model = qwix.apply_lora_to_model(base, qwix.LoraProvider(**rule), rows, rngs=nnx.Rngs(1))
        assert model.up.kernel_lora_b[...].sharding.spec == P(None, "tp")
        out = nnx.jit(lambda m, x: m(x))(model, rows)
        assert jax.typeof(out).sharding.spec == P("fsdp", "tp")
        loss = lambda m: jnp.sum(jnp.square(m(rows)))
        gradients = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))(model)
        assert jax.typeof(gradients["up"]["kernel_lora_b"][...]).sharding.spec == P(None, "tp")
    np.testing.assert_allclose(out, alone(x), rtol=2e-5, atol=2e-5)


def test_linen_partitioned():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", "tp"))
    model = qwix.apply_lora_to_model(
        nn.Dense(32, kernel_init=init), qwix.LoraProvider(**RULE | {"module_path": ".*"})
    )
    x = jnp.ones((4, 16))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert variables["params"]["kernel_lora_a"].names == ("fsdp", None)
    assert variables["params"]["kernel_lora_b"].names == (None, "tp")
    on = mesh(AxisType.Auto)
    with jax.set_mesh(on):
        shardings = nn.get_sharding(variables, on)
        made = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0), x)
        assert made["params"]["kernel_lora_a"].value.sharding.spec == P("fsdp", None)
        out = jax.jit(model.apply)(made, x)
    alone = jax.jit(model.init)(jax.random.key(0), x)
    np.testing.assert_allclose(out, model.apply(alone, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [{}, {"weight_qtype": "int8"}])
def test_adapters_that_are_loaded_keep_the_mesh(stored):
    on = mesh(AxisType.Auto)
    rule = {"module_path": RULE["module_path"], "rank": 4, "alpha": 2.0} | stored
    with jax.set_mesh(on):
        model = qwix.apply_lora_to_model(
            placed(Decoder(nnx.Rngs(0)), on), qwix.LoraProvider(**rule), rngs=nnx.Rngs(1), **INPUTS
        )
        host = jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), lora.adapters_of(model))
        lora.with_adapters(model, host)
        loaded = model.layers[0].gate_proj.kernel_lora_a[...]
        assert loaded.sharding.spec == P("fsdp", None) and float(loaded[0, 0]) == np.float32(0.01)
        merged = lora.merge(model).model
        kernel = vars(merged.layers[0].gate_proj)["kernel"]
        array = kernel.unboxed.qvalue if stored else kernel.get_value()
        assert array.sharding.spec == P("fsdp", "tp")
