"""Answers that were worked out before: a file of JSON lines, [key, value] each. Needs no jax.

A key holds a digest of everything that decides the value, so nothing is ever out of date, only unused.
Several processes may append to one file; a line that an interrupted one left unfinished is passed over.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

FILE = "prices.jsonl"


class Cache:
    """The file in `folder`, read once; what is put is there for this process at once, for others later."""

    def __init__(self, folder: str | os.PathLike):
        self._path = pathlib.Path(folder) / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Any] = {}
        if self._path.exists():
            for line in self._path.read_text(errors="replace").splitlines():
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue
                self._known[key] = value

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Remembers a value that JSON can hold."""
        self._known[key] = value
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            line = json.dumps([key, value]) + "\n"
            file.seek(0, os.SEEK_END)
            if file.tell():  # an unfinished line must not swallow this one
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())


def default_folder() -> str:
    """Where answers are kept: under XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(root, "qwix", "price")


def digest_of_files(paths: Iterable[pathlib.Path]) -> str:
    """One digest of the files' names and contents; a file that is not there counts as empty."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.name.encode() + b"\0")
        total.update(path.read_bytes() if path.exists() else b"")
        total.update(b"\0")
    return total.hexdigest()
