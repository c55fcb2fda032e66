"""Every op of ODML's table through LiteRT: quantized, converted by the real converter, run, and compared.

Many ops are outputs of one model, each of an input of its own, as conversions and statistics take time. A
result is within two steps of its scale: LiteRT's kernels round once more than fake quantization does.
"""

import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import qwix
from qwix import odml
from qwix._src import odml_forms, odml_model, odml_ops

MISSING = [name for name in ("ai_edge_litert", "litert_converter") if importlib.util.find_spec(name) is None]
needs_litert = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} are missing: {odml_model.INSTALL}")
RNG = np.random.default_rng(0)
FIRST = np.arange(16) < 12

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softmax": jax.nn.softmax,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "hard_swish": jax.nn.hard_swish,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_tanh": jax.nn.hard_tanh,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
}
ONLY_INT8 = {
    "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False),
    "softplus": jax.nn.softplus,
    "log_softmax": jax.nn.log_softmax,
    "take": lambda x: x[:, np.arange(16)[::-1].copy()],
}
ARITHMETIC = {
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "square": jnp.square,
    "cube": lambda x: x**3,
    "absolute": jnp.abs,
    "negative": jnp.negative,
    "clip": lambda x: jnp.clip(x, -1, 1.5),
    "maximum": lambda x: jnp.maximum(x, 0.3),
    "add": lambda x: x + 0.7,
    "subtract": lambda x: 0.7 - x,
    "multiply": lambda x: x * 0.7,
    "divide": lambda x: x / 0.7,
    "mean": lambda x: x.mean(-1),
    "sum": lambda x: x.sum(-1),
    "cumsum": lambda x: jnp.cumsum(x, -1),
}
MOVES = {
    "where": lambda x: jnp.where(FIRST, x, 0.0),
    "masked": lambda x: jnp.where(FIRST, x, -1e9),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 1))),
    "pad_inside": lambda x: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 2))),
    "concatenate": lambda x: jnp.concatenate([x, x[:, :4]], -1),
    "flip": lambda x: x[:, ::-1],
    "broadcast": lambda x: jnp.broadcast_to(x[:, None], (4, 3, 16)),
    "tile": lambda x: jnp.tile(x, (1, 2)),
    "transpose": lambda x: x.T.reshape(4, 16),
    "max": lambda x: x.max(-1),
}
POSITIVE = {
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "reciprocal": lambda x: 1 / x,
    "root": lambda x: x**0.5,
    "inverse_square": lambda x: x**-2,
}
LOGARITHMS = {"log": jnp.log, "log1p": jnp.log1p, "power": lambda x: x**2.5}


class Table(nnx.Module):
    """Functions of one row each, by name; with a dense layer before and after them in a chain."""

    def __init__(self, functions, *, chain=False):
        self.functions = nnx.static(functions)
        weights = RNG.normal(size=(len(functions), 16, 16)).astype(np.float32) / 4
        self.weights = nnx.Param(jnp.asarray(weights)) if chain else None

    def __call__(self, x):
        return {name: self.one(fn, x[i], i) for i, (name, fn) in enumerate(self.functions.items())}

    def one(self, fn, x, i):
        if self.weights is None:
            return fn(x)
        y = fn(x @ self.weights[i])
        return y @ self.weights[i] if y.shape[-1] == 16 else y


def rows(count, low):
    return (np.linspace(0.9, 1, count)[:, None, None] * RNG.uniform(low, 3, (count, 4, 16))).astype(
        np.float32
    )


def exported(model, x, act_qtype):
    """(the file, the outputs of fake quantization, those of LiteRT's two kinds of kernels)."""
    rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype=act_qtype, act_batch_axes=())
    model = qwix.quantize_model(model, qwix.OdmlQatProvider([rule]), x)
    odml.calibrate(model, [(x,)], progress=False)
    want = jax.tree.map(np.asarray, model(x))
    file = odml.export(model, sample_inputs=x, strict=True)
    return file, want, file.run({"x": x})


def check(functions, act_qtype="int8", low=-3.0, *, chain=False):
    file, want, got = exported(Table(functions, chain=chain), rows(len(functions), low), act_qtype)
    summary = file.summary()
    assert summary.float_ops == (), str(summary)
    assert all({*op.inputs, *op.outputs} <= {act_qtype, "float32", "int32", "bool"} for op in summary.ops)
    steps = odml.with_integer_io(file).quantization()
    off = {name: float(np.abs(got[name] - want[name]).max() / steps[name][0][0]) for name in functions}
    # A root that is one step off, of at least the half of the largest inverse: 3.4 steps of the quotient.
    most = {"rsqrt": 4.41} if act_qtype == "int16" else {}
    assert {name: n for name, n in off.items() if n > most.get(name, 2.01)} == {}
    return summary


@needs_litert
def test_activation_functions_are_integer_ops():
    summary = check(ACTIVATIONS)
    names = {op.name for op in summary.ops}
    assert {
        "TANH",
        "LOGISTIC",
        "SOFTMAX",
        "GELU",
        "HARD_SWISH",
        "RELU",
        "RELU6",
        "LEAKY_RELU",
        "EXP",
    } <= names


@needs_litert
def test_arithmetic_is_integer_ops():
    check(ARITHMETIC)


@needs_litert
@pytest.mark.large
def test_what_moves_values_is_integer_ops():
    check(MOVES)


@needs_litert
@pytest.mark.large
@pytest.mark.parametrize("functions", [ONLY_INT8, POSITIVE | LOGARITHMS], ids=["int8", "positive"])
def test_what_has_a_form_for_int8(functions):
    check(functions, low=0.3 if "log" in functions else -3.0)


@needs_litert
@pytest.mark.large
@pytest.mark.parametrize(
    ("functions", "low"),
    [(ACTIVATIONS, -3.0), (ARITHMETIC | MOVES, -3.0), (POSITIVE, 0.3)],
    ids=["activations", "arithmetic", "positive"],
)
def test_what_has_a_form_for_int16(functions, low):
    inexact = {"exp2", "expm1", "cumsum"}  # tables of 513 numbers, and weights of 8 bits
    check({name: fn for name, fn in functions.items() if name not in inexact}, "int16", low)


@needs_litert
@pytest.mark.large
@pytest.mark.parametrize("functions", [ACTIVATIONS, ARITHMETIC], ids=["activations", "arithmetic"])
def test_chains_between_dense_layers_stay_integer(functions):
    wide = {name: fn for name, fn in functions.items() if name not in ("mean", "sum", "softmax")}
    check(wide, chain=True)


@needs_litert
def test_the_summary_of_a_file_is_what_it_was():
    file, *_ = exported(Table({"silu": jax.nn.silu}), rows(1, -3.0), "int8")
    assert str(file.summary()).splitlines()[1:-1] == [
        "QUANTIZE    1  float32                int8                  0",
        "RESHAPE     1  int8        int32      int8                  8",
        "LOGISTIC    1  int8                   int8                  0",
        "MUL         1  int8, int8             int8                  0",
        "DEQUANTIZE  1  int8                   float32               0",
    ]


REFUSED = {
    "sin": jnp.sin,
    "floor": jnp.floor,
    "sort": lambda x: jnp.sort(x, -1),
    "argmax": lambda x: x[0, x.argmax(-1)],
    "gt": lambda x: jnp.where(x > 0, x, 0.0),
}


@pytest.mark.parametrize("op", REFUSED)
def test_what_has_no_integer_form_says_why(op):
    rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
    model = Table({op: REFUSED[op]})
    with pytest.raises(ValueError, match=r"(?s)no integer form.*LiteRT"):
        qwix.quantize_model(model, qwix.OdmlQatProvider([rule]), rows(1, -3.0))


def test_int16_is_refused_where_litert_has_no_kernel():
    rule = SimpleNamespace(act_qtype="int16")
    assert "for int8, not for int16" in odml_ops.TABLE["log"].refusal(rule)
    assert odml_ops.TABLE["tanh"].refusal(rule) is None
    assert odml_ops.TABLE["sin"].refusal(None) == "LiteRT has a float kernel only"
    power = SimpleNamespace(op="pow", args=[None, np.float32(2.5)], params={})
    assert odml_ops.spec_of(power).qtypes == ("int8",)
    power.args[1] = np.float32(-0.5)
    assert odml_ops.spec_of(power).qtypes == ("int8", "int16")


def test_every_float_op_of_the_table_has_a_reason():
    assert [
        name for name, spec in odml_ops.TABLE.items() if (spec.kind == "float") != bool(spec.reason)
    ] == []
    assert odml_ops.spec_of(SimpleNamespace(op="new", args=[], params={})).reason


def test_fixed_ranges_are_the_steps_of_the_kernels():
    for qtype, steps in (("int8", 255), ("int16", 65534)):
        low, high = odml_ops.TABLE["softmax"].fixed_range(SimpleNamespace(act_qtype=qtype))
        assert (high - low) / steps == (1 / 256 if qtype == "int8" else 1 / 32768)


class Plain:
    """Forms without rounding."""

    qtype, constants, moved = "int16", frozenset(), True

    def __call__(self, name, x, **_):
        return x

    def constant(self, x, qtype=None):
        return jnp.asarray(x, jnp.float32)

    def again(self, x):
        return x

    def ends(self, i):
        return -3.0, 3.0


FORMS = {
    "neg": (lax.neg, {}),
    "square": (jnp.square, {}),
    "integer_pow": (lambda x: x**5, {"y": 5}),
    "exp2": (jnp.exp2, {}),
    "expm1": (jnp.expm1, {}),
    "cumsum": (lambda x: lax.cumsum(x, 1, reverse=True), {"axis": 1, "reverse": True}),
    "silu": (jax.nn.silu, {}),
    "gelu": (jax.nn.gelu, {"approximate": True}),
    "hard_silu": (jax.nn.hard_swish, {}),
    "hard_sigmoid": (jax.nn.hard_sigmoid, {}),
    "elu": (jax.nn.elu, {}),
    "softplus": (jax.nn.softplus, {}),
    "log_softmax": (jax.nn.log_softmax, {}),
}


@pytest.mark.parametrize("op", FORMS)
def test_forms_compute_the_op_and_its_derivative(op):
    fn, params = FORMS[op]
    form = odml_ops.TABLE[op].form
    x = jnp.asarray(rows(1, -3.0)[0])
    new = lambda x: form(Plain(), lambda *args: [fn(*args)], params, x)[0]
    np.testing.assert_allclose(new(x), fn(x), rtol=1e-5, atol=2e-5)
    grad = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(f(x))))(x)
    np.testing.assert_allclose(grad(new), grad(fn), rtol=1e-4, atol=1e-4)


def test_padding_inside_is_padding_at_edges():
    x = jnp.arange(6.0).reshape(2, 3)
    config = ((1, 0, 2), (-1, 2, 1))
    padded = lambda *args: [lax.pad(*args, config)]
    (got,) = odml_forms.pad(Plain(), padded, {"padding_config": config}, x, jnp.float32(9))
    np.testing.assert_array_equal(got, lax.pad(x, jnp.float32(9), config))


def test_int16_concatenates_by_sums():
    parts = [jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 1)), -jnp.ones((2, 2))]
    (got,) = odml_forms.concatenate(Plain(), lambda *args: [], {"dimension": 1}, *parts)
    np.testing.assert_array_equal(got, jnp.concatenate(parts, 1))
