"""Makes an integer `.tflite` file of MobileNetV2, runs it and prints how near it comes.

python -m examples.mobilenet.export                      # the table of its ops, and scores
python -m examples.mobilenet.export --out mobilenet.tflite
python -m examples.mobilenet.export --json FILE --check  # keep the numbers; exit 1 when one falls short
"""

import json
import pathlib
import sys
import time

from absl import app, flags
from rich import box
from rich.console import Console
from rich.table import Table

from examples.mobilenet import edge, evaluate, images, load

_JSON = flags.DEFINE_string("json", None, "File for the numbers: bytes, integer_ops, float_ops, ...")
_CHECK = flags.DEFINE_bool("check", False, "Exit with 1, saying what fell short, unless all limits are met.")
_OUT = flags.DEFINE_string("out", None, "File for the model itself.")


def table(result: edge.Result) -> Table:
    """The scores, one line for each kind of kernels."""
    title = f"LiteRT's interpreter on a CPU, {len(images.FILES)} images"
    found = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    found.add_column("kernels")
    columns = ("SQNR, fake-quantized", "SQNR, float", "top-1 as fake-quantized", "as float", "steps")
    for column in columns:
        found.add_column(column, justify="right")
    share = lambda agreement: f"{round(agreement * len(images.FILES))} of {len(images.FILES)}"
    decibels = lambda sqnr: "equal" if sqnr is None else f"{sqnr:.1f} dB"
    for kernels, scores in result.kernels.items():
        sqnrs = decibels(scores.sqnr_fakequant_litert), decibels(scores.sqnr_float_litert)
        shares = share(scores.agreement), share(scores.agreement_float)
        found.add_row(kernels, *sqnrs, *shares, f"{scores.steps:.0f}")
    return found


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. Everything is a flag; see --help.")
    console = Console(width=None if sys.stdout.isatty() else 120)
    start, batch = time.perf_counter(), images.load()
    model = load.load_model()
    reference = evaluate.logits(model, batch)
    quantized = edge.fake_quantized(model, images.for_calibration())
    fake = evaluate.logits(quantized, batch)
    file = edge.exported(quantized, batch[:1])
    if _OUT.value:
        file.save(_OUT.value)
    console.print(str(file.summary()), highlight=False)
    result = edge.measured(file, fake, reference, batch)
    console.print(table(result))
    seconds = time.perf_counter() - start
    console.print(f"float to fake-quantized {result.sqnr_float_fakequant:.1f} dB; {seconds:.0f} s in all")
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(edge.numbers(result), indent=2) + "\n")
    if _CHECK.value and (found := edge.shortfalls(result)):
        sys.exit("Fell short:\n" + "\n".join(f"  {line}" for line in found))


if __name__ == "__main__":
    app.run(main)
