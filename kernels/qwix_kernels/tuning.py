"""Block sizes for a problem on a chip, from the most specific source that has them.

    explicit argument > `use(...)` context > tuned for this very problem > for its bucket of M > for the
    nearest weight > the kernel's heuristic

Tuned entries come from the user's file, named by the environment variable QWIX_TUNING_CACHE, else
~/.cache/qwix/tuning.json, and from the packaged tables tuning_tables/<chip>.json; where both are as close,
the user's wins. An entry may also say that a search found nothing better than the heuristic: then that stands
for its neighbours too.

    bucket    the same facts, batched or not, K and N, and M in the same bucket: M rounded up to a power of
              two, at least 16 and at most 1024
    near      the same kind of kernel (operand types and tiles), M in the same bucket, and K and N that are
              less than one octave away, |log2(K/K')| + |log2(N/N')| < 1

A borrowed config is cut to the problem's sizes, must fit the chip's VMEM, and must not look worse than the
heuristic's by more than `MARGIN` (dispatch.py sees to that). No file can break a program: tuning_files.py.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

from qwix_kernels import tuning_files
from qwix_kernels.chips import Chip
from qwix_kernels.problem import MatmulProblem, Operand

NEAR = 1.0  # octaves
FAR = 2.0  # octaves, beyond which a warning is due
MARGIN = 1.1  # times the heuristic's estimate
_LEAST_M, _MOST_M = 16, 1024
_WORTH_US = 20.0
_OTHER_FACTS = 0.25  # octaves, for another dtype of the scales or the result, or another epilogue
_TABLES = pathlib.Path(__file__).parent / "tuning_tables"
_CONTEXT: contextvars.ContextVar[Any] = contextvars.ContextVar("qwix_tuning_config", default=None)


@dataclasses.dataclass(frozen=True)
class Found:
    """One candidate. `config` is None where a search found that the heuristic's choice is best."""

    config: Any
    source: str  # "explicit", "context", "user cache" or "packaged"
    match: str = ""  # of the two tables: "exact", "bucket" or "near (...)"

    @property
    def borrowed(self) -> bool:
        """Whether it was made for another problem."""
        return self.match not in ("", "exact")


@contextlib.contextmanager
def use(config: Any) -> Iterator[None]:
    """Makes every kernel lowered inside use `config` where it fits; an explicit argument still wins.

    Lowering happens on the first call of a jitted function: a program that is compiled already is not
    changed.
    """
    token = _CONTEXT.set(config)
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def ambient() -> Any:
    """The config of the innermost `use`, or None."""
    return _CONTEXT.get()


def key(problem: Any) -> str:
    """The problem in one line that stays the same between versions: the key of the tables.

    Problems of other ops than matmul say it themselves, as `tuning_key`. A star stands for a scale that
    covers the whole axis.

    >>> from qwix_kernels.problem import MatmulProblem, Operand
    >>> lhs, rhs = Operand("bfloat16", 1, 8), Operand("int4", 1, 32, "float32", 1, 64)
    >>> key(MatmulProblem(8, 64, 32, lhs, rhs, "bfloat16"))
    'b1 m8 k64 n32 bfloat16 int4[float32:1x*] bfloat16'
    """
    if not isinstance(problem, MatmulProblem):
        return problem.tuning_key
    p = problem
    lhs = _operand_key(p.lhs, p)
    if q := p.quantize_lhs:
        lhs += f"->{dataclasses.replace(q, tile_k=q.tile_k % p.k if p.k else 0)}"
    parts = [f"b{p.batch} m{p.m} k{p.k} n{p.n}", lhs, _operand_key(p.rhs, p), p.out_dtype]
    if p.rhs_transposed:
        parts.append("nk")
    if p.precision:
        parts.append(p.precision)
    if p.fused:
        parts.append(p.fused)
    return " ".join(parts)


def _operand_key(x: Operand, p: MatmulProblem) -> str:
    name = x.codebook or x.dtype
    if x.is_quantized:
        free = "*" if x.tile_free == x.free > 1 else x.tile_free
        along_k = "*" if x.tile_k == p.k else x.tile_k
        name += f"[{x.scale_dtype}:{free}x{along_k}{',zero' if x.zero_point else ''}]"
    return name + ("/shared" if x.batch != p.batch else "")


def bucket(m: int) -> int:
    """The bucket of a number of rows: its upper end, a power of two; the last one has no end.

    >>> [bucket(m) for m in (1, 16, 17, 600, 1024, 5000)]
    [16, 16, 32, 1024, 1024, 1024]
    """
    return min(max(1 << (m - 1).bit_length(), _LEAST_M), _MOST_M)


def candidates(
    problem: Any, chip: Chip, explicit: Any, config_type: type, implementation: str
) -> Iterator[Found]:
    """What to try, the most specific first; the heuristic is the caller's.

    Raises TypeError for an explicit config of another type.
    """
    if explicit is not None:
        if not isinstance(explicit, config_type):
            raise TypeError(
                f"config must be a {config_type.__module__}.{config_type.__name__}, got {explicit!r}."
            )
        yield Found(explicit, "explicit")
        return
    if isinstance(ambient(), config_type):
        yield Found(ambient(), "context")
    tables = _tables(chip, implementation)
    name = key(problem)
    for path, source, table in tables:
        if entry := table.by_key.get(name):
            yield from _found(entry, config_type, problem, path, source, "exact")
    if wanted := tuning_files.parse_key(name):
        near = [
            (distance, match, path, source, entry)
            for path, source, table in tables
            for entry in table.by_kind.get(wanted.kind, ())
            for distance, match in [_distance(wanted, entry.problem)]
            if match and entry.key != name
        ]
        for _, match, path, source, entry in sorted(near, key=lambda x: x[0]):
            yield from _found(entry, config_type, problem, path, source, match)


def _tables(chip: Chip, implementation: str) -> list[tuple[pathlib.Path, str, tuning_files.Table]]:
    places = (
        (user_file(), "user cache", (chip.name, implementation)),
        (packaged_file(chip), "packaged", (implementation,)),
    )
    return [(path, source, tuning_files.table(path, *levels)) for path, source, levels in places]


def _distance(wanted: tuning_files.Problem, have: Any) -> tuple[tuple[float, float], str]:
    """((octaves of K and N, octaves of M), how it matches), the latter empty where it is too far."""
    octaves, rows = wanted.octaves(have), abs(math.log2(wanted.m / have.m))
    if bucket(wanted.m) != bucket(have.m) or octaves >= NEAR or (wanted.batch > 1) != (have.batch > 1):
        return (octaves, rows), ""
    same = wanted.facts == have.facts
    if octaves == 0 and same:
        return (0.0, rows), "bucket"
    at = f"m{have.m} k{have.k} n{have.n}{'' if same else ' ' + have.facts}"
    return (octaves + (0 if same else _OTHER_FACTS), rows), f"near ({octaves:.2f} octaves, {at})"


def _found(
    entry: tuning_files.Entry, config_type: Any, problem: Any, path: pathlib.Path, source: str, match: str
) -> Iterator[Found]:
    if entry.config is None:
        yield Found(None, source, match)
        return
    try:
        config = config_type(**entry.config)
    except (TypeError, ValueError) as e:
        tuning_files.warn_once(f"Ignoring the tuning entry {entry.key!r} of {path}: {e}.")
        return
    if match != "exact" and entry.problem:
        config = config.refit((entry.problem.m, entry.problem.k, entry.problem.n), problem)
    if config is not None:
        yield Found(config, source, match)


def warn_if_far(problem: Any, chip: Chip, implementation: str, static_us: float) -> None:
    """Says that a problem which no entry is near to runs with the heuristic's blocks, where that may matter.

    Once per kind of problem, where the user's own file has entries of the kind on this chip, every tuned
    weight of the kind is more than `FAR` octaves away, and the problem takes 20 us or more. The environment
    variable QWIX_TUNING_WARN=1 has every problem named that no entry is near to, QWIX_TUNING_WARN=0 none.
    """
    asked = os.environ.get("QWIX_TUNING_WARN", "")
    octaves, users = octaves_to_nearest(problem, chip, implementation)
    if asked == "0" or (asked != "1" and (users is None or octaves <= FAR or static_us < _WORTH_US)):
        return
    wanted = tuning_files.parse_key(key(problem))
    once = key(problem) if asked == "1" or wanted is None else wanted.kind
    if (chip.name, once) not in _FAR_SAID:
        _FAR_SAID.add((chip.name, once))
        where = "nothing of its kind" if octaves == math.inf else f"nothing within {octaves:.1f} octaves"
        warnings.warn(
            f"{key(problem)} runs on {chip.name} with blocks chosen by formula: {where} was tuned. "
            "`python -m bench.tune` tunes it without a chip; QWIX_TUNING_WARN=0 silences this.",
            stacklevel=2,
        )


_FAR_SAID: set[tuple[str, str]] = set()


def octaves_to_nearest(problem: Any, chip: Chip, implementation: str) -> tuple[float, float | None]:
    """How far the nearest tuned weight of this kind is, for any M; and the nearest in the user's own file.

    Infinity where none of the kind was tuned, and None where the user's file has none.
    """
    wanted = tuning_files.parse_key(key(problem))
    if wanted is None:
        return math.inf, None
    near: dict[str, float] = {}
    for _, source, table in _tables(chip, implementation):
        for entry in table.by_kind.get(wanted.kind, ()):
            if entry.problem:
                near[source] = min(near.get(source, math.inf), wanted.octaves(entry.problem))
    return min(near.values(), default=math.inf), near.get("user cache")


def save(problem: Any, chip: Chip, implementation: str, config: Any) -> pathlib.Path:
    """Writes `config` (a dataclass) for this problem into the user's file and returns the file.

    Safe between threads and processes. Raises ValueError where the file holds something else.
    """
    fields = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    path = user_file()
    tuning_files.update(path, {(chip.name, implementation, key(problem)): {"config": fields}})
    return path


def user_file() -> pathlib.Path:
    """The user's file: QWIX_TUNING_CACHE, else ~/.cache/qwix/tuning.json."""
    return pathlib.Path(os.environ.get("QWIX_TUNING_CACHE") or "~/.cache/qwix/tuning.json").expanduser()


def packaged_file(chip: Chip) -> pathlib.Path:
    """The table that comes with the package; there may be none for a chip."""
    return _TABLES / f"{chip.name}.json"
