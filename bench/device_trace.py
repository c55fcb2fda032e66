"""Times programs on an accelerator by what its own profiler recorded, not by a clock on the host.

`jax.profiler` writes an XSpace protobuf (`plugins/profile/<run>/<host>.xplane.pb`): planes, which have lines,
which have events. The planes of accelerators are called `/device:TPU:0`, `/device:GPU:0` and so on, and hold
a program's time in one of two forms:

    TPU   the line "XLA Modules" has one event per run of a program, called `jit_name(fingerprint)`; from its
          start to its end the core does nothing else
    GPU   lines called "Stream #..." have one event per kernel or copy, whose stat `hlo_module` names its
          program, `jit_name`; the events of a program are added up and shared out over its runs

Programs are told apart by the name of the function that was jitted, so each needs a name of its own.
"""

from __future__ import annotations

import collections
import concurrent.futures
import glob
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.profiler import ProfileData

# A function, and the arguments of its runs, which take turns.
Program = tuple[Callable[..., Any], Sequence[tuple[Any, ...]]]
MODULES = "XLA Modules"
_DEVICE = re.compile(r"/device:(TPU|GPU):\d+$")
_MODULE = re.compile(r"(?P<name>.+?)(?:\(\d+\))?$")


def program_times(profile: ProfileData) -> dict[str, list[float]]:
    """Microseconds of device time by program: one per run on a TPU, the sum over all runs on a GPU.

    The first accelerator that ran anything counts. Raises ValueError where none did.

    >>> profile = ProfileData.from_text_proto('''
    ...   planes { name: "/device:TPU:0"
    ...     lines { name: "XLA Modules" events { metadata_id: 1 duration_ps: 2500000 } }
    ...     event_metadata { key: 1 value { id: 1 name: "jit_square(1234)" } } }''')
    >>> program_times(profile)
    {'jit_square': [2.5]}
    """
    planes = list(profile.planes)
    for plane in sorted((p for p in planes if _DEVICE.match(p.name)), key=lambda p: p.name):
        times = _tpu_runs(plane) if "TPU" in plane.name else _gpu_sums(plane)
        if times:
            return times
    raise ValueError(
        f"The profile has no run of a program on an accelerator; its planes: {[p.name for p in planes]}."
    )


def _tpu_runs(plane: Any) -> dict[str, list[float]]:
    times = collections.defaultdict(list)
    for line in plane.lines:
        if line.name == MODULES:
            for event in line.events:
                match = _MODULE.match(event.name)
                times[match["name"] if match else event.name].append(event.duration_ns / 1e3)
    return dict(times)


def _gpu_sums(plane: Any) -> dict[str, list[float]]:
    times: dict[str, float] = collections.defaultdict(float)
    for line in plane.lines:
        if line.name.startswith("Stream #"):
            for event in line.events:
                module = stat(event, "hlo_module")
                if module:
                    times[str(module)] += event.duration_ns / 1e3
    return {name: [total] for name, total in times.items()}


def stat(event: Any, wanted: str) -> Any:
    """The value of an event's stat, or None."""
    with warnings.catch_warnings():
        # jaxlib's type of stats has no module; where that warning is an error, the process would abort.
        warnings.simplefilter("ignore", DeprecationWarning)
        return next((value for name, value in event.stats if name == wanted), None)


def read(folder: str) -> ProfileData:
    """The profile that `jax.profiler.trace(folder)` left. Raises FileNotFoundError where there is none."""
    pattern = os.path.join(glob.escape(folder), "plugins", "profile", "*", "*.xplane.pb")
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"No profile in {folder!r} ({pattern}).")
    return ProfileData.from_file(files[-1])


def medians(times: Mapping[str, Sequence[float]], names: Sequence[str], rounds: int) -> dict[str, float]:
    """Microseconds per run of each jitted function, out of `program_times` of `rounds` runs of each.

    Raises ValueError for a function that the profile lacks.
    """
    found = {}
    for name in names:
        runs = times.get(f"jit_{name}")
        if not runs:
            raise ValueError(f"The profile has no run of {name!r}; it has {sorted(times)}.")
        found[name] = float(np.median(runs)) if len(runs) > 1 else runs[0] / rounds
    return found


def time_on_device(programs: Mapping[str, Program], rounds: int = 20) -> dict[str, float]:
    """Microseconds of device time per run of each program, runs interleaved round by round.

    Args:
      programs: name -> (function, arguments in turn). The names are given to the compiled functions.
      rounds: how often each is run; 2 or more. One run before is not timed.

    Raises:
      ValueError: fewer than two rounds, or no accelerator in the profile.
    """
    return time_compiled(compiled(programs), rounds)


def compiled(programs: Mapping[str, Program]) -> dict[str, Program]:
    """The same programs compiled, several at a time."""

    def one(name: str) -> Program:
        fn, arguments = programs[name]
        return jax.jit(_named(name, fn)).lower(*arguments[0]).compile(), arguments

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(programs, pool.map(one, programs), strict=True))


def time_compiled(programs: Mapping[str, Program], rounds: int) -> dict[str, float]:
    """As `time_on_device`, of what `compiled` gave."""
    if rounds < 2:
        raise ValueError(f"A median needs 2 rounds or more, got {rounds=}.")
    for fn, arguments in programs.values():
        jax.block_until_ready(fn(*arguments[0]))
    with tempfile.TemporaryDirectory(prefix="qwix_trace_") as folder:
        with jax.profiler.trace(folder):
            for turn in range(rounds):
                for fn, arguments in programs.values():
                    jax.block_until_ready(fn(*arguments[turn % len(arguments)]))
        return medians(program_times(read(folder)), tuple(programs), rounds)


def _named(name: str, fn: Callable) -> Callable:
    def run(*arguments):
        return fn(*arguments)

    run.__name__ = run.__qualname__ = name
    return run
