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

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

from bench import cache, op_tables, ragged_price, shapes
from bench.shapes import RaggedLayer

_CHIPS = flags.DEFINE_list("chips", list(ragged_price.CHIPS), "TPUs to give static prices for.")
_SCHEMES = flags.DEFINE_list("schemes", ["w8a8", "w4a16_g128"], "Schemes, static or on a device.")
_CPU_SCHEMES = flags.DEFINE_list("cpu_schemes", ["w8a8", "w8a16", "w4a16_g128"], "Schemes on the CPU.")
_CPU_GROUPS = flags.DEFINE_list("cpu_groups", ["8"], "Numbers of groups on the CPU.")
_CPU_SHAPE = flags.DEFINE_string("cpu_shape", "512x512x512", "M x K x N on the CPU.")
_STATIC = flags.DEFINE_boolean("static", True, "Static prices, where no accelerator is here.")
_CPU = flags.DEFINE_boolean("cpu", True, "CPU ratios, where no accelerator is here.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "How often each program is timed.", lower_bound=2)
_JSON = flags.DEFINE_string("json", None, "Write everything to this file as well.")
FLOATS = ("float32", "bfloat16")


def cpu_layers(shape: str, groups: Sequence[str]) -> list[RaggedLayer]:
    """Layers of this shape, for each number of groups balanced and with half of the groups empty.

    Raises ValueError for what is no shape, or groups that do not divide the rows.

    >>> [str(layer) for layer in cpu_layers("64x8x4", ["2"])]
    ['cpu 2 experts, 64 x 8 x 4', 'cpu empty 2 experts, 64 x 8 x 4']
    """
    try:
        m, k, n = map(int, shape.split("x"))
        counts = [int(g) for g in groups]
    except ValueError:
        raise ValueError(
            f"--cpu_shape is MxKxN and --cpu_groups are numbers, got {shape}, {groups}."
        ) from None
    for count in counts:
        if count < 1 or m % count:
            raise ValueError(f"{count} groups do not divide {m} rows.")
    return [RaggedLayer("cpu", g, m, k, n, sizes) for g in counts for sizes in ("balanced", "empty")]


def cpu_rows(layers: Sequence[RaggedLayer], schemes: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Ratios to `jax.lax.ragged_dot` of float32 and bfloat16; under 1 is faster."""
    from bench.cpu_ratios import Ratio, in_turn

    for layer in layers:
        seconds = in_turn(_programs(layer, schemes), rounds)
        for scheme in schemes:
            ratios = {
                f"ratio_to_{other}": dataclasses.asdict(Ratio.of(seconds[scheme], seconds[other]))
                for other in FLOATS
            }
            yield {"layer": str(layer), "scheme": scheme} | ratios


def _programs(layer: RaggedLayer, schemes: Sequence[str]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Jitted programs and their data; the group sizes are data too."""
    import jax
    import jax.numpy as jnp

    from bench import measured, ragged_problems

    sizes = jnp.asarray(layer.group_sizes(), jnp.int32)
    like = lambda dtype: [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in ((layer.rows, layer.k), (layer.experts, layer.k, layer.n))
    ]
    programs: dict[str, tuple[Any, tuple[Any, ...]]] = {
        dtype: (jax.jit(jax.lax.ragged_dot), (*measured.data(like(dtype)), sizes)) for dtype in FLOATS
    }
    for name in schemes:
        scheme = shapes.scheme(name)
        lhs, rhs, _ = ragged_problems.operands(scheme, layer)
        programs[name] = jax.jit(ragged_problems.kernel(scheme)), (*measured.data((lhs, rhs)), sizes)
    return programs


def device_rows(
    chip: Any, layers: Sequence[RaggedLayer], schemes: Sequence[str], rounds: int
) -> Iterator[Any]:
    """Microseconds on the accelerator that is here, next to XLA's ragged dot of bfloat16."""
    from qwix_kernels import dispatch

    from bench import ragged_problems
    from bench.device_trace import time_on_device

    for layer in layers:
        for scheme in schemes:
            programs = _programs(layer, [scheme])
            data = {"qgmm_ours": programs[scheme], "qgmm_bf16": programs["bfloat16"]}
            times = time_on_device(data, rounds)
            plan = dispatch.explain(ragged_problems.problem(shapes.scheme(scheme), layer), chip)
            floor = max(ragged_problems.floor(shapes.scheme(scheme), layer, chip))
            yield {
                "chip": chip.name,
                "layer": str(layer),
                "scheme": scheme,
                "implementation": plan.chosen,
                "us": times["qgmm_ours"],
                "xla_bf16_us": times["qgmm_bf16"],
                "percent_of_floor": 100 * floor / times["qgmm_ours"],
            }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    from bench import measured, qdot_rows

    result: dict[str, Any] = {"versions": qdot_rows.versions()}
    static: list[ragged_price.Row] = []
    try:
        on_cpu = cpu_layers(_CPU_SHAPE.value, _CPU_GROUPS.value)
        wanted = ragged_price.cells(_CHIPS.value, _SCHEMES.value)
        ragged_price.cells((), _CPU_SCHEMES.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    chip = measured.local_chip()
    if chip is not None:
        layers = [layer for model in shapes.RAGGED.values() for layer in model]
        result["device"] = list(device_rows(chip, layers, _SCHEMES.value, _ROUNDS.value))
    else:
        if _CPU.value:
            result["cpu"] = list(cpu_rows(on_cpu, _CPU_SCHEMES.value, _ROUNDS.value))
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
