"""The parts of docs/performance.md that were measured, on a CPU: figures that bench/recorded/ holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.page_cells import table


def cpu_section(cpu: Mapping[str, Any]) -> Iterator[str]:
    """Ratios that `bench.qdot --json` wrote."""
    yield "## CPU, measured"
    yield (
        "Wall clock of `python -m bench.qdot --static=false`, programs in turn in one process (google/qwix "
        "in one of its own), as ratios of times with the quartiles over the rounds; under 1 is faster. Not "
        "comparable with anything static."
    )
    others = {"float32": "x jnp float32", "bfloat16": "x jnp bfloat16", "reference": "x google/qwix"}
    spread = lambda r: "-" if r is None else "{median:.2f} ({low:.2f}-{high:.2f})".format(**r)
    yield table(
        ("scheme", "M x K x N", "activations", *others.values()),
        (
            (
                row["scheme"],
                f"{row['m']} x {row['k']} x {row['n']}",
                row["dtype"],
                *(spread(row[f"ratio_to_{other}"]) for other in others),
            )
            for row in cpu["cpu"]
        ),
    )
    met = sum(target["met"] for target in cpu["targets"])
    yield f"CPU targets: {met} of {len(cpu['targets'])} met."
    missed = [f"- {target['said']}" for target in cpu["targets"] if not target["met"]]
    if missed:
        yield "\n".join(missed)


def compile_time_section(compile_time: Mapping[str, Any]) -> Iterator[str]:
    """Ratios that `bench.compile_time --json` wrote."""
    yield "## Compile time, measured"
    yield (
        "`python -m bench.compile_time`: processor time to trace, lower and compile the SmolLM2 example, "
        "over that of its bfloat16 original, in turn in one process; for a TPU by its own compiler."
    )
    header = ("scheme", "for", "x bfloat16", "quartiles", "HLO instructions, x bfloat16", "kernels")
    yield table(
        header,
        (
            (
                row["scheme"],
                row["target"],
                f"{row['ratio']:.2f}",
                f"{row['low']:.2f}-{row['high']:.2f}",
                f"{row['instructions_ratio']:.2f}",
                str(row["kernels"]),
            )
            for row in compile_time["rows"]
        ),
    )
