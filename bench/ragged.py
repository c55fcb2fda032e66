"""What grouped matmuls cost here: timed on a TPU or a GPU; on a CPU static prices and CPU ratios.

    python -m bench.ragged --json FILE
    python -m bench.ragged --chips v6e --schemes w8a8,w4a16_g128
    python -m bench.ragged --static=false --cpu_groups 8,32

Three kinds of figures, never mixed:

    device    measured on the accelerator that is here, by its own profiler (device_trace.py)
    static    read from what the TPU's compiler emits, for a chip that is not here (ragged_price.py)
    cpu       wall clock on this CPU, only ever as a ratio of programs that ran in turn
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from bench import cache, op_tables, ragged_price, ragged_rows, shapes

_CHIPS = flags.DEFINE_list("chips", list(ragged_price.CHIPS), "TPUs to give static prices for.")
_SCHEMES = flags.DEFINE_list("schemes", ["w8a8", "w4a16_g128"], "Schemes, static or on a device.")
_CPU_SCHEMES = flags.DEFINE_list("cpu_schemes", ["w8a8", "w8a16", "w4a16_g128"], "Schemes on the CPU.")
_CPU_GROUPS = flags.DEFINE_list("cpu_groups", ["8"], "Numbers of groups on the CPU.")
_CPU_SHAPE = flags.DEFINE_string("cpu_shape", "512x512x512", "M x K x N on the CPU.")
_STATIC = flags.DEFINE_boolean("static", True, "Static prices, where no accelerator is here.")
_CPU = flags.DEFINE_boolean("cpu", True, "CPU ratios, where no accelerator is here.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "How often each program is timed.", lower_bound=2)
_JSON = flags.DEFINE_string("json", None, "Write everything to this file as well.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    from bench import measured, qdot_rows

    result: dict[str, Any] = {"versions": qdot_rows.versions()}
    static: list[ragged_price.Row] = []
    try:
        on_cpu = ragged_rows.cpu_layers(_CPU_SHAPE.value, _CPU_GROUPS.value)
        wanted = ragged_price.cells(_CHIPS.value, _SCHEMES.value)
        ragged_price.cells((), _CPU_SCHEMES.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    chip = measured.local_chip()
    if chip is not None:
        layers = [layer for model in shapes.RAGGED.values() for layer in model]
        result["device"] = list(ragged_rows.device_rows(chip, layers, _SCHEMES.value, _ROUNDS.value))
    else:
        if _CPU.value:
            result["cpu"] = list(ragged_rows.cpu_rows(on_cpu, _CPU_SCHEMES.value, _ROUNDS.value))
        if _STATIC.value:
            static = list(ragged_price.price(wanted, cache.default_folder()))
            result["static"] = [row.as_json() for row in static]
    op_tables.show(result)
    if static:
        ragged_price.show(static)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
