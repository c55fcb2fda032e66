"""A report as a picture: the SQNR of each weight over its bytes before and after, in the model's order."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwix._src.report import Report

# Of the layers' names, as many as stay readable.
_MAX_LABELS = 40


def plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes the picture; the path's suffix picks the format (.png, .svg, .pdf).

    Raises:
      ImportError: without matplotlib.
      ValueError: when no op of the report has a weight.
    """
    try:
        # Not pyplot: a Figure alone needs no display and keeps no global state.
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "Report.plot draws with matplotlib, which the extra `examples` brings: pip install "
            "'qwix[examples]', "
            "or pip install matplotlib."
        ) from None
    rows = list({(row.path, row.weight): row for row in report.rows if row.weight is not None}.values())
    if not rows:
        raise ValueError("There is nothing to plot: no op of this report has a weight.")
    figure = Figure(figsize=(max(6.4, min(20.0, 0.22 * len(rows))), 6.4), layout="constrained")
    quality, size = figure.subplots(2, 1, sharex=True)
    places = range(len(rows))
    shown = [
        row.sqnr_db if row.sqnr_db is not None and math.isfinite(row.sqnr_db) else math.nan for row in rows
    ]
    quality.plot(places, shown, marker="o", markersize=3, linewidth=0.8)
    quality.set_ylabel("SQNR of the weight, dB")
    quality.set_title(report.title)
    size.bar(places, [row.bytes_before / 1e6 for row in rows], color="0.85", label="before")
    size.bar(places, [row.bytes_after / 1e6 for row in rows], label="after")
    size.set_ylabel("MB on device")
    size.legend()
    step = -(-len(rows) // _MAX_LABELS)
    size.set_xticks(
        places[::step], [f"{row.path}/{row.weight}" for row in rows[::step]], rotation=90, fontsize="x-small"
    )
    figure.savefig(path)
