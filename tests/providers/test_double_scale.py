"""Scales of weights that are quantized themselves: how many bytes, how far off, and that all else stays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import qwix
from qwix._src import double_scale, prepack
from qwix._src.double_scale import BLOCK, DoubleScale, scale_bytes
from qwix._src.report_records import device_bytes

KEY = jax.random.key(0)
EPS = 2.0**-23
encode = jax.jit(double_scale.encode, static_argnums=1)
X = jax.random.normal(KEY, (4, 32))


def provider(tile_size=8, double_quantize=True, weight_qtype="nf4"):
    rule = qwix.QuantizationRule(
        weight_qtype=weight_qtype, tile_size=tile_size, double_quantize=double_quantize
    )
    return qwix.PtqProvider(rule)


def scales_of(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.2, 3.0, shape), jnp.float32)


def off_by(double: DoubleScale, scales: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(|rebuilt - scales|, what it may be), in float64.

    A code is the nearest: half a step, where the step has been rounded to 16 bits, by 2^-16 of itself, and
    largest / step by at most 127 * 2^-16 codes. Subtracting the mean and adding it round once each.
    """
    wide = np.asarray(scales, np.float64)
    step = np.asarray(double_scale._spread(double.step, double.lead, double.shape), np.float64)
    bound = step * (0.5 + 128 * 2.0**-16) + 2 * EPS * (wide + 127 * step)
    return abs(np.asarray(double.rebuild(), np.float64) - wide), bound


@pytest.mark.parametrize(
    "shape, lead, blocks",
    [
        ((9, 192), (), (1, 7)),
        ((3, 9, 192), (0,), (3, 1, 7)),
        ((9, 3, 7), (1,), (1, 3, 1)),
        ((2, 5, 3, 100), (0, 2), (2, 1, 3, 2)),
        ((513,), (), (3,)),
        ((1, 256), (0,), (1, 1)),
    ],
)
def test_scales_are_within_half_a_step_of_their_block(shape, lead, blocks):
    scales = scales_of(shape)
    double = encode(scales, lead)
    assert double.codes.shape == shape and double.codes.dtype == jnp.int8
    assert double.step.shape == blocks and double.shape == shape
    off, bound = off_by(double, scales)
    assert (off <= bound).all()
    assert bound.max() < 3.0 / 127  # a step is the largest distance from the mean, by 127
    assert device_bytes(double) == scale_bytes(shape, "float32", [a for a in lead if shape[a] > 1])


def test_blocks_are_256_neighbours_and_one_does_not_see_another():
    scales = jnp.ones((4, 150)).at[0, 0].set(100.0)  # 600: blocks of 256, 256 and 88
    off, _ = off_by(encode(scales), scales)
    flat = off.reshape(-1)
    mean = float(encode(scales).mean[0, 0])
    assert (
        flat[BLOCK:] <= (mean - 1) * 2.0**-16
    ).all()  # all are at a block's end and flat[1:BLOCK].max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_come_back_with_the_same_bits_eagerly_and_compiled(dtype):
    double = encode(scales_of((37, 61)).astype(dtype))
    rebuilt = double.rebuild()
    assert rebuilt.dtype == jnp.dtype(dtype) and (rebuilt > 0).all()
    assert (jax.jit(DoubleScale.rebuild)(double) == rebuilt).all()
    assert (jax.vmap(DoubleScale.rebuild)(jax.tree.map(lambda x: x[None], double))[0] == rebuilt).all()
    # Which holds on any machine because the products are exact.
    step = np.asarray(double_scale._spread(double.step, (), double.shape))
    products = np.asarray(double.codes, np.float64) * step
    assert (products == products.astype(np.float32)).all()


def test_equal_scales_and_tiny_ones():
    for value in (0.1, 1.0, 2e-19):
        double = encode(jnp.full((3, 300), value, jnp.float32))
        assert (abs(double.rebuild() - value) <= 4 * EPS * value).all()
    small = jnp.asarray([1e-6] * 10 + [1.0] * 290, jnp.float32)
    assert (encode(small).rebuild() >= 0).all()


def test_an_nf4_weight_with_tiles_of_64_takes_4_127_bits():
    weight, count = jax.random.normal(KEY, (1024, 256)), 1024 * 256
    plain = qwix.quantize(weight, "nf4", channelwise_axes=(1,), tiled_axes={0: 64})
    double = double_scale.double(plain)
    assert device_bytes(plain) * 8 / count == 4.5
    assert device_bytes(double) * 8 / count == 4 + 8 / 64 + 32 / (64 * BLOCK) + 32 / count
    assert device_bytes(double) * 8 / count == pytest.approx(4.127, abs=2e-4)
    assert double.nbytes == device_bytes(double) and double.qvalue is plain.qvalue
    off, bound = off_by(double.scale, plain.scale)
    assert (off <= bound).all()


@pytest.mark.parametrize("qtype, tile", [("nf4", 8), pytest.param("int8", None, marks=pytest.mark.large)])
def test_a_model_computes_with_the_rebuilt_scales(qtype, tile):
    model = nnx.Linear(32, 48, rngs=nnx.Rngs(0))
    double = provider(tile, weight_qtype=qtype)
    quantized = qwix.quantize_model(model, double, X)
    array = quantized.kernel.unboxed
    assert isinstance(quantized.kernel.array.scale, DoubleScale) and isinstance(array.scale, jax.Array)
    assert (qwix.dequantize(quantized.kernel.array) == array.dequantize()).all()
    by_hand = qwix.quantize_model(model, provider(tile, False, qtype), X)
    nnx.update(by_hand, {"kernel": {"array": {"scale": array.scale}}})
    assert (quantized(X) == by_hand(X)).all() and (quantized(X) != model(X)).any()
    (row,) = qwix.report(quantized).rows
    assert (
        row.bytes_after
        == device_bytes(quantized.kernel)
        == double.records["", "dot_general0"].device_bytes_after
    )


def test_few_scales_stay_as_they_are():
    array = qwix.quantize(jnp.ones((32, 2)), "nf4", channelwise_axes=(1,))
    assert double_scale.double(array) is array and device_bytes(array) == 32 + 8
    assert scale_bytes((1, 2), "float32") == 8 and scale_bytes((1, 3), "float32") == 3 + 4 + 4
    assert scale_bytes((3, 3), "float32", (0, 1)) == 36 and scale_bytes((1, 8), "bfloat16") == 16


def test_tiles_of_zeros_do_not_count():
    weight = 0.01 * jax.random.normal(KEY, (32, 64)).at[:8, :32].set(0)  # a scale of 1, of others near 0.02
    plain = qwix.quantize(weight, "nf4", channelwise_axes=(1,), tiled_axes={0: 8})
    double = double_scale.double(plain)
    assert plain.scale.max() == 1.0 and double.scale.step.max() < 0.1 / 127
    assert (double_scale.rebuilt(double).dequantize()[:8, :32] == 0).all()


def bound_of_chain(weights) -> jax.Array:
    """How far two float32 computations of X @ W @ W' ... may be apart: dots of 32 values, on both sides."""
    out = abs(X)
    for weight in weights:
        out = out @ abs(weight)
    return 2 * len(weights) * 34 * EPS * out


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(32, use_bias=False)(x), None


class Model(nn.Module):
    """Layers of a scan, and layers under vmap, along this axis of their params."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Layer, length=3, **options)(name="stack")(x, None)
        return nn.vmap(Layer, axis_size=2, in_axes=None, **options)(name="heads")(x)[0]


@pytest.mark.parametrize(
    "axis, stack, heads",
    [(0, (3, 1, 2), (2, 1, 2)), pytest.param(1, (1, 3, 32), (1, 2, 32), marks=pytest.mark.large)],
)
def test_layers_under_scan_and_vmap_have_blocks_of_their_own(axis, stack, heads):
    double = provider(2)
    model = qwix.quantize_model(Model(axis), double)
    floats = Model(axis).init(KEY, X)["params"]
    abstract = jax.eval_shape(model.init, KEY, X)["params"]
    params = qwix.quantize_params(floats, abstract)
    kernels = [params[name]["Dense_0"]["kernel"] for name in ("stack", "heads")]
    assert [kernel.array.scale.step.shape for kernel in kernels] == [stack, heads]
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    is_aux = lambda leaf: isinstance(leaf, qwix.WithAux)
    dense = jax.tree.map(lambda x: x.unboxed.dequantize() if is_aux(x) else x, params, is_leaf=is_aux)
    expected = Model(axis).apply({"params": dense}, X)
    got = jax.jit(model.apply)({"params": params}, X)
    layers, heads = (jnp.moveaxis(dense[name]["Dense_0"]["kernel"], axis, 0) for name in ("stack", "heads"))
    bound = jnp.stack([bound_of_chain([*layers, head]) for head in heads])
    assert (abs(got - expected) <= bound).all()
    rows = sorted(row.bytes_after for row in qwix.report(model, params=params).rows)
    records = sorted(record.device_bytes_after for record in double.records.values())
    assert rows == records == sorted(map(device_bytes, kernels))


class Stacked(nnx.Module):
    """Layers that are stacked, and run by a scan or all at once."""

    def __init__(self, scans):
        make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(32, 32, use_bias=False, rngs=rngs)))
        self.layers = make(nnx.Rngs(0))
        self.scans = scans

    def __call__(self, x):
        if not self.scans:
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x)
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


@pytest.mark.parametrize("scans", [pytest.param(True, marks=pytest.mark.large), False])
def test_stacked_nnx_layers(scans):
    model = Stacked(scans)
    quantized = qwix.quantize_model(model, provider(2), X)
    assert quantized.layers.kernel.array.scale.step.shape == (3, 1, 2)
    model.layers.kernel[...] = quantized.layers.kernel.unboxed.dequantize()
    expected = model(X)
    layers = model.layers.kernel[...]
    bound = bound_of_chain(layers) if scans else jnp.stack([bound_of_chain([layer]) for layer in layers])
    assert (abs(quantized(X) - expected) <= bound).all()


def test_an_abstract_nnx_model_is_filled_and_read_back_from_disk(tmp_path):
    model = nnx.Linear(32, 64, rngs=nnx.Rngs(0))
    expected = qwix.quantize_model(model, provider(weight_qtype="int4"), X)
    abstract = nnx.eval_shape(lambda: nnx.Linear(32, 64, rngs=nnx.Rngs(0)))
    filled = qwix.quantize_model(
        abstract, provider(weight_qtype="int4"), jax.ShapeDtypeStruct(X.shape, X.dtype)
    )
    assert filled.kernel.unboxed.scale == jax.ShapeDtypeStruct((4, 64), jnp.float32)
    assert device_bytes(filled.kernel) == device_bytes(expected.kernel)
    nnx.update(filled, qwix.quantize_params(nnx.to_pure_dict(nnx.state(model)), filled))
    assert (filled(X) == expected(X)).all()
    with ocp.StandardCheckpointer() as checkpointer:
        state = nnx.state(expected)
        checkpointer.save(tmp_path / "model", state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        read = checkpointer.restore(tmp_path / "model", target)
    other = qwix.quantize_model(nnx.Linear(32, 64, rngs=nnx.Rngs(1)), provider(weight_qtype="int4"), X)
    nnx.update(other, read)
    assert (other(X) == expected(X)).all()


def test_prepacked_weights():
    how = qwix.HowToQuantize(qtype="nf4", channelwise_axes=(1, 2), tiled_axes={0: 8})
    plain = qwix.quantize(
        jax.random.normal(KEY, (32, 4, 16)), "nf4", channelwise_axes=(1, 2), tiled_axes={0: 8}
    )
    packed = double_scale.double(prepack.prepack(plain, how))
    assert isinstance(packed, qwix.TransposedQArray) and isinstance(packed.scale, DoubleScale)
    unpacked, expected = prepack.unpack(packed), double_scale.rebuilt(double_scale.double(plain))
    assert (unpacked.qvalue == plain.qvalue).all() and (unpacked.scale == expected.scale).all()
    abstract = prepack.unpack(jax.eval_shape(lambda: packed))
    assert abstract.scale == jax.ShapeDtypeStruct((4, 4, 16), jnp.float32)


@pytest.mark.large
def test_lookups():
    embed, ids = nnx.Embed(50, 32, rngs=nnx.Rngs(0)), jnp.array([[3, 49]])
    quantized = qwix.quantize_model(embed, provider(), ids)
    assert (quantized(ids) == quantized.embedding.unboxed.dequantize()[ids]).all()


@pytest.mark.parametrize("kind", [pytest.param(AxisType.Auto, marks=pytest.mark.large), AxisType.Explicit])
def test_sharded_weights(kind, devices):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind,) * 2, devices=devices[:4])
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.normal(), ("a", "b"))
        model = nnx.Linear(32, 64, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))
        quantized = qwix.quantize_model(model, provider(), jnp.ones((4, 32)))
        scale = quantized.kernel.array.scale
        assert scale.codes.get_raw_value().sharding.spec == P("a", "b")
        names = [part.get_metadata()["out_sharding"] for part in (scale.codes, scale.step, scale.mean)]
        assert names == [("a", "b"), (None, None), (None, None)]
        weight = quantized.kernel.unboxed
        assert weight.scale.sharding.spec == P("a", "b")
        expected = np.asarray(X, np.float64) @ np.asarray(weight.dequantize(), np.float64)
        bound = 40 * EPS * abs(np.asarray(X)) @ abs(np.asarray(weight.dequantize()))
        got = nnx.jit(lambda model, x: model(x))(quantized, X)
        assert (abs(np.asarray(got) - expected) <= bound).all()


def test_linen_boxes_keep_their_names():
    layer = nn.Dense(64, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("a", "b")))
    abstract = jax.eval_shape(qwix.quantize_model(layer, provider()).init, KEY, X)
    scale = nn.get_partition_spec(abstract)["params"]["kernel"].array.scale
    assert (scale.codes, scale.step, scale.mean) == (P("a", "b"), P(None, None), P(None, None))


def test_what_cannot_be_quantized_twice():
    with pytest.raises(ValueError, match=r"double_quantize=True .* but weight_qtype is None"):
        qwix.QuantizationRule(double_quantize=True)
    with pytest.raises(ValueError, match="can't be used with 'mxfp4', whose scales are numbers of 8 bits"):
        qwix.QuantizationRule(weight_qtype="mxfp4", double_quantize=True)
    with pytest.raises(TypeError, match="double_quantize must be True or False, got 8"):
        qwix.QuantizationRule(weight_qtype="nf4", double_quantize=8)
    rule = qwix.QtRule(weight_qtype="int8", double_quantize=True)
    with pytest.raises(ValueError, match="training keeps them float"):
        qwix.QtProvider(rule)
    (again,) = qwix.load_rules("- {weight_qtype: nf4, tile_size: 64, double_quantize: true}\n")
    assert again.double_quantize
