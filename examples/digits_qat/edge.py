"""The digits classifier trained for integer arithmetic, as an integer `.tflite` file.

Three forms of one network are scored on the test images: the one that was trained, with fake quantization;
the program that is given to LiteRT's converter, run by JAX; and the file, run by LiteRT's interpreter on this
machine's CPU. They must find the same digits, but for a few images on the edge between two.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

import qwix
from examples.digits_qat import train
from examples.digits_qat.data import Images
from examples.digits_qat.models import Classifier
from qwix import odml

RULE = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
EPOCHS = 15
LIMIT = 0.3  # points of accuracy between any two forms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The fields of the JSON file.

    Attributes:
      float_accuracy: of a network trained in float32, in percent of the test images, as all of these.
      qat_accuracy: with fake quantization, as trained.
      conversion_accuracy: of the program for the converter.
      litert_accuracy: of the file.
      bytes, integer_ops, float_ops: of the file.
    """

    float_accuracy: float
    qat_accuracy: float
    conversion_accuracy: float
    litert_accuracy: float
    bytes: int
    integer_ops: int
    float_ops: int


def trained(images: Images, *, epochs: int = EPOCHS, progress: bool = True) -> Classifier:
    """A classifier whose weights and ranges are trained for int8."""
    model = qwix.quantize_model(Classifier(nnx.Rngs(0)), qwix.OdmlQatProvider([RULE]), images.pixels[:2])
    train.train(model, images, epochs=epochs, seed=0, name="int8", progress=progress)
    return model


def as_converted(model: Classifier) -> Classifier:
    """The model as LiteRT's converter reads it, with its params and statistics in it."""
    params, stats = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, qwix.QuantStat))
    return qwix.quantize_model(model, qwix.OdmlConversionProvider([RULE], params, stats))


def exported(model: Classifier, count: int) -> odml.TfliteModel:
    """The file, for `count` images at once."""
    shape = jax.ShapeDtypeStruct((count, 8, 8, 1), np.float32)
    return odml.export(model, sample_inputs=shape, output_names=["logits"], strict=True)


def percent(logits: jax.Array | np.ndarray, images: Images) -> float:
    """Share of right labels of scores `[images, 10]`."""
    return 100 * float((np.asarray(logits).argmax(-1) == np.asarray(images.labels)).mean())


def measured(model: Classifier, floats: Classifier, test: Images) -> tuple[Result, odml.TfliteModel]:
    """All numbers of a trained model, and the file."""
    converted, file = as_converted(model), exported(model, len(test))
    summary = file.summary()
    result = Result(
        float_accuracy=train.accuracy(floats, test),
        qat_accuracy=train.accuracy(model, test),
        conversion_accuracy=percent(jax.jit(lambda x: converted(x))(test.pixels), test),
        litert_accuracy=percent(file.run({"pixels": test.pixels})["logits"], test),
        bytes=summary.bytes,
        integer_ops=len(summary.integer_ops),
        float_ops=len(summary.float_ops),
    )
    return result, file


def shortfalls(result: Result) -> list[str]:
    """What is not as it must be, in words.

    Example:
      >>> counts = {"bytes": 40_000, "integer_ops": 6, "float_ops": 0}
      >>> shortfalls(Result(float_accuracy=98.0, qat_accuracy=98.0, conversion_accuracy=98.0,
      ...                   litert_accuracy=97.0, **counts))
      ['accuracies 98.00, 98.00 and 97.00 are 1.00 points apart, must be at most 0.3']
    """
    found = [f"{result.float_ops} float ops, must be none"] if result.float_ops else []
    scores = result.qat_accuracy, result.conversion_accuracy, result.litert_accuracy
    apart = max(scores) - min(scores)
    if not apart <= LIMIT:
        shown = "{:.2f}, {:.2f} and {:.2f}".format(*scores)
        found.append(f"accuracies {shown} are {apart:.2f} points apart, must be at most {LIMIT}")
    if result.qat_accuracy < result.float_accuracy - 1:
        found.append(f"int8 gets {result.qat_accuracy:.2f} %, float {result.float_accuracy:.2f} %")
    return found
