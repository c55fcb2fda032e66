"""The process that prices what XLA makes of a cell without a kernel: its baselines, and dispatch's fallback.

Their prices are the compiler's own estimates. The baselines have the layouts that XLA likes best, the op
those that the kernel has. A compiler that dumps its bundles takes five times as long over them, since XLA
tries many blocks for a matmul and would dump each; so this one dumps nothing.

Run as `python -m bench.xla_worker [CACHE]`, by worker.py.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from typing import Any

from bench import child, tpu_compile
from bench.cache import Cache
from bench.cells import Cell
from bench.shapes import scheme

PROGRAMS = ("op", "bf16", "same_op")


def price(cell: Cell, program: str, cache: Cache | None) -> tpu_compile.ProgramCost:
    """The cost of one of `PROGRAMS`: what dispatch runs for the cell, if that has no kernel; XLA's bfloat16;
    XLA's chain for the same op, of one batch.
    """
    import jax
    import jax.numpy as jnp

    from bench import problems

    wanted, shape = scheme(cell.scheme), (cell.m, cell.k, cell.n, cell.batch)
    if program == "op":
        op, arrays = problems.kernel(wanted, cell.implementation), problems.operands(wanted, *shape)
    elif program == "same_op":
        op, arrays = problems.xla_same_op(wanted), problems.shapes_of(wanted, *shape)
    else:
        sizes = (cell.batch, cell.m, cell.k), (cell.batch, cell.k, cell.n)
        op, arrays = problems.xla_bf16, [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fallback is in the answer
        return tpu_compile.price(cell.chip, None, op, *arrays, cache=cache, row_major=program == "op")


def main(cache_folder: str | None = None) -> None:
    tpu_compile.prepare(None)
    cache = Cache(cache_folder) if cache_folder else None

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        cost = price(Cell(**request["cell"]), request["program"], cache)
        return {"ops": [dataclasses.asdict(op) for op in cost.ops]}

    child.serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
