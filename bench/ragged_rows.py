"""Grouped matmuls timed where this runs: on its accelerator, or as ratios on its CPU. For ragged.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from bench import shapes
from bench.shapes import RaggedLayer

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
            named = {"qgmm_ours": programs[scheme], "qgmm_bf16": programs["bfloat16"]}
            times = time_on_device({name: (fn, [data]) for name, (fn, data) in named.items()}, rounds)
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
