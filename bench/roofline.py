"""A roofline plot per chip, as SVG that is the same, byte for byte, for the same answers.

Across: operations per byte that must be moved, the arithmetic intensity. Up: operations per second at the
static time. The roof is what HBM can feed, then what the units can do (Williams, Waterman and Patterson, CACM
52, 2009).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from qwix_kernels.chips import CHIPS, Chip

from bench.suites import MAIN_SCHEMES
from bench.tpu_compile import device_bandwidth, device_rate

# Told apart without colours too: each has a marker of its own.
_MARKERS = dict(zip(MAIN_SCHEMES, "osD^vP", strict=True))
_STYLE = {"svg.hashsalt": "qwix", "svg.fonttype": "none", "font.size": 9, "path.simplify": False}


def point(chip: Chip, answer: Mapping[str, Any]) -> tuple[float, float]:
    """(operations per unavoidable byte, operations per second at the static time) of a priced cell."""
    work = 2.0 * answer["batch"] * answer["m"] * answer["k"] * answer["n"]
    moved = answer["hbm_floor_us"] * 1e-6 * device_bandwidth(chip)
    return work / moved, work / answer["static_us"] * 1e6


def roofs(chip: Chip) -> dict[str, float]:
    """Peak operations per second of a jax device by unit, of the units that the chip has."""
    rates = {"bf16": chip.bf16, "int8": chip.int8, "fp8": chip.fp8, "int4": chip.int4}
    return {unit: device_rate(chip, rate) for unit, rate in rates.items() if rate}


def svg(chip: str, answers: Sequence[Mapping[str, Any]]) -> str:
    """The plot of the main schemes' cells on one chip."""
    spec = CHIPS[chip]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.add_subplot()
        _draw_roofs(axes, spec)
        for scheme, marker in _MARKERS.items():
            points = [point(spec, a) for a in answers if a["scheme"] == scheme]
            if points:
                options = {"s": 14, "alpha": 0.7, "linewidths": 0}
                axes.scatter(*zip(*points, strict=True), marker=marker, label=scheme, **options)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="operations per byte that must be moved",
            ylabel="operations per second, static",
            title=f"{chip}: one jax device, static",
        )
        axes.legend(loc="lower right", fontsize=8, ncols=2)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return "\n".join(text.rstrip() for text in buffer.getvalue().splitlines()) + "\n"


def _draw_roofs(axes: Axes, chip: Chip) -> None:
    across = np.geomspace(1, 1e4, 200)
    for (unit, peak), style in zip(roofs(chip).items(), ("-", "--", "-.", ":"), strict=False):
        axes.plot(
            across,
            np.minimum(peak, across * device_bandwidth(chip)),
            style,
            color="0.35",
            linewidth=1,
            zorder=0,
        )
        axes.annotate(unit, (across[-1], peak), (-2, 2), textcoords="offset points", ha="right", fontsize=8)
