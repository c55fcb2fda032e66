"""One chip's part of docs/performance.md: tables by class of rows, and what misses a target and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from bench import misses, shapes, targets
from bench.page_cells import mean, table, to_reference
from bench.price_table import class_row

Answers = Sequence[dict[str, Any]]


def sections(chip: str, answers: Answers) -> Iterator[str]:
    """The parts of one chip. `answers` are all of that chip, those without a price too."""
    mine = [a for a in answers if "error" not in a]
    yield f"## {chip}"
    if not mine:
        yield f"Nothing has a price: {answers[0]['error']}"
        return
    yield f"![Roofline of {chip}, static](figures/roofline_{chip}.svg)"
    yield f"Every cell: [all prices on {chip}](performance_{chip}.md)."
    for rows, title in (
        ("prefill", "Prefill, M >= 512"),
        ("decode", "Decode, M <= 32"),
        ("batch", "M = 33 to 64"),
    ):
        group = [a for a in mine if targets.rows_of(a["m"]) == rows]
        if group:
            yield f"### {chip}: {title}"
            yield table(*_classes(group))
    for title, found in (
        ("sub-channel, M >= 512", _sub_channel(mine)),
        ("dynamic quantization", _dynamic(mine)),
    ):
        if found[1]:
            yield f"### {chip}: {title}"
            yield table(*found)
    yield f"### {chip}: spills"
    yield _spills(mine)
    yield f"### {chip}: what misses a target"
    yield _losing(chip, answers)


def _classes(group: Answers):
    header = (
        "scheme",
        "cells",
        "x best floor",
        "worst",
        "at M x K x N",
        "x XLA bf16",
        "worst",
        "fell back",
        "x google/qwix",
    )
    schemes = dict.fromkeys(a["scheme"] for a in group)
    lines = []
    for scheme in schemes:
        cells = [a for a in group if a["scheme"] == scheme]
        lines.append((scheme, *class_row(cells), mean(cells, to_reference)))
    return header, [*lines, ("**all**", *class_row(group), mean(group, to_reference))]


def _sub_channel(mine: Answers):
    """Schemes with tiles beside the same without, on the same shapes."""
    header = ("scheme", "shared by", "cells", "x best floor", "x per-channel", "x google/qwix", "binds")
    whole = {(a["scheme"], a["m"], a["k"], a["n"]): a["static_us"] for a in mine if a["batch"] == 1}
    prefill = [a for a in mine if targets.rows_of(a["m"]) == "prefill" and shapes.scheme(a["scheme"]).tile]
    lines = []
    for scheme in dict.fromkeys(a["scheme"] for a in prefill):
        cells = [a for a in prefill if a["scheme"] == scheme]
        kind, plain_name = shapes.scheme(scheme), scheme.split("_")[0]
        pairs = [(a, whole.get((plain_name, a["m"], a["k"], a["n"]))) for a in cells]
        times = [a["static_us"] / plain for a, plain in pairs if plain]
        binds = dict.fromkeys(a["binds"] for a in cells)
        lines.append(
            (
                scheme,
                f"{kind.tile} x {kind.tile_n}" if kind.tile_n > 1 else str(kind.tile),
                str(len(cells)),
                mean(cells, lambda a: a["ratio_to_best_floor"]),
                f"{targets.geomean(times):.2f}" if times else "-",
                mean(cells, to_reference),
                ", ".join(binds),
            )
        )
    return header, lines


def _dynamic(mine: Answers):
    header = ("scheme", "rows", "cells", "x with activations given quantized", "worst", "at M x K x N")
    given = {(a["scheme"], a["m"], a["k"], a["n"], a["batch"]): a["static_us"] for a in mine}
    pairs: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for a in mine:
        static = given.get((f"{a['scheme']}_static", a["m"], a["k"], a["n"], a["batch"]))
        if static:
            where = f"{a['m']} x {a['k']} x {a['n']}"
            key = a["scheme"], targets.rows_of(a["m"])
            pairs.setdefault(key, []).append((a["static_us"] / static, where))
    lines = []
    for (scheme, rows), found in pairs.items():
        worst, where = max(found)
        mean = targets.geomean([ratio for ratio, _ in found])
        lines.append((scheme, rows, str(len(found)), f"{mean:.2f}", f"{worst:.2f}", where))
    return header, lines


def _spills(mine: Answers) -> str:
    """Schemes whose kernels fill and spill more than a tenth of their register loads and stores."""
    header = ("scheme", "rows", "cells over 10 %", "worst", "cells where they bind")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for a in mine:
        if a["spills"] > 0.1:
            groups.setdefault((a["scheme"], targets.rows_of(a["m"])), []).append(a)
    if not groups:
        return "No kernel's fills and spills are over 10 % of its register loads and stores."
    lines = [
        (*key, str(len(g)), f"{max(a['spills'] for a in g):.0%}", str(sum(map(targets.spills_bind, g))))
        for key, g in groups.items()
    ]
    return table(header, lines)


def _losing(chip: str, answers: Answers) -> str:
    """One line per scheme, class of rows and target, the worst cell's figures as the reason."""
    found = [miss for miss in targets.misses(answers) if miss.chip == chip]
    if not found:
        return "Nothing."
    ladders = {tuple(e[k] for k in ("chip", "scheme", "rows", "target")): e["ladder"] for e in misses.load()}
    groups: dict[tuple[str, ...], list[targets.Miss]] = {}
    for miss in found:
        groups.setdefault(miss.key, []).append(miss)
    lines = []
    for key, group in groups.items():
        worst = max(group, key=lambda miss: miss.excess)
        _, scheme, rows, target = key
        where = worst.cell.removeprefix(chip).strip().removeprefix(scheme).strip()
        times = "" if math.isinf(worst.excess) else f"{worst.excess:.2f}x what is allowed; "
        what = f"{times}{where}: {worst.why}"
        lines.append((scheme, rows, target, str(len(group)), what, ladders.get(key, "")))
    header = ("scheme", "rows", "target", "cells", "worst", "strategies tried")
    return table(header, lines)
