"""Trains a CNN and a variational auto-encoder in float and in four quantized ways, and compares them.

python -m examples.digits_qat                               # everything, a few minutes on a CPU
python -m examples.digits_qat --json FILE --plot FILE --check
"""

import dataclasses
import json
import pathlib
import sys
import time

import numpy as np
from absl import app, flags
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

import qwix
from examples.digits_qat import data, plot, train
from examples.digits_qat.models import AutoEncoder, Classifier
from examples.digits_qat.schemes import SCHEMES, Scheme

_JSON = flags.DEFINE_string("json", None, "File for the numbers: scheme -> accuracy, loss, ...")
_PLOT = flags.DEFINE_string("plot", None, "File for the loss curves; .svg, .png or .pdf.")
_CHECK = flags.DEFINE_bool("check", False, "Exit with 1, saying what fell short, unless all limits are met.")
_EPOCHS = flags.DEFINE_integer("epochs", 30, "Passes over the training images.", lower_bound=1)
_SEEDS = flags.DEFINE_integer(
    "seeds", 3, "Networks trained per scheme; figures are their means.", lower_bound=1
)


@dataclasses.dataclass(frozen=True)
class Result:
    """Means over the seeds.

    Attributes:
      accuracy: of the classifier on the test images, in percent.
      ptq_accuracy: the same after its weights were quantized for serving, by the rule it was trained with.
      float_ptq_accuracy: of the float classifier, quantized by that rule without training.
      autoencoder_loss: negative evidence lower bound on the test images, in nats.
      curves: network -> mean training loss of every epoch, of the first seed.
      seconds: for everything.
    """

    accuracy: float
    ptq_accuracy: float | None
    float_ptq_accuracy: float | None
    autoencoder_loss: float
    curves: dict[str, list[float]]
    seconds: float


def serving_rule(scheme: Scheme) -> qwix.QuantizationRule | None:
    """The rule of the forward pass alone."""
    if scheme.rule is None:
        return None
    return qwix.QuantizationRule(**{k: v for k, v in scheme.rule.items() if not k.startswith("bwd_")})


def run(name: str, images: data.Images, test: data.Images, floats: list[Classifier]) -> Result:
    """Trains both networks once per seed. `floats`: the float classifiers, which the first scheme fills."""
    scheme, start = SCHEMES[name], time.perf_counter()
    found: dict[str, list[float]] = {}
    curves: dict[str, list[float]] = {}
    for seed in range(_SEEDS.value):
        for network, kind in (("classifier", Classifier), ("autoencoder", AutoEncoder)):
            model = train.prepared(kind(nnx.Rngs(seed)), scheme.provider(), images)
            losses = train.train(
                model, images, epochs=_EPOCHS.value, seed=seed, name=f"{name} {network} {seed}"
            )
            curves.setdefault(network, losses)
            if isinstance(model, AutoEncoder):
                found.setdefault("autoencoder_loss", []).append(train.loss(model, test))
                continue
            found.setdefault("accuracy", []).append(train.accuracy(model, test))
            if rule := serving_rule(scheme):
                served = train.quantized(model, rule, images)
                found.setdefault("ptq_accuracy", []).append(train.accuracy(served, test))
                # Static ranges come from training, which the float model had none of.
                dynamic = dataclasses.replace(rule, act_static_scale=False)
                plain = train.quantized(floats[seed], dynamic, images)
                found.setdefault("float_ptq_accuracy", []).append(train.accuracy(plain, test))
            else:
                floats.append(model)
    mean = {key: float(np.mean(values)) for key, values in found.items()}
    return Result(
        accuracy=mean["accuracy"],
        ptq_accuracy=mean.get("ptq_accuracy"),
        float_ptq_accuracy=mean.get("float_ptq_accuracy"),
        autoencoder_loss=mean["autoencoder_loss"],
        curves=curves,
        seconds=time.perf_counter() - start,
    )


def shortfalls(results: dict[str, Result]) -> list[str]:
    """What misses its limit, in words."""
    base, lines = results["float"], []
    for name, result in results.items():
        scheme = SCHEMES[name]
        if result.accuracy < base.accuracy - scheme.accuracy_drop:
            lines.append(
                f"{name}: accuracy {result.accuracy:.2f} is more than {scheme.accuracy_drop} points under "
                f"float's {base.accuracy:.2f}"
            )
        if result.autoencoder_loss > base.autoencoder_loss * (1 + scheme.loss_rise / 100):
            lines.append(
                f"{name}: the auto-encoder's loss {result.autoencoder_loss:.3f} is more than "
                f"{scheme.loss_rise} % over float's {base.autoencoder_loss:.3f}"
            )
        if result.ptq_accuracy is None or result.float_ptq_accuracy is None:
            continue
        if result.ptq_accuracy != result.accuracy:
            lines.append(
                f"{name}: quantized for serving its accuracy is {result.ptq_accuracy:.2f}, in training "
                f"{result.accuracy:.2f}"
            )
        if scheme.beats_float_ptq and result.float_ptq_accuracy > result.ptq_accuracy:
            lines.append(
                f"{name}: training gave {result.ptq_accuracy:.2f}, quantizing the float model "
                f"{result.float_ptq_accuracy:.2f}"
            )
    return lines


def summary(results: dict[str, Result]) -> Table:
    """One line per scheme."""
    table = Table(box=box.SIMPLE_HEAD, title="Digits: 600 test images", title_justify="left")
    table.add_column("scheme")
    table.add_column("")
    for column in ("accuracy %", "then PTQ %", "float, then PTQ %", "VAE loss (nats)", "seconds"):
        table.add_column(column, justify="right")
    for name, r in results.items():
        ptq = ["-" if x is None else f"{x:.2f}" for x in (r.ptq_accuracy, r.float_ptq_accuracy)]
        numbers = (f"{r.accuracy:.2f}", *ptq, f"{r.autoencoder_loss:.3f}", f"{r.seconds:.0f}")
        table.add_row(name, SCHEMES[name].title, *numbers)
    return table


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. Everything is a flag; see --help.")
    images, test = data.load()
    console, floats = Console(width=None if sys.stdout.isatty() else 140), []
    results = {name: run(name, images, test, floats) for name in SCHEMES}
    console.print(summary(results))
    if _PLOT.value:
        networks = ("classifier", "autoencoder")
        curves = {n: {name: r.curves[n] for name, r in results.items()} for n in networks}
        plot.save(curves, pathlib.Path(_PLOT.value))
    if _JSON.value:
        numbers = {name: dataclasses.asdict(result) for name, result in results.items()}
        pathlib.Path(_JSON.value).write_text(json.dumps(numbers, indent=2) + "\n")
    if _CHECK.value and (found := shortfalls(results)):
        sys.exit("Fell short:\n" + "\n".join(f"  {line}" for line in found))


if __name__ == "__main__":
    app.run(main)
