"""Trains the digits classifier for int8, makes an integer `.tflite` file of it, and runs that.

python -m examples.digits_qat.export --json FILE --check
"""

import dataclasses
import json
import pathlib
import sys
import time

from absl import app, flags
from flax import nnx
from rich.console import Console

from examples.digits_qat import data, edge, train
from examples.digits_qat.models import Classifier

_JSON = flags.DEFINE_string("json", None, "File for the numbers: qat_accuracy, litert_accuracy, ...")
_CHECK = flags.DEFINE_bool("check", False, "Exit with 1, saying what fell short, unless all limits are met.")
_OUT = flags.DEFINE_string("out", None, "File for the model itself.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. Everything is a flag; see --help.")
    console, start = Console(width=None if sys.stdout.isatty() else 120), time.perf_counter()
    images, test = data.load()
    floats = Classifier(nnx.Rngs(0))
    train.train(floats, images, epochs=edge.EPOCHS, seed=0, name="float")
    result, file = edge.measured(edge.trained(images), floats, test)
    if _OUT.value:
        file.save(_OUT.value)
    console.print(str(file.summary()), highlight=False)
    for name in ("float", "qat", "conversion", "litert"):
        console.print(f"{name:<12}{getattr(result, f'{name}_accuracy'):.2f} % of {len(test)} images")
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    if _CHECK.value and (found := edge.shortfalls(result)):
        sys.exit("Fell short:\n" + "\n".join(f"  {line}" for line in found))


if __name__ == "__main__":
    app.run(main)
