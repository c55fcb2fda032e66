"""The process that prices the programs of the ragged suite: requests as ragged_price.py makes them.

Run as `python -m bench.ragged_compile FOLDER [CACHE]`.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from bench import op_worker, tpu_compile
from bench.cache import Cache
from bench.shapes import RaggedLayer, scheme


def price(request: dict[str, Any], dump: str, cache: Cache | None) -> tpu_compile.ProgramCost:
    """The cost of the op as dispatch runs it, with the layer's group sizes."""
    from qwix_kernels import chips, dispatch
    from qwix_kernels.ragged_matmul.tpu_plan import Config

    from bench import ragged_problems

    layer, wanted, chip = RaggedLayer(**request["layer"]), scheme(request["scheme"]), request["chip"]
    given = Config(**request["config"]) if request.get("config") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fallback is in the row
        problem = ragged_problems.problem(wanted, layer)
        name = "mosaic_tpu" if given else None
        plan = dispatch.explain(problem, chips.chip(chip), implementation=name, config=given)
        known = ragged_problems.known(layer, plan.config.block_m) if plan.config else None
        op, arrays = ragged_problems.kernel(wanted, name, given), ragged_problems.operands(wanted, layer)
        return tpu_compile.price(chip, dump, op, *arrays, cache=cache, row_major=True, known=known)


if __name__ == "__main__":
    op_worker.serve(price, *sys.argv[1:])
