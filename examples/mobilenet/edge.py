"""MobileNetV2 as an integer `.tflite` file, and how near it comes to the models that it was made from.

Three models are compared on the sample images: the float one, the fake-quantized one (floats, rounded as the
file's integers are) and the file, run by LiteRT's interpreter on this machine's CPU. File and fake-quantized
model differ where a sum falls so near to the middle of two integers that the order of additions decides, and
by the rounding of biases; 53 layers further that is some 24 dB below the scores, which rounding the biases
alone does as well.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import qwix
from examples.mobilenet import correct, evaluate
from examples.mobilenet.model import MobileNetV2
from qwix import odml

RULE = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
KERNELS = ("xnnpack", "builtin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file must reach."""

    bytes: int = 4_100_000
    integer_ops: int = 69
    sqnr_fakequant_litert: float = 23.0
    sqnr_float_litert: float = 15.0
    agreement: float = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """The file by one kind of LiteRT's kernels, on all images.

    Attributes:
      sqnr_fakequant_litert: signal to noise of the scores beside those of the fake-quantized model, in dB.
      sqnr_float_litert: beside those of the float model.
      agreement: share of images with the fake-quantized model's likeliest class.
      agreement_float: with the float model's.
      steps: largest difference from the fake-quantized model, in steps of the scores' scale.
    """

    sqnr_fakequant_litert: float | None  # None: no score differs
    sqnr_float_litert: float | None
    agreement: float
    agreement_float: float
    steps: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one file; scores by kind of kernels."""

    bytes: int
    integer_ops: int
    float_ops: int
    sqnr_float_fakequant: float | None
    kernels: dict[str, Scores]


def with_corrected_biases(model: MobileNetV2, batch: np.ndarray) -> MobileNetV2:
    """The float model with biases that make up for what rounding its weights does to the mean output.

    Args:
      batch: images of which the mean inputs of the layers are taken.
    """
    fresh, means = nnx.clone(model), correct.mean_inputs(model, batch)
    for path, layer in correct.layers(fresh).items():
        kernel = layer.kernel[...]
        stored = qwix.dequantize(qwix.quantize(kernel, "int8", channelwise_axes=(kernel.ndim - 1,)))
        error = np.asarray(kernel, np.float64) - np.asarray(stored, np.float64)
        if layer.bias is not None:
            layer.bias[...] = layer.bias[...] + jnp.asarray(correct.shift(error, means[path]), jnp.float32)
    return fresh


def fake_quantized(model: MobileNetV2, batch: np.ndarray) -> MobileNetV2:
    """The model under `qwix.OdmlQatProvider`, with statistics of `batch`, image by image.

    One image at a time: the mean of the images' ranges is a finer step than the range of all of them.
    """
    model = with_corrected_biases(model, batch)
    quantized = qwix.quantize_model(model, qwix.OdmlQatProvider([RULE]))
    odml.calibrate(quantized, np.split(batch, len(batch)))
    quantized.set_attributes(disable_quant_stats_update=True, raise_if_not_found=False)
    return quantized


def litert_scores(file: odml.TfliteModel, batch: np.ndarray, kernels: str) -> np.ndarray:
    """Scores of all classes, `[images, classes]`, of a file that takes one image."""
    scores = [file.run({"images": image}, kernels=kernels)["logits"] for image in np.split(batch, len(batch))]
    return np.concatenate(scores)


def compare(
    file: odml.TfliteModel, fake: np.ndarray, reference: np.ndarray, batch: np.ndarray, kernels: str
) -> Scores:
    """What the file makes of the images, beside the scores of the fake-quantized and the float model."""
    scores = litert_scores(file, batch, kernels)
    step = odml.with_integer_io(file).quantization()["logits"][0].item()
    return Scores(
        sqnr_fakequant_litert=evaluate.sqnr_db(scores, fake),
        sqnr_float_litert=evaluate.sqnr_db(scores, reference),
        agreement=evaluate.agreement(scores, fake),
        agreement_float=evaluate.agreement(scores, reference),
        steps=float(abs(scores - fake).max() / step),
    )


def exported(quantized: MobileNetV2, image: np.ndarray) -> odml.TfliteModel:
    """The file, for one image at a time."""
    return odml.export(quantized, sample_inputs=image, output_names=["logits"], strict=True)


def measured(file: odml.TfliteModel, fake: np.ndarray, reference: np.ndarray, batch: np.ndarray) -> Result:
    """All numbers. `fake` and `reference` are the scores of the fake-quantized and of the float model."""
    summary = file.summary()
    return Result(
        bytes=summary.bytes,
        integer_ops=len(summary.integer_ops),
        float_ops=len(summary.float_ops),
        sqnr_float_fakequant=evaluate.sqnr_db(fake, reference),
        kernels={kernels: compare(file, fake, reference, batch, kernels) for kernels in KERNELS},
    )


def numbers(result: Result) -> dict[str, Any]:
    """The result as the JSON file has it: the scores of the default kernels are at the top, too."""
    every = dataclasses.asdict(result)
    return every | every["kernels"][KERNELS[0]]


def shortfalls(result: Result, limits: Limits = Limits()) -> list[str]:
    """What of the limits a result misses, in words; empty when it meets them all.

    Example:
      >>> bad = Scores(sqnr_fakequant_litert=20.0, sqnr_float_litert=16.0, agreement=1.0, agreement_float=1.0,
      ...              steps=1.0)
      >>> counts = {"bytes": 4_000_000, "integer_ops": 69, "float_ops": 0, "sqnr_float_fakequant": 17.0}
      >>> shortfalls(Result(**counts, kernels={"xnnpack": bad}))
      ['xnnpack: sqnr_fakequant_litert is 20.0, must be at least 23.0']
    """
    found = []
    if result.bytes > limits.bytes:
        found.append(f"{result.bytes} bytes, must be at most {limits.bytes}")
    if result.float_ops:
        found.append(f"{result.float_ops} float ops, must be none")
    if result.integer_ops != limits.integer_ops:
        found.append(f"{result.integer_ops} integer ops, must be {limits.integer_ops}")
    for kernels, scores in result.kernels.items():
        for field in ("sqnr_fakequant_litert", "sqnr_float_litert", "agreement"):
            value, least = getattr(scores, field), getattr(limits, field)
            if value is not None and not value >= least:
                found.append(f"{kernels}: {field} is {value:.1f}, must be at least {least}")
    return found
