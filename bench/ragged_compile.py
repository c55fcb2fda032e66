"""The process that prices the programs of the ragged suite: requests as ragged_price.py makes them.

Run as `python -m bench.ragged_compile FOLDER [CACHE]`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from typing import Any

from bench import child, tpu_compile
from bench.cache import Cache
from bench.shapes import RaggedLayer, scheme


def price(request: dict[str, Any], dump: str, cache: Cache | None) -> tpu_compile.ProgramCost:
    """The cost of the op as dispatch runs it, with the layer's group sizes."""
    from qwix_kernels import chips, dispatch

    from bench import ragged_problems

    layer, wanted, chip = RaggedLayer(**request["layer"]), scheme(request["scheme"]), request["chip"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fallback is in the row
        plan = dispatch.explain(ragged_problems.problem(wanted, layer), chips.chip(chip))
        known = ragged_problems.known(layer, plan.config.block_m) if plan.config else None
        op, arrays = ragged_problems.kernel(wanted), ragged_problems.operands(wanted, layer)
        return tpu_compile.price(chip, dump, op, *arrays, cache=cache, row_major=True, known=known)


def main(folder: str, cache: str | None = None) -> None:
    dump = os.path.join(folder, "dump")
    tpu_compile.prepare(dump)
    known = Cache(cache) if cache else None

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return {"ops": [dataclasses.asdict(op) for op in price(request, dump, known).ops]}

    child.serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
