"""All figures of bench.scale, in one dict."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from bench import scale_cells, scale_compile, scale_memory, scale_plan

_CHIPS = ("v5e", "v5p", "v6e", "v7x")


def measure(meshes: Sequence[str], only: str, width: int, layers: int) -> dict[str, Any]:
    """All figures, as they go to the JSON file."""
    result: dict[str, Any] = {"cells": []}
    for cell in scale_compile.rows(meshes, only):
        result["cells"].append(cell)
        print(f"{cell['mesh']:12} {cell['op']:34} {cell['collectives']}", file=sys.stderr, flush=True)
    if layers:
        here = [name for name in meshes if name in scale_compile.MESHES]
        result["memory"] = [scale_memory.row(name, width, layers) for name in here]
    narrow = scale_plan.per_weight(result["cells"], scale_cells.K * scale_cells.N)
    if len(narrow) == 2:
        result["plan"] = list(scale_plan.rows(_CHIPS, narrow))
    return result
