"""Which block sizes are worth compiling for a matmul: more than the heuristic looks at, best guess first.

And in which order candidates of any op are tried.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from qwix_kernels.chips import Chip
from qwix_kernels.matmul import tpu_estimate
from qwix_kernels.matmul.tpu_config import LANES, Config
from qwix_kernels.matmul.tpu_plan import k_tile, resolve
from qwix_kernels.problem import MatmulProblem

_ROWS = (8, 16, 32, 64, 128, 256, 512, 1024)
_COLUMNS = (128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
_STEPS = (1, 2, 3, 4, 6, 7, 8, 14, 16, 28, 32)
HOPELESS = 3.0  # times the least estimate


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config that fits, and its estimate with the ramp: microseconds on one core."""

    config: Any
    estimate_us: float


@functools.lru_cache(maxsize=1024)
def space(problem: MatmulProblem, chip: Chip) -> tuple[Candidate, ...]:
    """All candidates that fit and are not hopeless, the lowest estimate first.

    Raises NotImplementedError for a problem that the kernel does not take.
    """
    tpu_estimate.check(problem, chip)
    with_ramp = lambda config: (
        tpu_estimate.estimate(problem, chip, config).static_us + ramp_us(problem, chip, config)
    )
    return ordered([*_configs(problem), tpu_estimate.heuristic_config(problem, chip)], with_ramp)


def ordered(configs: Iterable[Any], estimate: Callable[[Any], float]) -> tuple[Candidate, ...]:
    """Those that fit and are not hopeless, the lowest estimate first.

    `estimate` raises NotImplementedError for one that does not fit.
    """
    found = {}
    for config in dict.fromkeys(configs):
        try:
            found[config] = estimate(config)
        except NotImplementedError:
            continue
    least = min(found.values())
    by_estimate = sorted(found, key=lambda c: found[c])
    return tuple(Candidate(c, found[c]) for c in by_estimate if found[c] <= HOPELESS * least)


def ramp_us(problem: MatmulProblem, chip: Chip, config: Config) -> float:
    """What a static price leaves out: the first fetch and the last store, which no other work hides."""
    return tpu_estimate.ramp_us(resolve(problem, chip, config), chip)


def diverse(
    candidates: Sequence[Candidate], first: Any, kind: Callable[[Any, Sequence[Candidate]], Any]
) -> Iterator[Any]:
    """The configs in the order to try: `first`, then the best of each kind, the second best, and so on."""
    by_kind: dict[Any, list[Any]] = {}
    for candidate in candidates:
        by_kind.setdefault(kind(candidate.config, candidates), []).append(candidate.config)
    rounds = itertools.zip_longest(*by_kind.values())
    yield from dict.fromkeys([first, *(c for one in rounds for c in one if c is not None)])


def neighbours(candidates: Sequence[Candidate], config: Any, fields: Sequence[str]) -> list[Any]:
    """Candidates that differ from `config` in one size, by one step up or down, the lowest estimate first."""
    sizes = {f: sorted({getattr(c.config, f) for c in candidates}) for f in fields}
    at = lambda c, f: sizes[f].index(getattr(c, f))
    steps = lambda c: sum(abs(at(c, f) - at(config, f)) for f in fields)
    rest = lambda c: {f: v for f, v in dataclasses.asdict(c).items() if f not in fields}
    return [c.config for c in candidates if steps(c.config) == 1 and rest(c.config) == rest(config)]


def _configs(p: MatmulProblem) -> Iterator[Config]:
    row_tile = p.quantize_lhs.tile_k % p.k if p.quantize_lhs else 0
    tiles = [t for t in (k_tile(p.lhs, p.k), k_tile(p.rhs, p.k), row_tile) if t]
    for strategy in ("after", "before") if tiles else ("once",):
        for bm, bn, bk in itertools.product(_blocks_m(p.m), _blocks_n(p.n), _blocks_k(p.k, tiles)):
            yield Config(bm, bn, bk, strategy)


def _blocks_m(m: int) -> list[int]:
    unit = 8 if m <= 32 else 32
    whole = -(-m // unit) * unit
    return sorted({size for size in _ROWS if size < whole} | ({whole} if whole <= 2048 else set()))


def _blocks_n(n: int) -> list[int]:
    return sorted({size for size in _COLUMNS if size < n} | ({n} if n <= 8192 else set()))


def _blocks_k(k: int, tiles: list[int]) -> list[int]:
    """K and the parts of it that leave no tail."""
    unit = math.lcm(LANES, *tiles)
    parts = (k // steps for steps in _STEPS if k % steps == 0)
    return [part for part in parts if part == k or (part % unit == 0 and part >= 512)]
