"""Prices a quantized matmul on a TPU that is not here, from what the compiler emits. Every figure is static.

    python -m bench.price --chip v5e --scheme w4a16_g128 --m 1024 --k 4096 --n 4096 --json
    python -m bench.price --chip v5e,v6e --scheme w8a8,w4a16_g128 --m 16,1024
    python -m bench.price --model llama3_8b --chip v6e --scheme w4a16_g128 --m 16
    python -m bench.price --suite matmul --check
    python -m bench.price --suite train --check
    python -m bench.price --suite conv --check
    python -m bench.price --suite ragged --check
    python -m bench.price --suite lora --check
    python -m bench.price --suite matmul --chip h100 --check    # ptxas and machine code: gpu_price.py

How to read the result, and what it leaves out: docs/pricing.md.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import tqdm
from absl import app, flags

from bench import (
    conv_price,
    gpu_price,
    lora_price,
    misses,
    op_suite,
    pool,
    ragged_price,
    shapes,
    suites,
    targets,
    tpu_compile,
    train,
)
from bench.cache import default_folder
from bench.cells import Cell, cells_of

# Suites of other ops than matmul, with cells and targets of their own.
_OF_ROWS = {"conv": conv_price.SUITE, "ragged": ragged_price.SUITE, "lora": lora_price.SUITE}
_GPU_SUITES = ("matmul", "ragged")
_CHIP = flags.DEFINE_list(
    "chip",
    None,
    f"Chips: {', '.join(tpu_compile.TOPOLOGY)}, all for a suite; or GPUs: {', '.join(gpu_price.CHIPS)}.",
)
_SCHEME = flags.DEFINE_list("scheme", None, "Schemes, for example w8a8,w4a16_g128,wf8af8,wnf4a16_g64.")
_M = flags.DEFINE_list("m", None, "Rows of the activations.")
_K = flags.DEFINE_list("k", None, "Length of the sums (4096).")
_N = flags.DEFINE_list("n", None, "Columns of the weight (4096).")
_BATCH = flags.DEFINE_integer("batch", 1, "Matmuls at a time, each with a weight of its own.", lower_bound=1)
_SUITE = flags.DEFINE_enum(
    "suite", None, (*suites.SUITES, "train", *_OF_ROWS), "A fixed set of cells instead; --scheme selects."
)
_MODEL = flags.DEFINE_enum(
    "model", None, list(shapes.MODELS), "The layers of a model, instead of --k and --n."
)
_JSON = flags.DEFINE_boolean("json", False, "Print JSON, and nothing else, on standard output.")
_OUT = flags.DEFINE_string("out", None, "Write the JSON to this file as well.")
_CHECK = flags.DEFINE_boolean(
    "check", False, f"Fail where a target is missed that {misses.FILE.name} does not list, or the reverse."
)
_WRITE_MISSES = flags.DEFINE_boolean(
    "write_misses",
    False,
    f"Rewrite {misses.FILE.name} (of conv, ragged and lora their own lists) for the chips of this run.",
)
_PLAN = flags.DEFINE_boolean("plan", False, "Say what would be priced and how long it takes; price nothing.")
_IMPLEMENTATION = flags.DEFINE_string("implementation", None, "Price this one, not the one dispatch prefers.")
_CONFIG = flags.DEFINE_string("config", None, "Block sizes as a JSON object, instead of those looked up.")
_BASELINES = flags.DEFINE_boolean(
    "baselines", True, "Price XLA's bfloat16 and XLA's chain for the same op too."
)
_JOBS = flags.DEFINE_integer("jobs", os.cpu_count() or 1, "Compiling processes at a time.", lower_bound=1)
_CACHE = flags.DEFINE_string(
    "cache",
    default_folder(),
    "Folder of the answers so far, which an interrupted run goes on from; '': none.",
)
# What a suite fixes.
_FIXED = ("m", "k", "n", "batch", "model", "implementation", "config")


def _cells() -> tuple[list[Cell], tuple[str, ...]]:
    """The cells, and why some of a suite's are missing."""
    if _SUITE.value:
        return _suite_cells(_SUITE.value)
    chips, schemes, ms = _CHIP.value or [], _SCHEME.value or [], _numbers("m", _M.value)
    for flag, given in (("chip", chips), ("scheme", schemes), ("m", ms)):
        if not given:
            raise ValueError(
                f"--{flag} is missing; or give --suite {' or '.join((*suites.SUITES, 'train'))}."
            )
    if _MODEL.value:
        layers = dict.fromkeys((layer.k, layer.n) for layer in shapes.MODELS[_MODEL.value])
    else:
        layers = itertools.product(_numbers("k", _K.value) or [4096], _numbers("n", _N.value) or [4096])
    cells = cells_of(
        chips,
        schemes,
        ms,
        layers,
        implementation=_IMPLEMENTATION.value,
        config=_CONFIG.value,
        baselines=_BASELINES.value,
        batch=_BATCH.value,
    )
    return cells, ()


def _refuse(name: str, fixed: Sequence[str]) -> None:
    """Raises for flags that say what the suite called `name` says itself."""
    given = [flag for flag in fixed if flags.FLAGS[flag].present]
    if given:
        raise ValueError(f"--suite {name} has cells of its own; leave out --{', --'.join(given)}.")


def _suite_cells(name: str) -> tuple[list[Cell], tuple[str, ...]]:
    _refuse(name, _FIXED)
    suite = suites.suite(name, _CHIP.value or tuple(tpu_compile.TOPOLOGY), baselines=_BASELINES.value)
    wanted = [shapes.scheme(scheme).name for scheme in _SCHEME.value or ()]
    return [cell for cell in suite.cells if not wanted or cell.scheme in wanted], suite.skipped


def _numbers(flag: str, values: list[str] | None) -> list[int]:
    try:
        return [int(v) for v in values or ()]
    except ValueError:
        raise ValueError(f"--{flag} takes whole numbers, got {','.join(values or ())}.") from None


def _priced(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The answers in the order of the cells, with a bar and, for few cells, a line each on standard error."""
    answers: dict[int, dict[str, Any]] = {}
    found = pool.price_unordered(cells, jobs=_JOBS.value, cache=_CACHE.value or None)
    seen = sys.stderr.isatty()
    quiet = len(cells) == 1 or not (seen or len(cells) > 100)
    with tqdm.tqdm(total=len(cells), unit="cell", mininterval=1 if seen else 30, disable=quiet) as bar:
        for index, answer in found:
            answers[index] = answer
            if 1 < len(cells) <= 100 or "error" in answer:
                bar.write(summary(answer), file=sys.stderr)
            bar.update()
    return [answers[index] for index in range(len(cells))]


def summary(answer: dict[str, Any]) -> str:
    """One answer in one line."""
    if "error" in answer:
        return f"{targets.name_of(answer)}: {answer['error']}"
    ratio = f"{answer['ratio_to_floor']:.2f}x the floor"
    return f"{targets.name_of(answer)}: {answer['static_us']:.1f} us static, {ratio}"


def _complete() -> tuple[str, ...]:
    """Chips whose whole matmul suite this run prices, so that the list of misses can be held against it."""
    whole = _SUITE.value == "matmul" and not _SCHEME.value and _BASELINES.value
    return tuple(_CHIP.value or tpu_compile.TOPOLOGY) if whole else ()


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    if set(_CHIP.value or ()) & set(gpu_price.CHIPS):
        _rows(_SUITE.value or "", _of_gpu())
        return
    if _SUITE.value in _OF_ROWS:
        _rows(_SUITE.value, _OF_ROWS[_SUITE.value])
        return
    if _WRITE_MISSES.value and not _complete():
        raise app.UsageError("--write_misses needs --suite matmul with all of its schemes and baselines.")
    if _SUITE.value == "train":
        _train()
        return
    try:
        cells, skipped = _cells()
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    if _PLAN.value:
        print(suites.plan(cells, skipped, pool.known(cells, _CACHE.value or None), _JOBS.value))
        return
    answers = _priced(cells)
    found = targets.misses(answers)
    _show(answers, skipped)
    if _WRITE_MISSES.value:
        misses.save(misses.draft(found, misses.load(), _complete()))
    fails = _checked(found) if _CHECK.value else []
    if fails or any("error" in answer for answer in answers if not _SUITE.value):
        sys.exit(1)


def _of_gpu() -> gpu_price.Suite:
    """The suite that is asked for, of GPUs, or the cells that the flags say."""
    if _SUITE.value in _GPU_SUITES:
        return gpu_price.Suite(_SUITE.value)
    if _SUITE.value:
        raise app.UsageError(f"--suite {_SUITE.value} has no GPUs; {' and '.join(_GPU_SUITES)} have.")
    layers = [(layer.k, layer.n) for layer in shapes.MODELS.get(_MODEL.value or "", ())]
    try:
        pairs = layers or itertools.product(
            _numbers("k", _K.value) or [4096], _numbers("n", _N.value) or [4096]
        )
        sizes = tuple((m, k, n) for k, n in dict.fromkeys(pairs) for m in _numbers("m", _M.value))
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    if not sizes or not _SCHEME.value:
        raise app.UsageError(f"--scheme and --m are missing; or give --suite {' or '.join(_GPU_SUITES)}.")
    return gpu_price.Chosen("matmul", sizes)


def _train() -> None:
    """Prices the training step instead of cells, and holds it to its target."""
    chips = _CHIP.value or tuple(train.FORMAT_OF)
    try:
        _refuse("train", (*_FIXED, "scheme", "baselines"))
        if _PLAN.value:
            print(train.plan(chips))
            return
        rows = train.price(chips, jobs=_JOBS.value, cache=_CACHE.value or None)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    text = json.dumps([row.as_json() for row in rows], indent=1)
    if _OUT.value:
        with open(_OUT.value, "w") as file:
            file.write(text + "\n")
    if _JSON.value:
        print(text)
    else:
        train.show(rows)
    fails = train.failures(rows)
    if _CHECK.value:
        print(f"FAILED: {len(fails)}", *fails, sep="\n  ", file=sys.stderr)
    if _CHECK.value and fails:
        sys.exit(1)


def _rows(name: str, suite: Any) -> None:
    """Prices the cells of another op than matmul, and holds them to their targets."""
    chips = _CHIP.value or suite.chips
    try:
        if name:
            _refuse(name, (*_FIXED, "baselines"))
        cells = suite.cells(chips, _SCHEME.value or ())
        if not cells:
            has = sorted({cell.scheme for cell in suite.cells(chips, ())})
            raise ValueError(
                f"--suite {name} has no {', '.join(_SCHEME.value or ())}; it has {', '.join(has)}."
            )
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    if _PLAN.value:
        print(op_suite.plan(cells, suite.seconds))
        return
    rows = list(suite.price(cells, _CACHE.value or None))
    complete = () if _SCHEME.value else chips  # of no suite: --scheme is given
    if _WRITE_MISSES.value:
        suite.write_misses(rows, complete)
    text = op_suite.dumps(rows)
    if _OUT.value:
        with open(_OUT.value, "w") as file:
            file.write(text + "\n")
    if _JSON.value:
        print(text)
    else:
        suite.show(rows)
    fails, known = suite.checked(rows, complete) if _CHECK.value else ([], [])
    for title, lines in (("Known misses", known), ("FAILED", fails)):
        if _CHECK.value:
            print(f"{title}: {len(lines)}", *lines, sep="\n  ", file=sys.stderr)
    if fails:
        sys.exit(1)


def _show(answers: Sequence[dict[str, Any]], skipped: Sequence[str]) -> None:
    text = json.dumps(answers[0] if len(answers) == 1 else answers, indent=1)
    if _OUT.value:
        with open(_OUT.value, "w") as file:
            file.write(text + "\n")
    if _JSON.value:
        print(text)
        return
    from bench import price_table

    if len(answers) <= 100:
        price_table.show(answers)
    if _SUITE.value:
        price_table.show_classes(answers)
    for why in skipped:
        print(f"left out: {why}")


def _checked(found: Sequence[targets.Miss]) -> list[str]:
    """Prints what misses a target, known or not, and gives what is not known."""
    dispatched = _IMPLEMENTATION.value is None and _CONFIG.value is None
    if not dispatched:  # the targets are for what dispatch chooses
        found = [miss for miss in found if miss.target in ("price", "reference")]
    fails, known = misses.against(found, misses.load(), _complete())
    for title, lines in (("Known misses", known), ("FAILED", fails)):
        print(f"{title}: {len(lines)}", *lines, sep="\n  ", file=sys.stderr)
    return fails


if __name__ == "__main__":
    app.run(main)
