"""Quantizes SmolLM2-135M in six ways and prints what happened.

python -m examples.smollm2                         # everything
python -m examples.smollm2 --schemes=int8,nf4      # some
python -m examples.smollm2 --json FILE --check     # keep the numbers; exit 1 when one falls short
"""

import dataclasses
import json
import pathlib
import resource
import sys
import time

import jax
import numpy as np
import tokenizers
from absl import app, flags
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

import qwix
from examples.smollm2 import evaluate, generate, load, schemes
from examples.smollm2.model import SmolLM2

QUESTION = "What is the capital of France?"
CHIPS = ("v5e", "v6e", "v7x")

_JSON = flags.DEFINE_string("json", None, "File for the numbers: scheme -> perplexity, device_mb, ...")
_CHECK = flags.DEFINE_bool(
    "check", False, "Exit with 1, saying what fell short, unless every scheme meets its limits."
)
_SCHEMES = flags.DEFINE_list("schemes", list(schemes.SCHEMES), "Which to run.")


def quantized(model: SmolLM2, scheme: schemes.Scheme, tokens: np.ndarray) -> SmolLM2:
    """The model under a scheme; the float one is left as it was."""
    if not (rules := scheme.rules()):
        return model
    return qwix.quantize_model(model, qwix.PtqProvider(rules), jax.numpy.asarray(tokens))


def run(
    name: str, model: SmolLM2, tokenizer: tokenizers.Tokenizer, tokens: np.ndarray, console: Console
) -> schemes.Result:
    """Quantizes, reports, scores and asks."""
    scheme = schemes.SCHEMES[name]
    console.rule(f"[bold]{name}[/]: {scheme.title}")
    start = time.perf_counter()
    candidate = quantized(model, scheme, tokens[: evaluate.WINDOWS_AT_ONCE])
    if candidate is not model:
        qwix.report(candidate, chips=CHIPS, params=model).print(console)
    result = schemes.Result(
        perplexity=evaluate.perplexity(candidate, tokens),
        device_mb=evaluate.device_bytes(nnx.state(candidate)) / 1e6,
        linear_weight_ratio=evaluate.linear_bytes(candidate) / evaluate.linear_bytes(model),
        answer=generate.answer(candidate, tokenizer, QUESTION),
        seconds=time.perf_counter() - start,
    )
    jax.clear_caches()  # compiled code for a scheme that is done with
    console.print(f"perplexity {result.perplexity:.3f}   {result.device_mb:.1f} MB   {result.seconds:.0f} s")
    console.print(f"{QUESTION} {result.answer}", markup=False, highlight=False)
    return result


def summary(results: dict[str, schemes.Result]) -> Table:
    """One line per scheme."""
    table = Table(box=box.SIMPLE_HEAD, title="SmolLM2-135M-Instruct", title_justify="left")
    for column in ("scheme", "MB on device", "linear weights", "perplexity", "seconds"):
        table.add_column(column, justify="left" if column == "scheme" else "right")
    table.add_column(QUESTION)
    for name, result in results.items():
        ratio = f"{result.linear_weight_ratio:.4f}x"
        numbers = (f"{result.device_mb:.1f}", ratio, f"{result.perplexity:.3f}", f"{result.seconds:.0f}")
        table.add_row(name, *numbers, result.answer)
    return table


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. Everything is a flag; see --help.")
    if unknown := set(_SCHEMES.value) - set(schemes.SCHEMES):
        raise app.UsageError(f"Unknown schemes {sorted(unknown)}; there are {', '.join(schemes.SCHEMES)}.")
    # A table cut to 80 columns by a pipe is of no use to anyone.
    console = Console(width=None if sys.stdout.isatty() else 260)
    start = time.perf_counter()
    tokenizer, model = load.load_tokenizer(), load.load_model()
    tokens = evaluate.windows(tokenizer)
    results = {name: run(name, model, tokenizer, tokens, console) for name in _SCHEMES.value}
    console.rule()
    console.print(summary(results))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    console.print(f"{time.perf_counter() - start:.0f} s in all, peak memory {peak:.2f} GB")
    if _JSON.value:
        numbers = {name: dataclasses.asdict(result) for name, result in results.items()}
        pathlib.Path(_JSON.value).write_text(json.dumps(numbers, indent=2) + "\n")
    harder = 1.0
    if _CHECK.value and not evaluate.is_python_312(tokens):
        console.print(
            "This Python's documentation is not the text of the limits, which are scaled by float's."
        )
        harder = evaluate.perplexity(model, tokens) / schemes.FLOAT_PERPLEXITY
    found = [line for name, result in results.items() for line in schemes.shortfalls(name, result, harder)]
    if _CHECK.value and found:
        sys.exit("Fell short:\n" + "\n".join(f"  {line}" for line in found))


if __name__ == "__main__":
    app.run(main)
