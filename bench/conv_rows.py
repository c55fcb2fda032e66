"""Convolutions timed where this runs: on its accelerator, or as ratios on its CPU. For conv.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench import shapes
from bench.shapes import ConvLayer


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
            data = {name: (op, [measured.data(like)]) for name, (op, like) in programs.items()}
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
