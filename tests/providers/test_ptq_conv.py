"""Post-training quantization of convolutions: every scheme and geometry is the direct op on the same arrays,
bit for bit, in NNX and Linen, also inside jit, scan and remat.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qwix
from qwix._src.core import conv_general, qarray

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(0)
LARGE = pytest.mark.large
NHWC = ("NHWC", "HWIO", "NHWC")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


class Op(nnx.Module):
    def __init__(self, op, w):
        self.op, self.w = nnx.static(op), nnx.Param(w)

    def __call__(self, x):
        return self.op(x, self.w[...])


def conv(strides=(1, 1), padding="SAME", layout=NHWC, **options):
    """(x, w) -> a convolution, of arrays and of QArrays."""
    return lambda x, w, op=lax.conv_general_dilated: op(
        x, w, strides, padding, dimension_numbers=layout, **options
    )


# The op, shape of the images, shape of the kernel, its output axis, its input axis.
GEOMETRIES = {
    "plain": (conv(), (2, 5, 5, 8), (3, 3, 8, 6), 3, 2),
    "1x1": (conv(), (2, 4, 4, 8), (1, 1, 8, 6), 3, 2),
    "strided": (conv((2, 2), [(0, 1), (1, 0)]), (2, 6, 6, 8), (3, 3, 8, 6), 3, 2),
    "dilated": (conv(rhs_dilation=(2, 1)), (2, 6, 6, 8), (3, 3, 8, 6), 3, 2),
    "transposed": (conv(padding=[(2, 2), (2, 2)], lhs_dilation=(2, 2)), (2, 3, 3, 8), (3, 3, 8, 6), 3, 2),
    "groups": (conv(feature_group_count=2), (2, 5, 5, 8), (3, 3, 4, 6), 3, 2),
    "depthwise": (conv(feature_group_count=8), (2, 5, 5, 8), (3, 3, 1, 16), 3, 2),
    "batch groups": (conv(batch_group_count=2), (4, 5, 5, 8), (3, 3, 8, 6), 3, 2),
    "channels first": (conv(layout=("NCHW", "OIHW", "NCHW")), (2, 8, 5, 5), (6, 8, 3, 3), 0, 1),
    "one axis": (conv((1,), layout=("NWC", "WIO", "NWC")), (2, 7, 8), (3, 8, 6), 2, 1),
}
SCHEMES = {
    "w8a8": {"weight_qtype": "int8", "act_qtype": "int8"},
    "w4a8": {"weight_qtype": "int4", "act_qtype": "int8"},
    "w8a16": {"weight_qtype": "int8"},
    "w4a16 tiles": {"weight_qtype": "int4", "tile_size": 4},
    "w8a8 tiles": {"weight_qtype": "int8", "act_qtype": "int8", "tile_size": 4},
    "half the channels": {"weight_qtype": "int4", "tile_size": 0.5},
    "nf4": {"weight_qtype": "nf4", "tile_size": 4},
    "nf4 both": {"weight_qtype": "nf4", "act_qtype": "nf4"},
    "fp8": {"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"},
    "asymmetric": {
        "weight_qtype": "int8",
        "act_qtype": "int8",
        "weight_calibration_method": "minmax",
        "act_calibration_method": "minmax",
    },
    "other calibrations": {
        "weight_qtype": "int4",
        "act_qtype": "int8",
        "weight_calibration_method": "rms,3",
        "act_calibration_method": "absmax,0.9",
    },
}


def hows(geometry, scheme):
    """How each side is quantized; the weight's channels, in tiles where a group has more than a tile."""
    _, x_shape, w_shape, out, channel = GEOMETRIES[geometry]
    rule = qwix.QuantizationRule(**SCHEMES[scheme])
    image_channel = 1 if geometry == "channels first" else len(x_shape) - 1
    size = rule.tile_size
    size = round(size * w_shape[channel]) if isinstance(size, float) else size
    tiled = size is not None and size < w_shape[channel]
    left = rule.act_qtype and qwix.HowToQuantize(
        qtype=rule.act_qtype,
        channelwise_axes=(0,),
        tiled_axes={image_channel: size} if tiled else {},
        calibration_method=rule.act_calibration_method or "absmax",
    )
    right = qwix.HowToQuantize(
        qtype=rule.weight_qtype,
        channelwise_axes=(out,),
        tiled_axes={channel: size} if tiled else {},
        calibration_method=rule.weight_calibration_method,
    )
    return rule, left, right


FURTHER = {
    "plain": [scheme for scheme in SCHEMES if scheme != "w8a8"],
    "depthwise": ["w4a16 tiles", "asymmetric"],
    "groups": ["w8a8 tiles"],
    "channels first": ["w4a16 tiles"],
    "transposed": ["asymmetric"],
}


def leaves_equal(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return jnp.array([(a == b).all() for a, b in pairs]).all()


QUICK = ("plain", "depthwise")


@pytest.mark.parametrize("geometry", [g if g in QUICK else pytest.param(g, marks=LARGE) for g in GEOMETRIES])
def test_the_model_does_what_the_op_does(geometry):
    """One program for all schemes of a geometry, which takes a tenth of the time to compile."""
    op, x_shape, w_shape, *_ = GEOMETRIES[geometry]
    schemes = ["w8a8", *FURTHER.get(geometry, ())]
    providers = {}

    @jax.jit
    def run(x, w):
        outs = {}
        for scheme in schemes:
            rule, left, right = hows(geometry, scheme)
            providers[scheme] = qwix.PtqProvider(rule)
            model = qwix.quantize_model(Op(op, w), providers[scheme], x)
            stored, direct = model.w.unboxed, qarray.quantize(w, right)
            assert stored.qtype == direct.qtype and stored.scale.shape == direct.scale.shape
            lhs = qarray.quantize(x, left) if left else x
            expected = op(lhs, direct, conv_general.conv_general_dilated)
            outs[scheme] = model(x), expected, op(x, w), leaves_equal(stored, direct)
        return outs

    for scheme, (got, expected, exact, same) in run(normal(0, *x_shape) + 0.5, normal(1, *w_shape)).items():
        assert same and got.dtype == exact.dtype
        assert (got == expected).all(), (scheme, abs(got - expected).max())
        noise = jnp.square(got - exact).sum() / jnp.square(exact).sum()
        assert 0 < noise < (1e-3 if "w8" in scheme or scheme == "asymmetric" else 0.05), (scheme, noise)
        (record,) = providers[scheme].records.values()
        assert record.is_quantized and record.act_qtype == SCHEMES[scheme].get("act_qtype"), scheme


@pytest.mark.parametrize(
    "geometry, method",
    [("depthwise", "minmax"), *(pytest.param("plain", m, marks=LARGE) for m in ("absmax", "minmax"))],
)
def test_static_ranges(geometry, method):
    """One scale for all images: the mean over those of the sample; padding stands for exact zeros."""
    op, x_shape, w_shape, *_ = GEOMETRIES[geometry]
    x, w = normal(0, *x_shape) + 0.5, normal(1, *w_shape)
    rule = qwix.QuantizationRule(
        weight_qtype="int8", act_qtype="int8", act_static_scale=True, act_calibration_method=method
    )
    model = qwix.quantize_model(Op(op, w), rule, x)
    scale = model.conv_general_dilated0_lhs_scale.unboxed
    low, high = x.min((1, 2, 3)).mean(), x.max((1, 2, 3)).mean()
    spread = high - low if method == "minmax" else 2 * abs(x).max((1, 2, 3)).mean()
    assert scale.shape == (1, 1, 1, 1) and abs(scale.item() - spread / 255) <= 8 * EPS * spread
    zero = model.conv_general_dilated0_lhs_zero_point.unboxed if method == "minmax" else None
    for images in (x, 2 * x):
        lhs = qarray.quantize_with_scale_zero_point(images, "int8", scale, zero)
        expected = op(lhs, model.w.unboxed, conv_general.conv_general_dilated)
        assert (model(images) == expected).all()
    assert (nnx.jit(lambda m, x: m(x))(model, x) == model(x)).all()


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)

    def __call__(self, x):
        return x + 2 * self.conv(x)


class Stack(nnx.Module):
    def __init__(self):
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Block))(nnx.Rngs(0))

    def __call__(self, x):
        call = nnx.remat(Block.__call__)
        return nnx.scan(lambda x, f: call(f, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class Unrolled(nnx.Module):
    def __init__(self):
        graphdef, state = nnx.split(Stack().layers)
        rows = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(3)]
        self.layers = nnx.List([nnx.merge(graphdef, row) for row in rows])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + 2 * nn.Conv(8, (3, 3), feature_group_count=2, name="conv")(x), None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            nn.remat(LinenBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(name="layers")(x, None)[0]


X = normal(3, 2, 4, 4, 8)


@LARGE
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16 tiles", "asymmetric"])
def test_scanned_and_rematerialized_layers(scheme):
    """Each layer of a stack is quantized as it would be by itself; in jit, too."""
    rule = SCHEMES[scheme] | ({"tile_size": 2} if "tile_size" in SCHEMES[scheme] else {})
    rule = qwix.QuantizationRule(**rule)
    expected = qwix.quantize_model(Unrolled(), rule, X)
    stacked = qwix.quantize_model(Stack(), rule, X)
    for i, layer in enumerate(expected.layers):
        for a, b in zip(
            jax.tree.leaves(stacked.layers.conv.kernel.unboxed),
            jax.tree.leaves(layer.conv.kernel.unboxed),
            strict=True,
        ):
            assert (a[i] == b).all()
    want = expected(X)
    # Sums of 36 products; a step of an activation that rounding moves to its other side.
    bound = 1e-5 * abs(want).max() + (abs(want).max() / 100 if rule.act_qtype else 0)
    for got in (stacked(X), nnx.jit(lambda m, x: m(x))(stacked, X)):
        assert (abs(got - want) <= bound).all()
    assert (stacked(X) != Stack()(X)).any()


@pytest.mark.parametrize("static", [pytest.param(False, marks=LARGE), True])
def test_linen(static):
    """init makes what quantize_params makes; scanned, rematerialized, with a scale for each layer."""
    rule = qwix.QuantizationRule(weight_qtype="int4", act_qtype="int8", act_static_scale=static, tile_size=2)
    float_model, model = LinenStack(), qwix.quantize_model(LinenStack(), rule)
    made = model.init(KEY, X)["params"]
    params = float_model.init(KEY, X)["params"]
    abstract = jax.eval_shape(model.init, KEY, X)["params"]
    kernel = made["layers"]["conv"]["kernel"]
    assert kernel.array.qvalue.dtype == jnp.int4 and kernel.array.scale.shape == (3, 1, 1, 2, 8)
    if static:
        assert made["layers"]["conv"]["conv_general_dilated0_lhs_scale"].array.shape == (3, 1, 1, 1, 4)
        stats = {"count": jnp.ones(3, jnp.int32), "sum_of_absmax": jnp.full((3, 1, 1, 1, 4), 16.0)}
        stats = {"layers": {"conv": {"conv_general_dilated0_lhs": stats}}}
        given = qwix.quantize_params(params, abstract, stats)
        assert (
            given["layers"]["conv"]["conv_general_dilated0_lhs_scale"].array == jnp.float32(16 / 127.5)
        ).all()
    else:
        given = qwix.quantize_params(params, abstract)
        for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(given), strict=True):
            assert (a == b).all()
    exact = float_model.apply({"params": params}, X)
    out = jax.jit(model.apply)({"params": given}, X)
    assert 10 * jnp.log10((exact**2).sum() / ((out - exact) ** 2).sum()) > 15  # int4: half a step of a 7th
    assert (out != exact).any()


@LARGE
def test_layers_of_flax_are_seen():
    """Transposed, depthwise and causal layers of both libraries, with weights alone."""
    rule = qwix.QuantizationRule(weight_qtype="int8")
    x = normal(0, 2, 6, 8)
    layers = {
        "transposed": nnx.ConvTranspose(8, 6, 3, strides=2, rngs=nnx.Rngs(0)),
        "depthwise": nnx.Conv(8, 8, 3, feature_group_count=8, rngs=nnx.Rngs(0)),
        "causal": nnx.Conv(8, 6, 3, padding="CAUSAL", rngs=nnx.Rngs(0)),
    }
    for name, layer in layers.items():
        model = qwix.quantize_model(layer, rule, x)
        plain = nnx.clone(layer)
        plain.kernel[...] = qwix.dequantize(model.kernel.unboxed)
        # Sums of at most 24 products, in any order.
        bound = 2 * 24 * EPS * 24 * abs(x).max() * abs(plain.kernel[...]).max()
        assert (abs(model(x) - plain(x)) <= bound).all() and (model(x) != layer(x)).any(), name
        assert model.kernel.array.scale.shape == (1, 1, layer.kernel.shape[-1]), name
    linen = qwix.quantize_model(nn.ConvTranspose(6, (3,), strides=(2,)), rule)
    assert linen.init(KEY, x)["params"]["kernel"].array.qvalue.dtype == jnp.int8


@LARGE
def test_op_names_and_prepacking():
    """A rule may name convolutions only; a kernel of a convolution isn't stored as a matrix."""

    class Both(nnx.Module):
        def __init__(self):
            self.conv, self.out = Block(nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.out(self.conv(x))

    rule = qwix.QuantizationRule(weight_qtype="int8", op_names="conv_general_dilated")
    plain, packed = (
        qwix.quantize_model(Both(), qwix.PtqProvider(rule, prepack=prepack), X) for prepack in (False, True)
    )
    assert {row.op: row.reason for row in qwix.report(plain).rows} == {
        "conv_general_dilated": None,
        "dot_general": "no rule matches",
    }
    assert isinstance(packed.conv.conv.kernel.array, qwix.QArray)
    assert (plain(X) == packed(X)).all()


def test_a_tile_that_does_not_divide_the_channels_names_the_weight():
    op, x_shape, w_shape, *_ = GEOMETRIES["plain"]
    rule = qwix.QuantizationRule(weight_qtype="int8", tile_size=3)
    with pytest.raises(ValueError, match=r"The weight 'w' of shape \(3, 3, 8, 6\) can't be quantized"):
        qwix.quantize_model(Op(op, normal(0, *w_shape)), rule, normal(1, *x_shape))


def test_a_kernel_that_is_no_weight_stays_float():
    x = normal(0, 2, 5, 5, 8)
    op = lambda x, w: conv()(x @ w, jnp.ones((3, 3, 8, 8)))
    model = qwix.quantize_model(Op(op, normal(1, 8, 8)), qwix.QuantizationRule(weight_qtype="int8"), x)
    reasons = {row.op: row.reason for row in qwix.report(model).rows}
    assert reasons == {
        "dot_general": None,
        "conv_general_dilated": "the kernel of the convolution is no weight",
    }


@LARGE
@pytest.mark.parametrize(
    "provider",
    [
        lambda: qwix.PtqProvider(qwix.QuantizationRule(**SCHEMES["w8a8"])),
        lambda: qwix.QtProvider(qwix.QtRule(**SCHEMES["w8a8"])),
    ],
    ids=["inference", "training"],
)
def test_the_layout_that_a_convolution_asks_for(provider, devices):
    """Images cut along a mesh with explicit axes: the same integers, where the op says."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=devices[:2])
    x, w = normal(0, 2, 4, 4, 8), normal(1, 3, 3, 8, 6)
    alone = qwix.quantize_model(Op(conv(), w), provider(), x)(x)
    with jax.set_mesh(mesh):
        layout = NamedSharding(mesh, P("data"))
        cut = jax.device_put(x, layout)
        model = qwix.quantize_model(Op(conv(out_sharding=layout), w), provider(), cut)
        got = jax.jit(model)(cut)
    assert got.sharding.spec[0] == "data"
    assert (abs(got - alone) <= 4 * EPS * abs(alone)).all()
