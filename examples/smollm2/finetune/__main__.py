"""python -m examples.smollm2.finetune [--json FILE] [--check]"""

import dataclasses
import json
import pathlib
import sys

from absl import app, flags
from rich.console import Console

from examples.smollm2 import finetune

_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_CHECK = flags.DEFINE_bool("check", False, "Exit with 1, saying what fell short, unless all limits are met.")
_STEPS = flags.DEFINE_integer(
    "steps", 200, "Training steps, each on one window of 256 tokens.", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", 5e-5, "Of Adam, after a tenth of the steps; it falls to 0."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. Everything is a flag; see --help.")
    result = finetune.run(_STEPS.value, _LEARNING_RATE.value)
    Console().print(
        f"perplexity of the first 4096 tokens: {result.plain:.3f} in float, {result.before:.3f} in int4, "
        f"{result.after:.3f} after {_STEPS.value} steps, {result.served:.3f} served; {result.seconds:.0f} s, "
        f"peak memory {result.peak_gb:.2f} GB"
    )
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    if _CHECK.value and (found := result.shortfalls()):
        sys.exit("Fell short:\n" + "\n".join(f"  {line}" for line in found))


if __name__ == "__main__":
    app.run(main)
