"""A small transformer over meshes, by automatic sharding and in shard_map: PTQ, training, adapters.

Weights are cut along `model` as Megatron cuts them (columns, then rows), and in FSDP along `data` besides.
Results are those of one device. Sums over shards are added in another order, so floats differ in their last
bits; where that turns an integer of a later layer, its row is off by a step of 8 bits in that layer, and so
are those that attend to it. So a part of the rows must agree to float32's rounding, and none may be off by
more than a step in each of four layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import qwix
from bench import scale_hlo

WIDTH, HEADS, HIDDEN, VOCAB = 32, 4, 64, 16
TOKENS = jnp.arange(64).reshape(8, 8) % VOCAB
INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
PTQ = qwix.QuantizationRule(**INT8)
EPS = float(np.finfo(np.float32).eps)
STEP = 1 / 127.5  # of the greatest
# Of weights, whole along `data` and cut along `model`.
PARTS = {(WIDTH, n // c) for n in (WIDTH, HIDDEN) for c in (1, 2, 4)} | {
    (n // c, WIDTH) for n in (WIDTH, HIDDEN) for c in (2, 4)
}
MESHES = {"2x4": (2, 4), "4x2": (4, 2), "8x1": (8, 1)}
LAYOUTS = {"tensor": (None, "model"), "fsdp": ("data", "model")}


def mesh_of(name):
    return jax.make_mesh(MESHES[name], ("data", "model"), axis_types=(AxisType.Auto,) * 2)


class Dense(nn.Module):
    """Linen's, cut along columns or rows."""

    features: int
    names: tuple

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), self.names)
        return nn.Dense(self.features, use_bias=False, kernel_init=init, name="dense")(x)


class LinenTransformer(nn.Module):
    rows: str | None
    columns: str

    @nn.compact
    def __call__(self, tokens):
        inward, outward = (self.rows, self.columns), (self.columns, self.rows)
        x = nn.Embed(VOCAB, WIDTH)(tokens)
        query, key, value = (
            Dense(WIDTH, inward, name=n)(x).reshape(*x.shape[:2], HEADS, -1) for n in ("q", "k", "v")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + Dense(WIDTH, outward, name="o")(mixed.reshape(x.shape))
        hidden = nn.gelu(Dense(HIDDEN, inward, name="up")(nn.LayerNorm()(x)))
        return x + Dense(WIDTH, outward, name="down")(hidden)


class NnxTransformer(nnx.Module):
    def __init__(self, rows, columns, rngs):
        def linear(n, m, names):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names, eager_sharding=False)
            return nnx.Linear(n, m, use_bias=False, rngs=rngs, kernel_init=init)

        inward, outward = (rows, columns), (columns, rows)
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.q, self.k, self.v = (linear(WIDTH, WIDTH, inward) for _ in range(3))
        self.o = linear(WIDTH, WIDTH, outward)
        self.up, self.down = linear(WIDTH, HIDDEN, inward), linear(HIDDEN, WIDTH, outward)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        query, key, value = (f(x).reshape(*x.shape[:2], HEADS, -1) for f in (self.q, self.k, self.v))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.o(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


def close(got, want):
    """Of results with a row for each token."""
    error = abs(np.asarray(got) - np.asarray(want)).max(-1) / float(abs(want).max())
    return (error <= 64 * EPS).mean() >= 1 / 4 and error.max() <= 4 * STEP


def check_gathers(found, layout):
    """No weight is gathered where weights needn't be; as stored integers in FSDP, and all of them."""
    whole = [c for c in found if c.op == "all-gather" and {s[-2:] for s in c.shapes} & PARTS]
    assert all(set(c.dtypes) == {"s8"} for c in whole), whole
    assert bool(whole) == (layout == "fsdp")


def nnx_on(mesh, layout):
    """The float model, cut as its metadata says."""
    with jax.set_mesh(mesh):

        @nnx.jit
        def make():
            model = NnxTransformer(*LAYOUTS[layout], nnx.Rngs(0))
            state = nnx.state(model)
            nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
            return model

        return make()


def served(model, tokens):
    """(result, collectives) of one compiled call, the model's arrays as arguments."""
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, tokens).compile()
    return compiled(state, tokens), scale_hlo.collectives(compiled.as_text())


@pytest.fixture(scope="module")
def alone():
    """One device's quantized model, and its result."""
    model = qwix.quantize_model(NnxTransformer(None, "model", nnx.Rngs(0)), qwix.PtqProvider(PTQ), TOKENS)
    return jax.jit(model)(TOKENS)


QUICK = ("2x4", "tensor")
GRID = [(m, layout) for m in MESHES for layout in LAYOUTS]


def marked(cases, quick):
    return [c if c in quick else pytest.param(*c, marks=pytest.mark.large) for c in cases]


@pytest.mark.parametrize("mesh_name, layout", marked(GRID, [("4x2", "fsdp")]))
def test_ptq_nnx(mesh_name, layout, alone):
    """No float weight travels: tensor parallel gathers none at all, FSDP only stored integers."""
    mesh = mesh_of(mesh_name)
    with jax.set_mesh(mesh):
        model = qwix.quantize_model(nnx_on(mesh, layout), qwix.PtqProvider(PTQ), TOKENS)
        out, found = served(model, jax.device_put(TOKENS, P("data", None)))
    assert close(out, alone)
    check_gathers(found, layout)
    kernel = vars(model.up)["kernel"].array.qvalue
    assert mesh.shape["model"] == 1 or kernel.sharding.spec == P(*LAYOUTS[layout])


@pytest.mark.parametrize("mesh_name, layout", marked(GRID, [QUICK]))
def test_ptq_linen(mesh_name, layout):
    model = qwix.quantize_model(LinenTransformer(*LAYOUTS[layout]), PTQ)
    init = jax.jit(lambda key: nn.unbox(model.init(key, TOKENS)))
    single = init(jax.random.key(0))
    want = jax.jit(model.apply)(single, TOKENS)
    mesh = mesh_of(mesh_name)
    with jax.set_mesh(mesh):
        variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
        shardings = nn.unbox(nn.get_sharding(variables, mesh))
        params = jax.device_put(single, shardings)
        compiled = jax.jit(model.apply).lower(params, jax.device_put(TOKENS, P("data", None))).compile()
        got = compiled(params, jax.device_put(TOKENS, P("data", None)))
    assert close(got, want)
    check_gathers(scale_hlo.collectives(compiled.as_text()), layout)


@pytest.mark.large
@pytest.mark.parametrize("mesh_name", ["2x4", "8x1"])
def test_training(mesh_name):
    """A quantized step: the loss and every gradient."""
    rule = qwix.QtRule(**INT8, bwd_qtype="int8")

    def loss(model, tokens):
        return jnp.mean(jnp.square(model(tokens) - 1))

    grad = nnx.jit(nnx.value_and_grad(loss))
    single = qwix.quantize_model(NnxTransformer(None, "model", nnx.Rngs(0)), qwix.QtProvider(rule), TOKENS)
    want, want_grads = grad(single, TOKENS)
    mesh = mesh_of(mesh_name)
    with jax.set_mesh(mesh):
        model = qwix.quantize_model(nnx_on(mesh, "fsdp"), qwix.QtProvider(rule), TOKENS)
        got, grads = grad(model, jax.device_put(TOKENS, P("data", None)))
    assert abs(got - want) <= STEP * abs(want)
    for ours, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        # A step in each of the layers forward and back.
        assert (abs(ours - reference) <= 8 * STEP * abs(reference).max()).all()


@pytest.mark.large
@pytest.mark.parametrize("mesh_name", MESHES)
def test_adapters(mesh_name):
    """LoRA on int8 weights: adapters are cut as their weights, results are those of one device."""
    nonzero = jax.nn.initializers.normal(0.1)
    provider = lambda: qwix.LoraProvider(
        module_path=".*", rank=4, alpha=2.0, weight_qtype="int8", lora_b_initializer=nonzero
    )
    base = NnxTransformer(None, "model", nnx.Rngs(0))
    want = qwix.apply_lora_to_model(base, provider(), TOKENS, rngs=nnx.Rngs(1))(TOKENS)
    mesh = mesh_of(mesh_name)
    with jax.set_mesh(mesh):
        model = qwix.apply_lora_to_model(nnx_on(mesh, "tensor"), provider(), TOKENS, rngs=nnx.Rngs(1))
        got, _ = served(model, jax.device_put(TOKENS, P("data", None)))
        laid_out = model.up.kernel_lora_b[...].sharding.spec
        assert mesh.shape["model"] == 1 or laid_out == P(None, "model")
    assert close(got, want)


@pytest.mark.large
@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("mesh_name", MESHES)
def test_data_parallel_in_shard_map(mesh_name, check_vma, alone):
    """The quantized model inside of jax.shard_map: rows of the batch are independent."""
    mesh = mesh_of(mesh_name)
    model = qwix.quantize_model(NnxTransformer(None, "model", nnx.Rngs(0)), qwix.PtqProvider(PTQ), TOKENS)
    graphdef, state = nnx.split(model)
    local = lambda state, tokens: nnx.merge(graphdef, state)(tokens)
    run = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma)
    )
    compiled = run.lower(state, TOKENS).compile()
    assert close(compiled(state, TOKENS), alone)
    assert not scale_hlo.collectives(compiled.as_text())
