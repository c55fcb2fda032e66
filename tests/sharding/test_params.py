"""Quantized weights lie on meshes as their float weights do: eager, compiled, automatic, explicit, named."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qwix
from qwix._src import derived_sharding, weight_quantizer
from qwix._src.core import qarray
from qwix._src.weight_quantizer import Form, quantize_weight

MESHES = {"2x4": (2, 4), "4x2": (4, 2), "8x1": (8, 1)}
INT8 = qwix.QuantizationRule(weight_qtype="int8")


def mesh_of(name, kind=AxisType.Auto):
    return jax.make_mesh(MESHES[name], ("fsdp", "tp"), axis_types=(kind, kind))


HOWS = {
    "int8": qwix.HowToQuantize(qtype="int8", channelwise_axes=(1,)),
    "int4": qwix.HowToQuantize(qtype="int4", channelwise_axes=(1,), tiled_axes={0: 8}),
    "minmax": qwix.HowToQuantize(qtype="int8", channelwise_axes=(1,), calibration_method="minmax"),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "how", ["int4", *(pytest.param(h, marks=pytest.mark.large) for h in ("int8", "minmax"))]
)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_sharded_weight_stays_where_it_is(mesh, how, kind, devices):
    """Bit-equal to one device; at most small maxima cross the mesh."""
    on, how = mesh_of(mesh, kind), HOWS[how]
    w = jax.random.normal(jax.random.key(0), (64, 32))
    placed = jax.device_put(w, NamedSharding(on, P("fsdp", "tp")))
    form = Form.like(jax.eval_shape(lambda: qarray.quantize(w, how)), how)
    got, sqnr = quantize_weight(placed, form, name="w", quality=True)
    expected, alone = quantize_weight(w, form, name="w", quality=True)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert sqnr == pytest.approx(alone, abs=1e-3)
    specs = derived_sharding.of_stored(("fsdp", "tp"), expected, on.shape)
    assert specs.scale == P("fsdp" if how.tiled_axes else None, "tp") and specs.qvalue == P("fsdp", "tp")
    jax.tree.map(lambda x, spec: _assert_spec(x, spec), got, specs)
    args = weight_quantizer._hashable(derived_sharding.on_mesh(placed.sharding, expected))
    text = weight_quantizer._program(form, qarray, None, False, *args).lower(placed).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text


def _assert_spec(x, spec):
    assert x.sharding.is_equivalent_to(NamedSharding(x.sharding.mesh, spec), x.ndim), (x.sharding, spec)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_pieces_of_a_sharded_weight_are_cut_where_it_is_not(monkeypatch, kind, devices):
    on, how = mesh_of("2x4", kind), HOWS["int8"]
    w = jax.random.normal(jax.random.key(0), (64, 32))
    placed = jax.device_put(w, NamedSharding(on, P("fsdp")))
    form = Form.like(jax.eval_shape(lambda: qarray.quantize(w, how)), how)
    expected, _ = quantize_weight(w, form, name="w")
    monkeypatch.setattr(weight_quantizer, "CHUNK_BYTES", 64 * 32 * 4 // 2 // 4)
    cut = weight_quantizer.cut_of(placed, form)
    assert cut.axis == 1
    got, _ = quantize_weight(placed, form, name="w")
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    args = weight_quantizer._hashable(derived_sharding.on_mesh(placed.sharding, expected))
    text = weight_quantizer._program(form, qarray, cut, True, *args).lower(placed).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_axes_that_are_merged_keep_the_shards_of_the_first():
    how = qwix.HowToQuantize(qtype="int8", channelwise_axes=(1, 2))
    w = jax.eval_shape(lambda: qwix._src.prepack.prepack(qarray.quantize(jnp.ones((8, 4, 16)), how), how))
    assert derived_sharding.of_stored(("a", "b", None), w, None).qvalue == P(None, "a", "b")
    assert derived_sharding.of_stored(("a", "b", None), w, None).scale == P(None, None, "b")
    assert derived_sharding.survives(("a", "b", None), w)
    assert not derived_sharding.survives((None, None, "b"), w)


class Mlp(nnx.Module):
    def __init__(self, rngs, names=("embed", "mlp")):
        init = lambda *names: nnx.with_partitioning(nnx.initializers.normal(), names, eager_sharding=False)
        self.up = nnx.Linear(32, 64, use_bias=False, kernel_init=init(*names), rngs=rngs)
        self.down = nnx.Linear(64, 32, kernel_init=init(*names[::-1]), rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class LinenMlp(nn.Module):
    logical: bool = False

    @nn.compact
    def __call__(self, x):
        wrap = nn.with_logical_partitioning if self.logical else nn.with_partitioning
        names = ("embed", "mlp") if self.logical else ("fsdp", "tp")
        init = lambda *names: wrap(nn.initializers.normal(), names)
        x = nn.Dense(64, use_bias=False, kernel_init=init(*names), name="up")(x)
        return nn.Dense(32, kernel_init=init(*names[::-1]), name="down")(nn.relu(x))


RULES = (("embed", "fsdp"), ("mlp", "tp"))
INT4 = qwix.QuantizationRule(weight_qtype="int4", tile_size=8)
X = jnp.linspace(-1, 1, 4 * 32).reshape(4, 32)


def quiet_model(rule=INT4, make=Mlp, **kwargs):
    return qwix.quantize_model(nnx.eval_shape(lambda: make(nnx.Rngs(0), **kwargs)), rule)


@pytest.mark.parametrize("mesh", ["2x4", pytest.param("4x2", marks=pytest.mark.large)])
def test_an_abstract_nnx_model_is_placed_and_filled(mesh, devices):
    on, model = mesh_of(mesh), quiet_model()
    placed = qwix.shardings(model, on, RULES)
    assert placed["up"]["kernel"]["array"]["scale"].get_raw_value().spec == P("fsdp", "tp")
    graphdef, state = nnx.split(model)
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    target = nnx.merge(graphdef, jax.tree.map(put, state, placed))
    floats = Mlp(nnx.Rngs(0))
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(floats)))
    nnx.update(target, qwix.quantize_params(params, target))
    kernel = target.up.kernel.unboxed
    assert kernel.qvalue.sharding.spec == P("fsdp", "tp") and kernel.scale.sharding.spec == P("fsdp", "tp")
    expected = qwix.quantize_model(floats, INT4)
    jax.tree.map(np.testing.assert_array_equal, kernel, expected.up.kernel.unboxed)
    per_device = qwix.device_bytes(model, placed)
    assert per_device == qwix.device_bytes(target)
    quantized = 32 * 64 * (0.5 + 4 / 8) * 2 / 8  # both kernels over all devices; the bias is whole
    assert per_device == quantized + 32 * 4
    assert jnp.allclose(target(X), expected(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logical", [False, True])
def test_linen_boxes(logical, devices):
    on, model = mesh_of("2x4"), qwix.quantize_model(LinenMlp(logical), INT4)
    abstract = jax.eval_shape(model.init, jax.random.key(0), X)
    rules = RULES if logical else ()
    placed = qwix.shardings(abstract, on, rules)
    made = jax.jit(model.init, out_shardings=placed)(jax.random.key(0), X)
    scale = made["params"]["down"]["kernel"].unboxed.scale
    assert scale.sharding.spec == P("tp", "fsdp")
    spec = nn.get_partition_spec(abstract)
    if logical:
        spec = nn.logical_to_mesh(spec, rules)
    assert spec["params"]["down"]["kernel"].array.scale == P("tp", "fsdp")


def test_nnx_partition_specs(devices):
    spec = nnx.get_partition_spec(nnx.state(quiet_model(INT8, names=("fsdp", "tp"))))
    array = spec["up"]["kernel"]["array"]
    assert array["qvalue"].get_raw_value() == P("fsdp", "tp") and array["scale"].get_raw_value() == P(
        None, "tp"
    )


def test_adapters_follow(devices):
    provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=4.0, weight_qtype="nf4", tile_size=8)
    model = qwix.apply_lora_to_model(nnx.eval_shape(lambda: Mlp(nnx.Rngs(0))), provider, X, rngs=nnx.Rngs(1))
    placed = qwix.shardings(model, mesh_of("2x4"), RULES)
    assert placed["up"]["kernel_lora_a"].get_raw_value().spec == P("fsdp", None)
    assert placed["up"]["kernel_lora_b"].get_raw_value().spec == P(None, "tp")


def test_tiles_that_straddle_shards(devices):
    """Tiles of 16 of an axis of 32 over 4 devices: two scales for four shards."""
    rule = qwix.QuantizationRule(weight_qtype="int4", tile_size=16)
    model = quiet_model(rule, names=("tp", "fsdp"))
    message = (
        r"'up/kernel/array/scale': along axis 0, tiles of 16 straddle the 4 shards of 'tp' "
        r"\(fsdp: 2, tp: 4\) of 8 values; tiles that divide 8 don't"
    )
    with pytest.warns(UserWarning, match=message):
        placed = qwix.shardings(model, mesh_of("2x4"))
    array = placed["up"]["kernel"]["array"]
    assert array["scale"].get_raw_value().spec == P(None, "fsdp")
    with pytest.raises(ValueError, match=message):
        qwix.shardings(model, mesh_of("2x4"), strict=True)
    # A concrete one: the scale is whole, its values aren't, and nothing else is different.
    with jax.set_mesh(mesh_of("2x4")):
        floats = Mlp(nnx.Rngs(0), names=("tp", "fsdp"))
        got = qwix.quantize_model(floats, rule).up.kernel.array.scale
    assert got.get_metadata("out_sharding") == (None, "fsdp")


def test_what_a_mesh_cannot_do(devices):
    on = mesh_of("2x4")
    with pytest.raises(
        ValueError, match=r"sharded over 'tpp', which is no axis .*fsdp: 2, tp: 4.* 'tp' meant"
    ):
        qwix.shardings(quiet_model(INT8, names=("fsdp", "tpp")), on)
    with pytest.raises(ValueError, match="over the mesh axis 'tp' twice"):
        qwix.shardings(quiet_model(INT8, names=("tp", "tp")), on)
    three = jax.sharding.AbstractMesh((3,), ("tp",))
    with pytest.raises(ValueError, match=r"kernel.* has 64 entries, which the 3 shards of 'tp'"):
        qwix.shardings(quiet_model(INT8, names=(None, "tp")), three)
    bare = qwix.quantize_model(nnx.eval_shape(lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0))), INT8)
    with pytest.raises(ValueError, match="A model with no shardings: none of its 3 arrays"):
        qwix.shardings(bare, on)


def test_bytes_are_of_arrays():
    with pytest.raises(TypeError, match="No array in 'x'"):
        qwix.device_bytes("x")
    assert qwix.device_bytes({}) == 0 and qwix.device_bytes(jnp.ones((3, 2), "bfloat16")) == 12
    assert qwix.device_bytes(nnx.Dropout(0.5, rngs=nnx.Rngs(0))) == 4 + 8  # a count and a key
