"""Post-training quantization of ragged dots: every scheme and kind is the direct op on the same arrays, bit
for bit, in NNX and Linen, also inside jit, scan, remat and vmap; rows of no group change nothing.
"""

import doctest

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import qwix
from qwix._src import ragged_rows
from qwix._src.core import qarray, ragged_dot
from qwix._src.qt_rule import QtRule

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(0)
LARGE = pytest.mark.large
SIZES = jnp.array([5, 0, 3])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


class Op(nnx.Module):
    def __init__(self, op, w):
        self.op, self.w = nnx.static(op), nnx.Param(w)

    def __call__(self, x, *more):
        return self.op(x, self.w[...], *more)


def general(contracting, batch, ragged, groups, sizes=SIZES):
    """(x, w) -> a ragged dot, of arrays and of QArrays."""
    numbers = lax.RaggedDotDimensionNumbers((contracting, batch), ragged, groups)
    return lambda x, w, op=lax.ragged_dot_general: op(x, w, sizes, numbers)


BY_BATCH = jnp.array([[2, 1, 1], [0, 4, 0]])
# The op, the shapes of x and w, the channelwise axes of both, the axis of w that is summed over.
KINDS = {
    "rows": (general(((1,), (1,)), ((), ()), [0], [0]), (8, 16), (3, 16, 8), (0,), (0, 2), 1),
    "transposed": (general(((1,), (2,)), ((), ()), [0], [0]), (8, 16), (3, 8, 16), (0,), (0, 1), 2),
    "groups last": (general(((1,), (0,)), ((), ()), [0], [2]), (8, 16), (16, 8, 3), (0,), (1, 2), 0),
    "rows of a batch": (
        general(((2,), (2,)), ((0,), (1,)), [1], [0], BY_BATCH),
        (2, 4, 16),
        (3, 2, 16, 8),
        (0, 1),
        (0, 1, 3),
        2,
    ),
    "the sum": (general(((0,), (0,)), ((), ()), [0], []), (8, 6), (8, 10), (1,), (1,), 0),
    "the batch": (general(((2,), (1,)), ((0,), (0,)), [0], []), (8, 3, 16), (8, 16, 5), (0, 1), (0, 2), 1),
}
SCHEMES = {
    "w8a8": {"weight_qtype": "int8", "act_qtype": "int8"},
    "w4a8": {"weight_qtype": "int4", "act_qtype": "int8"},
    "w8a16": {"weight_qtype": "int8"},
    "w4a16 tiles": {"weight_qtype": "int4", "tile_size": 4},
    "w8a8 tiles": {"weight_qtype": "int8", "act_qtype": "int8", "tile_size": 0.5},
    "nf4": {"weight_qtype": "nf4", "tile_size": 8},
    "nf4 both": {"weight_qtype": "nf4", "act_qtype": "nf4"},
    "fp8": {"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"},
    "mx": {"weight_qtype": "mxfp8_16", "tile_size": 16},
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


FURTHER = {
    "rows": [scheme for scheme in SCHEMES if scheme != "w8a8"],
    "transposed": ["w4a16 tiles"],
    "rows of a batch": ["w4a16 tiles"],
    "the sum": ["w8a16"],
}


def leaves_equal(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return jnp.array([(a == b).all() for a, b in pairs]).all()


QUICK = ("rows", "transposed")


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=LARGE) for k in KINDS])
def test_the_model_does_what_the_op_does(kind):
    """One program for all schemes of a kind, which takes a tenth of the time to compile."""
    op, x_shape, w_shape, x_axes, w_axes, summed = KINDS[kind]
    schemes = ["w8a8", *FURTHER.get(kind, ())]
    providers = {}

    def hows(rule):
        size = rule.tile_size
        left = rule.act_qtype and qwix.HowToQuantize(
            qtype=rule.act_qtype,
            channelwise_axes=x_axes,
            tiled_axes={len(x_shape) - 1: size} if size else {},
            calibration_method=rule.act_calibration_method or "absmax",
        )
        return left, qwix.HowToQuantize(
            qtype=rule.weight_qtype,
            channelwise_axes=w_axes,
            tiled_axes={summed: size} if size else {},
            calibration_method=rule.weight_calibration_method,
        )

    @jax.jit
    def run(x, w):
        outs = {}
        for scheme in schemes:
            rule = qwix.QuantizationRule(**SCHEMES[scheme])
            left, right = hows(rule)
            providers[scheme] = qwix.PtqProvider(rule)
            model = qwix.quantize_model(Op(op, w), providers[scheme], x)
            stored, direct = model.w.unboxed, qarray.quantize(w, right)
            assert stored.qtype == direct.qtype and stored.scale.shape == direct.scale.shape
            lhs = qarray.quantize(x, left) if left else x
            expected = op(lhs, direct, ragged_dot.ragged_dot_general)
            outs[scheme] = model(x), expected, op(x, w), leaves_equal(stored, direct)
        return outs

    for scheme, (got, expected, exact, same) in run(normal(0, *x_shape), normal(1, *w_shape)).items():
        assert same and got.dtype == exact.dtype
        assert (got == expected).all(), (scheme, abs(got - expected).max())
        noise = jnp.square(got - exact).sum() / jnp.square(exact).sum()
        assert 0 < noise < (1e-3 if "w8" in scheme or scheme == "asymmetric" else 0.05), (scheme, noise)
        (record,) = providers[scheme].records.values()
        assert record.op == "ragged_dot" and record.is_quantized and record.weight == "w"
        assert record.act_qtype == SCHEMES[scheme].get("act_qtype"), scheme
        assert record.device_bytes_after < record.device_bytes_before / 2


@LARGE
def test_the_short_spelling_and_its_options():
    x, w = normal(0, 8, 16), normal(1, 3, 16, 8)
    rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(w.astype(jnp.bfloat16))

        def __call__(self, x):
            return lax.ragged_dot(x, self.w[...], SIZES, preferred_element_type=jnp.float32)

    x = x.astype(jnp.bfloat16)
    model = qwix.quantize_model(Model(), rule, x)
    how = qwix.HowToQuantize(qtype="int8", channelwise_axes=(0,))
    options = {"preferred_element_type": jnp.float32, "act_how": how}
    expected = qwix.ragged_dot(x, model.w.unboxed, SIZES, **options)
    assert model(x).dtype == jnp.float32 and (model(x) == expected).all()


@pytest.mark.parametrize("method", [pytest.param("absmax", marks=LARGE), "minmax"])
def test_static_ranges_and_scales_for_all_channels_leave_out_rows_of_no_group(method):
    """Two of eight rows are in no group: nan there, which moves neither a scale nor a result."""
    sizes, w = jnp.array([4, 0, 2]), normal(1, 3, 16, 8)
    op = lambda x, w: lax.ragged_dot(x, w, sizes)
    x = normal(0, 8, 16) + 1
    dirty = x.at[6:].set(jnp.nan)
    fields = {"weight_qtype": "int8", "act_qtype": "int8", "act_calibration_method": method}
    model = qwix.quantize_model(Op(op, w), qwix.QuantizationRule(**fields, act_static_scale=True), dirty)
    scale = model.ragged_dot0_lhs_scale.unboxed
    low, high = x[:6].min(1).mean(), x[:6].max(1).mean()
    spread = high - low if method == "minmax" else 2 * abs(x[:6]).max(1).mean()
    assert scale.shape == (1, 1) and abs(scale.item() - spread / 255) <= 8 * EPS * spread
    shared = qwix.quantize_model(Op(op, w), QtRule(**fields, disable_channelwise_axes=True), dirty)
    assert shared.w.array.scale.shape == (1, 1, 1)
    per_row = qwix.quantize_model(Op(op, w), qwix.QuantizationRule(**fields), dirty)
    for got in (model(dirty), shared(dirty), per_row(dirty)):
        assert (got[6:] == 0).all() and jnp.isfinite(got).all() and (got[:6] != 0).all()
    assert (shared(dirty) == shared(x)).all() and (model(dirty) == model(x)).all()
    whole = qwix.quantize(jnp.where(jnp.arange(8)[:, None] < 6, x, 0), "int8", calibration_method=method)
    direct = lambda: qwix.ragged_dot(whole, shared.w.unboxed, sizes)
    got, want = jax.jit(lambda: (shared(x), direct()))()
    assert (got == want).all()


class Experts(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3, 8, 8)))

    def __call__(self, x):
        return x + lax.ragged_dot(x, self.w[...], SIZES)


class Stack(nnx.Module):
    def __init__(self):
        self.layers = nnx.split_rngs(splits=2)(nnx.vmap(Experts))(nnx.Rngs(0))

    def __call__(self, x):
        call = nnx.remat(Experts.__call__)
        return nnx.scan(lambda x, f: call(f, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class Unrolled(nnx.Module):
    def __init__(self):
        graphdef, state = nnx.split(Stack().layers)
        rows = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(2)]
        self.layers = nnx.List([nnx.merge(graphdef, row) for row in rows])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


X = normal(3, 8, 8)


@LARGE
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16 tiles"])
def test_scanned_and_rematerialized_layers(scheme):
    rule = qwix.QuantizationRule(**SCHEMES[scheme])
    expected, stacked = qwix.quantize_model(Unrolled(), rule, X), qwix.quantize_model(Stack(), rule, X)
    for i, layer in enumerate(expected.layers):
        for a, b in zip(
            jax.tree.leaves(stacked.layers.w.unboxed), jax.tree.leaves(layer.w.unboxed), strict=True
        ):
            assert (a[i] == b).all()
    want = expected(X)
    bound = 1e-5 * abs(want).max() + (abs(want).max() / 100 if rule.act_qtype else 0)
    for got in (stacked(X), nnx.jit(lambda m, x: m(x))(stacked, X)):
        assert (abs(got - want) <= bound).all()
    assert (stacked(X) != Stack()(X)).any()


def test_several_layers_under_vmap():
    """JAX maps a ragged dot along the first axis of everything."""
    w, x = normal(1, 2, 3, 16, 8), normal(0, 2, 4, 16)
    op = lambda x, w, sizes: jax.vmap(lax.ragged_dot)(x, w, sizes)
    model = qwix.quantize_model(Op(op, w), qwix.QuantizationRule(weight_qtype="int8"), x, BY_BATCH)
    dequantized = qwix.dequantize(model.w.unboxed)
    assert model.w.array.scale.shape == (2, 3, 1, 8)
    want = op(x, dequantized, BY_BATCH)
    assert (abs(model(x, BY_BATCH) - want) <= 32 * EPS * abs(want).max()).all()


class LinenExperts(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        w = self.param("w", nn.initializers.normal(1.0), (3, 8, 8))
        return x + lax.ragged_dot(x, w, SIZES), None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            nn.remat(LinenExperts, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return body(name="layers")(x, None)[0]


@pytest.mark.parametrize("static", [pytest.param(False, marks=LARGE), True])
def test_linen(static):
    """init makes what quantize_params makes; scanned, rematerialized, with scales per layer and group."""
    rule = qwix.QuantizationRule(weight_qtype="int4", act_qtype="int8", act_static_scale=static, tile_size=4)
    model = qwix.quantize_model(LinenStack(), rule)
    made = model.init(KEY, X)["params"]
    params = LinenStack().init(KEY, X)["params"]
    abstract = jax.eval_shape(model.init, KEY, X)["params"]
    weight = made["layers"]["w"].array
    assert weight.qvalue.dtype == jnp.int4 and weight.scale.shape == (2, 3, 2, 8)
    if static:
        assert made["layers"]["ragged_dot0_lhs_scale"].array.shape == (2, 1, 2)
        stats = {"count": jnp.ones(2, jnp.int32), "sum_of_absmax": jnp.full((2, 1, 2), 16.0)}
        given = qwix.quantize_params(params, abstract, {"layers": {"ragged_dot0_lhs": stats}})
        assert (given["layers"]["ragged_dot0_lhs_scale"].array == jnp.float32(16 / 127.5)).all()
    else:
        given = qwix.quantize_params(params, abstract)
        for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(given), strict=True):
            assert (a == b).all()
    exact = LinenStack().apply({"params": params}, X)
    out = jax.jit(model.apply)({"params": given}, X)
    assert 10 * jnp.log10((exact**2).sum() / ((out - exact) ** 2).sum()) > 15
    assert (out != exact).any()


@LARGE
def test_op_names_prepacking_and_products_of_activations():
    """A rule may name ragged dots only; experts aren't stored as one matrix; act_qtype is for activations."""

    class Both(nnx.Module):
        def __init__(self):
            self.experts, self.out = Experts(nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(1))

        def __call__(self, x):
            y = self.out(self.experts(x))
            return lax.ragged_dot(y, jnp.stack([x, x, x]), SIZES)

    rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8", op_names="ragged_dot")
    plain, packed = (
        qwix.quantize_model(Both(), qwix.PtqProvider(rule, prepack=prepack), X) for prepack in (False, True)
    )
    rows = {row.path: row for row in qwix.report(plain).rows}
    assert {path: row.reason for path, row in rows.items()} == {
        "experts": None,
        "out": "no rule matches",
        "": None,
    }
    assert rows[""].weight is None and rows[""].schema == "dynamic-range"
    assert isinstance(packed.experts.w.array, qwix.QArray)
    assert (plain(X) == packed(X)).all()
    alone = qwix.QuantizationRule(weight_qtype="int8")
    rows = {row.path: row.reason for row in qwix.report(qwix.quantize_model(Both(), alone, X)).rows}
    assert rows[""] == "no operand is a weight, and the rule has no act_qtype"


def test_a_tile_that_does_not_divide_the_sum_names_the_weight():
    op, x_shape, w_shape, *_ = KINDS["rows"]
    rule = qwix.QuantizationRule(weight_qtype="int8", tile_size=3)
    with pytest.raises(ValueError, match=r"The weight 'w' of shape \(3, 16, 8\) can't be quantized"):
        qwix.quantize_model(Op(op, normal(0, *w_shape)), rule, normal(1, *x_shape))


def test_examples_in_docstrings():
    assert doctest.testmod(ragged_rows).failed == 0
