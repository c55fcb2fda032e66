"""The targets that are known to be missed: known_misses.json, and what a run says against it.

An entry is about one scheme, one class of rows and one target on one chip:

    {"chip", "scheme", "rows", "target"   as in targets.py
     "count"                              how many cells of the matmul suite miss it
     "worst"                              how many times what is allowed, the worst of them
     "reason"                             the worst cell's figures and what binds it, from the run
     "ladder"                             where the strategies that were tried stand, with their cycles}

A miss that is not listed fails, and so do more cells or a worse one than listed. On a chip whose whole suite
was run an entry that nothing misses any more fails too, so that the list stays true.
"""

from __future__ import annotations

import fnmatch
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from bench.targets import Miss

FILE = pathlib.Path(__file__).parent / "known_misses.json"
_KERNELS = "kernels/qwix_kernels/matmul"
# (pattern of scheme, rows, target, and where the strategies that were tried stand): the first that matches.
LADDERS = (
    ("wnf4*", "decode*", "*", f"{_KERNELS}/tpu_codebook.py: the ladder"),
    ("wnf4*", "batch*", "*", f"{_KERNELS}/tpu_codebook.py: the ladder"),
    ("wmxfp*", "decode*", "*", f"{_KERNELS}/tpu_weights.py: the ladder"),
    ("wmxfp*", "batch*", "*", f"{_KERNELS}/tpu_weights.py: the ladder"),
    ("wnvfp*", "decode*", "*", f"{_KERNELS}/tpu_weights.py: the ladder"),
    ("wnvfp*", "batch*", "*", f"{_KERNELS}/tpu_weights.py: the ladder"),
    ("*", "*", "dynamic", f"{_KERNELS}/tpu_rows.py: the ladder"),
    ("*", "decode*", "*", f"{_KERNELS}/tpu_kernel.py: the ladder, decode"),
    ("*", "batch*", "*", f"{_KERNELS}/tpu_kernel.py: the ladder, decode"),
    ("*", "*", "*", f"{_KERNELS}/tpu_kernel.py: the ladder, prefill"),
)
_SLACK = 1.005  # the worst is written with three digits
_KEY = ("chip", "scheme", "rows", "target")


def load(path: pathlib.Path = FILE) -> list[dict[str, Any]]:
    """The entries. Raises ValueError, naming the entry, for one that is incomplete or listed twice."""
    entries = json.loads(path.read_text())
    seen = set()
    for entry in entries:
        missing = {*_KEY, "count", "worst", "reason", "ladder"} ^ entry.keys()
        if missing:
            raise ValueError(f"{path}: {entry} lacks, or has besides what it needs, {sorted(missing)}.")
        if _key(entry) in seen:
            raise ValueError(f"{path}: {_key(entry)} is listed twice.")
        seen.add(_key(entry))
    return entries


def against(
    found: Sequence[Miss], known: Iterable[dict[str, Any]], complete: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """(what fails, what is known and still so), in words. `complete`: chips whose whole suite was run."""
    groups = _groups(found)
    fails, listed = [], []
    for entry in known:
        group = groups.pop(_key(entry), [])
        if group and (reason := _worse(group, entry)):
            fails += [f"{miss} [{reason}]" for miss in group]
        elif group:
            listed += [f"{miss} [known: {entry['reason']}; {entry['ladder']}]" for miss in group]
        elif entry["chip"] in complete:
            name = " ".join(_key(entry))
            fails.append(f"{name}: listed in {FILE.name}, but no longer missed; remove the entry")
    fails += [f"{miss} [not listed in {FILE.name}]" for group in groups.values() for miss in group]
    return fails, listed


def ladder_of(scheme: str, rows: str, target: str) -> str:
    """The file, and the section of its header, that shows the strategies which were tried for such a miss.

    >>> ladder_of("wnf4a16_g64", "decode small", "hbm")
    'kernels/qwix_kernels/matmul/tpu_codebook.py: the ladder'
    """
    return next(
        where
        for *patterns, where in LADDERS
        if all(map(fnmatch.fnmatchcase, (scheme, rows, target), patterns))
    )


def draft(
    found: Sequence[Miss], known: Iterable[dict[str, Any]], chips: Iterable[str]
) -> list[dict[str, Any]]:
    """The list as a run of the whole suite on `chips` says it should be.

    Entries of other chips stay, and so does what somebody wrote as `ladder`.
    """
    written = {_key(entry): entry for entry in known}
    kept = [entry for entry in written.values() if entry["chip"] not in set(chips)]
    for key, group in _groups(found).items():
        worst = max(group, key=lambda miss: miss.excess)
        entry = {**dict(zip(_KEY, key, strict=True)), "count": len(group), "worst": _rounded(worst.excess)}
        ladder = written.get(key, {}).get("ladder", ladder_of(*key[1:]))
        kept.append(entry | {"reason": worst.why, "ladder": ladder})
    return sorted(kept, key=_key)


def save(entries: Sequence[dict[str, Any]], path: pathlib.Path = FILE) -> None:
    """Writes one entry a line, so that a change is easy to read."""
    lines = ",\n".join(" " + json.dumps(entry) for entry in entries)
    path.write_text(f"[\n{lines}\n]\n" if entries else "[]\n")


def _key(entry: dict[str, Any]) -> tuple[str, ...]:
    return tuple(entry[field] for field in _KEY)


def _groups(found: Sequence[Miss]) -> dict[tuple[str, ...], list[Miss]]:
    groups: dict[tuple[str, ...], list[Miss]] = {}
    for miss in found:
        groups.setdefault(miss.key, []).append(miss)
    return groups


def _worse(group: Sequence[Miss], entry: dict[str, Any]) -> str | None:
    worst = max(miss.excess for miss in group)
    listed = math.inf if entry["worst"] is None else entry["worst"]
    if len(group) > entry["count"]:
        return f"{len(group)} cells, {FILE.name} lists {entry['count']}"
    if worst > listed * _SLACK:
        return f"{worst:.3f}x what is allowed, {FILE.name} lists {listed}x"
    return None


def _rounded(excess: float) -> float | None:
    """Three digits after the point; None, which JSON has, for a cell without a price."""
    return None if math.isinf(excess) else round(excess, 3)
