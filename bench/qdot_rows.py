"""What qdot.py prints, row by row, for the cells that it is asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from bench import shapes as names


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


def undocumented(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets that are missed for no reason given."""
    return [t for t in result.get("targets", ()) if not t["met"] and not t["reason"]]
