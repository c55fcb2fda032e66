"""Quantizes MobileNetV2 in five ways and prints what happened.

python -m examples.mobilenet                       # everything
python -m examples.mobilenet --schemes=w8a8,w4a16  # some
python -m examples.mobilenet --json FILE --check   # keep the numbers; exit 1 when one falls short
"""

import dataclasses
import json
import pathlib
import resource
import sys
import time

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

import qwix
from examples.mobilenet import correct, evaluate, images, load, schemes
from examples.mobilenet.model import MobileNetV2

CHIPS = ("v6e",)

_JSON = flags.DEFINE_string("json", None, "File for the numbers: scheme -> agreement, sqnr_db, ...")
_CHECK = flags.DEFINE_bool(
    "check", False, "Exit with 1, saying what fell short, unless every scheme meets its limits."
)
_SCHEMES = flags.DEFINE_list("schemes", list(schemes.SCHEMES), "Which to run.")


def quantized(model: MobileNetV2, scheme: schemes.Scheme) -> MobileNetV2:
    """The model under a scheme; the float one is left as it was."""
    if scheme.rules is None:
        return model
    return qwix.quantize_model(
        model, qwix.PtqProvider(scheme.make_rules()), jnp.asarray(images.for_calibration())
    )


def run(
    name: str, model: MobileNetV2, reference: np.ndarray, console: Console
) -> tuple[schemes.Result, np.ndarray]:
    """Quantizes, reports and scores; returns the class of each image, too."""
    scheme = schemes.SCHEMES[name]
    console.rule(f"[bold]{name}[/]: {scheme.title}")
    start = time.perf_counter()
    candidate, layers = quantized(model, scheme), 0
    if candidate is not model:
        report = qwix.report(candidate, chips=CHIPS, params=model)
        report.print(console)
        layers = report.totals.quantized_ops
    plain = evaluate.logits(candidate, images.load())
    if candidate is not model:
        correct.correct(candidate, model, images.for_calibration())
    scores = evaluate.logits(candidate, images.load())
    result = schemes.Result(
        agreement=evaluate.agreement(scores, reference),
        sqnr_db=evaluate.sqnr_db(scores, reference),
        plain_agreement=evaluate.agreement(plain, reference),
        plain_sqnr_db=evaluate.sqnr_db(plain, reference),
        device_mb=evaluate.device_bytes(nnx.state(candidate)) / 1e6,
        weight_ratio=evaluate.weight_bytes(candidate) / evaluate.weight_bytes(model),
        quantized_layers=layers,
        seconds=time.perf_counter() - start,
    )
    return result, scores.argmax(-1)


def summary(results: dict[str, schemes.Result]) -> Table:
    """One line per scheme, with what plain rounding comes to and what the corrected model does."""
    table = Table(box=box.SIMPLE_HEAD, title="MobileNetV2", title_justify="left")
    scores = ("top-1 agreement, plain", "corrected", "SQNR of scores, plain", "corrected")
    for column in ("scheme", "MB on device", "weights", *scores, "seconds"):
        table.add_column(column, justify="left" if column == "scheme" else "right")
    share = lambda agreement: f"{round(agreement * len(images.FILES))} of {len(images.FILES)}"
    decibels = lambda sqnr: "" if sqnr is None else f"{sqnr:.1f} dB"
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.device_mb:.2f}",
            f"{result.weight_ratio:.4f}x",
            share(result.plain_agreement),
            share(result.agreement),
            decibels(result.plain_sqnr_db),
            decibels(result.sqnr_db),
            f"{result.seconds:.0f}",
        )
    return table


def predictions(classes: dict[str, np.ndarray]) -> Table:
    """The class that each scheme finds likeliest in each image; bold where it isn't float's."""
    table = Table(box=box.SIMPLE_HEAD, title="Classes of ImageNet", title_justify="left")
    table.add_column("image")
    for name in classes:
        table.add_column(name, justify="right")
    reference = next(iter(classes.values()))
    for i, image in enumerate(images.FILES):
        cells = [
            f"{found[i]}" if found[i] == reference[i] else f"[bold]{found[i]}[/]"
            for found in classes.values()
        ]
        table.add_row(image, *cells)
    return table


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. Everything is a flag; see --help.")
    if unknown := set(_SCHEMES.value) - set(schemes.SCHEMES):
        raise app.UsageError(f"Unknown schemes {sorted(unknown)}; there are {', '.join(schemes.SCHEMES)}.")
    # A table cut to 80 columns by a pipe is of no use to anyone.
    console = Console(width=None if sys.stdout.isatty() else 260)
    start = time.perf_counter()
    model = load.load_model()
    reference = evaluate.logits(model, images.load())
    results, classes = {}, {"float": reference.argmax(-1)}
    for name in _SCHEMES.value:
        results[name], classes[name] = run(name, model, reference, console)
    console.rule()
    console.print(predictions(classes))
    console.print(summary(results))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    console.print(f"{time.perf_counter() - start:.0f} s in all, peak memory {peak:.2f} GB")
    if _JSON.value:
        numbers = {name: dataclasses.asdict(result) for name, result in results.items()}
        pathlib.Path(_JSON.value).write_text(json.dumps(numbers, indent=2) + "\n")
    found = [line for name, result in results.items() for line in schemes.shortfalls(name, result)]
    if _CHECK.value and found:
        sys.exit("Fell short:\n" + "\n".join(f"  {line}" for line in found))


if __name__ == "__main__":
    app.run(main)
