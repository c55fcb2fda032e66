"""QLoRA of SmolLM2 on the CPU: perplexity from 25 to under 19 with adapters of rank 8 over nf4 weights.

python -m examples.smollm2.qlora [--json FILE] [--check]      # about ten minutes on two CPU cores
"""

import dataclasses
import json
import pathlib
import sys

from absl import app, flags, logging
from rich.console import Console

from examples.smollm2 import qlora_training

_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_CHECK = flags.DEFINE_bool("check", False, "Exit with 1, saying what fell short, unless all limits are met.")
_STEPS = flags.DEFINE_integer(
    "steps", 100, "Training steps, each on one window of 256 tokens.", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", 1e-3, "Of Adam, after a tenth of the steps; it falls to 0."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. Everything is a flag; see --help.")
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of saving
    result = qlora_training.run(_STEPS.value, _LEARNING_RATE.value)
    Console().print(
        f"perplexity of the first 4096 tokens: {result.plain:.3f} in float, {result.before:.3f} in nf4, "
        f"{result.after:.3f} after {_STEPS.value} steps, {result.requantized:.3f} merged into nf4 "
        f"({result.requantized_sqnr_db:.1f} dB); logits differ by {result.loaded_difference:g} after saving "
        f"and loading, by {result.peft_difference:g} through PEFT's files, by {result.merged_difference:.1e} "
        f"merged into floats; adapters {result.adapter_bytes / 1e6:.1f} MB, optimizer "
        f"{result.optimizer_bytes / 1e6:.1f} MB, linear weights {result.base_bytes / 1e6:.1f} MB; "
        f"{result.seconds:.0f} s, peak memory {result.peak_gb:.2f} GB"
    )
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    if _CHECK.value and (found := result.shortfalls()):
        sys.exit("Fell short:\n" + "\n".join(f"  {line}" for line in found))


if __name__ == "__main__":
    app.run(main)
