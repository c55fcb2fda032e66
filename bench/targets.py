"""What the prices are held to, and which do not hold.

    rows       M                    target     what must hold
    prefill    512 and more         floor      at most 1.25x the floor of the best strategy
                                    geomean    of those ratios on a chip: at most 1.15x
    decode     32 and less          hbm        weight-only: compute under the memory time, and at most 1.05x
                                               the time that HBM needs for each operand once
    batch      33 to 64             hbm        weight-only: at most 1.25x the floor
    any                             bf16       at least as fast as XLA's bfloat16, or dispatch falls back
                                    reference  at least as fast as google/qwix, where that was priced
                                    speedup    sub-channel: google/qwix takes 3x as long, geometric mean of a
                                               chip
                                    dynamic    at most 1.10x the same op on activations that come quantized
                                    spills     register fills and spills are not what binds
                                    price      there is one

Cells whose floor is under SMALL_US are a class of their own in the list of known misses ("prefill small"):
what a program takes besides its kernel weighs there. A miss is a number: how many times the limit the value
is. `misses` finds them; misses.py holds them against the list of those that are known.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from bench import reference_figures, shapes

PREFILL, PREFILL_MEAN, DECODE, BATCH = 1.25, 1.15, 1.05, 1.25
SPEEDUP, DYNAMIC = 3.0, 1.10
SMALL_US = 5.0


@dataclasses.dataclass(frozen=True)
class Miss:
    """A target that does not hold. `excess` is above 1: the value over what is allowed."""

    chip: str
    scheme: str  # "*" for a figure over all schemes
    rows: str
    target: str
    excess: float
    cell: str
    why: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.chip, self.scheme, self.rows, self.target

    def __str__(self) -> str:
        return f"{self.cell}: {self.target}, {self.excess:.2f}x what is allowed: {self.why}"


def rows_of(m: int) -> str:
    """The class of a number of rows.

    >>> [rows_of(m) for m in (1, 32, 64, 256, 512)]
    ['decode', 'decode', 'batch', 'other', 'prefill']
    """
    return "decode" if m <= 32 else "batch" if m <= 64 else "prefill" if m >= 512 else "other"


def class_of(answer: dict[str, Any]) -> str:
    """The class that a miss is listed under: that of the rows, with a word for small problems."""
    small = "error" not in answer and answer["floor_us"] < SMALL_US
    return rows_of(answer["m"]) + " small" * small


def name_of(answer: dict[str, Any]) -> str:
    """The cell of an answer in words."""
    batch = f"{answer['batch']} x " if answer.get("batch", 1) > 1 else ""
    return "{chip} {scheme} {batch}{m} x {k} x {n}".format(**{**answer, "batch": batch})


def misses(answers: Sequence[dict[str, Any]]) -> list[Miss]:
    """Every target that an answer, or a chip's answers together, miss."""
    found = [miss for answer in answers for miss in _of_one(answer)]
    priced = [answer for answer in answers if "error" not in answer]
    for chip in dict.fromkeys(answer["chip"] for answer in priced):
        found += _of_chip(chip, [answer for answer in priced if answer["chip"] == chip])
    return found


def is_held_to(target: str, answers: Sequence[dict[str, Any]]) -> bool:
    """Whether one chip's answers have what `target` compares: without that, no miss says nothing."""
    priced = [a for a in answers if "error" not in a]
    if target in ("reference", "speedup"):
        return any(reference_kcycles(a) and (target == "reference" or _is_sub_channel(a)) for a in priced)
    if target == "dynamic":
        schemes = {a["scheme"] for a in priced}
        return any(f"{name}_static" in schemes for name in schemes)
    return bool(answers)


def _of_one(a: dict[str, Any]) -> Iterator[Miss]:
    if "error" in a:
        yield _miss(a, "price", math.inf, a["error"])
        return
    scheme, rows = shapes.scheme(a["scheme"]), rows_of(a["m"])
    if rows == "prefill" and a["ratio_to_best_floor"] > PREFILL:
        what = f"{a['ratio_to_best_floor']:.2f}x the floor of {a['best_floor_of']}; {binding(a)}"
        yield _miss(a, "floor", a["ratio_to_best_floor"] / PREFILL, what)
    if scheme.is_weight_only and rows in ("decode", "batch"):
        yield from _hbm(a, rows)
    if a["xla_bf16_us"] and a["implementation"] != "xla" and a["static_us"] > a["xla_bf16_us"]:
        what = f"{a['static_us']:.1f} us, XLA's bfloat16 {a['xla_bf16_us']:.1f}; {binding(a)}"
        yield _miss(a, "bf16", a["static_us"] / a["xla_bf16_us"], what)
    theirs = reference_kcycles(a)
    if theirs and a["static_kcycles"] > theirs:
        what = f"{a['static_kcycles']:.0f}k cycles, {reference_figures.SOURCE} {theirs}k"
        yield _miss(a, "reference", a["static_kcycles"] / theirs, what)
    if spills_bind(a):
        yield _miss(a, "spills", a["spills"] + 1, f"{a['spills']:.0%} of loads and stores; {binding(a)}")


def _hbm(a: dict[str, Any], rows: str) -> Iterator[Miss]:
    limit = DECODE if rows == "decode" else BATCH
    floor = a["hbm_floor_us"] if rows == "decode" else a["floor_us"]
    excess = a["static_us"] / floor / limit
    if rows == "decode":
        # What the compiler fetched ahead into on-chip memory still has to come from HBM once.
        excess = max(excess, a["compute_us"] / max(a["memory_us"], a["hbm_floor_us"]))
    if excess > 1:
        what = f"{a['static_us']:.1f} us (compute {a['compute_us']:.1f}), floor {floor:.1f}; {binding(a)}"
        yield _miss(a, "hbm", excess, what)


def _of_chip(chip: str, answers: list[dict[str, Any]]) -> Iterator[Miss]:
    prefill = [a["ratio_to_best_floor"] for a in answers if rows_of(a["m"]) == "prefill"]
    if prefill and (mean := geomean(prefill)) > PREFILL_MEAN:
        what = f"{mean:.3f}x over {len(prefill)} cells"
        yield Miss(chip, "*", "prefill", "geomean", mean / PREFILL_MEAN, f"{chip} prefill", what)
    faster = [r / a["static_kcycles"] for a in answers if _is_sub_channel(a) and (r := reference_kcycles(a))]
    if faster and (mean := geomean(faster)) < SPEEDUP:
        what = f"{mean:.2f}x faster over {len(faster)} cells"
        yield Miss(chip, "*", "any", "speedup", SPEEDUP / mean, f"{chip} sub-channel", what)
    by_cell = {(a["scheme"], a["m"], a["k"], a["n"], a["batch"]): a for a in answers}
    for a in answers:
        given = by_cell.get((f"{a['scheme']}_static", a["m"], a["k"], a["n"], a["batch"]))
        if given and a["static_us"] > DYNAMIC * given["static_us"]:
            what = f"{a['static_us']:.1f} us, {given['static_us']:.1f} on quantized activations; {binding(a)}"
            yield _miss(a, "dynamic", a["static_us"] / given["static_us"] / DYNAMIC, what)


def _miss(a: dict[str, Any], target: str, excess: float, why: str) -> Miss:
    return Miss(a["chip"], a["scheme"], class_of(a), target, excess, name_of(a), why)


def _is_sub_channel(a: dict[str, Any]) -> bool:
    return shapes.scheme(a["scheme"]).tile > 0


def binding(a: dict[str, Any]) -> str:
    """What an answer's longest kernel waits for, in words."""
    if a["binds"] == "XLA":
        return "XLA's ops bind"
    slots = a["units"].get(a["binds"])
    what = {"HBM": "HBM binds", "MXU": "the matrix units bind"}.get(a["binds"], f"{a['binds']} slots bind")
    if a["binds"] in ("HBM", "MXU"):
        return f"{what} (matrix units held {a['mxu_busy']:.0%})"
    return f"{what} ({slots:.0%} used, matrix units held {a['mxu_busy']:.0%})"


def spills_bind(a: dict[str, Any]) -> bool:
    """Whether the busiest slots are those of loads or stores, and would not be without fills and spills."""
    if a["binds"] not in ("VLOAD", "VSTORE"):
        return False
    units = a["units"]
    extra = {"VLOAD": units.get("FILL", 0.0), "VSTORE": units.get("SPILL", 0.0)}
    rest = [
        use - extra.get(u, 0.0) for u, use in units.items() if u not in (a["binds"], "FILL", "SPILL", "SALU")
    ]
    return units[a["binds"]] - extra[a["binds"]] < max([*rest, a["mxu_busy"]])


def reference_kcycles(answer: dict[str, Any]) -> int | None:
    """The reference's figure for an answer's cell, if there is one."""
    if answer.get("batch", 1) > 1:
        return None
    return reference_figures.kcycles(*(answer[key] for key in ("chip", "scheme", "m", "k", "n")))


def geomean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers.

    >>> geomean([1.0, 4.0])
    2.0
    """
    return math.exp(sum(map(math.log, values)) / len(values))
