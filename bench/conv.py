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
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

from bench import cache, conv_price, op_tables, shapes
from bench.shapes import ConvLayer

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


def layers_called(names: Sequence[str] | None) -> list[ConvLayer]:
    """The layers with these names; all of them for None.

    Raises ValueError for a name of none.

    >>> [str(layer) for layer in layers_called(["square"])]
    ['3x3 8x56x56x256 -> 256']
    """
    every = [layer for model in shapes.CONVOLUTIONS.values() for layer in model]
    if names is None:
        return every
    known = {layer.name for layer in every}
    for name in names:
        if name not in known:
            raise ValueError(f"Unknown layer {name!r}; known: {', '.join(sorted(known))}.")
    return [layer for layer in every if layer.name in names]


def cpu_rows(layers: Sequence[ConvLayer], schemes: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Ratios to XLA's convolutions of float32 and bfloat16, one image; under 1 is faster."""
    import dataclasses

    from bench.cpu_ratios import Ratio, in_turn

    for layer in (dataclasses.replace(layer, images=1) for layer in layers):
        seconds = in_turn(_programs(layer, schemes), rounds)
        for scheme in schemes:
            ratios = {
                f"ratio_to_{other}": dataclasses.asdict(Ratio.of(seconds[scheme], seconds[other]))
                for other in ("float32", "bfloat16")
            }
            yield {"layer": str(layer), "scheme": scheme} | ratios


def _programs(layer: ConvLayer, schemes: Sequence[str]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    import jax
    import jax.numpy as jnp

    from bench import conv_problems, measured

    wide = lambda dtype: lambda a: jax.ShapeDtypeStruct(a.shape, dtype)
    floats = conv_problems.bf16_operands(layer)
    programs = {
        name: (conv_problems.xla_bf16(layer), jax.tree.map(wide(dtype), floats))
        for name, dtype in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16))
    }
    for scheme in schemes:
        programs[scheme] = conv_problems.kernel(layer, scheme), conv_problems.operands(layer, scheme)
    return {name: (jax.jit(op), measured.data(shapes)) for name, (op, shapes) in programs.items()}


def device_rows(chip: Any, layers: Sequence[ConvLayer], schemes: Sequence[str], rounds: int) -> Iterator[Any]:
    """Microseconds on the accelerator that is here, next to XLA's bfloat16."""
    from qwix_kernels import dispatch

    from bench import conv_problems, measured
    from bench.device_trace import time_on_device

    for layer in layers:
        for scheme in schemes:
            problem = conv_problems.problem(layer, scheme)
            programs = {
                "qconv_ours": (conv_problems.kernel(layer, scheme), conv_problems.operands(layer, scheme)),
                "qconv_bf16": (conv_problems.xla_bf16(layer), conv_problems.bf16_operands(layer)),
            }
            data = {name: (op, measured.data(like)) for name, (op, like) in programs.items()}
            times = time_on_device(data, rounds)
            plan = dispatch.explain(problem, chip)
            yield {
                "chip": chip.name,
                "layer": str(layer),
                "scheme": scheme,
                "implementation": plan.chosen,
                "us": times["qconv_ours"],
                "xla_bf16_us": times["qconv_bf16"],
                "percent_of_floor": 100 * plan.estimate.floor_us / times["qconv_ours"],
            }


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
        layers, cpu_layers = layers_called(_LAYERS.value), layers_called(_CPU_LAYERS.value)
        wanted = [c for c in conv_price.cells(_CHIPS.value, _SCHEMES.value) if c.layer in layers]
        conv_price.cells((), _CPU_SCHEMES.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    chip = measured.local_chip()
    if chip is not None:
        result["device"] = list(device_rows(chip, layers, _SCHEMES.value, _ROUNDS.value))
    else:
        if _CPU.value:
            result["cpu"] = list(cpu_rows(cpu_layers, _CPU_SCHEMES.value, _ROUNDS.value))
        if _STATIC.value:
            static = list(conv_price.price(wanted, cache.default_folder()))
            result["static"] = [row.as_json() for row in static]
    show(result, static)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
