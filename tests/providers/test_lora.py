"""Adapters of Linen models: a model with adapters is the model with W + scaling * A B, whatever the op."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

import qwix
import qwix.lora

NORMAL = nn.initializers.normal(1.0)
RULE = {"rank": 3, "alpha": 1.5, "lora_b_initializer": NORMAL}  # scaling: 1/2
X = jax.random.normal(jax.random.key(0), (4, 16))
IMAGES = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))
dense = functools.partial(nn.Dense, use_bias=False)


class Scanned(nn.Module):
    """Three layers in a scan, rematerialized."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return dense(16)(x), None

        scan = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan()(x, None)[0]


class Mapped(nn.Module):
    """Three layers under vmap, which share their input or have one each."""

    shared: bool

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "axis_size": 3}
        layers = nn.vmap(nn.Dense, in_axes=None if self.shared else 0, **axes)(8, use_bias=False)
        return layers(x if self.shared else jnp.stack([x, x, x]))


class Ops(nn.Module):
    """One op of x and a weight of that shape."""

    op: object
    shape: tuple

    @nn.compact
    def __call__(self, x, *args):
        return self.op(x, self.param("w", NORMAL, self.shape), *args)


class Tied(nn.Module):
    """A table that's looked up, and the head of the model, too."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(32, 16, embedding_init=NORMAL)
        return embed.attend(embed(ids))


def einsum(spec):
    return functools.partial(jnp.einsum, spec)


def grouped(a, b):
    g, rank, _ = b.shape
    return jnp.einsum("hwigr,gro->hwigo", a.reshape(*a.shape[:3], g, rank), b)


MATRIX = lambda a, b: a @ b
STACKED = lambda a, b: jnp.einsum("lkr,lrn->lkn", a, b)
KERNEL = lambda a, b: jnp.einsum("hwir,ro->hwio", a, b)
CASES = {
    "dense": (dense(8), (X,), MATRIX),
    "scan": (Scanned(), (X,), STACKED),
    "vmap": (Mapped(False), (X,), STACKED),
    "vmap of shared x": (Mapped(True), (X,), STACKED),
    "several axes": (nn.DenseGeneral((2, 4), use_bias=False), (X,), MATRIX),
    "einsum": (
        Ops(einsum("bd,ndh->bnh"), (3, 16, 4)),
        (X,),
        lambda a, b: jnp.einsum("dr,rnh->ndh", a, b),
    ),
    "einsum over two axes": (
        Ops(einsum("bnh,nhd->bd"), (4, 4, 8)),
        (X.reshape(4, 4, 4),),
        lambda a, b: jnp.einsum("nhr,rd->nhd", a, b),
    ),
    "einsum with a batch": (
        Ops(einsum("bnd,ndh->bnh"), (4, 4, 8)),
        (X.reshape(4, 4, 4),),
        lambda a, b: jnp.einsum("ndr,nrh->ndh", a, b),
    ),
    "weight on the left": (Ops(lambda x, w: w @ x.T, (8, 16)), (X,), lambda a, b: (a @ b).T),
    "transposed": (Ops(lambda x, w: x @ w.T, (8, 16)), (X,), lambda a, b: (a @ b).T),
    "reshaped": (Ops(lambda x, w: x @ w.reshape(16, 8), (4, 4, 8)), (X,), MATRIX),
    "sliced": (Ops(lambda x, w: x @ w[:, 2:7], (16, 8)), (X,), MATRIX),
    "not contracted": (Ops(lambda x, w: x @ w + jnp.sum(w * w), (16, 8)), (X,), MATRIX),
    "conv": (nn.Conv(8, (3, 3), strides=2, use_bias=False), (IMAGES,), KERNEL),
    "grouped conv": (nn.Conv(8, (3, 3), feature_group_count=2, use_bias=False), (IMAGES,), grouped),
    "ragged": (
        Ops(jax.lax.ragged_dot, (3, 16, 8)),
        (X, jnp.array([2, 0, 1], jnp.int32)),
        STACKED,
    ),
    "tied table": (Tied(), (jnp.arange(8).reshape(2, 4),), MATRIX),
}
FORMATS = {
    "float": {},
    "int8": {"weight_qtype": "int8"},
    "nf4": {"weight_qtype": "nf4", "double_quantize": True},
}


def split(params):
    """{path of a weight: (its float value, A, B)} of params with adapters."""
    is_aux = lambda _, x: isinstance(x, qwix.WithAux)
    flat = traverse_util.flatten_dict(meta.unbox(params), is_leaf=is_aux)
    floats = {
        p: qwix.dequantize(x.unboxed) if is_aux(p, x) else x for p, x in flat.items() if "_lora_" not in p[-1]
    }
    part = lambda p, suffix: flat.get((*p[:-1], p[-1] + suffix))
    return {p: (x, part(p, "_lora_a"), part(p, "_lora_b")) for p, x in floats.items()}


def merged(params, change, magnitude=False):
    """Float params with every adapter added by hand, or |W| + |change| for a bound."""
    out = {}
    for path, (weight, a, b) in split(params).items():
        if magnitude:
            weight, a, b = (None if x is None else jnp.abs(x) for x in (weight, a, b))
        out[path] = weight if a is None else weight + 0.5 * change(a, b).reshape(weight.shape)
    return traverse_util.unflatten_dict(out)


LARGE = pytest.mark.large
COMBINATIONS = [
    *((name, "float") for name in CASES),
    *((name, "int8") for name in ("dense", "scan", "weight on the left", "ragged", "tied table")),
    *(
        pytest.param(name, "int8", marks=LARGE)
        for name in ("vmap of shared x", "several axes", "einsum with a batch", "sliced", "grouped conv")
    ),
    ("dense", "nf4"),
    *(pytest.param(name, "nf4", marks=LARGE) for name in ("scan", "tied table")),
]


@pytest.mark.parametrize(("name", "stored"), COMBINATIONS)
def test_a_weight_with_an_adapter_is_their_sum(name, stored):
    model, inputs, change = CASES[name]
    rule = RULE | FORMATS[stored] | ({"rank": 2, "alpha": 1.0} if "grouped" in name else {})
    adapted = qwix.apply_lora_to_model(model, qwix.LoraProvider(**rule))
    params = jax.jit(adapted.init)(jax.random.key(2), *inputs)["params"]
    assert all(b is not None for _, _, b in split(params).values())
    sizes = [jnp.abs(x) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in inputs]

    @jax.jit
    def references(params):
        want = model.apply({"params": merged(params, change)}, *inputs)
        return want, model.apply({"params": merged(params, change, magnitude=True)}, *sizes)

    out = jax.jit(adapted.apply)({"params": params}, *inputs)
    want, bound = references(params)
    # Each sum of n products is off by at most n eps of the sum of their magnitudes; n is 36 at most, in at
    # most three layers.
    np.testing.assert_array_less(np.abs(out - want), 64 * 2**-23 * np.asarray(bound) + 1e-30)
    # Another process knows the params, not what `init` has seen.
    other = qwix.apply_lora_to_model(model, qwix.LoraProvider(**rule))
    np.testing.assert_array_equal(jax.jit(other.apply)({"params": params}, *inputs), out)


SHAPES = {
    "dense": {"kernel_lora_a": (16, 3), "kernel_lora_b": (3, 8)},
    "several axes": {"kernel_lora_a": (16, 3), "kernel_lora_b": (3, 8)},
    "einsum": {"w_lora_a": (16, 3), "w_lora_b": (3, 3, 4)},
    "einsum over two axes": {"w_lora_a": (4, 4, 3), "w_lora_b": (3, 8)},
    "einsum with a batch": {"w_lora_a": (4, 4, 3), "w_lora_b": (4, 3, 8)},
    "conv": {"kernel_lora_a": (3, 3, 4, 3), "kernel_lora_b": (3, 8)},
    "ragged": {"w_lora_a": (3, 16, 3), "w_lora_b": (3, 3, 8)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_names(name):
    model, inputs, _ = CASES[name]
    adapted = qwix.apply_lora_to_model(model, qwix.LoraProvider(rank=3, alpha=1.5))
    params = jax.eval_shape(adapted.init, jax.random.key(0), *inputs)["params"]
    assert {k: v.shape for k, v in params.items() if "_lora_" in k} == SHAPES[name]


def test_it_begins_as_the_base_model():
    provider = qwix.LoraProvider(rank=3, alpha=1.5, weight_qtype="int8", act_qtype="int8")
    adapted = qwix.apply_lora_to_model(dense(8), provider)
    params = adapted.init(jax.random.key(0), X)["params"]
    assert jnp.all(params["kernel_lora_b"] == 0) and jnp.any(params["kernel_lora_a"] != 0)
    rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
    base = qwix.quantize_model(dense(8), rule)
    want = base.apply({"params": {"kernel": params["kernel"]}}, X)
    np.testing.assert_array_equal(adapted.apply({"params": params}, X), want)


DORA = {  # the axes over which norms are taken
    "dense": 0,
    "several axes": 0,
    "einsum over two axes": (0, 1),
    "conv": (0, 1, 2),
    "grouped conv": (0, 1, 2),
    "weight on the left": 1,
    "scan": 1,
    "vmap of shared x": 1,
    "ragged": 1,
    "tied table": 0,
}


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("dense", "int8"),
        ("conv", "int8"),
        *((name, "float") for name in ("weight on the left", "grouped conv", "ragged", "tied table")),
        *(
            pytest.param(name, "float", marks=LARGE)
            for name in ("several axes", "einsum over two axes", "scan", "vmap of shared x")
        ),
    ],
)
def test_dora(name, stored):
    model, inputs, change = CASES[name]
    rule = RULE | FORMATS[stored] | ({"rank": 2, "alpha": 1.0} if "grouped" in name else {})
    adapted = qwix.apply_lora_to_model(model, qwix.LoraProvider(**rule, use_dora=True))
    params = meta.unbox(jax.jit(adapted.init)(jax.random.key(2), *inputs)["params"])
    scale_m = lambda path, x: 1.5 * x if "_lora_m" in jax.tree_util.keystr(path) else x
    params = jax.tree_util.tree_map_with_path(scale_m, params)
    flat = traverse_util.flatten_dict(params, is_leaf=lambda _, x: isinstance(x, qwix.WithAux))
    whole = traverse_util.flatten_dict(merged(params, change))
    norm = lambda weight: jnp.sqrt(jnp.sum(weight**2, DORA[name], keepdims=True))
    for path, weight in whole.items():
        m = flat[(*path[:-1], path[-1] + "_lora_m")].reshape(norm(weight).shape)
        np.testing.assert_allclose(m, 1.5 * norm(split(params)[path][0]), rtol=1e-6)  # it begins at |W|
        whole[path] = weight / norm(weight) * m
    out = jax.jit(adapted.apply)({"params": params}, *inputs)
    want = model.apply({"params": traverse_util.unflatten_dict(whole)}, *inputs)
    np.testing.assert_allclose(out, want, atol=2e-5 * float(jnp.abs(want).max()), rtol=0)


def test_rank_stabilized_scaling():
    rule = qwix.LoraRule(rank=16, alpha=8.0, use_rslora=True)
    assert rule.scaling == 2.0
    assert qwix.LoraRule(rank=16, alpha=8.0).scaling == 0.5


def test_dropout_is_on_where_the_stream_is():
    provider = qwix.LoraProvider(**RULE, dropout=0.5)
    adapted = qwix.apply_lora_to_model(dense(8), provider)
    params = {"params": adapted.init(jax.random.key(0), X)["params"]}
    plain = adapted.apply(params, X)
    base = X @ params["params"]["kernel"]
    drop = lambda seed: adapted.apply(params, X, rngs={"dropout": jax.random.key(seed)})
    assert jnp.any(drop(0) != plain) and jnp.any(drop(0) != drop(1))
    np.testing.assert_array_equal(drop(0), drop(0))
    # What isn't dropped counts twice, so that the mean is what it was: of 4000 masks, within 5 sigma.
    many = jax.vmap(lambda key: adapted.apply(params, X, rngs={"dropout": key}))(
        jax.random.split(jax.random.key(1), 4000)
    )
    sigma = jnp.std(many, axis=0) / np.sqrt(4000)
    assert jnp.all(jnp.abs(jnp.mean(many, 0) - plain) < 5 * sigma)
    np.testing.assert_allclose(jnp.mean(many - base, 0), plain - base, atol=5 * float(sigma.max()))


def test_layers_of_a_scan_drop_different_values():
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            class Layer(nn.Module):
                @nn.compact
                def __call__(self, carry, _):
                    kernel = self.param("w", nn.initializers.zeros, (16, 4))
                    return carry, carry @ kernel

            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            return nn.scan(Layer, length=2, **axes)()(x, None)[1]

    ones = nn.initializers.ones
    provider = qwix.LoraProvider(
        rank=1, alpha=1.0, dropout=0.5, lora_a_initializer=ones, lora_b_initializer=ones
    )
    adapted = qwix.apply_lora_to_model(Layers(), provider)
    params = adapted.init(jax.random.key(0), X)
    out = adapted.apply(params, X, rngs={"dropout": jax.random.key(3)})
    assert jnp.any(out[0] != out[1])


def test_gradients_are_those_of_the_sum():
    adapted = qwix.apply_lora_to_model(dense(8), qwix.LoraProvider(**RULE, weight_qtype="int8"))
    params = adapted.init(jax.random.key(0), X)["params"]
    kernel = qwix.dequantize(params["kernel"].unboxed)
    part = {k: v for k, v in params.items() if "_lora_" in k}
    loss = lambda part, x: jnp.sum(jnp.sin(adapted.apply({"params": params | part}, x)))
    plain = lambda part, x: jnp.sum(
        jnp.sin(x @ (kernel + 0.5 * part["kernel_lora_a"] @ part["kernel_lora_b"]))
    )
    got, want = jax.grad(loss, (0, 1))(part, X), jax.grad(plain, (0, 1))(part, X)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5), got, want)


def test_bfloat16_models_compute_in_bfloat16():
    adapted = qwix.apply_lora_to_model(
        dense(8, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), qwix.LoraProvider(**RULE, weight_qtype="int8")
    )
    params = adapted.init(jax.random.key(0), X)["params"]
    assert params["kernel_lora_a"].dtype == jnp.bfloat16
    assert adapted.apply({"params": params}, X).dtype == jnp.bfloat16


def test_rules_without_adapters_quantize_and_the_first_that_matches_decides():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dense(8, name="head")(dense(16, name="body")(x))

    rules = [
        qwix.LoraRule(module_path="body", rank=2, alpha=1.0),
        qwix.QuantizationRule(module_path="head", weight_qtype="int8"),
    ]
    params = qwix.apply_lora_to_model(Two(), qwix.LoraProvider(rules)).init(jax.random.key(0), X)["params"]
    assert sorted(params["body"]) == ["kernel", "kernel_lora_a", "kernel_lora_b"]
    assert isinstance(params["body"]["kernel"], jax.Array)
    assert sorted(params["head"]) == ["kernel"] and isinstance(params["head"]["kernel"], qwix.WithAux)


def test_it_is_no_ptq_provider():
    assert not issubclass(qwix.LoraProvider, qwix.PtqProvider)
    assert issubclass(qwix.LoraProvider, qwix.BoxedParamProvider)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"rank": 0, "alpha": 1.0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 2.0, "alpha": 1.0}, TypeError, "rank is a count"),
        ({"rank": 2, "alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"rank": 2, "alpha": "1"}, TypeError, "alpha is a number"),
        ({"rank": 2, "alpha": 1.0, "dropout": 1.0}, ValueError, "dropout is a part"),
        ({"rank": 2, "alpha": 1.0, "lora_a_initializer": 0}, TypeError, "lora_a_initializer is a function"),
        ({"rank": 2}, TypeError, "alpha"),
        ({"rank": 2, "alpha": 1.0, "ranks": 3}, TypeError, "ranks"),
        ({}, ValueError, "needs rules"),
    ],
)
def test_bad_rules(kwargs, error, match):
    with pytest.raises(error, match=match):
        qwix.LoraProvider(**kwargs)


def test_rules_or_the_fields_of_one():
    with pytest.raises(ValueError, match="Only one of rules and kwargs should be provided"):
        qwix.LoraProvider([qwix.LoraRule(rank=2, alpha=1.0)], rank=2)


def test_a_rank_that_is_too_large_names_the_weight():
    adapted = qwix.apply_lora_to_model(dense(8), qwix.LoraProvider(rank=9, alpha=1.0))
    with pytest.raises(
        ValueError, match=r"rank=9 is too large for an adapter of the weight 'kernel'.* 16 by 8"
    ):
        adapted.init(jax.random.key(0), X)


def test_a_rule_that_hits_no_weight_says_which_modules_there_are():
    provider = qwix.LoraProvider(module_path="decoder/.*", rank=2, alpha=1.0)
    adapted = qwix.apply_lora_to_model(Tied(), provider)
    with pytest.raises(ValueError, match=r"matched no op, so no weight has its adapter.*'Embed_0'"):
        adapted.init(jax.random.key(0), jnp.arange(4))


def test_params_of_another_rank_are_refused():
    make = lambda rank: qwix.apply_lora_to_model(dense(8), qwix.LoraProvider(rank=rank, alpha=1.0))
    params = make(2).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"The adapter of 'kernel' has A of shape \(16, 2\)"):
        make(3).apply(params, X)


def test_another_provider_is_refused():
    with pytest.raises(TypeError, match="takes a LoraProvider, got PtqProvider"):
        qwix.apply_lora_to_model(dense(8), qwix.PtqProvider(qwix.QuantizationRule(weight_qtype="int8")))


@pytest.mark.parametrize("stored", ["float", "int8"])
def test_fresh_adapters_for_params_that_exist(stored):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    module = dense(8, kernel_init=init)
    checkpoint = module.init(jax.random.key(0), X)["params"]
    model = qwix.apply_lora_to_model(module, qwix.LoraProvider(**RULE | FORMATS[stored], use_dora=True))
    base = checkpoint
    if stored != "float":
        abstract = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
        base = qwix.quantize_params(meta.unbox(checkpoint), abstract)
    params = qwix.lora.init_adapters(model, base, jax.random.key(1), X)
    assert sorted(params) == ["kernel", "kernel_lora_a", "kernel_lora_b", "kernel_lora_m"]
    assert base.keys() == {"kernel"}
    weight = meta.unbox(base)["kernel"]
    weight = qwix.dequantize(weight.unboxed) if stored != "float" else weight
    norms = jnp.linalg.norm(weight, axis=0)
    np.testing.assert_allclose(meta.unbox(params)["kernel_lora_m"], norms, rtol=1e-6)
    if stored == "float":
        assert params["kernel_lora_a"].names == ("embed", None)
    model.apply({"params": params}, X)
    with pytest.raises(ValueError, match="have no 'kernel', which gets an adapter"):
        qwix.lora.init_adapters(model, {"other": X}, jax.random.key(1), X)
    with pytest.raises(ValueError, match="adapters already"):
        qwix.lora.init_adapters(model, params, jax.random.key(1), X)
