"""What the processes that price one op a request have in common: a dump folder, and a cache of programs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from bench import child, tpu_compile
from bench.cache import Cache

Price = Callable[[dict[str, Any], str, Cache | None], tpu_compile.ProgramCost]


def serve(price: Price, folder: str, cache: str | None = None) -> None:
    """Answers requests with the ops of the program that `price` compiles, given where its dump goes."""
    dump = os.path.join(folder, "dump")
    tpu_compile.prepare(dump)
    known = Cache(cache) if cache else None
    child.serve(lambda request: {"ops": [dataclasses.asdict(op) for op in price(request, dump, known).ops]})
