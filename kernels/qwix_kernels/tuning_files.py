"""Tuning files: JSON that other people and other versions wrote, read so that nothing in it breaks a program.

    packaged table, one per chip   {implementation: {problem key: entry}}
    the user's file                {chip: {implementation: {problem key: entry}}}
    entry                          {"config": {field: value}, ...}   best blocks that were found, or
                                   {...}                             a search in which the heuristic won

An entry's other fields (`scheme`, `static_us`, `kernel`) are for `python -m bench.tune` and for people. What
cannot be read is reported once and ignored. Writing replaces the whole file at once, under a lock: a reader
never sees half a file, and two writers lose nothing of each other's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system: only the threads of one process are kept apart
    fcntl: Any = None

_KEY = re.compile(r"b(\d{1,9}) m(\d{1,9}) k(\d{1,9}) n(\d{1,9}) (\S.*)", re.ASCII)
_SCALE_DTYPE = re.compile(r"\[\w+:")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem's key, taken apart. `facts` is all but the sizes."""

    batch: int
    m: int
    k: int
    n: int
    facts: str

    @property
    def kind(self) -> str:
        """What decides the work inside a kernel: the operands' types and tiles, and the rhs' order.

        The types of scales and of the result, and what else is fused, are left out.

        >>> parse_key("b1 m8 k64 n32 bfloat16->int8:0:static int8[float32:1x*] float32 nk bias").kind
        'bfloat16->int8:0 int8[1x*] nk'
        """
        lhs, rhs, *rest = self.facts.split(" ")
        operands = _SCALE_DTYPE.sub("[", f"{lhs} {rhs}").replace(":static", "")
        return " ".join([operands, *(x for x in rest if x in ("nk", "gate") or x.startswith("->"))])

    def octaves(self, other: Problem) -> float:
        """How far the weights' sizes are apart: doubling one of them is 1."""
        return abs(math.log2(self.k / other.k)) + abs(math.log2(self.n / other.n))


def parse_key(key: str) -> Problem | None:
    """The sizes and facts in a matmul's key; None for a key of another form."""
    match = _KEY.fullmatch(key)
    if not match or " " not in match[5]:
        return None
    batch, m, k, n = map(int, match.groups()[:4])
    return Problem(batch, m, k, n, match[5]) if min(batch, m, k, n) > 0 else None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a file. `config` is None where a search found nothing better than the heuristic."""

    key: str
    config: Mapping[str, Any] | None
    problem: Problem | None


@dataclasses.dataclass(frozen=True)
class Table:
    """The entries of one file for one implementation."""

    by_key: Mapping[str, Entry]
    by_kind: Mapping[str, Sequence[Entry]]


def table(path: pathlib.Path, *levels: str) -> Table:
    """The entries below `levels` in a file; none where there is no such file or level."""
    return _table(str(path), _stamp(path), levels)


@functools.lru_cache(maxsize=64)
def _table(path: str, stamp: tuple, levels: tuple[str, ...]) -> Table:
    found: Any = _read(path, stamp)
    for level in levels:
        found = found.get(level, {})
        if not isinstance(found, dict):
            warn_once(f"Ignoring {level!r} in the tuning file {path}: it should be a JSON object.")
            found = {}
    by_key: dict[str, Entry] = {}
    by_kind: dict[str, list[Entry]] = {}
    for key, value in found.items():
        config = value.get("config") if isinstance(value, dict) else value
        if not isinstance(value, dict) or not isinstance(config, dict | None):
            warn_once(f"Ignoring the tuning entry {key!r} of {path}: it should be a JSON object.")
            continue
        by_key[key] = entry = Entry(key, config, parse_key(key))
        if entry.problem:
            by_kind.setdefault(entry.problem.kind, []).append(entry)
    return Table(by_key, by_kind)


def _stamp(path: pathlib.Path) -> tuple:
    """Changes when the file does; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


@functools.lru_cache(maxsize=16)
def _read(path: str, stamp: tuple) -> dict:
    if not stamp:
        return {}
    try:
        return load(pathlib.Path(path))
    except (OSError, ValueError) as e:
        warn_once(f"Ignoring the tuning file {path}: {e}.")
        return {}


def load(path: pathlib.Path) -> dict:
    """The file's JSON. Raises OSError or ValueError."""
    try:
        content = json.loads(path.read_text())
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    return content


def update(path: pathlib.Path, entries: Mapping[tuple[str, ...], Mapping[str, Any] | None]) -> None:
    """Writes entries, each under its levels and key, into a file; None takes one out. Others stay.

    Raises ValueError for a file that is there and holds something else, OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        try:
            content = load(path) if path.exists() else {}
        except ValueError as e:
            raise ValueError(f"{path} is no tuning file ({e}); move it away or name another one.") from e
        for (*levels, key), entry in entries.items():
            at = content
            for level in levels:
                at = at.setdefault(level, {})
                if not isinstance(at, dict):
                    raise ValueError(
                        f"{path} is no tuning file ({level!r} should be an object); move it away."
                    )
            at.pop(key, None)
            if entry is not None:
                at[key] = dict(entry)
        _replace(path, _dump(content, max((len(k) for k in entries), default=2)) + "\n")


def _replace(path: pathlib.Path, text: str) -> None:
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise


def _dump(content: Mapping[str, Any], depth: int, indent: int = 0) -> str:
    """JSON with one line for each entry, sorted: changes read well in a diff."""
    if depth == 0 or not isinstance(content, dict) or not content:
        return json.dumps(content, sort_keys=True)
    pad = " " * (indent + 1)
    lines = (
        f"{pad}{json.dumps(k)}: {_dump(content[k], depth - 1, indent + 1)}"
        for k in sorted(content, key=_order)
    )
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


def _order(key: str) -> tuple:
    found = parse_key(key)
    return (found.facts, found.batch, found.k, found.n, found.m) if found else (key,)


_THREADS = threading.Lock()


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    with _THREADS:
        handle = os.open(folder, os.O_RDONLY) if fcntl else None
        try:
            if handle is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)  # released when it is closed
            yield
        finally:
            if handle is not None:
                os.close(handle)


def warn_once(message: str) -> None:
    """Each message once per process."""
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=3)


_WARNED: set[str] = set()
