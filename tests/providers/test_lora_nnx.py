"""Adapters of NNX models: their variables, Flax's transformations, dropout's switch, pickling and sharing."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qwix

NORMAL = jax.nn.initializers.normal(1.0)
QLORA = {"rank": 2, "alpha": 1.0, "weight_qtype": "nf4", "tile_size": 8, "lora_b_initializer": NORMAL}
X = jax.random.normal(jax.random.key(0), (4, 16))


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 32, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(32, 16, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(self.up(x))


class Layers(nnx.Module):
    """Three layers, stacked, in a scan."""

    def __init__(self, rngs: nnx.Rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(16, 16, use_bias=False, rngs=rngs))
        self.layers = make(rngs.split(3))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class Experts(nnx.Module):
    """Three layers under vmap that share x."""

    def __init__(self, rngs: nnx.Rngs):
        self.experts = nnx.vmap(lambda rngs: nnx.Linear(16, 8, use_bias=False, rngs=rngs))(rngs.split(3))

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.experts, x)


def lora(model, inputs=(X,), seed=1, **rule):
    return qwix.apply_lora_to_model(model, qwix.LoraProvider(**rule), *inputs, rngs=nnx.Rngs(seed))


def float_kernel(layer):
    stored = vars(layer)["kernel"]
    return qwix.dequantize(stored.unboxed) if isinstance(stored, qwix.WithAux) else stored.get_value()


def whole(layer, scaling=0.5):
    return float_kernel(layer) + scaling * layer.kernel_lora_a[...] @ layer.kernel_lora_b[...]


@pytest.mark.parametrize("rule", [{"rank": 2, "alpha": 1.0, "lora_b_initializer": NORMAL}, QLORA])
def test_adapters_are_lora_params_and_add_to_the_weights(rule):
    base = Mlp(nnx.Rngs(0))
    model = lora(base, **rule)
    assert isinstance(model.up.kernel_lora_a, nnx.LoRAParam) and not hasattr(base.up, "kernel_lora_a")
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))
    assert shapes == {
        "up": {"kernel_lora_a": (16, 2), "kernel_lora_b": (2, 32)},
        "down": {"kernel_lora_a": (32, 2), "kernel_lora_b": (2, 16)},
    }
    want = X @ whole(model.up) @ whole(model.down)
    bound = jnp.abs(X) @ jnp.abs(whole(model.up)) @ jnp.abs(whole(model.down))
    assert jnp.all(jnp.abs(model(X) - want) < 128 * 2**-23 * bound)
    np.testing.assert_array_equal(model.up(X), lora(base, **rule).up(X))  # a module by itself; the same seed


@pytest.mark.parametrize("rule", [{"rank": 2, "alpha": 1.0, "lora_b_initializer": NORMAL}, QLORA])
@pytest.mark.parametrize("make", [Layers, Experts])
def test_stacked_layers(make, rule):
    model = lora(make(nnx.Rngs(0)), **rule)
    layer = getattr(model, "layers", None) or model.experts
    assert layer.kernel_lora_a.shape == (3, 16, 2) and layer.kernel_lora_b.shape[:2] == (3, 2)
    kernels = float_kernel(layer) + 0.5 * jnp.einsum(
        "lkr,lrn->lkn", layer.kernel_lora_a[...], layer.kernel_lora_b[...]
    )
    if make is Experts:
        want, bound = jnp.einsum("bk,lkn->lbn", X, kernels), jnp.einsum("bk,lkn->lbn", abs(X), abs(kernels))
    else:
        want, bound = X, jnp.abs(X)
        for kernel in kernels:
            want, bound = want @ kernel, bound @ jnp.abs(kernel)
    assert jnp.all(jnp.abs(nnx.jit(lambda m, x: m(x))(model, X) - want) < 128 * 2**-23 * bound)


def test_an_optimizer_of_lora_params_moves_nothing_else():
    model = lora(Mlp(nnx.Rngs(0)), rank=2, alpha=4.0, weight_qtype="nf4", tile_size=8)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    counts = [x.size for x in jax.tree.leaves(nnx.state(optimizer)) if x.size > 1]
    adapters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    assert sum(counts) == 2 * adapters  # Adam's two moments of adapters, and of nothing else
    rest = lambda: jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.LoRAParam))))
    before = rest()

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(X) - jnp.roll(X, 1, 1)) ** 2)
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, rest(), before)


def test_train_and_eval_switch_dropout():
    model = lora(Mlp(nnx.Rngs(0)), rank=2, alpha=1.0, dropout=0.5, lora_b_initializer=NORMAL)
    with pytest.raises(ValueError, match=r"qwix_rngs=nnx.Rngs\(dropout=seed\)"):
        model(X)
    model.eval()
    plain = model(X)
    bound = 128 * 2**-23 * jnp.abs(X) @ jnp.abs(whole(model.up)) @ jnp.abs(whole(model.down))
    assert jnp.all(jnp.abs(plain - X @ whole(model.up) @ whole(model.down)) < bound)
    model.train()
    model.set_attributes(qwix_rngs=nnx.Rngs(dropout=0))
    first, second = model(X), model(X)
    assert jnp.any(first != plain) and jnp.any(first != second)


def test_a_shared_weight_has_one_adapter():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(16, 16, use_bias=False, rngs=rngs)
            self.second = nnx.Linear(16, 16, use_bias=False, rngs=rngs)
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(self.first(x))

    model = lora(Shared(nnx.Rngs(0)), **QLORA)
    assert model.first.kernel_lora_a is model.second.kernel_lora_a
    kernel = whole(model.first)
    bound = 128 * 2**-23 * jnp.abs(X) @ jnp.abs(kernel) @ jnp.abs(kernel)
    assert jnp.all(jnp.abs(model(X) - X @ kernel @ kernel) < bound)


def test_partition_names_follow_the_weight():
    names = ("embed", "mlp")
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names, eager_sharding=False)
    model = lora(nnx.Linear(16, 8, kernel_init=init, rngs=nnx.Rngs(0)), **QLORA)
    assert model.kernel_lora_a.get_metadata("out_sharding") == ("embed", None)
    assert model.kernel_lora_b.get_metadata("out_sharding") == (None, "mlp")


def test_it_can_be_pickled_split_and_merged():
    model = lora(Mlp(nnx.Rngs(0)), rank=2, alpha=1.0, weight_qtype="nf4", tile_size=8)
    model.up.kernel_lora_b.set_value(jnp.ones((2, 32)))
    out = model(X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model))(X), out)
    np.testing.assert_array_equal(nnx.merge(*nnx.split(model))(X), out)
    np.testing.assert_array_equal(nnx.clone(model)(X), out)


def test_abstract_models():
    abstract = nnx.eval_shape(lambda: Mlp(nnx.Rngs(0)))
    model = qwix.apply_lora_to_model(
        abstract, qwix.LoraProvider(**QLORA), jax.ShapeDtypeStruct((4, 16), jnp.float32), rngs=nnx.Rngs(0)
    )
    assert model.up.kernel_lora_a.get_raw_value() == jax.ShapeDtypeStruct((16, 2), jnp.float32)
    made = nnx.jit(lambda: lora(Mlp(nnx.Rngs(0)), **QLORA))()
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(made))) == jax.tree.map(
        jnp.shape, nnx.to_pure_dict(nnx.state(model))
    )
    # Of one program, weights and scales may differ from those of many in the last bit; outputs reach 5.
    want = lora(Mlp(nnx.Rngs(0)), **QLORA)(X)
    np.testing.assert_allclose(made(X), want, rtol=0, atol=1e-5)


def test_without_rngs_it_says_which_seed():
    with pytest.warns(UserWarning, match=r"adapters are made from nnx.Rngs\(10003\)"):
        model = qwix.apply_lora_to_model(Mlp(nnx.Rngs(0)), qwix.LoraProvider(**QLORA), X)
    same = lora(Mlp(nnx.Rngs(0)), seed=10003, **QLORA)
    np.testing.assert_array_equal(model.up.kernel_lora_a[...], same.up.kernel_lora_a[...])


def test_without_inputs_flax_own_layers_get_adapters():
    model = qwix.apply_lora_to_model(Mlp(nnx.Rngs(0)), qwix.LoraProvider(**QLORA), rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(X), lora(Mlp(nnx.Rngs(0)), **QLORA)(X))


def test_bad_input_leaves_the_model_as_it_was():
    class Listed(nnx.Module):
        def __init__(self, rngs):
            self.weights = nnx.List([nnx.Param(jnp.ones((16, 16)))])

        def __call__(self, x):
            return x @ self.weights[0]

    base = Listed(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'weights/0' can't have an adapter: it stands in a List"):
        lora(base, **QLORA)
    assert isinstance(base.weights[0], nnx.Param) and list(vars(base.weights)) == list(vars(nnx.List([1])))
    with pytest.raises(
        ValueError, match=r"rank=17 is too large for an adapter of the weight 'down/kernel'|'up/kernel'"
    ):
        lora(Mlp(nnx.Rngs(0)), **QLORA | {"rank": 17})
    with pytest.raises(ValueError, match="no weight has its adapter"):
        lora(Mlp(nnx.Rngs(0)), **QLORA, module_path="decoder")
