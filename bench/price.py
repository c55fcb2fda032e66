"""Prices a quantized matmul on a TPU that is not here, from what the compiler emits. Every figure is static.

    python -m bench.price --chip v5e --scheme w4a16_g128 --m 1024 --k 4096 --n 4096 --json
    python -m bench.price --chip v5e,v6e --scheme w8a8,w4a16_g128 --m 16,1024
    python -m bench.price --suite canonical --check
    python -m bench.price --model llama3_8b --chip v6e --scheme w4a16_g128 --m 16

How to read the result, and what it leaves out: docs/pricing.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from absl import app, flags

from bench import reference_figures, shapes, tpu_compile

_CHIP = flags.DEFINE_list("chip", None, f"Chips: {', '.join(tpu_compile.TOPOLOGY)}. All of them for a suite.")
_SCHEME = flags.DEFINE_list("scheme", None, "Schemes, for example w8a8,w4a16_g128,wf8af8,wnf4a16_g64.")
_M = flags.DEFINE_list("m", None, "Rows of the activations.")
_K = flags.DEFINE_list("k", None, "Length of the sums (4096).")
_N = flags.DEFINE_list("n", None, "Columns of the weight (4096).")
_SUITE = flags.DEFINE_enum("suite", None, ["canonical"], "A fixed set of cells instead.")
_MODEL = flags.DEFINE_enum(
    "model", None, list(shapes.MODELS), "The layers of a model, instead of --k and --n."
)
_JSON = flags.DEFINE_boolean("json", False, "Print JSON, and nothing else, on standard output.")
_OUT = flags.DEFINE_string("out", None, "Write the JSON to this file as well.")
_CHECK = flags.DEFINE_boolean(
    "check", False, "Fail where a cell is slower than google/qwix, or has no price."
)
_IMPLEMENTATION = flags.DEFINE_string("implementation", None, "Price this one, not the one dispatch prefers.")
_CONFIG = flags.DEFINE_string("config", None, "Block sizes as a JSON object, instead of those looked up.")
_BASELINES = flags.DEFINE_boolean(
    "baselines", True, "Price XLA's bfloat16 and XLA's chain for the same op too."
)

LATER = ("h100", "b200")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line of the table."""

    chip: str
    scheme: str
    m: int
    k: int
    n: int
    implementation: str | None = None
    config: str | None = None
    baselines: bool = True


def price(cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """The answer for each cell, in order. A cell that cannot be priced has an `error`.

    Cells are compiled one after the other in a child process.
    """
    waiting = list(cells)
    while waiting:
        with tempfile.TemporaryDirectory(prefix="qwix_price_") as folder:
            for answer in _child(tuple(waiting), folder):
                waiting.pop(0)
                yield answer


def _child(cells: Sequence[Cell], folder: str) -> Iterator[dict[str, Any]]:
    """Answers of one child, until it has done its work or dies; it always gives one answer at least."""
    log = os.path.join(folder, "stderr")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # The child runs in the caller's folder, so nothing here can shadow its imports.
    command = [sys.executable, "-m", "bench.worker", os.path.join(folder, "dump")]
    from bench.worker import ANSWER

    with (
        open(log, "w") as stderr,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        ) as child,
    ):
        assert child.stdin and child.stdout
        for cell in cells:
            answer = _ask(child, cell, ANSWER)
            if answer is None:
                child.wait()
                yield {**dataclasses.asdict(cell), "error": f"The compiler's process died: {_tail(log)}"}
                return
            yield answer
        child.stdin.close()


def _ask(child: subprocess.Popen, cell: Cell, marker: str) -> dict[str, Any] | None:
    try:
        child.stdin.write(json.dumps(dataclasses.asdict(cell)) + "\n")  # type: ignore[union-attr]
        child.stdin.flush()  # type: ignore[union-attr]
    except BrokenPipeError:
        return None
    for line in child.stdout:  # type: ignore[union-attr]
        if line.startswith(marker):
            return json.loads(line.removeprefix(marker))
    return None


def _tail(path: str) -> str:
    with open(path, errors="replace") as file:
        return " | ".join(line.strip() for line in file.read().splitlines()[-5:]) or "it said nothing"


def cells_of(
    chips: Sequence[str],
    schemes: Sequence[str],
    ms: Iterable[int],
    layers: Iterable[tuple[int, int]],
    **options,
) -> list[Cell]:
    """All combinations, checked.

    Raises ValueError for a chip, a scheme or a size that cannot be priced, with what can.
    """
    for chip in chips:
        if chip in LATER:
            raise ValueError(
                f"{chip} cannot be priced yet: only TPUs can ({', '.join(tpu_compile.TOPOLOGY)})."
            )
        if chip not in tpu_compile.TOPOLOGY:
            raise ValueError(f"Unknown chip {chip!r}; chips: {', '.join(tpu_compile.TOPOLOGY)}.")
    ms, layers = list(ms), list(layers)
    for size in itertools.chain(ms, *layers):
        if size < 1:
            raise ValueError(f"Sizes start at 1, got {size}.")
    for scheme, (k, _) in itertools.product(map(shapes.scheme, schemes), layers):
        if scheme.tile and k % scheme.tile:
            raise ValueError(f"{scheme.name}: the tile {scheme.tile} does not divide K={k}.")
    return [
        Cell(chip, scheme, m, k, n, **options)
        for chip, (k, n), m, scheme in itertools.product(chips, layers, ms, schemes)
    ]


def slower_than_reference(answer: dict[str, Any]) -> str | None:
    """What is wrong with a cell: no price, or slower than google/qwix. None when all is well."""
    cell = " ".join(str(answer[key]) for key in ("chip", "scheme", "m", "k", "n"))
    if "error" in answer:
        return f"{cell}: {answer['error']}"
    theirs = reference_kcycles(answer)
    if theirs is None or answer["static_kcycles"] <= theirs:
        return None
    return f"{cell}: {answer['static_kcycles']:.0f}k cycles, {reference_figures.SOURCE} {theirs}k"


def reference_kcycles(answer: dict[str, Any]) -> int | None:
    """The reference's figure for an answer's cell, if there is one."""
    return reference_figures.kcycles(*(answer[key] for key in ("chip", "scheme", "m", "k", "n")))


def _cells() -> list[Cell]:
    options = {
        "implementation": _IMPLEMENTATION.value,
        "config": _CONFIG.value,
        "baselines": _BASELINES.value,
    }
    suite = _SUITE.value is not None
    chips: Sequence[str] = _CHIP.value or (tuple(tpu_compile.TOPOLOGY) if suite else ())
    schemes: Sequence[str] = _SCHEME.value or (shapes.CANONICAL_SCHEMES if suite else ())
    ms: Sequence[int] = _numbers("m", _M.value) or (shapes.CANONICAL_M if suite else ())
    for flag, given in (("chip", chips), ("scheme", schemes), ("m", ms)):
        if not given:
            raise app.UsageError(f"--{flag} is missing; or give --suite canonical.")
    if _MODEL.value:
        layers = dict.fromkeys((layer.k, layer.n) for layer in shapes.MODELS[_MODEL.value])
    else:
        layers = itertools.product(_numbers("k", _K.value) or [4096], _numbers("n", _N.value) or [4096])
    return cells_of(chips, schemes, ms, layers, **options)


def _numbers(flag: str, values: list[str] | None) -> list[int]:
    try:
        return [int(v) for v in values or ()]
    except ValueError:
        raise ValueError(f"--{flag} takes whole numbers, got {','.join(values or ())}.") from None


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    try:
        cells = _cells()
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    answers = []
    for answer in price(cells):
        answers.append(answer)
        if len(cells) > 1:
            print(f"[{len(answers)}/{len(cells)}] {_summary(answer)}", file=sys.stderr, flush=True)
    wrong = [problem for problem in map(slower_than_reference, answers) if problem]
    text = json.dumps(answers[0] if len(cells) == 1 else answers, indent=1)
    if _OUT.value:
        with open(_OUT.value, "w") as file:
            file.write(text + "\n")
    if _JSON.value:
        print(text)
    else:
        from bench import price_table

        price_table.show(answers)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
    if any("error" in answer for answer in answers) or (_CHECK.value and wrong):
        sys.exit(1)


def _summary(answer: dict[str, Any]) -> str:
    cell = f"{answer['chip']} {answer['scheme']} {answer['m']}x{answer['k']}x{answer['n']}"
    if "error" in answer:
        return f"{cell}: {answer['error']}"
    return f"{cell}: {answer['static_us']:.1f} us static, {answer['ratio_to_floor']:.2f}x the floor"


if __name__ == "__main__":
    app.run(main)
