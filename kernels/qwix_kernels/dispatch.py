"""Which implementation of an op runs, and why the others do not.

An op registers its implementations in order of preference. Each says by `NotImplementedError` what it cannot
take, and by an `Estimate` what it would cost; the next one is asked then. The last one of every op runs
anywhere and refuses nothing, so `implementation=None` never fails. A named implementation runs, or its
refusal reaches the caller.

Everything here needs only the description of a problem: `explain` answers for chips that are not present.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from qwix_kernels import chips, tuning, tuning_files
from qwix_kernels.chips import Chip


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What an implementation costs on one core of a chip, in microseconds. Static: nothing was measured."""

    compute_us: float  # the busiest unit
    memory_us: float  # bytes really moved over the HBM bandwidth
    static_us: float  # what both take together: the greater one where they overlap, the sum where they do not
    floor_us: float  # what no implementation can beat: best native unit, unavoidable bytes
    note: str = ""

    @property
    def ratio_to_floor(self) -> float:
        return self.static_us / self.floor_us if self.floor_us else 1.0


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an op. `platforms` is empty where every platform will do.

    On the chips `on_request`, on which it has never run, it runs only where a caller names it.

    `check` raises NotImplementedError for what it cannot run. `heuristic_config` gives block sizes, or None
    where there is nothing to choose; `config_type` is the class of its result.
    """

    name: str
    platforms: tuple[str, ...]
    check: Callable[[Any, Chip], None]
    estimate: Callable[[Any, Chip, Any], Estimate]
    run: Callable[..., Any]  # (problem, *operands, config=, chip=)
    heuristic_config: Callable[[Any, Chip], Any] | None = None
    config_type: Callable[[], type] | None = None
    on_request: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What dispatch decided for a problem on a chip. `str()` gives it in words."""

    problem: Any
    chip: str
    chosen: str
    config: Any
    config_source: str | None  # "explicit", "context", "user cache", "packaged" or "heuristic"
    estimate: Estimate
    rejected: tuple[tuple[str, str], ...]  # (implementation, reason)
    # How a tuned entry matches: "exact", "bucket" or "near (...)"; empty where none does. With the source
    # "heuristic": a search found nothing better.
    tuned: str = ""

    def __str__(self) -> str:
        e = self.estimate
        lines = [
            f"{self.chosen} on {self.chip}: {e.static_us:.1f} us by static estimate "
            f"(compute {e.compute_us:.1f}, memory {e.memory_us:.1f}, floor {e.floor_us:.1f})",
        ]
        if self.config is not None:
            lines.append(f"  config ({self.config_source}): {self.config}")
            lines.append(f"  tuned: {self.tuned or 'no'}")
        lines += [f"  how: {e.note}"] if e.note else []
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected]
        return "\n".join(lines)


_IMPLEMENTATIONS: dict[type, tuple[Implementation, ...]] = {}


def register(problem_type: type, implementations: Sequence[Implementation]) -> None:
    """Makes `implementations`, in order of preference, the ways to run problems of this type."""
    if implementations[-1].platforms:
        raise ValueError(f"The last implementation must run anywhere, got {implementations[-1].name!r}.")
    _IMPLEMENTATIONS[problem_type] = tuple(implementations)


def implementations(problem: Any) -> tuple[Implementation, ...]:
    """All implementations of the problem's op, the preferred one first."""
    try:
        return _IMPLEMENTATIONS[type(problem)]
    except KeyError:
        known = ", ".join(t.__name__ for t in _IMPLEMENTATIONS)
        raise TypeError(f"No op takes a {type(problem).__name__}; known problems: {known}.") from None


def named(problem: Any, names: str | Sequence[str] | None) -> tuple[Implementation, ...]:
    """The implementations that a caller allows, in the caller's order; all of them for None.

    Raises ValueError for a name that this op does not have, and for an empty list.
    """
    known = {impl.name: impl for impl in implementations(problem)}
    if names is None:
        return tuple(known.values())
    wanted = (names,) if isinstance(names, str) else tuple(names)
    if not wanted:
        raise ValueError(f"implementation is empty; give None (any) or some of {', '.join(known)}.")
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"Unknown implementation {name!r}{hint} Known: {', '.join(known)}.")
    return tuple(known[name] for name in wanted)


def choose(
    problem: Any,
    chip: Chip,
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
    kernels_refused: str | None = None,
) -> tuple[Implementation, Explanation]:
    """The first allowed implementation that can run `problem` on `chip`.

    One that is not named by the caller is also passed over when it is predicted to be slower than the last
    one.

    Raises NotImplementedError, with every reason, when a caller's names leave none.
    """
    candidates = named(problem, implementation)
    rejected: list[tuple[str, str]] = []
    for impl in candidates:
        try:
            estimate, used = _plan(impl, problem, chip, config, kernels_refused)
            if implementation is None and chip.name in impl.on_request:
                raise NotImplementedError(
                    f"this kernel has been interpreted and compiled, and has not run on a {chip.name}"
                )
            fallback = candidates[-1]
            if implementation is None and impl is not fallback:
                _refuse_slower(estimate, fallback.estimate(problem, chip, None), fallback.name)
        except NotImplementedError as refusal:
            rejected.append((impl.name, str(refusal)))
            continue
        source = used.source or None
        explanation = Explanation(
            problem, chip.name, impl.name, used.config, source, estimate, tuple(rejected), used.match
        )
        return impl, explanation
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise NotImplementedError(
        f"{implementation!r} cannot run this on {chip.name}: {reasons}. {_abilities(chip)} "
        f"implementation=None picks one that can. The problem: {problem}"
    )


def _abilities(chip: Chip) -> str:
    """What a chip multiplies in, fastest first.

    >>> _abilities(chips.chip("v5e"))
    'v5e multiplies int4 (788 TOP/s), int8 (394), bfloat16 (197).'
    """
    rates = {"bfloat16": chip.bf16, "int8": chip.int8, "float8": chip.fp8, "int4": chip.int4}
    known = sorted(((rate, name) for name, rate in rates.items() if rate), reverse=True)
    words = [f"{name} ({rate:g}{' TOP/s' * (i == 0)})" for i, (rate, name) in enumerate(known)]
    return f"{chip.name} multiplies {', '.join(words)}."


def explain(
    problem: Any,
    chip: str | Chip | None = None,
    *,
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
) -> Explanation:
    """What would run for `problem` on `chip` and why not the others. Runs nothing and needs no such device.

    Args:
      problem: for example a `MatmulProblem`, as `matmul.problem_of` makes it.
      chip: a name in `chips.CHIPS`, a `Chip`, or None for the one that a program would be lowered for here.
      implementation: as for the op itself.
      config: as for the op itself.

    >>> from qwix_kernels.matmul import problem_of
    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((1, 16, 64), jnp.int8)
    >>> w = jax.ShapeDtypeStruct((1, 64, 32), jnp.int8)
    >>> explain(problem_of(x, w), "cpu").chosen
    'xla'
    """
    return choose(problem, chips.chip(chip), implementation, config)[1]


def warn_of_fallback(explanation: Explanation, chip: Chip) -> None:
    """Says once per kind of problem and reason that an accelerator runs the portable path."""
    found = {impl.name: impl for impl in implementations(explanation.problem)}
    if chip.platform == "cpu" or found[explanation.chosen].platforms or not explanation.rejected:
        return
    # Of the kernels for other platforms only where this one has none.
    here = [(name, why) for name, why in explanation.rejected if chip.platform in found[name].platforms]
    here = here or list(explanation.rejected)
    scheme = getattr(explanation.problem, "scheme", type(explanation.problem).__name__)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in here)
    key = (chip.name, scheme, re.sub(r"\d+", "#", reasons))
    if key in _WARNED:
        return
    _WARNED.add(key)
    warnings.warn(
        f"{scheme} runs through {explanation.chosen} on {chip.name}, not through a kernel ({reasons}). "
        f"To try a kernel all the same, name it: implementation={here[0][0]!r}; "
        f"to accept this, implementation={explanation.chosen!r}.",
        stacklevel=2,
    )


_WARNED: set[tuple[str, str, str]] = set()


def warn_of_untuned(explanation: Explanation, chip: Chip) -> None:
    """Says it where a kernel runs with blocks chosen by formula, far from everything that was tuned."""
    if explanation.config_source == "heuristic" and not explanation.tuned:
        tuning.warn_if_far(explanation.problem, chip, explanation.chosen, explanation.estimate.static_us)


def _plan(
    impl: Implementation, problem: Any, chip: Chip, config: Any, kernels_refused: str | None
) -> tuple[Estimate, tuning.Found]:
    """(cost, config and where it is from) of `impl`, or NotImplementedError."""
    if impl.platforms and chip.platform not in impl.platforms:
        raise NotImplementedError(
            f"runs on {', '.join(impl.platforms)}, not on {chip.platform} ({chip.name})"
        )
    if impl.platforms and kernels_refused:
        raise NotImplementedError(kernels_refused)
    impl.check(problem, chip)
    if impl.heuristic_config is None or impl.config_type is None:
        return impl.estimate(problem, chip, None), tuning.Found(None, "")
    match = ""
    for found in tuning.candidates(problem, chip, config, impl.config_type(), impl.name):
        if found.config is None:
            match = found.match
            break
        estimate = _estimate(impl, problem, chip, found)
        if estimate is not None:
            return estimate, found
    chosen = impl.heuristic_config(problem, chip)
    return impl.estimate(problem, chip, chosen), tuning.Found(chosen, "heuristic", match)


def _estimate(impl: Implementation, problem: Any, chip: Chip, found: tuning.Found) -> Estimate | None:
    """The cost with a config that was looked up; None where it does not do."""
    try:
        estimate = impl.estimate(problem, chip, found.config)
    except (NotImplementedError, ValueError) as refusal:
        if found.source == "explicit":
            raise NotImplementedError(f"config {found.config}: {refusal}") from refusal
        if not found.borrowed:
            tuning_files.warn_once(
                f"Ignoring the tuned config {found.config} ({found.source}), which does not fit: {refusal}."
            )
        return None
    if found.borrowed and impl.heuristic_config is not None:
        own = impl.estimate(problem, chip, impl.heuristic_config(problem, chip))
        if estimate.static_us > tuning.MARGIN * own.static_us:
            return None
    return estimate


def _refuse_slower(mine: Estimate, other: Estimate, other_name: str) -> None:
    if mine.static_us > other.static_us:
        raise NotImplementedError(
            f"predicted slower than {other_name}: {mine.static_us:.1f} us against {other.static_us:.1f} us"
        )
