"""Prices layers with given blocks in compiling processes, several at a time. Needs no jax itself."""

from __future__ import annotations

import contextlib
import os
import queue
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from bench import op_suite, tune_ops
from bench.tune_ops import LayerCell

MODULES = {"conv": "bench.conv_compile", "ragged": "bench.ragged_compile"}


@contextlib.contextmanager
def pricer(op: str, jobs: int, cache: str | None) -> Iterator[Any]:
    """A function of cells of one op that gives (index, answer) as they come; its processes end with it."""
    with tempfile.TemporaryDirectory(prefix="qwix_tune_") as folder, ThreadPoolExecutor(jobs) as threads:
        idle: queue.SimpleQueue[op_suite.Worker] = queue.SimpleQueue()
        workers = []
        for i in range(jobs):
            own = os.path.join(folder, str(i))
            os.mkdir(own)
            arguments = [own, *([os.path.abspath(cache)] if cache else [])]
            workers.append(op_suite.Worker(MODULES[op], arguments, os.path.join(own, "stderr")))
            idle.put(workers[-1])

        def one(index: int, cell: LayerCell) -> tuple[int, dict[str, Any]]:
            worker = idle.get()
            try:
                return index, tune_ops.answer(cell, worker.ask)
            finally:
                idle.put(worker)

        def price(cells: Sequence[LayerCell]) -> Iterator[tuple[int, dict[str, Any]]]:
            futures = [threads.submit(one, index, cell) for index, cell in enumerate(cells)]
            for future in as_completed(futures):
                yield future.result()

        yield price
        for worker in workers:
            worker.close()
