"""What convolutions cost here: timed on a TPU or a GPU; on a CPU static prices and CPU ratios.

    python -m bench.conv --json FILE
    python -m bench.conv --chips v5e,v6e --schemes w8a8_static,w8a8
    python -m bench.conv --static=false --cpu_layers "square,28,conv4 1x1"

Three kinds of figures, never mixed:

    device    measured on the accelerator that is here, by its own profiler (device_trace.py)
    static    read from what the TPU's compiler emits, for a chip that is not here (conv_price.py)
    cpu       wall clock on this CPU, only ever as a ratio of programs that ran in turn
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from bench import cache, conv_price, conv_rows, op_tables, shapes

_CHIPS = flags.DEFINE_list("chips", list(conv_price.CHIPS), "TPUs to give static prices for.")
_SCHEMES = flags.DEFINE_list("schemes", ["w8a8_static"], f"Of {', '.join(shapes.CONV_SCHEMES)}.")
_LAYERS = flags.DEFINE_list("layers", None, "Names of layers of shapes.CONVOLUTIONS; all of them by default.")
_CPU_LAYERS = flags.DEFINE_list(
    "cpu_layers",
    ["conv3 3x3", "conv4 3x3", "conv4 1x1", "28", "14"],
    "Names of layers on the CPU, one image.",
)
_CPU_SCHEMES = flags.DEFINE_list("cpu_schemes", list(shapes.CONV_SCHEMES), "Schemes on the CPU.")
_STATIC = flags.DEFINE_boolean("static", True, "Static prices, where no accelerator is here.")
_CPU = flags.DEFINE_boolean("cpu", True, "CPU ratios, where no accelerator is here.")
_ROUNDS = flags.DEFINE_integer("rounds", 11, "How often each program is timed.", lower_bound=2)
_JSON = flags.DEFINE_string("json", None, "Write everything to this file as well.")


def show(result: dict[str, Any], static: Sequence[conv_price.Row]) -> None:
    """Prints whatever kinds of figures there are, losing ones included."""
    op_tables.show(result)
    if static:
        conv_price.show(static)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    from bench import measured, qdot_rows

    static: list[conv_price.Row] = []
    result: dict[str, Any] = {"versions": qdot_rows.versions()}
    try:
        layers, cpu_layers = (
            conv_rows.layers_called(_LAYERS.value),
            conv_rows.layers_called(_CPU_LAYERS.value),
        )
        wanted = [c for c in conv_price.cells(_CHIPS.value, _SCHEMES.value) if c.layer in layers]
        conv_price.cells((), _CPU_SCHEMES.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    chip = measured.local_chip()
    if chip is not None:
        result["device"] = list(conv_rows.device_rows(chip, layers, _SCHEMES.value, _ROUNDS.value))
    else:
        if _CPU.value:
            result["cpu"] = list(conv_rows.cpu_rows(cpu_layers, _CPU_SCHEMES.value, _ROUNDS.value))
        if _STATIC.value:
            static = list(conv_price.price(wanted, cache.default_folder()))
            result["static"] = [row.as_json() for row in static]
    show(result, static)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
