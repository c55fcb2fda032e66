"""What qdot costs here. On a TPU or a GPU it is timed; on a CPU static prices and CPU ratios are printed.

    python -m bench.qdot --json FILE    # on a GPU: prefill and decode in every scheme
    python -m bench.qdot --shapes 16x4096x4096,1024x4096x14336 --schemes w8a8,w4a16_g128 --chips v5e,v6e
    python -m bench.qdot --static=false --compare ENV/bin/python --check    # CPU ratios, against google/qwix

Three kinds of figures, never mixed:

    device    measured on the accelerator that is here, by its own profiler (device_trace.py); on a GPU next
              to what the device does at best and to XLA's own 8-bit products (gpu_measured.py)
    static    read from what the TPU's compiler emits, for a chip that is not here (price.py)
    cpu       wall clock on this CPU, only ever as a ratio of programs that ran in turn (cpu_ratios.py)
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from bench import qdot_rows

_CHIPS = flags.DEFINE_list("chips", ["v5e"], "TPUs to give static prices for.")
_SHAPES = flags.DEFINE_list("shapes", ["16x4096x4096", "1024x4096x4096"], "M x K x N, static or on a device.")
_SCHEMES = flags.DEFINE_list("schemes", ["w8a8", "w4a16_g128"], "Schemes, static or on a device.")
_CPU_SHAPES = flags.DEFINE_list(
    "cpu_shapes", ["16x1024x1024", "256x1024x1024", "512x1024x1024"], "M x K x N on the CPU."
)
_CPU_SCHEMES = flags.DEFINE_list(
    "cpu_schemes",
    [f"{scheme}{tile}" for scheme in ("w8a8", "w4a8", "w8a16", "w4a16") for tile in ("", "_g128")]
    + ["wnf4a16_g64", "wf8af8", "wf8a16_g128"],
    "Schemes on the CPU; a16 means that the activations stay what they are.",
)
_CPU_DTYPES = flags.DEFINE_list(
    "cpu_dtypes", ["float32", "bfloat16"], "Dtypes of the activations on the CPU."
)
_STATIC = flags.DEFINE_boolean("static", True, "Static prices, where no accelerator is here.")
_CPU = flags.DEFINE_boolean("cpu", True, "CPU ratios, where no accelerator is here.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "How often each program is timed.", lower_bound=2)
_COMPARE = flags.DEFINE_string(
    "compare", None, "An interpreter whose environment has google's qwix; it is timed beside ours on the CPU."
)
_JSON = flags.DEFINE_string("json", None, "Write everything to this file as well.")
_CHECK = flags.DEFINE_boolean(
    "check", False, "Exit with 1 where a CPU target is missed that is not documented as missed."
)


def _on_device(chip: Any) -> dict[str, Any]:
    from bench import measured

    if chip.platform == "cuda":
        return _on_gpu(chip)
    shapes = qdot_rows.checked(_SHAPES.value, _SCHEMES.value)
    return {"device": list(measured.measure(chip, _SCHEMES.value, shapes, _ROUNDS.value))}


def _on_gpu(chip: Any) -> dict[str, Any]:
    """The cells that --shapes and --schemes say; by default those that gpu_measured.py says."""
    from bench import gpu_measured, gpu_problems, qdot_tables

    cells = gpu_measured.default_cells(chip.name)
    if flags.FLAGS["shapes"].present or flags.FLAGS["schemes"].present:
        schemes = _SCHEMES.value if flags.FLAGS["schemes"].present else gpu_problems.SCHEMES
        shapes = qdot_rows.checked(_SHAPES.value, schemes)
        cells = gpu_problems.asked(chip.name, shapes, schemes)
    rows = []
    for row in gpu_measured.measure(chip, cells, _ROUNDS.value):
        print(qdot_tables.gpu_summary(row), file=sys.stderr, flush=True)
        rows.append(row)
    import jax

    kind = jax.devices()[0].device_kind
    return {"device_kind": kind, "limits": gpu_measured.limits(_ROUNDS.value), "gpu": rows}


def _without_device() -> dict[str, Any]:
    from bench import cpu_ratios, cpu_targets

    result: dict[str, Any] = {}
    static = qdot_rows.checked(_SHAPES.value, _SCHEMES.value) if _STATIC.value else []
    if _CPU.value:
        shapes = qdot_rows.checked(_CPU_SHAPES.value, _CPU_SCHEMES.value, on_cpu=True)
        reference = cpu_ratios.Reference(_COMPARE.value) if _COMPARE.value else None
        with reference or contextlib.nullcontext():
            options = {"rounds": _ROUNDS.value, "reference": reference}
            measured = cpu_ratios.measure(shapes, _CPU_SCHEMES.value, _CPU_DTYPES.value, **options)
            groups = list(measured)
        result["reference"] = reference and reference.version
        result["cpu"] = qdot_rows.cpu_rows(groups)
        result["targets"] = [verdict.as_dict() for verdict in cpu_targets.verdicts(groups)]
    if static:
        result["static"] = qdot_rows.static_rows(_CHIPS.value, _SCHEMES.value, static)
    return result


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    from bench import measured, qdot_tables

    try:
        chip = measured.local_chip()
        if chip and _COMPARE.value:
            raise ValueError("--compare is a comparison on a CPU; set JAX_PLATFORMS=cpu for it.")
        result = {"versions": qdot_rows.versions()} | (_on_device(chip) if chip else _without_device())
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    qdot_tables.show(result)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")
    if _CHECK.value and (missed := qdot_rows.undocumented(result)):
        sys.exit("Missed:\n" + "\n".join(f"  {t['said']}" for t in missed))
    if any("error" in row for row in result.get("static", ())):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
