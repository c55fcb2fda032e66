"""Prices many cells in child processes (worker.py), several at a time, and remembers the answers.

Cells of one shape on one chip go to one child in a row, since they share XLA's baseline. A child that dies
costs the cell that it was at, and is replaced.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import queue
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from bench import child
from bench.cache import Cache, digest_of_files
from bench.cells import Cell

_ROOT = child.ROOT


def price(cells: Sequence[Cell], *, jobs: int = 1, cache: str | None = None) -> Iterator[dict[str, Any]]:
    """The answer for each cell, in the order of `cells`. A cell that cannot be priced has an `error`.

    Args:
      cells: what to price.
      jobs: how many children compile at a time.
      cache: a folder (cache.py) to look answers up in and to keep them in; None for none.
    """
    early: dict[int, dict[str, Any]] = {}
    wanted = itertools.count()
    at = next(wanted)
    for index, answer in price_unordered(cells, jobs=jobs, cache=cache):
        early[index] = answer
        while at in early:
            yield early.pop(at)
            at = next(wanted)


def price_unordered(
    cells: Sequence[Cell], *, jobs: int = 1, cache: str | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `price`, but (index in `cells`, answer) as the answers come."""
    answered = Cache(cache) if cache else None
    waiting: dict[tuple[Any, ...], list[int]] = {}
    for index, cell in enumerate(cells):
        if answered and (answer := answered.get(_key(cell))):
            yield index, answer
        else:
            waiting.setdefault((cell.chip, cell.m, cell.k, cell.n, cell.batch), []).append(index)
    for index, answer in _Pool(cells, list(waiting.values()), jobs, cache).answers():
        if answered and "error" not in answer:
            answered.put(_key(cells[index]), answer)
        yield index, answer


def known(cells: Sequence[Cell], cache: str | None) -> int:
    """How many of the cells have an answer in the cache."""
    found = Cache(cache) if cache else None
    return sum(found is not None and found.get(_key(cell)) is not None for cell in cells)


def remembered(cells: Sequence[Cell], cache: str) -> list[dict[str, Any]]:
    """The answers that the cache has for these cells, in their order; nothing is priced."""
    found = Cache(cache)
    return [answer for cell in cells if (answer := found.get(_key(cell)))]


def _key(cell: Cell) -> str:
    return f"cell {json.dumps(dataclasses.asdict(cell))} {_sources()}"


@functools.cache
def _sources() -> str:
    """A digest of all that decides an answer: the kernels, their tuning, the pricing code, the compiler."""
    spec = importlib.util.find_spec("qwix_kernels")
    assert spec and spec.origin
    kernels = pathlib.Path(spec.origin).parent
    tuned = os.environ.get("QWIX_TUNING_CACHE") or "~/.cache/qwix/tuning.json"
    files = [*kernels.rglob("*.py"), *kernels.rglob("*.json"), pathlib.Path(tuned).expanduser()]
    here = ("bundles", "floors", "hlo", "problems", "replay", "shapes", "tpu_compile", "worker", "xla_worker")
    files += [pathlib.Path(__file__).parent / f"{name}.py" for name in here]
    versions = [importlib.metadata.version(p) for p in ("jax", "jaxlib", "libtpu")]
    return " ".join([digest_of_files(files), *versions, os.environ.get("LIBTPU_INIT_ARGS", "")])


class _Pool:
    """Threads that each talk to a child of their own."""

    def __init__(self, cells: Sequence[Cell], groups: list[list[int]], jobs: int, cache: str | None):
        self._cells, self._cache = cells, cache
        self._count = sum(map(len, groups))
        self._groups: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for group in groups:
            self._groups.put(group)
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._children: dict[int, _Child] = {}
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(min(jobs, len(groups)))
        ]

    def answers(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for thread in self._threads:
            thread.start()
        try:
            for _ in range(self._count):
                result = self._results.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            self._stopped.set()
            for worker in list(self._children.values()):
                worker.kill()
            for thread in self._threads:
                thread.join()

    def _work(self, number: int) -> None:
        with tempfile.TemporaryDirectory(prefix="qwix_price_") as folder:
            try:
                while not self._stopped.is_set():
                    self._price(number, self._groups.get_nowait(), folder)
            except queue.Empty:
                pass
            except BaseException as error:  # the consumer raises it
                self._results.put(error)
            finally:
                if worker := self._children.pop(number, None):
                    worker.close()

    def _price(self, number: int, group: list[int], folder: str) -> None:
        for index in group:
            if self._stopped.is_set():
                return
            worker = self._children.get(number)
            if worker is None:
                worker = self._children[number] = _Child(folder, self._cache)
            answer = worker.ask(self._cells[index])
            if answer is None:
                self._children.pop(number).close()
                error = f"The compiler's process died: {worker.last_words()}"
                answer = {**dataclasses.asdict(self._cells[index]), "error": error}
            self._results.put((index, answer))


class _Child(child.Child):
    """A worker.py process."""

    def __init__(self, folder: str, cache: str | None):
        arguments = [folder, *([os.path.abspath(cache)] if cache else [])]
        super().__init__("bench.worker", arguments, os.path.join(folder, "stderr"), _ROOT)

    def ask(self, cell: Cell) -> dict[str, Any] | None:
        """The answer, or None where the process died over it."""
        answer = self.request(dataclasses.asdict(cell))
        if answer and "error" in answer:
            return {**dataclasses.asdict(cell), **answer}
        return answer
