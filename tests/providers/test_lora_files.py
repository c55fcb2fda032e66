"""Adapters by themselves: out of models and into them, on disk, and in the layout of PEFT."""

import functools
import json
import math
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from flax.linen import meta
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from qwix._src import lora_files
from qwix._src.lora_files import adapters_of, flat, load_adapters, read_metadata, save_adapters, with_adapters
from qwix._src.lora_peft import load_peft, save_peft
from qwix._src.lora_peft_config import PeftConfig, from_json, read_peft_config
from qwix._src.providers.lora import LoraProvider, LoraRule, apply_lora_to_model

KEY = jax.random.key(0)
EPS = 2.0**-23
PEFT = pathlib.Path(__file__).parents[1] / "data" / "peft"
NAMES = {
    "embed/embedding": "embed_tokens",
    "attn/q_proj/kernel": "attn.q_proj",
    "attn/o_proj/kernel": "attn.o_proj",
    "conv/kernel": "conv",
}


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q_proj = nnx.Einsum("btd,dnh->btnh", (8, 3, 4), (3, 4), rngs=rngs)
        self.o_proj = nnx.LinearGeneral((3, 4), 8, axis=(-2, -1), rngs=rngs)


class Tiny(nnx.Module):
    """The model that PEFT wrote adapters for, with heads as an axis."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attn = Attention(rngs)
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)

    def __call__(self, ids, image):
        hidden = self.embed(ids)
        q = jnp.tanh(self.attn.q_proj(hidden))
        conv = self.conv(image.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        return {"q": q.reshape(*ids.shape, 12), "out": hidden + self.attn.o_proj(q), "conv": conv}


def base() -> dict[str, np.ndarray]:
    return load_file(PEFT / "base.safetensors")


def tiny(config: PeftConfig) -> Tiny:
    """The base model with adapters as the config wants them."""
    stored, model = base(), Tiny(nnx.Rngs(0))
    model.embed.embedding[...] = stored["embed_tokens.weight"]
    for name, shape in (("q_proj", (8, 3, 4)), ("o_proj", (3, 4, 8))):
        layer = getattr(model.attn, name)
        layer.kernel[...] = stored[f"attn.{name}.weight"].T.reshape(shape)
        layer.bias[...] = stored[f"attn.{name}.bias"].reshape(layer.bias.shape)
    model.conv.kernel[...] = stored["conv.weight"].transpose(2, 3, 1, 0)
    model.conv.bias[...] = stored["conv.bias"]
    rules = [
        LoraRule(module_path=path.rpartition("/")[0], **config.rule_fields(module))
        for path, module in NAMES.items()
    ]
    return apply_lora_to_model(model, LoraProvider(rules), stored["ids"], stored["image"], rngs=nnx.Rngs(1))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))(x), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )  # fmt: skip
        return nn.Dense(4, name="head")(scan(name="layers")(x, None)[0])


@functools.cache
def stack():
    """A Linen model with adapters, and its params."""
    model = apply_lora_to_model(Stack(), LoraProvider(rank=2, alpha=4.0, weight_qtype="int8"))
    return model, model.init(KEY, jnp.ones((1, 8)))["params"]


def by_hand(ranks=None) -> dict:
    """Adapters of `Tiny`."""
    shapes = {
        "embed/embedding": ((11,), (8,)),
        "attn/q_proj/kernel": ((8,), (3, 4)),
        "attn/o_proj/kernel": ((12,), (8,)),
        "conv/kernel": ((3, 3, 3), (6,)),
    }
    ranks = {"attn/o_proj/kernel": 2} if ranks is None else ranks
    leaves = {}
    for path, (ins, outs) in shapes.items():
        leaves[f"{path}_lora_a"] = jnp.ones((*ins, ranks.get(path, 4)))
        leaves[f"{path}_lora_b"] = jnp.ones((ranks.get(path, 4), *outs))
    return noisy(lora_files.nested(leaves))


def noisy(adapters, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), adapters)


def assert_same(one, other):
    assert sorted(flat(one)) == sorted(flat(other))
    for path, array in flat(one).items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(flat(other)[path]), err_msg=path)
        assert array.dtype == flat(other)[path].dtype


# Out of models, and into them


def test_linen_adapters_are_taken_and_put_back_in_their_boxes():
    _, params = stack()
    adapters = adapters_of(params)
    assert {path: x.shape for path, x in flat(adapters).items()} == {
        "layers/Dense_0/kernel_lora_a": (2, 8, 2),
        "layers/Dense_0/kernel_lora_b": (2, 2, 8),
        "head/kernel_lora_a": (8, 2),
        "head/kernel_lora_b": (2, 4),
    }
    new = noisy(adapters)
    changed = with_adapters(params, new)
    assert_same(adapters_of(changed), new)
    assert jax.tree.structure(changed) == jax.tree.structure(params)  # boxes and quantized weights as well
    a = changed["layers"]["Dense_0"]["kernel_lora_a"]
    assert isinstance(a, meta.AxisMetadata) and a.names == params["layers"]["Dense_0"]["kernel_lora_a"].names
    assert_same(adapters_of(params), adapters)  # a new tree
    with_params = with_adapters(freeze({"params": params}), new)
    assert isinstance(with_params, FrozenDict) and set(with_params) == {"params"}
    assert_same(adapters_of(with_params), new)


def test_an_nnx_model_changes_in_place():
    adapters = by_hand()
    leaves = {path: nnx.LoRAParam(jnp.asarray(x)) for path, x in flat(adapters).items()}
    tree = lora_files.nested(leaves | {"attn/q_proj/kernel": nnx.Param(jnp.ones(3)), "names": "no array"})
    as_modules = lambda tree: nnx.Dict(
        **{k: as_modules(v) if type(v) is dict else v for k, v in tree.items()}
    )
    model = as_modules(tree)
    assert_same(adapters_of(model), adapters)
    assert with_adapters(model, noisy(adapters, 2)) is model
    assert_same(adapters_of(model), noisy(adapters, 2))
    assert model.attn.q_proj.kernel_lora_a is leaves["attn/q_proj/kernel_lora_a"]
    listed = nnx.Dict(layers=nnx.List([nnx.Dict(w_lora_a=nnx.LoRAParam(jnp.ones(2)))]))
    assert set(flat(adapters_of(listed))) == {"layers/0/w_lora_a"}


def test_what_is_put_in_has_the_dtype_and_the_sharding_of_what_was_there():
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    sharded = NamedSharding(mesh, P("x", None))
    params = {
        "w_lora_a": jax.device_put(jnp.ones((4, 2), jnp.bfloat16), sharded),
        "w_lora_b": jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=sharded),
        "w": jnp.ones((4, 3)),
    }
    new = with_adapters(params, {"w_lora_a": np.full((4, 2), 1.5), "w_lora_b": np.ones((2, 3), np.float32)})
    assert new["w_lora_a"].sharding == new["w_lora_b"].sharding == sharded
    assert new["w_lora_a"].dtype == jnp.bfloat16 and (new["w_lora_a"] == 1.5).all()
    assert new["w"] is params["w"]


def changed(adapters, **changes):
    """{path: a new array, or None to leave it out}."""
    leaves = flat(adapters) | {path.replace("__", "/"): value for path, value in changes.items()}
    return lora_files.nested({path: value for path, value in leaves.items() if value is not None})


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"head__kernl_lora_a": jnp.ones((8, 2))},
            "'head/kernl_lora_a' is no adapter .* 'head/kernel_lora_a'",
        ),
        ({"head__kernel_lora_b": None}, "lack 'head/kernel_lora_b', which the model has .1 missing of 2."),
        (
            {"head__kernel_lora_a": jnp.ones((8, 3))},
            "its rank is 3, the model's 2. Make the model with rank=3",
        ),
        (
            {"head__kernel_lora_a": jnp.ones((9, 2))},
            r"'head/kernel_lora_a' has shape \(9, 2\), but .* another",
        ),
        (
            {"head__kernel_lora_b": jnp.ones((2, 5))},
            r"'head/kernel_lora_b' has shape \(2, 5\), but .* another",
        ),
        ({"head__kernel_lora_a": jnp.ones((8, 2), int)}, "must be a float array, but it is of int32"),
        ({"head__kernel_lora_a": "a"}, "must be a float array, but it is str"),
    ],
)
def test_adapters_that_do_not_fit_change_nothing(changes, message):
    before = {"head": {"kernel_lora_a": jnp.ones((8, 2)), "kernel_lora_b": jnp.ones((2, 4))}}
    model = nnx.Dict(head=nnx.Dict(**{name: nnx.LoRAParam(x) for name, x in before["head"].items()}))
    for tree in (before, model):
        with pytest.raises(ValueError, match=message):
            with_adapters(tree, changed(noisy(before), **changes))
    assert_same(adapters_of(model), before)


def test_what_has_no_adapters_is_named():
    with pytest.raises(ValueError, match=r"has no adapters. Make them first: qwix.apply_lora_to_model"):
        with_adapters(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {"kernel_lora_a": jnp.ones(2)})
    with pytest.raises(TypeError, match="not in a list"):
        adapters_of([])
    assert adapters_of({"kernel": jnp.ones(2)}) == {}


# On disk


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_adapters_go_to_disk_and_into_a_fresh_model(tmp_path, format):
    model, params = stack()
    adapters = noisy(adapters_of(params))
    adapters["head"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapters["head"])
    path = tmp_path / "adapters"
    save_adapters(path, adapters, format=format, metadata={"rank": 2, "alpha": 4.0})
    assert path.is_dir() == (format == "orbax")
    read = load_adapters(path)
    assert_same(read, adapters)
    assert read_metadata(path) == {"rank": 2, "alpha": 4.0}
    loaded = with_adapters(params, read)
    assert loaded["head"]["kernel_lora_a"].dtype == jnp.float32  # as the fresh model has it
    x = jax.random.normal(KEY, (3, 8))
    apply = jax.jit(lambda params: model.apply({"params": params}, x))
    assert (apply(loaded) == apply(with_adapters(params, adapters))).all()
    assert (apply(loaded) != apply(params)).any()
    with pytest.raises(FileExistsError, match="exists already"):
        save_adapters(path, params, format=format)


def test_a_safetensors_file_has_dotted_names_and_values_in_order(tmp_path):
    path = tmp_path / "deep" / "a.safetensors"
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    save_adapters(path, {"x": {"w_lora_a": transposed, "w": 1.0}}, format="safetensors")
    (name,) = stored = load_file(path)
    assert name == "x.w_lora_a" and (stored[name] == transposed).all()
    assert read_metadata(path) == {}


def test_what_cannot_be_saved_or_loaded_is_named(tmp_path):
    adapters = {"w_lora_a": np.ones((2, 1), np.float32)}
    with pytest.raises(ValueError, match="format must be 'orbax' or 'safetensors', got 'npz'"):
        save_adapters(tmp_path / "x", adapters, format="npz")
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapters(tmp_path / "x", {"w": 1.0})
    with pytest.raises(ValueError, match=r"'a\.b/w_lora_a' has a dot in it.*format='orbax'"):
        save_adapters(tmp_path / "x", {"a.b": adapters}, format="safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="There are no adapters at"):
        load_adapters(tmp_path / "x")
    with pytest.raises(ValueError, match="is no checkpoint of adapters"):
        load_adapters(tmp_path)
    with pytest.raises(ValueError, match=r"layout of PEFT. Read it with load_peft"):
        load_adapters(PEFT / "plain")
    (tmp_path / "text").write_text("no safetensors file, but long enough")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_metadata(tmp_path / "text")


# PEFT


def magnitudes(config: PeftConfig, stored: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(|weight| + |change|, as a matrix [out, in], the same for DoRA after the scaling), float64."""
    weight = base()[f"{name}.weight"].astype(np.float64)
    weight = weight.T if name == "embed_tokens" else weight.reshape(weight.shape[0], -1)
    key = f"base_model.model.{name}.lora_"
    a, b = stored.get(f"{key}A.weight"), stored.get(f"{key}B.weight")
    a = stored[f"{key}embedding_A"] if a is None else a.reshape(a.shape[0], -1)
    b = stored[f"{key}embedding_B"] if b is None else b.reshape(b.shape[0], -1)
    scaling, scale = config.scaling_of(name), 1.0
    if config.use_dora:
        norm = np.linalg.norm(weight + scaling * b.astype(np.float64) @ a, axis=1)
        scale = (stored[f"{key}magnitude_vector"].reshape(-1) / norm)[:, None]
    return (abs(weight) + scaling * abs(b) @ abs(a)) * abs(scale), scaling


def bounds(config: PeftConfig, stored: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> dict:
    """How far two float32 computations of the model can be apart: every sum is of at most 27 + 4 products,
    the norms of DoRA are sums of 27 squares, and each side is off by its own rounding.
    """
    given = base()
    unit = 2 * 64 * EPS
    embed, q, o, conv = (
        magnitudes(config, stored, name)[0] for name in ("embed_tokens", "attn.q_proj", "attn.o_proj", "conv")
    )
    hidden = embed.T[given["ids"]]
    err_hidden = unit * hidden
    err_q = unit * (hidden @ q.T + abs(given["attn.q_proj.bias"])) + err_hidden @ q.T
    err_out = err_hidden + unit * (abs(got["q"]) @ o.T + abs(given["attn.o_proj.bias"])) + err_q @ o.T
    padded = np.pad(abs(given["image"]), ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # [n, c, y, x, kh, kw]
    flat_patches = patches.transpose(0, 2, 3, 1, 4, 5).reshape(1, 5, 5, 27)
    sums = (flat_patches @ conv.T + abs(given["conv.bias"])).transpose(0, 3, 1, 2)
    return {"q": err_q + unit, "out": err_out, "conv": unit * sums}


@pytest.mark.parametrize("name", ["dora", pytest.param("plain", marks=pytest.mark.large)])
def test_what_peft_wrote_computes_what_torch_computed(name, tmp_path):
    config = read_peft_config(PEFT / name)
    model = tiny(config)
    adapters, again = load_peft(PEFT / name, model, names=NAMES)
    assert again == config
    with_adapters(model, adapters)
    got = jax.tree.map(np.asarray, model(base()["ids"], base()["image"]))
    expected = load_file(PEFT / name / "outputs.safetensors")
    stored = load_file(PEFT / name / "adapter_model.safetensors")
    for output, bound in bounds(config, stored, got).items():
        assert (abs(got[output] - expected[output]) <= bound).all(), output
        assert (bound < 0.01 * abs(expected[output]).max()).all(), "a bound that means something"
    with pytest.raises(ValueError, match=r"the change of '.*' by .* .lora_alpha=1.*, but the model that of"):
        load_peft(peft_directory(tmp_path, name, lora_alpha=1, alpha_pattern={}), model, names=NAMES)

    written = save_peft(tmp_path / "out", model, config=config, names=NAMES)
    assert written.rank_of("attn.o_proj") == config.rank_of("attn.o_proj")
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted(ours) == sorted(stored)
    for key, value in stored.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    theirs = json.loads((PEFT / name / "adapter_config.json").read_text())
    for key, value in json.loads((tmp_path / "out" / "adapter_config.json").read_text()).items():
        if key != "auto_mapping":
            assert theirs[key] == value, key


def test_the_config_alone_is_enough_to_be_written(tmp_path):
    adapters = by_hand({"conv/kernel": 2})
    written = save_peft(tmp_path, adapters, config=PeftConfig(r=4, lora_alpha=6), names=NAMES.get)
    assert written.target_modules == ["attn.o_proj", "attn.q_proj", "conv", "embed_tokens"]
    assert [written.rank_of(module) for module in written.target_modules] == [4, 4, 2, 4]
    assert read_peft_config(tmp_path) == written
    assert_same(load_peft(tmp_path, adapters, names=NAMES)[0], adapters)
    save_peft(tmp_path, adapters, config=PeftConfig(), kinds={"embed/embedding": "linear"})
    assert "base_model.model.embed.lora_A.weight" in load_file(tmp_path / "adapter_model.safetensors")
    grouped = {"conv": {"kernel_lora_a": jnp.ones((3, 3, 2, 4)), "kernel_lora_b": jnp.ones((2, 2, 3))}}
    with pytest.raises(ValueError, match="convolution 'conv/kernel' has groups"):
        save_peft(tmp_path, grouped, config=PeftConfig())


def test_stacked_layers_are_modules_of_their_own(tmp_path):
    _, params = stack()
    adapters = noisy(adapters_of(params))
    names = {"layers/Dense_0/kernel": "model.layers.{}.proj", "head/kernel": "lm_head"}
    save_peft(tmp_path, adapters, config=PeftConfig(r=2, lora_alpha=4), names=names)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    second = stored["base_model.model.model.layers.1.proj.lora_A.weight"]
    assert (second == adapters["layers"]["Dense_0"]["kernel_lora_a"][1].T).all()
    abstract = jax.eval_shape(lambda: params)
    assert_same(load_peft(tmp_path, abstract, names=names)[0], adapters)
    with pytest.raises(ValueError, match=r"names gives 'layer' to .* another weight. Stacked layers need"):
        save_peft(tmp_path, adapters, config=PeftConfig(r=2), names=lambda _: "layer")
    with pytest.raises(ValueError, match=r"with 2 leading axes; A has the shape \(8, 2\)"):
        save_peft(tmp_path, adapters, config=PeftConfig(r=2), names=lambda _: "{}.{}")


def peft_directory(tmp_path, name="plain", **fields):
    """A copy of what PEFT wrote, with another config."""
    target = tmp_path / "copy"
    shutil.copytree(PEFT / name, target)
    config = json.loads((target / "adapter_config.json").read_text()) | fields
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bias": "all"}, "bias is 'all': biases of the base model are trained"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True: the base model stores its weights transposed"),
        ({"modules_to_save": ["head"]}, "modules_to_save is .'head'.: whole modules are trained"),
        ({"layer_replication": [[0, 4]]}, "layer_replication is .*: layers of the base model are repeated"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'. Only 'LORA' adapters can be loaded"),
        ({"use_qalora": True}, "use_qalora is True, which isn't known here"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the w"),
    ],
)
def test_configs_that_say_more_than_lora_are_refused(tmp_path, fields, message):
    directory = peft_directory(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        load_peft(directory, {"kernel_lora_a": jnp.ones((2, 1))})
    assert from_json({"peft_type": "LORA", "init_lora_weights": "gaussian"}) == PeftConfig()


def test_a_peft_adapter_for_another_model_is_named(tmp_path):
    adapters = by_hand()
    load = lambda tree, names=NAMES, directory=PEFT / "plain": load_peft(directory, tree, names=names)
    with pytest.raises(
        ValueError, match=r"changes 'conv' .1 such modules., which is no weight with an adapter"
    ):
        load({name: adapters[name] for name in ("embed", "attn")})
    with pytest.raises(
        ValueError, match=r"has nothing for 'attn.k_proj', which is 'attn/q_proj/kernel' here"
    ):
        load(adapters, NAMES | {"attn/q_proj/kernel": "attn.k_proj"})
    with pytest.raises(ValueError, match="names has no 'conv/kernel'; the nearest that it has is"):
        load(adapters, {name: module for name, module in NAMES.items() if module != "conv"})
    with pytest.raises(
        ValueError, match=r"'attn/o_proj/kernel' here wants rank 4, not 2. Make the model with"
    ):
        load(changed(adapters, attn__o_proj__kernel_lora_a=jnp.ones((12, 4)),
                     attn__o_proj__kernel_lora_b=jnp.ones((4, 8))))  # fmt: skip
    with pytest.raises(ValueError, match=r"shape \[4, 8\] in the adapter, but .* here wants \(9, 4\)"):
        load(changed(adapters, attn__q_proj__kernel_lora_a=jnp.ones((9, 4))))
    with pytest.raises(ValueError, match=r"use_dora=True, but the adapter of .* hasn't magnitudes"):
        load(adapters, directory=PEFT / "dora")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json"):
        load(adapters, directory=tmp_path)


def test_keys_that_are_not_loras(tmp_path):
    directory = peft_directory(tmp_path)
    path, adapters = directory / "adapter_model.safetensors", by_hand()
    stored = load_file(path)
    extra = {"base_model.model.embed_tokens.base_layer.weight": np.ones((11, 8), np.float32)}
    lora_files.write_safetensors(lora_files.as_path(path), stored | extra, {})
    with pytest.warns(UserWarning, match="'embed_tokens.base_layer.weight', a weight of the base model"):
        load_peft(directory, adapters, names=NAMES)
    extra = {"base_model.model.conv.lora_A.bias": np.ones(4, np.float32)}
    lora_files.write_safetensors(lora_files.as_path(path), stored | extra, {})
    with pytest.raises(ValueError, match=r"'base_model.model.conv.lora_A.bias', which isn't LoRA's"):
        load_peft(directory, adapters, names=NAMES)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors in"):
        load_peft(directory, adapters, names=NAMES)


def test_patterns_of_a_config():
    config = PeftConfig(
        r=16, lora_alpha=8, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.\d+\.up": 2}
    )
    assert config.rank_of("model.layers.3.q_proj") == 4 and config.rank_of("model.eq_proj") == 16
    assert config.alpha_of("model.layers.13.up") == 2 and config.alpha_of("layers.x.up") == 8
    assert math.isclose(config.scaling_of("layers.1.up"), 2 / 4)
    with pytest.raises(ValueError, match=r"target_modules=\['q_proj'\] leaves out 'model.up'"):
        PeftConfig(target_modules=["q_proj"]).completed({"model.q_proj": 8, "model.up": 8})
    assert PeftConfig(target_modules=".*up").completed({"model.up": 4}).rank_of("model.up") == 4
