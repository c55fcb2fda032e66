"""The ways in which other projects call this library on meshes, without what they work around.

MaxText trains with QtProvider and gathers quantized weights in its grouped matmul; tpu-inference quantizes a
model under jit with donation, or fills an abstract one from a checkpoint; Tunix puts adapters on a model that
is sharded already.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qwix
import qwix.pallas as qpl
from bench import scale_hlo

EPS = float(np.finfo(np.float32).eps)
INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
RULES = [qwix.QuantizationRule(module_path=".*", **INT8)]
X = jax.random.normal(jax.random.key(0), (8, 32))


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


class Mlp(nnx.Module):
    """Columns of `up` and rows of `down` along `model`, as their metadata says."""

    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        linear = lambda n, m, names: nnx.Linear(
            n,
            m,
            use_bias=False,
            rngs=rngs,
            kernel_init=nnx.with_partitioning(init, names, eager_sharding=False),
        )
        self.up = linear(32, 64, (None, "model"))
        self.down = linear(64, 32, ("model", None))

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def sharded(mesh):
    """The float model on the mesh."""

    @nnx.jit
    def make():
        model = Mlp(nnx.Rngs(0))
        state = nnx.state(model)
        nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        return model

    with jax.set_mesh(mesh):
        return make()


def spec(x):
    return (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))


def close(got, want, bound=64 * EPS):
    """Of sums of the same integers and scales, added up in another order."""
    return (abs(np.asarray(got) - np.asarray(want)) <= bound * float(abs(want).max())).all()


@pytest.fixture(scope="module")
def alone():
    """The quantized model on one device, and its result."""
    model = qwix.quantize_model(Mlp(nnx.Rngs(0)), qwix.PtqProvider(RULES), X)
    return model, jax.jit(model)(X)


def stored(model):
    return {name: vars(getattr(model, name))["kernel"].array for name in ("up", "down")}


def test_tpu_inference_quantizes_under_jit_with_donation(alone):
    """One jitted call, donating the float model: values are those of one device, where the weights were."""
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(sharded(mesh))

        def quantize(state):
            model = qwix.quantize_model(nnx.merge(graphdef, state), qwix.PtqProvider(RULES), X)
            return nnx.split(model)[1]

        compiled = jax.jit(quantize, donate_argnums=(0,)).lower(state).compile()
        text = compiled.as_text()
        quantized = compiled(state)
        again = qwix.quantize_model(nnx.eval_shape(lambda: Mlp(nnx.Rngs(0))), qwix.PtqProvider(RULES), X)
        nnx.update(again, quantized)
        out = jax.jit(again)(jax.device_put(X, P("data", None)))
    gathered = [c for c in scale_hlo.collectives(text) if c.op == "all-gather"]
    assert not gathered
    for name, want in stored(alone[0]).items():
        got = stored(again)[name]
        np.testing.assert_array_equal(got.qvalue, want.qvalue)
        assert spec(got.qvalue) == ((None, "model") if name == "up" else ("model", None))
    assert close(out, alone[1])


def test_tpu_inference_fills_an_abstract_model_from_a_checkpoint(alone):
    """No dummy inputs, no float model: float shards come one by one and are quantized where they belong."""
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        abstract = nnx.eval_shape(lambda: Mlp(nnx.Rngs(0)))
        model = qwix.quantize_model(abstract, qwix.PtqProvider(RULES))
        floats = Mlp(nnx.Rngs(0))
        checkpoint = (
            (f"{name}/kernel", np.asarray(getattr(floats, name).kernel[...])) for name in ("up", "down")
        )
        nnx.update(model, qwix.quantize_params(checkpoint, model))
        out = jax.jit(model)(jax.device_put(X, P("data", None)))
    for name, want in stored(alone[0]).items():
        got = stored(model)[name].qvalue
        np.testing.assert_array_equal(got, want.qvalue)
        assert spec(got) == ((None, "model") if name == "up" else ("model", None))
    assert close(out, alone[1])


def test_serving_gathers_no_weights(alone):
    """Tensor parallel: one sum per layer whose rows are cut, and the rows' maxima; no all-gather."""
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        model = qwix.quantize_model(sharded(mesh), qwix.PtqProvider(RULES), X)
        x = jax.device_put(X, P("data", None))
        graphdef, state = nnx.split(model)
        compiled = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, x).compile()
        out = compiled(state, x)
    counts = scale_hlo.counted(scale_hlo.collectives(compiled.as_text()))
    assert counts == {"all-reduce": 2}
    assert close(out, alone[1])


@pytest.mark.large
def test_maxtext_trains_without_dummy_inputs_or_clean_up(devices):
    """QtProvider on a sharded model: no intermediates, no rngs are left; the step is that of one device."""
    rule = qwix.QtRule(module_path=".*", **INT8, bwd_qtype="int8", bwd_weight_grad_tile_size=1 / 2)

    def loss(model, x):
        return jnp.mean(jnp.square(model(x) - 1))

    grad = nnx.jit(nnx.value_and_grad(loss))
    single = qwix.quantize_model(Mlp(nnx.Rngs(0)), qwix.QtProvider(rule), X)
    want, want_grads = grad(single, X)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        model = qwix.quantize_model(sharded(mesh), qwix.QtProvider(rule), X)
        assert not jax.tree.leaves(nnx.state(model, nnx.Intermediate))
        assert not any(getattr(node, "qwix_rngs", None) for _, node in nnx.iter_graph(model))
        got, grads = grad(model, jax.device_put(X, P("data", None)))
    assert close(got, want)
    for ours, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        # A gradient's range is a float sum: where it's the last bit, one integer step of 254 differs.
        assert close(ours, reference, 2 / 254)
    assert spec(grads["up"]["kernel"][...]) == (None, "model")


def test_maxtext_gathers_quantized_weights_for_its_grouped_matmul(devices):
    """`qpl.quantize` under check_vma, then all-gathers of `rhs.qvalue` and of its scales; no floats else."""
    mesh = mesh_of()
    w = jax.random.normal(jax.random.key(1), (4, 32, 16))
    sizes = jnp.array([3, 0, 4, 1])

    def gmm(x, w, sizes):
        lhs = qpl.quantize(x, "int8", channelwise_axes=[0], calibration_method="absmax")
        rhs = qpl.quantize(w, "int8", channelwise_axes=[0, 2])
        whole = lambda a: jax.lax.all_gather(a, "model", axis=2, tiled=True)
        rhs = jax.tree.map(whole, rhs)
        return qwix.ragged_dot(lhs, rhs, sizes)

    run = jax.jit(
        jax.shard_map(
            gmm, mesh=mesh, in_specs=(P(), P(None, None, "model"), P()), out_specs=P("model"), check_vma=True
        )
    )
    compiled = run.lower(X, w, sizes).compile()
    got = compiled(X, w, sizes).reshape(4, 8, 16)
    lhs = qpl.quantize(X, "int8", channelwise_axes=[0])
    want = qwix.ragged_dot(lhs, qpl.quantize(w, "int8", channelwise_axes=[0, 2]), sizes)
    for each in got:
        assert close(each, want)
    wide = [c for c in scale_hlo.collectives(compiled.as_text()) if "s8" not in c.dtypes]
    assert sum(c.result_bytes for c in wide) == 4 * 16 * 4  # scales


@pytest.mark.large
def test_quantize_with_reduced_axes_gives_whole_gradients(devices):
    """A replicated weight whose gradient is left unreduced until asked for (MaxText's manual_quantize)."""
    mesh = mesh_of(AxisType.Explicit)
    w = jax.random.normal(jax.random.key(2), (32, 16))

    def loss(w, x):
        def local(w, x):
            varying = jax.lax.pcast(w, "data", to="varying")
            q = qpl.quantize(varying, "int8", channelwise_axes=[1])
            y = x @ (varying + jax.lax.stop_gradient(q.dequantize() - varying))
            return jax.lax.psum((y * y).sum(), "data")

        specs = (P(None, None), P("data", None))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True)(w, x)

    with jax.set_mesh(mesh):
        placed = jax.device_put(w, P(None, None)), jax.device_put(X, P("data", None))
        got = jax.jit(jax.grad(loss))(*placed)
    q = qwix.quantize(w, "int8", channelwise_axes=(1,)).dequantize()
    assert close(got, 2 * X.T @ (X @ q))


@pytest.mark.large
def test_the_current_rule_and_a_kernel_of_ones_own_inside_a_sharded_model(devices):
    """`get_current_rule("gmm")` in a model inside shard_map; its `pallas_call` takes QArrays."""
    seen = []

    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = qpl.dot(x_ref[...], w_ref[...])

    class Gmm(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(32, 32, rngs=rngs)
            self.w = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (32, 16)))

        def __call__(self, x):
            x = self.linear(x)
            rule = qpl.get_current_rule("gmm")
            seen.append(rule)
            w = self.w[...]
            if rule is None:
                return x @ w
            w = qpl.quantize(w, rule.weight_qtype, channelwise_axes=[1])
            x = qpl.quantize(x, rule.act_qtype, channelwise_axes=[0])
            out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32)
            return qpl.pallas_call(kernel, out, interpret=True)(x, w)

    rule = qwix.QtRule(module_path=".*", **INT8, op_names=("dot_general", "gmm"))
    model = qwix.quantize_model(Gmm(nnx.Rngs(0)), qwix.QtProvider(rule), X)
    mesh = mesh_of()
    graphdef, state = nnx.split(model)
    local = lambda state, x: nnx.merge(graphdef, state)(x)
    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    got = jax.jit(run)(state, X)
    assert (
        close(got, jax.jit(model)(X)) and seen[-1] is not None and seen[-1].weight_qtype == jnp.dtype("int8")
    )


@pytest.mark.large
def test_tunix_puts_adapters_on_a_sharded_model(devices):
    """No dummy forward with remat off, no resharding by hand: what was sharded stays, adapters follow."""
    provider = lambda: qwix.LoraProvider(module_path=".*up|.*down", rank=4, alpha=2.0, weight_qtype="int8")
    single = qwix.apply_lora_to_model(Mlp(nnx.Rngs(0)), provider(), X, rngs=nnx.Rngs(1))
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        model = qwix.apply_lora_to_model(sharded(mesh), provider(), X, rngs=nnx.Rngs(1))
        out = jax.jit(model)(jax.device_put(X, P("data", None)))
        assert spec(stored(model)["up"].qvalue) == (None, "model")
        assert spec(stored(model)["down"].qvalue) == ("model", None)
        assert spec(model.up.kernel_lora_b[...]) == (None, "model")
        assert spec(model.down.kernel_lora_a[...]) == ("model", None)
    assert close(out, single(X))


def test_a_mesh_stays_named_in_shardings(devices):
    """Every array of a quantized sharded model is on the mesh: nothing lands on one device."""
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        model = qwix.quantize_model(sharded(mesh), qwix.PtqProvider(RULES), X)
    for x in jax.tree.leaves(nnx.state(model)):
        assert isinstance(x.sharding, NamedSharding) and len(x.sharding.device_set) == 8
