"""Wall clock on a CPU, as ratios: our qdot against plain jnp and, where it is installed, google's qwix.

Absolute times of a CPU say more about the machine than about the program, and drift while it works. So all
programs of one shape run in turn, round by round, and what is reported is the median over the rounds of the
ratio within a round, with its quartiles. The reference package has the same name as this one, so it runs in
an interpreter of its own (`reference_child.py`), which waits while the others run.

Every timed run comes right after one that is not timed, so that no program pays for what the one before it
left in the caches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qwix
from bench.shapes import Scheme, scheme
from qwix import ops

BASELINES = ("float32", "bfloat16")
REFERENCE = "google/qwix"


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Of two programs' times: the median over the rounds, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """Of seconds round by round.

        >>> Ratio.of([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
        Ratio(median=2.0, low=2.0, high=2.5)
        """
        low, median, high = np.percentile(np.array(ours) / np.array(theirs), (25, 50, 75))
        return cls(float(median), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Group:
    """Programs that run in turn: schemes of one shape. `seconds` has a list, one entry per round, by program.

    Programs are the names of the schemes, those of plain jnp (`BASELINES`), and "google/qwix w8a8" and so on.
    """

    m: int
    k: int
    n: int
    dtype: str  # of the activations
    seconds: Mapping[str, Sequence[float]]

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(n for n in self.seconds if n not in BASELINES and not n.startswith(REFERENCE))

    def ratio(self, ours: str, theirs: str) -> Ratio | None:
        """None where one of them did not run."""
        if ours not in self.seconds or theirs not in self.seconds:
            return None
        return Ratio.of(self.seconds[ours], self.seconds[theirs])


class Reference:
    """A child that times google's qwix. Use it in a `with`.

    Raises ValueError for an interpreter that cannot be started or lacks the package.
    """

    def __init__(self, python: str):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "reference_child.py")
        try:
            self._child = subprocess.Popen(
                [python, "-I", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        except OSError as error:
            raise ValueError(f"Cannot run {python!r}: {error.strerror}.") from error
        hello = self._answer()
        wrong = hello.get("error") if hello else "it said nothing"
        if not wrong and os.path.samefile(hello["file"], qwix.__file__):
            wrong = "its qwix is this project itself"
        if wrong:
            self.close()
            raise ValueError(
                f"{python} cannot run the reference: {wrong}. Give an interpreter whose environment has it: "
                "uv venv ENV && VIRTUAL_ENV=ENV uv pip install qwix==0.1.8, then --compare ENV/bin/python."
            )
        self.version = f"{hello['version']} on jax {hello['jax']}"

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for stream in (self._child.stdin, self._child.stdout):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._child.wait()

    def make(self, name: str, kind: Scheme, shape: tuple[int, int, int], dtype: str) -> None:
        """Compiles a program there, and runs it once."""
        m, k, n = shape
        activation = None if kind.is_weight_only else kind.activation
        request = {"weight": kind.weight, "activation": activation, "tile": kind.tile, "dtype": dtype}
        self._ask({"make": name, "m": m, "k": k, "n": n, **request})

    def run(self, name: str) -> float:
        """Seconds of one run."""
        return self._ask({"run": name})["seconds"]

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._child.stdin
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        answer = self._answer()
        if not answer:
            raise RuntimeError(f"The reference's process ended with {self._child.wait()} at {request}.")
        return answer

    def _answer(self) -> dict[str, Any]:
        """Its next line, or nothing where it has ended."""
        assert self._child.stdout
        lines = (json.loads(line) for line in self._child.stdout if line.startswith("{"))
        return next(lines, {})


def in_turn(programs: dict[str, tuple[Any, tuple[Any, ...]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program in each round, every timed run right after one that is not."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, (op, arrays) in programs.items():
            op(*arrays).block_until_ready()
            start = time.perf_counter()
            op(*arrays).block_until_ready()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def measure(
    shapes: Sequence[tuple[int, int, int]],
    schemes: Sequence[str],
    dtypes: Sequence[str],
    *,
    rounds: int,
    reference: Reference | None = None,
) -> Iterator[Group]:
    """One group per shape and dtype of the activations; shapes are (M, K, N)."""
    for shape in shapes:
        for dtype in dtypes:
            yield _group(shape, dtype, schemes, rounds, reference)


def _group(
    shape: tuple[int, int, int], dtype: str, schemes: Sequence[str], rounds: int, reference: Reference | None
) -> Group:
    programs = {name: _ours(scheme(name), shape, dtype) for name in schemes}
    programs |= {name: _plain(shape, name) for name in BASELINES}
    for fn, arguments in programs.values():
        jax.block_until_ready(fn(*arguments))
    if reference:
        for name in schemes:
            reference.make(name, scheme(name), shape, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (fn, arguments) in programs.items():
            jax.block_until_ready(fn(*arguments))
            start = time.perf_counter()
            jax.block_until_ready(fn(*arguments))
            seconds[name].append(time.perf_counter() - start)
            if reference and name in schemes:
                seconds.setdefault(f"{REFERENCE} {name}", []).append(reference.run(name))
    return Group(*shape, dtype, seconds)


def _random(shape: tuple[int, int, int], dtype: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    m, k, n = shape
    return jnp.asarray(rng.normal(size=(m, k)), dtype), jnp.asarray(rng.normal(size=(k, n)), dtype)


def _ours(kind: Scheme, shape: tuple[int, int, int], dtype: str):
    """(jitted function, its arguments): activations are quantized on the way, the weight is given so."""
    x, w = _random(shape, dtype)
    tiles = {0: kind.tile} if kind.tile else {}
    weight = qwix.quantize(w, kind.weight, channelwise_axes=(1,), tiled_axes=tiles)
    activation = None if kind.is_weight_only else kind.activation
    tile = kind.tile or None if activation else None
    run = lambda x, weight: ops.qdot(x, weight, act_qtype=activation, act_tile_size=tile)
    return jax.jit(run), (x, weight)


def _plain(shape: tuple[int, int, int], dtype: str):
    return jax.jit(lambda x, w: jnp.dot(x, w)), _random(shape, dtype)
