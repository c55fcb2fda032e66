"""A process that answers requests: one JSON object a line each way. Needs no jax.

libtpu reads its settings once, prints lines of its own, and a compiler that meets what it cannot take may
abort; so it runs in processes that can be told apart by their settings, and replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

ANSWER = "@answer "
ROOT = pathlib.Path(__file__).resolve().parents[1]


class Child:
    """`python -m MODULE ARGUMENTS`, whose standard error goes to the file `log`."""

    def __init__(self, module: str, arguments: Sequence[str], log: str, root: pathlib.Path = ROOT):
        self._log = log
        # It runs in the caller's folder, so nothing here can shadow its imports.
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        with open(log, "w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                # With one seed sets print alike in all processes: a chip's text is part of keys of caches.
                env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "0"},
            )

    def request(self, what: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, or None where the process died over it."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        return None

    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        lines = pathlib.Path(self._log).read_text(errors="replace").splitlines()[-5:]
        return " | ".join(line.strip() for line in lines) or "it said nothing"

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Lets it end, and waits for it."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers the requests on standard input until it closes. What the compiler refuses is an `error`."""
    for line in sys.stdin:
        try:
            result = answer(json.loads(line))
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(ANSWER + json.dumps(result), flush=True)
