"""JAX functions as `.tflite` files, by LiteRT's converter, run by its interpreter and compared."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix import odml
from qwix.odml import Op, Signature, Summary, TfliteModel, convert, fake_quant, with_integer_io

RNG = np.random.default_rng(0)
X = RNG.uniform(-2, 2, (4, 16)).astype(np.float32)
W = RNG.normal(size=(16, 8)).astype(np.float32)


def dense(qtype: str, axis: int | None, zero_point: int | None):
    """A dense layer with relu, of which all is quantized."""
    bound = {"int4": 7, "int8": 127}[qtype]
    scales = np.abs(W).max(0 if axis is not None else None) / bound

    def run(x):
        x = fake_quant(x, 4 / 255, zero_point)
        w = fake_quant(jnp.asarray(W), scales, qtype=qtype, axis=axis, narrow_range=True)
        return fake_quant(jax.nn.relu(x @ w), 0.1, -128)

    return run


def test_fake_quant_is_what_it_says():
    x = jnp.array([[0.24, 0.26, 90.0], [-0.3, -1.0, -90.0]])
    np.testing.assert_array_equal(fake_quant(x, 0.5), [[0, 0.5, 63.5], [-0.5, -1, -64]])
    np.testing.assert_array_equal(fake_quant(x, 0.5, narrow_range=True)[1], [-0.5, -1, -63.5])
    np.testing.assert_array_equal(fake_quant(x, 0.5, -128), [[0, 0.5, 90], [0, 0, 0]])
    each = fake_quant(x, [0.5, 1.0], [0, 7], qtype="int4", axis=0)
    np.testing.assert_array_equal(each, [[0, 0.5, 3.5], [0, -1, -15]])
    half = fake_quant(x.astype(jnp.bfloat16), [1.0, 2.0, 4.0], axis=-1, qtype="int16")
    assert half.dtype == jnp.bfloat16 and half.tolist() == [[0, 0, 88], [0, 0, -88]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "must be positive and finite"),
        ({"scale": float("nan")}, "must be positive and finite"),
        ({"scale": 1.0, "qtype": "int2"}, "LiteRT has no 'int2'"),
        ({"scale": [1.0, 1.0]}, "scale has 2 numbers; an x without axis needs 1"),
        ({"scale": 1.0, "axis": 1}, r"scale has 1 numbers; axis 1 of \(2, 3\) needs 3"),
        ({"scale": 1.0, "zero_point": 200}, "1 of -128 to 127 are needed"),
    ],
)
def test_scales_and_zero_points_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fake_quant(jnp.ones((2, 3)), **options)


def test_scales_are_part_of_the_program():
    with pytest.raises(TypeError, match="scale is traced"):
        jax.jit(lambda x, scale: fake_quant(x, scale))(jnp.ones(3), 1.0)


def test_names_come_from_parameters_and_trees():
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    one = Signature(lambda image, state: {"logits": image, "new": [state["h"]]}, (shape, {"h": shape}))
    assert one.input_names == ("image", "state_h") and one.output_names == ("logits", "new_0")
    two = Signature(lambda *xs: xs, (shape, shape), output_names=["a", "b"])
    assert two.input_names == ("input_0", "input_1") and two.output_names == ("a", "b")
    assert Signature(lambda *xs: xs, (shape, shape)).output_names == ("output_0", "output_1")


def test_sample_inputs_and_names_that_make_no_sense_are_refused():
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    with pytest.raises(ValueError, match="input_names of 'f' must be 1 different ones"):
        Signature(lambda x: x, (shape,), "f", input_names=["a", "b"])
    with pytest.raises(ValueError, match="output_names of 'f' must be 2 different ones"):
        Signature(lambda x: (x, x), (shape,), "f", output_names=["a", "a"])
    with pytest.raises(TypeError, match=r"hold True, a bool.*functools.partial"):
        Signature(lambda x, train: x, (shape, True))
    (rows,) = jax.export.symbolic_shape("rows")
    with pytest.raises(ValueError, match="sizes must be numbers"):
        Signature(lambda x: x, (jax.ShapeDtypeStruct((rows, 3), jnp.float32),))
    with pytest.raises(ValueError, match="signatures of different names"):
        convert(Signature(lambda x: x, (shape,)), Signature(lambda x: x, (shape,)))


def test_a_missing_converter_is_said_with_what_installs_it(monkeypatch):
    for name in ("litert_converter", "ai_edge_litert"):
        monkeypatch.setitem(sys.modules, name, None)
        for part in ("converter_api_ext", "schema_py_generated"):
            monkeypatch.setitem(sys.modules, f"{name}.{part}", None)
    with pytest.raises(ImportError, match=r"qwix.odml needs litert-converter.*: pip install ai-edge-litert"):
        convert(Signature(lambda x: x, (X,)))
    with pytest.raises(ImportError, match=r"qwix.odml needs ai-edge-litert"):
        TfliteModel(b"").summary()


def test_the_summary_names_float_ops():
    ops = Op("SIN", "f", ("float32",), ("float32",)), Op("CAST", "f", ("int8",), ("float32",))
    assert (
        str(Summary(ops, 10, 0)).splitlines()[-1]
        == "10 bytes, 0 of them constants; no integer ops; 2 float ops: CAST, SIN."
    )
    assert not Op("DEQUANTIZE", "f", ("int8",), ("float32",)).is_float
    assert odml.__all__ == sorted(odml.__all__, key=lambda name: (name[0].islower(), name))


@pytest.mark.parametrize("zero_point", [None, 3])
@pytest.mark.parametrize(("qtype", "axis"), [("int8", 1), ("int8", None), ("int4", 1)])
def test_a_dense_layer_becomes_integer_and_agrees(tmp_path, qtype, axis, zero_point):
    run = dense(qtype, axis, zero_point)
    model = convert(Signature(run, (X,), output_names=["y"]), strict=True)
    summary = model.summary()
    assert [op.name for op in summary.ops] == ["QUANTIZE", "FULLY_CONNECTED", "DEQUANTIZE"]
    (layer,) = (op for op in summary.ops if op.name == "FULLY_CONNECTED")
    assert layer.inputs == layer.outputs == ("int8",) and qtype in layer.constants
    assert summary.float_ops == () and summary.bytes == len(model.content)
    # Two roundings may fall on either side of a half: that of the input, and that of the result.
    got, want = model.run({"x": jnp.asarray(X)})["y"], run(X)
    assert np.abs(got - want).max() <= 0.1 * 1.001
    assert (np.abs(got - want) > 1e-6).mean() < 0.05
    model.save(tmp_path / "dense.tflite")
    loaded = TfliteModel.load(tmp_path / "dense.tflite")
    assert loaded == model and loaded.signatures == {"serving_default": (("x",), ("y",))}
    np.testing.assert_array_equal(loaded.run({"x": X}, "serving_default")["y"], got)


def test_a_convolution_with_a_scale_for_each_channel_agrees():
    image = RNG.uniform(-1, 1, (1, 8, 8, 4)).astype(np.float32)
    kernel = RNG.normal(size=(3, 3, 4, 6)).astype(np.float32)
    scales = np.abs(kernel).max((0, 1, 2)) / 127

    def run(x):
        w = fake_quant(jnp.asarray(kernel), scales, axis=3, narrow_range=True)
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(fake_quant(x, 1 / 128), w, (1, 1), "SAME", dimension_numbers=dims)
        return fake_quant(y, 0.15)

    model = convert(Signature(run, (image,)), strict=True)
    assert [op.name for op in model.summary().ops] == ["QUANTIZE", "CONV_2D", "DEQUANTIZE"]
    got = model.run({"x": image})["output"]
    assert np.abs(got - run(image)).max() <= 0.15 * 1.001


def test_floats_between_integers_are_warned_of_or_refused():
    sine = Signature(lambda x: fake_quant(jnp.sin(fake_quant(x, 0.02)), 1 / 128), (X,))
    with pytest.warns(UserWarning, match="1 float op beside quantized ones: SIN in 'serving_default'"):
        model = convert(sine)
    np.testing.assert_allclose(model.run({"x": X})["output"], sine.fn(X), atol=1.001 / 128)
    with pytest.raises(ValueError, match=r"SIN.*or leave out strict"):
        convert(sine, strict=True)
    convert(Signature(jnp.tanh, (X,)), strict=True)  # a float model is not a broken integer one


def test_several_signatures_of_trees():
    first = Signature(dense("int8", 1, None), (X,), "quantized")
    second = Signature(lambda a, b: {"sum": a + b["c"], "tanh": jnp.tanh(a)}, (X, {"c": X}), "other")
    model = convert(first, second)
    assert model.signatures == {"quantized": (("x",), ("output",)), "other": (("a", "b_c"), ("sum", "tanh"))}
    out = model.run({"a": X, "b_c": X}, "other")
    np.testing.assert_allclose(out["tanh"], np.tanh(X), atol=1e-6)
    np.testing.assert_allclose(out["sum"], 2 * X, rtol=1e-6)
    assert [(op.signature, op.name) for op in model.summary().ops if op.is_float] == [
        ("other", "ADD"),
        ("other", "TANH"),
    ]
    with pytest.raises(ValueError, match=r"signature is None; the file has \['quantized', 'other'\]"):
        model.run({"x": X})


def test_a_function_is_traced_once():
    calls = []
    model = convert(Signature(lambda x, unused: (calls.append(1), jnp.tanh(x))[1], (X, X)))
    assert calls == [1] and model.signatures == {"serving_default": (("x", "unused"), ("output",))}


def test_wrong_inputs_of_a_run_are_named():
    model = convert(Signature(jnp.tanh, (X,)))
    for kernels in ("builtin", "reference"):
        got, want = (model.run({"x": X}, kernels=k)["output"] for k in (kernels, "xnnpack"))
        np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(ValueError, match="kernels is 'fast'; it is one of 'xnnpack', 'builtin', 'reference'"):
        model.run({"x": X}, kernels="fast")
    with pytest.raises(ValueError, match=r"has the inputs \['x'\], got \['y'\]"):
        model.run({"y": X})
    with pytest.raises(
        ValueError, match=r"'x' of 'serving_default' is float32\[4, 16\], got float64\[4, 16\]"
    ):
        model.run({"x": X.astype(np.float64)})
    with pytest.raises(ValueError, match=r"got float32\[3, 16\]"):
        model.run({"x": X[:3]})


def test_an_op_without_a_form_in_litert_is_named():
    with pytest.raises(ValueError, match=r"serving_default: it has no form of the ops lapack_\w+"):
        convert(Signature(lambda x: jnp.linalg.eigh(x @ x.T)[0], (X,)))


def test_integer_inputs_and_outputs_are_those_inside():
    run = dense("int8", 1, 3)
    model = convert(
        Signature(run, (X,), output_names=["y"]), Signature(dense("int8", 1, None), (X,), "other")
    )
    integer = with_integer_io(model)
    assert [op.name for op in integer.summary().ops] == ["FULLY_CONNECTED"] * 2
    assert integer.signatures == model.signatures
    (x_scale, x_zero), (y_scale, y_zero) = (integer.quantization("serving_default")[k] for k in ("x", "y"))
    np.testing.assert_allclose((x_scale, y_scale), [[4 / 255], [0.1]], rtol=1e-6)
    assert (x_zero, y_zero) == (3, -128) and model.quantization("other") == {}
    q = np.clip(np.round(X / x_scale) + x_zero, -128, 127).astype(np.int8)
    got = (integer.run({"x": q}, "serving_default")["y"].astype(np.float32) - y_zero) * y_scale
    want = model.run({"x": ((q.astype(np.float32) - x_zero) * x_scale).astype(np.float32)}, "serving_default")
    np.testing.assert_allclose(got, want["y"], rtol=1e-6)


def test_inputs_and_outputs_that_are_floats_inside_are_named():
    half = lambda x: fake_quant(jnp.tanh(fake_quant(x, 0.02)), 1 / 128)
    with pytest.warns(UserWarning, match="float op"):
        both = convert(Signature(lambda x: (half(x), jnp.sin(x)), (X,)))
    with pytest.raises(ValueError, match=r"The input 'x' of 'serving_default' is read by \[.*'SIN'.*\]"):
        with_integer_io(both)
    with pytest.warns(UserWarning, match="float op"):
        sine = convert(Signature(lambda x: jnp.sin(half(x)), (X,)))
    with pytest.raises(ValueError, match=r"The output 'output' .* is made by \['SIN'\]"):
        with_integer_io(sine)
