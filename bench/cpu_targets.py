"""What must hold on a CPU, of the ratios that cpu_ratios.py measures, and what is known not to.

A target is missed where three quarters of the rounds say so: a machine that does something else on the side
must not fail the check.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.cpu_ratios import REFERENCE, Group, Ratio

INT4, SUB_CHANNEL, NO_SLOWER = (
    "int4 within 1.3x of int8",
    "sub-channel within 3x of per-channel",
    f"no slower than {REFERENCE}",
)
LIMITS = {INT4: 1.3, SUB_CHANNEL: 3.0, NO_SLOWER: 1.0}
PAIRS: Mapping[str, tuple[tuple[str, str], ...]] = {
    INT4: (("w4a8", "w8a8"), ("w4a8_g128", "w8a8_g128"), ("w4a16", "w8a16"), ("w4a16_g128", "w8a16_g128")),
    SUB_CHANNEL: (
        ("w8a8_g128", "w8a8"),
        ("w4a8_g128", "w4a8"),
        ("w8a16_g128", "w8a16"),
        ("w4a16_g128", "w4a16"),
    ),
}
# (target, scheme) -> why it is missed.
DOCUMENTED: Mapping[tuple[str, str], str] = {}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One target for one scheme of one shape."""

    target: str
    ours: str
    theirs: str
    shape: str
    ratio: Ratio

    @property
    def limit(self) -> float:
        return LIMITS[self.target]

    @property
    def met(self) -> bool:
        return self.ratio.low <= self.limit

    @property
    def reason(self) -> str | None:
        """Why it is missed, where that is known."""
        return None if self.met else DOCUMENTED.get((self.target, self.ours))

    def __str__(self) -> str:
        said = "met" if self.met else f"missed ({self.reason or 'not documented'})"
        takes = f"{self.ours} takes {self.ratio.median:.2f}x of {self.theirs}"
        return f"{self.shape}: {takes}; {self.target}: {said}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `said` has it in words."""
        found = {key: getattr(self, key) for key in ("target", "ours", "theirs", "shape", "limit")}
        judged = {"ratio": self.ratio.median, "met": self.met, "reason": self.reason, "said": str(self)}
        return found | judged


def verdicts(groups: Sequence[Group]) -> Iterator[Verdict]:
    """Of every target and every pair of programs that both ran."""
    for group in groups:
        shape = f"{group.m}x{group.k}x{group.n} {group.dtype}"
        pairs = [(target, *pair) for target, found in PAIRS.items() for pair in found]
        pairs += [(NO_SLOWER, name, f"{REFERENCE} {name}") for name in group.schemes]
        for target, ours, theirs in pairs:
            ratio = group.ratio(ours, theirs)
            if ratio is not None:
                yield Verdict(target, ours, theirs, shape, ratio)
