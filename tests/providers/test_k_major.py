"""PtqProvider(prepack="k_major"): weights stored with the summed axes last, which no call transposes."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax._src import core as jcore
from qwix_kernels.problem import MatmulProblem

import qwix
from qwix._src import double_scale, prepack, turned
from qwix._src.core import qarray
from qwix._src.core.qarray import QArray
from qwix._src.core.transposed_qarray import TransposedQArray

RULES = {
    "w8a8": {"weight_qtype": "int8", "act_qtype": "int8"},
    "int8": {"weight_qtype": "int8"},
    "int4": {"weight_qtype": "int4", "tile_size": 4},
    "nf4": {"weight_qtype": "nf4", "tile_size": 8},
    "minmax": {"weight_qtype": "int8", "weight_calibration_method": "minmax"},
    "fp8": {"weight_qtype": "float8_e4m3fn"},
}
X = jax.random.normal(jax.random.key(0), (2, 5, 16))
RUN = nnx.jit(lambda model, x: model(x))
SIZES = jnp.array([3, 0, 4, 2])
# Layers of `Layers` as einsums, whether they move when they're stored K-major, and the stored [N, K].
LAYERS = {
    "dense": ("btd,de->bte", (24, 16)),
    "heads": ("btd,dnh->btnh", (16, 16)),
    "out": ("btd,nhd->btnh", None),
    "first": ("btd,ndh->btnh", (16, 16)),
}


class Layers(nnx.Module):
    """A dense layer, projections to heads with the heads behind, before and around the summed axis."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 24, use_bias=False, rngs=rngs)
        self.heads = nnx.LinearGeneral(16, (2, 8), use_bias=False, rngs=rngs)
        self.out = nnx.Einsum("btd,nhd->btnh", (2, 8, 16), None, rngs=rngs)
        self.first = nnx.Einsum("btd,ndh->btnh", (2, 16, 8), None, rngs=rngs)

    def __call__(self, x):
        return [getattr(self, layer)(x) for layer in LAYERS]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(16)(nn.relu(nn.DenseGeneral((4, 8))(x)).reshape(*x.shape[:-1], 32)), None


class Stack(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        variables, rngs = {"params": self.axis}, {"params": True}
        layers = nn.scan(Layer, variable_axes=variables, split_rngs=rngs, length=3)
        return layers(name="layers")(x, None)[0]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Blocks(nnx.Module):
    """Stacked layers, by Flax's scan."""

    def __init__(self, rngs):
        keys = jax.random.split(rngs.params(), 3)
        self.layers = nnx.vmap(lambda key: Block(nnx.Rngs(key)))(keys)

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class OwnScan(nnx.Module):
    """Stacked layers, by JAX's scan."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3, 16, 16)))

    def __call__(self, x):
        return jax.lax.scan(lambda x, w: (nnx.relu(x @ w), None), x, self.w[...])[0]


class Experts(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Param(jax.random.normal(rngs.params(), (4, 16, 32)))
        self.down = nnx.Param(jax.random.normal(rngs.params(), (4, 32, 16)))

    def __call__(self, x):
        x = x.reshape(-1, 16)
        return jax.lax.ragged_dot(nnx.relu(jax.lax.ragged_dot(x, self.up[...], SIZES)), self.down[...], SIZES)


class Moved(nnx.Module):
    """One weight, used as it is and in other ways."""

    def __init__(self, use):
        self.w, self.use = nnx.Param(jax.random.normal(jax.random.key(1), (16, 16))), use

    def __call__(self, x):
        return self.use(x, self.w[...])


def some_large(names, *small: str) -> list:
    """All names, those that aren't `small` with the large tests."""
    return [name if name in small else pytest.param(name, marks=pytest.mark.large) for name in names]


def rules(name: str, **kwargs) -> list[qwix.QuantizationRule]:
    return [qwix.QuantizationRule(module_path=".*", **RULES[name] | kwargs)]


def converted(model, name: str, **kwargs):
    return qwix.quantize_model(model, qwix.PtqProvider(rules(name), **kwargs), X)


def both(make, name: str):
    """The model without prepacking, and K-major."""
    return converted(make(), name), converted(make(), name, prepack="k_major")


def turns(jaxpr, size: int) -> list[str]:
    """The transposes of arrays of `size` values or more, wherever they are in the program."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "transpose" and eqn.invars[0].aval.size >= size:
            found.append(str(eqn))
        for inner in jcore.jaxprs_in_params(eqn.params):
            found += turns(inner, size)
    return found


def nnx_turns(model, x=X[:1, :1], size: int = 256) -> list[str]:
    graphdef, state = nnx.split(model)
    return turns(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, x).jaxpr, size)


def assert_near(got, want):
    """Both are sums of the same few terms, in another order."""
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("form", ["k-major", 1, None])
def test_unknown_forms_are_refused(form):
    for make in (qwix.PtqProvider, qwix.LoraProvider):
        with pytest.raises(ValueError, match=r"must be False, True \(.*\) or 'k_major'"):
            make([], prepack=form)


@pytest.mark.parametrize("name", some_large(RULES, "w8a8"))
def test_layers_hold_the_same_weights_turned_and_give_the_same_results(name):
    plain, packed = both(lambda: Layers(nnx.Rngs(0)), name)
    for layer, (subscripts, stored) in LAYERS.items():
        one, other = (getattr(model, layer).kernel for model in (plain, packed))
        assert other.shape == one.shape and other.dtype == one.dtype and other.size == one.size
        jax.tree.map(np.testing.assert_array_equal, other.unboxed, one.unboxed)
        assert jax.tree.structure(other.unboxed) == jax.tree.structure(one.unboxed)
        assert isinstance(other.array, TransposedQArray) and other.array.layout.k_last
        assert other.array.qvalue.shape == (1, *(stored or (16, 16)))
        assert isinstance(other.payload, turned.Turned if stored else QArray)
        got, want = (np.asarray(RUN(getattr(model, layer), X)) for model in (packed, plain))
        if name == "w8a8":
            np.testing.assert_array_equal(got, want)
        else:
            w = np.asarray(one.unboxed.dequantize(), np.float64)
            x = np.asarray(X, np.float64)
            terms = 16 * np.einsum(subscripts, np.abs(x), np.abs(w).max() * np.ones_like(w))
            bound = (16 + 16) * np.finfo(np.float32).eps * terms
            assert (np.abs(got - np.einsum(subscripts, x, w)) <= bound).all()
    assert nnx_turns(packed) == []
    assert nnx_turns(plain) != []  # `first`, whose heads and features aren't neighbours


def test_the_compiled_program_has_no_transpose():
    model = converted(nnx.Linear(16, 24, use_bias=False, rngs=nnx.Rngs(0)), "w8a8", prepack="k_major")
    text = jax.jit(lambda model, x: model(x)).lower(model, X[0]).compile().as_text()
    assert "transpose(" not in text and "s8[24,16]" in text and "s8[16,24]" not in text


@pytest.mark.parametrize("make", [pytest.param(Blocks, marks=pytest.mark.large), OwnScan, Experts])
@pytest.mark.parametrize("name", some_large(["w8a8", "int4", "nf4", "minmax"], "w8a8"))
def test_stacked_layers_and_experts(make, name):
    x = X if make is not Experts else X.reshape(10, 16)
    plain, packed = both(lambda: make(nnx.Rngs(0)), name)
    stored = [x for x in jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, TransposedQArray))]
    weights = [x for x in stored if isinstance(x, TransposedQArray)]
    assert weights and all(w.layout.k_last and w.layout.moves for w in weights)
    got, want = (RUN(model, x) for model in (packed, plain))
    if name == "w8a8":
        np.testing.assert_array_equal(got, want)
    else:
        assert_near(got, want)
    assert nnx_turns(packed, x[..., :1, :] if make is not Experts else x) == []


def test_stacked_layers_are_cut_as_they_lie():
    packed = converted(Blocks(nnx.Rngs(0)), "int8", prepack="k_major").layers.up.kernel
    assert packed.array.qvalue.shape == (3, 1, 32, 16) and packed.shape == (3, 16, 32)
    one = jax.tree.map(lambda x: x[1], packed)
    assert one.shape == (16, 32)
    expected = jax.tree.map(lambda x: x[1], packed.unboxed)
    jax.tree.map(np.testing.assert_array_equal, one.unboxed, expected)
    whole = jax.tree.map(np.testing.assert_array_equal, packed.payload.canonical(), packed.unboxed)
    assert whole is not None and jax.vmap(lambda w: w.unboxed)(packed).shape == (3, 16, 32)


@pytest.mark.parametrize("name", some_large(["w8a8", "int4"], "int4"))
def test_linen_layers_under_scan(name):
    plain, packed = (
        qwix.quantize_model(Stack(), qwix.PtqProvider(rules(name), prepack=form))
        for form in (False, "k_major")
    )
    params = Stack().init(jax.random.key(1), X)["params"]
    stored = []
    for model in (plain, packed):
        abstract = jax.eval_shape(model.init, jax.random.key(1), X)["params"]
        stored.append(qwix.quantize_params(params, abstract))
        assert jax.tree.structure(stored[-1]) == jax.tree.structure(abstract)
    kernel = stored[1]["layers"]["DenseGeneral_0"]["kernel"]
    assert kernel.array.qvalue.shape == (3, 1, 32, 16) and kernel.shape == (3, 16, 4, 8)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a.unboxed, b.unboxed)
    jax.tree.map(same, *(tree["layers"]["Dense_0"]["kernel"] for tree in stored), is_leaf=_is_aux)
    want = jax.jit(plain.apply)({"params": stored[0]}, X)
    assert_near(jax.jit(packed.apply)({"params": stored[1]}, X), want)
    program = jax.make_jaxpr(packed.apply)({"params": stored[1]}, X[:1, :1])
    assert turns(program.jaxpr, 512) == []


def _is_aux(x):
    return hasattr(x, "unboxed")


def test_layers_stacked_on_another_axis_stay_as_they_are():
    model = qwix.quantize_model(Stack(axis=1), qwix.PtqProvider(rules("int8"), prepack="k_major"))
    kernel = jax.eval_shape(model.init, jax.random.key(1), X)["params"]["layers"]["Dense_0"]["kernel"]
    assert isinstance(kernel.array, QArray) and kernel.shape == (32, 3, 16)


USES = {
    "turned twice": lambda x, w: x @ w.T.T,
    "turned": lambda x, w: x @ w.T,
    "also turned": lambda x, w: x @ w + x @ w.T,
    "on the left": lambda x, w: jnp.einsum("io,bti->obt", w, x),
    "parts": lambda x, w: jnp.concatenate([x @ w[:, 8:], x @ w[:, :4]], -1),
    "rows": lambda x, w: x[..., 4:12] @ w[4:12],
    "split": lambda x, w: jnp.einsum("btd,dnh->bnth", x, w.reshape(16, 2, 8)),
    "split and turned": lambda x, w: jnp.einsum("btd,nhd->bnth", x, w.reshape(16, 4, 4).transpose(2, 1, 0)),
    "summed": lambda x, w: x @ w + w.sum(0),
    "under vmap": lambda x, w: jax.vmap(lambda x: x @ w)(x),
    "looked up": lambda x, w: x @ w + w[jnp.array([[1], [2]])],
}


@pytest.mark.parametrize("use", some_large(USES, "also turned", "parts", "split", "looked up"))
@pytest.mark.filterwarnings("ignore:The op .* stays float")
def test_moved_weights_and_weights_of_several_ops(use):
    plain, packed = both(lambda: Moved(USES[use]), "w8a8")
    np.testing.assert_array_equal(RUN(packed, X), RUN(plain, X))
    if use in ("turned twice", "parts", "on the left", "under vmap"):
        assert nnx_turns(packed) == []


@pytest.mark.parametrize("name", some_large(["w8a8", "nf4"], "w8a8"))
def test_adapters_on_top(name):
    rule = qwix.LoraRule(module_path=".*", rank=2, alpha=4.0, **RULES[name])
    models = []
    for form in (False, "k_major"):
        provider = qwix.LoraProvider([rule], prepack=form)
        model = qwix.apply_lora_to_model(Layers(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))
        for part in ("dense", "heads", "out", "first"):
            b = getattr(model, part).kernel_lora_b
            b[...] = jax.random.normal(jax.random.key(2), b.shape)
        models.append(model)
    jax.tree.map(assert_near, RUN(models[1], X), RUN(models[0], X))
    assert isinstance(models[1].dense.kernel.array, TransposedQArray)
    loss = lambda model, x: sum(jnp.sum(y**2) for y in model(x))
    grad = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))
    grads = [grad(model, X) for model in models]
    jax.tree.map(assert_near, *map(nnx.to_pure_dict, grads[::-1]))
    assert nnx_turns(models[1]) == []


def test_checkpoints(tmp_path):
    packed, other = (converted(Layers(nnx.Rngs(i)), "int4", prepack="k_major") for i in (0, 1))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "model", nnx.to_pure_dict(nnx.state(packed)))
    with ocp.StandardCheckpointer() as loader:
        loaded = loader.restore(tmp_path / "model", nnx.to_pure_dict(nnx.state(other)))
    nnx.update(other, loaded)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(other), nnx.state(packed))


def test_params_from_elsewhere_and_without_data():
    packed, source = converted(Layers(nnx.Rngs(0)), "int4", prepack="k_major"), Layers(nnx.Rngs(5))
    nnx.update(packed, qwix.quantize_params(nnx.to_pure_dict(nnx.state(source, nnx.Param)), packed))
    expected = converted(source, "int4", prepack="k_major")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(packed), nnx.state(expected))
    abstract = nnx.eval_shape(lambda: converted(Layers(nnx.Rngs(0)), "int4", prepack="k_major"))
    kernel = abstract.heads.kernel
    assert isinstance(kernel.array, TransposedQArray) and kernel.shape == (16, 2, 8)
    assert kernel.unboxed.qvalue.shape == kernel.payload.shape == (16, 2, 8)


@pytest.mark.large
def test_double_quantized_scales():
    w = jax.random.normal(jax.random.key(0), (1024, 8))
    how = qwix.HowToQuantize(qtype="nf4", channelwise_axes=(1,), tiled_axes={0: 8})
    plain = qarray.quantize(w, how)
    stored = double_scale.double(prepack.prepack(plain, how, "k_major"))
    assert isinstance(stored.scale, double_scale.DoubleScale)
    payload = prepack.payload(stored)
    jax.tree.map(np.testing.assert_array_equal, payload.canonical(), prepack.unpack(stored))
    np.testing.assert_array_equal(payload.array.qvalue, plain.qvalue.T)


@pytest.mark.large
def test_weights_with_partition_names_stay_as_they_are():
    init = nnx.with_metadata(nnx.initializers.lecun_normal(), out_sharding=(None, "model"))
    with jax.set_mesh(jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
        layer = nnx.Linear(16, 32, kernel_init=init, rngs=nnx.Rngs(0))
        model = converted(layer, "int8", prepack="k_major")
    assert isinstance(model.kernel.array, QArray)


def test_the_report_says_what_is_k_major_and_its_bytes():
    plain, packed = both(lambda: Layers(nnx.Rngs(0)), "w8a8")
    rows = [{row.path: row for row in qwix.report(model).rows} for model in (plain, packed)]
    assert {path: row.scheme for path, row in rows[1].items()} == {
        "dense": "w8a8 K-major",
        "heads": "w8a8 K-major",
        "first": "w8a8 K-major",
        "out": "w8a8",
    }
    for path, row in rows[0].items():
        assert (row.bytes_after, row.sqnr_db) == (rows[1][path].bytes_after, rows[1][path].sqnr_db)
    problems = {r.path: r.problem for r in type(packed)._qwix_provider.records.values()}
    assert all(isinstance(p, MatmulProblem) and p.rhs_transposed for p in problems.values())


def test_weights_without_a_matrix_stay_as_they_are():
    how = lambda *axes: qwix.HowToQuantize(qtype="int8", channelwise_axes=axes)

    def zeros(shape, axes):
        scales = [n if axis in axes else 1 for axis, n in enumerate(shape)]
        return QArray(np.zeros(shape, np.int8), np.ones(scales, np.float32))

    for shape, axes in (((8,), ()), ((8, 1), (1,)), ((8, 4), ()), ((8, 4), (0,)), ((8, 4), (0, 1))):
        array = zeros(shape, axes)
        assert prepack.prepack(array, how(*axes), "k_major") is array
    stacked = zeros((2, 8, 4), (0, 2))
    assert prepack.prepack(stacked, how(0, 2), "k_major", (1,)) is stacked
    assert prepack.prepack(stacked, how(0, 2), "k_major", ()) is stacked
    assert prepack.prepack(stacked, how(0, 2), "k_major", (0,)).qvalue.shape == (2, 1, 4, 8)
