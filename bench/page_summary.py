"""docs/performance.md in Markdown: the summary, then each chip by class of rows, then what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench import page_chip, page_measured, shapes, targets
from bench.page_cells import mean, table, to_bf16, to_reference

Answers = Sequence[dict[str, Any]]

INTRO = """# Performance

Speed on a TPU, read from what the TPU's compiler emits. **Every figure is static** unless a heading says
measured: no TPU was at hand. [What a kernel costs](pricing.md) says how the figures are made and what they
leave out; the shapes are the layers of real models, in `bench/shapes.py`.

This page, its tables of all cells and its plots are written by

```bash
python -m bench.price --suite matmul --check --out suite.json
python -m bench.performance_page --json suite.json
```

Scheme names: `w4a16_g128` is 4-bit weights, 16-bit activations, 128 neighbours along K to a scale. `a8`,
`a4` and `af8` quantize bfloat16 activations on the way, and that is in the price. *x best floor* is the
static time over what no strategy on that chip can beat; *x XLA bf16* over XLA's own bfloat16 product of the
same shape; *x google/qwix* over what google/qwix 0.1.8 compiles to, where that was priced. Over 1 is slower.
*fell back* counts the cells where dispatch runs XLA's ops, because a kernel would be slower or cannot run."""


def page(
    answers: Answers,
    *,
    chips: Sequence[str],
    lacking: Mapping[str, int],
    versions: str,
    cpu: Mapping[str, Any] | None,
    compile_time: Mapping[str, Any] | None,
) -> str:
    """The page.

    Args:
      answers: of bench.price, with and without errors.
      chips: those that have answers, in order.
      lacking: how many cells of the suite have no answer, by chip.
      versions: of what compiled.
      cpu: what `bench.qdot --json` wrote, or None.
      compile_time: what `bench.compile_time --json` wrote, or None.
    """
    parts = [INTRO, f"Compiled by {versions}."]
    if lacking:
        lost = ", ".join(f"{count} cells of {chip}" for chip, count in lacking.items())
        parts.append(f"**The suite is incomplete: {lost} are not priced.**")
    parts += ["## Summary", table(*_summary(answers, chips, lacking))]
    parts += ["Targets, and how many cells miss them (the worst, over what is allowed):"]
    parts += [table(*_targets(answers, chips))]
    for chip in chips:
        parts += page_chip.sections(chip, [a for a in answers if a["chip"] == chip])
    if cpu:
        parts += page_measured.cpu_section(cpu)
    if compile_time:
        parts += page_measured.compile_time_section(compile_time)
    return "\n\n".join(parts) + "\n"


def _priced(answers: Answers, chip: str | None = None) -> list[dict[str, Any]]:
    return [a for a in answers if "error" not in a and chip in (None, a["chip"])]


def _summary(answers: Answers, chips: Sequence[str], lacking: Mapping[str, int]):
    header = (
        "chip",
        "cells",
        "prefill, x best floor",
        "prefill, x XLA bf16",
        "decode weight-only, x HBM floor",
        "decode, x XLA bf16",
        "x google/qwix",
        "slower than XLA bf16",
        "fell back",
    )

    def line(chip: str) -> tuple[str, ...]:
        mine = _priced(answers, chip)
        by_rows = lambda rows: [a for a in mine if targets.rows_of(a["m"]) == rows]
        prefill, decode = by_rows("prefill"), by_rows("decode")
        narrow = [a for a in decode if shapes.scheme(a["scheme"]).is_weight_only]
        slower = sum(a["implementation"] != "xla" and (to_bf16(a) or 0) > 1 for a in mine)
        return (
            chip,
            f"{len(mine)} of {len(mine) + lacking.get(chip, 0) + _errors(answers, chip)}",
            mean(prefill, lambda a: a["ratio_to_best_floor"]),
            mean(prefill, to_bf16),
            mean(narrow, lambda a: a["static_us"] / a["hbm_floor_us"]),
            mean(decode, to_bf16),
            mean(mine, to_reference),
            str(slower),
            str(sum(a["implementation"] == "xla" for a in mine)),
        )

    return header, map(line, chips)


def _errors(answers: Answers, chip: str) -> int:
    return sum("error" in a for a in answers if a["chip"] == chip)


# Target -> in words; docs: targets.py.
TARGETS = {
    "floor": "prefill at most 1.25x the floor of the best strategy",
    "geomean": "prefill at most 1.15x in geometric mean",
    "hbm": "decode, weight-only, at most 1.05x the HBM floor; up to 64 rows at most 1.25x",
    "bf16": "at least as fast as XLA's bfloat16, or falls back",
    "reference": "at least as fast as google/qwix",
    "speedup": "sub-channel at least 3x faster than google/qwix in geometric mean",
    "dynamic": "quantizing activations on the way costs at most 10 %",
    "spills": "register spills are not what binds",
    "price": "every cell has a price",
}


def _targets(answers: Answers, chips: Sequence[str]):
    found = targets.misses(answers)

    def said(chip: str, target: str) -> str:
        mine = [miss for miss in found if (miss.chip, miss.target) == (chip, target)]
        if not mine:
            its = [a for a in answers if a["chip"] == chip]
            return "met" if targets.is_held_to(target, its) else "not priced"
        worst = max(miss.excess for miss in mine)
        return f"{len(mine)} ({worst:.2f}x)" if target != "price" else str(len(mine))

    lines = ((words, *(said(chip, target) for chip in chips)) for target, words in TARGETS.items())
    return ("target", *chips), lines
