"""Whole models as integer `.tflite` files, made by LiteRT's converter and run by its interpreter.

The bound on a file is stated in steps of its output's scale: what reaches the output differs from the
fake-quantized model where a sum lies in the middle of two integers, or a table of LiteRT's kernels rounds
otherwise, and each such step is weighed by the layers behind it.
"""

import dataclasses
import doctest
import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import qwix
from examples.digits_qat import data, train
from examples.digits_qat import edge as digits
from examples.digits_qat.models import Classifier
from examples.mobilenet import edge as mobilenet
from examples.mobilenet import evaluate, images, load
from examples.mobilenet.model import Config, MobileNetV2
from qwix import odml
from tests.integration import odml_models

LARGE = pytest.mark.large
RULE = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 8, 8, 4)).astype(np.float32)
ROWS = RNG.normal(size=(4, 16)).astype(np.float32)
TEXT = RNG.normal(size=(1, 8, odml_models.SMOLLM2.width)).astype(np.float32)
TOKENS = RNG.integers(0, 32, (2, 6)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Made:
    """A file, the name and value of its input, and what the fake-quantized and the float model say."""

    file: odml.TfliteModel
    x: np.ndarray
    fake: np.ndarray
    reference: np.ndarray

    def steps(self, kernels: str) -> float:
        """The largest difference from the fake-quantized model, in steps of the output's scale."""
        ((given,), (output,)) = self.file.signatures["serving_default"]
        got = self.file.run({given: self.x}, kernels=kernels)[output]
        return float(abs(got - self.fake).max() / self.scale(output))

    def scale(self, output: str) -> float:
        read = self.file._read
        (one,) = read.signatureDefs
        graph = read.subgraphs[one.subgraphIndex]
        (last,) = (op for op in graph.operators if one.outputs[0].tensorIndex in op.outputs)
        return float(graph.tensors[last.inputs[0]].quantization.scale[0])


@functools.cache
def linen(kind: str) -> Made:
    model, x = {
        "conv_norm_silu": (odml_models.ConvNormSilu(), IMAGES),
        "unet": (odml_models.UNet(), IMAGES),
        "encoder": (odml_models.Encoder(), TOKENS),
        "scanned": (odml_models.Scanned(), ROWS),
    }[kind]
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    quantized = qwix.quantize_model(model, qwix.OdmlQatProvider([RULE]))
    stats = odml.calibrate(quantized, [x], {"params": params}, progress=False)
    apply = lambda model, **more: jax.jit(lambda x: model.apply({"params": params, **more}, x))(x)
    file = odml.export(quantized, params, stats, x, strict=True)
    return Made(file, x, np.asarray(apply(quantized, quant_stats=stats)), np.asarray(apply(model)))


def nnx_made(model: nnx.Module, x: np.ndarray) -> Made:
    quantized: Any = qwix.quantize_model(model, qwix.OdmlQatProvider([RULE]))
    odml.calibrate(quantized, [x], progress=False)
    quantized.set_attributes(disable_quant_stats_update=True)
    file = odml.export(quantized, sample_inputs=x, strict=True)
    run = lambda model: np.asarray(jax.jit(lambda x: model(x))(x))
    return Made(file, x, run(quantized), run(model))


# The bounds are twice what was seen, at least one step; by XNNPACK's kernels and by the builtin ones.
@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("conv_norm_silu", (1, 3)),
        ("scanned", (1, 1)),
        pytest.param("unet", (6, 6), marks=LARGE),
        pytest.param("encoder", (2, 4), marks=LARGE),
    ],
)
def test_no_op_of_a_model_is_float_and_the_file_agrees(kind, steps):
    made = linen(kind)
    summary = made.file.summary()
    assert summary.float_ops == () and len(summary.integer_ops) >= 4
    assert [op.name for op in summary.ops if "float32" in (*op.inputs, *op.outputs)] == (
        ["DEQUANTIZE"] if kind == "encoder" else ["QUANTIZE", "DEQUANTIZE"]
    )
    found = made.steps("xnnpack"), made.steps("builtin")
    assert found[0] <= steps[0] + 1e-3 and found[1] <= steps[1] + 1e-3, found
    assert evaluate.sqnr_db(made.fake, made.reference) > 6  # quantized, and not to nothing


def test_layers_of_a_scan_are_layers_of_the_file():
    names = [op.name for op in linen("scanned").file.summary().integer_ops]
    assert names == ["FULLY_CONNECTED"] * 4


def test_a_model_takes_and_gives_integers():
    made = linen("scanned")
    whole = odml.with_integer_io(made.file)
    scale, zero = whole.quantization()["x"]
    integers = np.clip(np.round(made.x / scale) + zero, -128, 127).astype(np.int8)
    scale, zero = whole.quantization()["output"]
    got = (whole.run({"x": integers})["output"].astype(np.float32) - zero) * scale
    np.testing.assert_allclose(got, made.file.run({"x": made.x})["output"], rtol=1e-6)


@LARGE
def test_a_file_offers_several_methods():
    methods = ("__call__", "encode", "decode")
    model = qwix.quantize_model(odml_models.Coder(nnx.Rngs(0)), qwix.OdmlQatProvider([RULE]), methods=methods)
    for method, x in (("__call__", ROWS), ("encode", ROWS), ("decode", abs(ROWS[:, :4]))):
        odml.calibrate(model, [x], method=method, progress=False)
    file = odml.export(model, sample_inputs={"encode": ROWS, "decode": ROWS[:, :4]}, strict=True)
    assert file.signatures == {"encode": (("image",), ("code",)), "decode": (("code",), ("output",))}
    model.set_attributes(disable_quant_stats_update=True)
    code = file.run({"image": ROWS}, "encode")["code"]
    want = np.asarray(model.encode(ROWS)["code"])
    assert abs(code - want).max() <= 1.001 * want.max() / 255 and abs(code).max() > 0
    decoded = file.run({"code": code}, "decode")["output"]
    assert abs(decoded - model.decode(code)).max() <= 1.001 / 128


@LARGE
def test_a_block_of_smollm2_is_integer_and_agrees():
    made = nnx_made(odml_models.SmolLM2Block(nnx.Rngs(0)), TEXT)
    summary = made.file.summary()
    assert summary.float_ops == () and len(summary.integer_ops) >= 40
    assert made.steps("xnnpack") <= 4 and made.steps("builtin") <= 6
    assert evaluate.sqnr_db(made.fake, made.reference) > 28


# --- the digits


@LARGE
def test_the_digits_trained_a_little_are_found_alike():
    train_images, test = data.load()
    few = data.Images(train_images.pixels[: 4 * train.BATCH], train_images.labels[: 4 * train.BATCH])
    model = digits.trained(few, epochs=3, progress=False)
    result, _ = digits.measured(model, model, test)
    assert result.qat_accuracy > 40 and digits.shortfalls(result) == []
    assert result.integer_ops == 5


@LARGE
def test_the_digits_are_found_as_well_as_in_float():
    train_images, test = data.load()
    floats = Classifier(nnx.Rngs(0))
    train.train(floats, train_images, epochs=digits.EPOCHS, seed=0, name="float", progress=False)
    result, _ = digits.measured(digits.trained(train_images, progress=False), floats, test)
    assert digits.shortfalls(result) == [] and result.qat_accuracy > 97


# --- MobileNetV2

TINY = Config(stem=8, stages=((1, 8, 1, 1), (6, 8, 2, 2)), head=16, classes=10)


@LARGE
def test_a_tiny_mobilenet_is_integer():
    batch = RNG.normal(size=(3, 32, 32, 3)).astype(np.float32)
    model = MobileNetV2(TINY, rngs=nnx.Rngs(0))
    quantized = mobilenet.fake_quantized(model, batch)
    file = mobilenet.exported(quantized, batch[:1])
    scores = (evaluate.logits(one, batch) for one in (quantized, model))
    result = mobilenet.measured(file, *scores, batch)
    assert result.float_ops == 0 and all(s.steps <= 3 for s in result.kernels.values())


@LARGE
def test_mobilenet_reaches_its_limits():
    batch, model = images.load(), load.load_model()
    quantized = mobilenet.fake_quantized(model, images.for_calibration())
    fake, reference = (evaluate.logits(one, batch) for one in (quantized, model))
    result = mobilenet.measured(mobilenet.exported(quantized, batch[:1]), fake, reference, batch)
    assert mobilenet.shortfalls(result) == []
    worse = dataclasses.replace(result, bytes=5_000_000, float_ops=1, integer_ops=68)
    assert len(mobilenet.shortfalls(worse)) == 3


@pytest.mark.parametrize("module", [digits, mobilenet], ids=lambda module: module.__name__)
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0
