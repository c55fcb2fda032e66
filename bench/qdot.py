"""What qdot costs here. On a TPU or a GPU it is timed; on a CPU static prices and CPU ratios are printed.

    python -m bench.qdot --json FILE
    python -m bench.qdot --shapes 16x4096x4096,1024x4096x14336 --schemes w8a8,w4a16_g128 --chips v5e,v6e
    python -m bench.qdot --static=false --compare ENV/bin/python --check    # CPU ratios, against google/qwix

Three kinds of figures, never mixed:

    device    measured on the accelerator that is here, by its own profiler (device_trace.py)
    static    read from what the TPU's compiler emits, for a chip that is not here (price.py)
    cpu       wall clock on this CPU, only ever as a ratio of programs that ran in turn (cpu_ratios.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from bench import shapes as names

_CHIPS = flags.DEFINE_list("chips", ["v5e"], "TPUs to give static prices for.")
_SHAPES = flags.DEFINE_list("shapes", ["16x4096x4096", "1024x4096x4096"], "M x K x N, static or on a device.")
_SCHEMES = flags.DEFINE_list("schemes", ["w8a8", "w4a16_g128"], "Schemes, static or on a device.")
_CPU_SHAPES = flags.DEFINE_list("cpu_shapes", ["16x1024x1024", "256x1024x1024"], "M x K x N on the CPU.")
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


def parse_shape(text: str) -> tuple[int, int, int]:
    """(M, K, N). Raises ValueError for anything but three sizes of at least 1.

    >>> parse_shape("16x4096x4096")
    (16, 4096, 4096)
    """
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"A shape is M x K x N, such as 16x4096x4096; got {text!r}.")
    m, k, n = map(int, sizes)
    return m, k, n


def checked(
    shapes: Sequence[str], schemes: Sequence[str], *, on_cpu: bool = False
) -> list[tuple[int, int, int]]:
    """The shapes, parsed.

    Raises ValueError where one does not fit a scheme, and for a scheme that cpu_ratios.py does not time.
    """
    parsed = [parse_shape(text) for text in shapes]
    for scheme in map(names.scheme, schemes):
        if on_cpu and (
            scheme.tile_n > 1 or scheme.zero_point or scheme.static or scheme.weight == "float4_e2m1fn"
        ):
            raise ValueError(f"CPU ratios are of scales per column and tiles along K; not of {scheme.name}.")
        for _, k, n in parsed:
            if reason := scheme.misfit(k, n):
                raise ValueError(f"{scheme.name}: {reason}.")
    return parsed


def static_rows(chips: Sequence[str], schemes: Sequence[str], shapes: Sequence[tuple[int, int, int]]):
    """Answers of price.py, XLA's bfloat16 and its chain for the same op included."""
    from bench import cache, cells, pool

    wanted = [cell for m, k, n in shapes for cell in cells.cells_of(chips, schemes, [m], [(k, n)])]
    return list(pool.price(wanted, jobs=os.cpu_count() or 1, cache=cache.default_folder()))


def cpu_rows(groups: Sequence[Any]) -> list[dict[str, Any]]:
    """One row per scheme, shape and dtype: ratios to plain jnp and to the reference, where that ran."""
    from bench.cpu_ratios import REFERENCE

    rows = []
    for group in groups:
        for scheme in group.schemes:
            others = {"float32": "float32", "bfloat16": "bfloat16", "reference": f"{REFERENCE} {scheme}"}
            ratios = {key: group.ratio(scheme, other) for key, other in others.items()}
            rows.append(
                {"scheme": scheme, "m": group.m, "k": group.k, "n": group.n, "dtype": group.dtype}
                | {f"ratio_to_{key}": dataclasses.asdict(r) if r else None for key, r in ratios.items()}
            )
    return rows


def versions() -> dict[str, str | None]:
    """Of what decides the figures; None for what is not installed."""
    from importlib import metadata

    found: dict[str, str | None] = dict.fromkeys(("jax", "jaxlib", "libtpu"))
    for name in found:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _on_device(chip: Any) -> dict[str, Any]:
    from bench import measured

    shapes = checked(_SHAPES.value, _SCHEMES.value)
    return {"device": list(measured.measure(chip, _SCHEMES.value, shapes, _ROUNDS.value))}


def _without_device() -> dict[str, Any]:
    from bench import cpu_ratios, cpu_targets

    result: dict[str, Any] = {}
    static = checked(_SHAPES.value, _SCHEMES.value) if _STATIC.value else []
    if _CPU.value:
        shapes = checked(_CPU_SHAPES.value, _CPU_SCHEMES.value, on_cpu=True)
        reference = cpu_ratios.Reference(_COMPARE.value) if _COMPARE.value else None
        with reference or contextlib.nullcontext():
            options = {"rounds": _ROUNDS.value, "reference": reference}
            measured = cpu_ratios.measure(shapes, _CPU_SCHEMES.value, _CPU_DTYPES.value, **options)
            groups = list(measured)
        result["reference"] = reference and reference.version
        result["cpu"] = cpu_rows(groups)
        result["targets"] = [verdict.as_dict() for verdict in cpu_targets.verdicts(groups)]
    if static:
        result["static"] = static_rows(_CHIPS.value, _SCHEMES.value, static)
    return result


def undocumented(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets that are missed for no reason given."""
    return [t for t in result.get("targets", ()) if not t["met"] and not t["reason"]]


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    from bench import measured, qdot_tables

    try:
        chip = measured.local_chip()
        if chip and _COMPARE.value:
            raise ValueError("--compare is a comparison on a CPU; set JAX_PLATFORMS=cpu for it.")
        result = {"versions": versions()} | (_on_device(chip) if chip else _without_device())
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    qdot_tables.show(result)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")
    if _CHECK.value and (missed := undocumented(result)):
        sys.exit("Missed:\n" + "\n".join(f"  {t['said']}" for t in missed))
    if any("error" in row for row in result.get("static", ())):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
