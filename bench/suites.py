"""Fixed sets of cells: what `python -m bench.price --suite NAME` prices. Needs no jax.

    canonical   [M, 4096] times [4096, 4096], the schemes of docs/pricing.md
    matmul      every layer of shapes.MODELS on every chip: what the kernels are held to (targets.py)

The matmul suite has every scheme on the canonical shape, with prefill and decode; the main ones on the MLP of
Llama-3 8B, the weight-only ones with 64 rows too; w8a8 and w4a16_g128 on all layers of all models, and on
experts as batched matmuls. XLA's bfloat16 is priced for every shape; its chain for the same op, which takes
it the longest to compile, for prefill of the canonical shape and schemes. It is what two processors price in
half an hour; other combinations are priced by naming them (`--scheme`, `--model`, `--m`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from bench import shapes
from bench.cells import Cell, check_chips
from bench.shapes import BATCH_M, DECODE_M, PREFILL_M

SUITES = ("canonical", "matmul")
CANONICAL_M = (PREFILL_M, DECODE_M)
CANONICAL_SCHEMES = (
    "w8a8",
    "w8a8_g128",
    "w8a8_g256",
    "w4a8_g128",
    "w8a16_g128",
    "w4a16_g128",
    "wnf4a16_g64",
    "wf8af8",
    "wf8a16_g128",
)
ALL_SCHEMES = (
    *CANONICAL_SCHEMES,
    "w4a8",
    "w4a4",
    "w8a16",
    "w4a16",
    "wf8a16",
    "w4a16_g32",
    "w4a16_g64",
    "w4a16_g512",
    "w4af8_g128",
    "w8a8_b128",
    "wf8af8_b128",
    "w4a16_g128_z",
    "wmxfp8amxfp8",
    "wmxfp8a16",
    "wmxfp4a16",
    "wnvfp4a16",
    "w8a8_static",
    "w8a8_g128_static",
    "wf8af8_static",
)
MAIN_SCHEMES = ("w8a8", "w8a8_g128", "w4a8_g128", "w4a16_g128", "wnf4a16_g64", "wf8af8")
LAYER_SCHEMES = ("w8a8", "w4a16_g128")
# Rows of one expert: 16 and 1024 tokens over all of them, two (Mixtral) or six (DeepSeek) experts a token.
EXPERT_M = {"mixtral_8x7b": (8, 256), "deepseek_v2_lite_moe": (8, 96)}


@dataclasses.dataclass(frozen=True)
class Suite:
    """Cells, and why some combinations are not among them."""

    cells: tuple[Cell, ...]
    skipped: tuple[str, ...]


def suite(name: str, chips: Sequence[str], baselines: bool = True) -> Suite:
    """The suite called `name`, on these chips, with or without XLA's prices.

    Raises ValueError for a chip that cannot be priced.

    >>> len(suite("canonical", ["v5e"]).cells)
    18
    """
    check_chips(chips)
    square = [(4096, 4096)]
    if name == "canonical":
        parts = [_rows(chip, square, CANONICAL_M, CANONICAL_SCHEMES, True) for chip in chips]
    else:
        parts = [part for chip in chips for part in _matmul(chip)]
    cells = dict.fromkeys(cell for part in parts for cell in part.cells)
    if not baselines:
        cells = [dataclasses.replace(cell, baselines=False) for cell in cells]
    return Suite(tuple(cells), tuple(dict.fromkeys(why for part in parts for why in part.skipped)))


def _matmul(chip: str) -> list[Suite]:
    layers = dict.fromkeys((layer.k, layer.n) for model in shapes.MODELS.values() for layer in model)
    mlp = [(layer.k, layer.n) for layer in shapes.MODELS["llama3_8b"] if layer.name in ("gate_up", "down")]
    whole = [(4096, 4096), *mlp]
    rest = [layer for layer in layers if layer not in whole]
    both = (PREFILL_M, DECODE_M)
    weight_only = [name for name in MAIN_SCHEMES if shapes.scheme(name).is_weight_only]
    parts = [
        _rows(chip, whole[:1], (PREFILL_M,), CANONICAL_SCHEMES, True),
        _rows(chip, whole[:1], (PREFILL_M,), ALL_SCHEMES[len(CANONICAL_SCHEMES) :], False),
        _rows(chip, whole[:1], (DECODE_M,), ALL_SCHEMES, False),
        _rows(chip, mlp, both, MAIN_SCHEMES, False),
        _rows(chip, whole, (BATCH_M,), weight_only, False),
        _rows(chip, rest, both, LAYER_SCHEMES, False),
    ]
    for model, ms in EXPERT_M.items():
        experts = [layer for layer in shapes.MODELS[model] if layer.experts > 1]
        for layer in experts:
            parts.append(_rows(chip, [(layer.k, layer.n)], ms, LAYER_SCHEMES, False, layer.experts))
    return parts


def _rows(chip: str, layers, ms, schemes, same_op: bool, batch: int = 1) -> Suite:
    cells, skipped = [], {}
    for k, n in layers:
        for m in ms:
            for name in schemes:
                reason = shapes.scheme(name).misfit(k, n)
                if reason:
                    skipped[f"{name} on {k} x {n}: {reason}"] = None
                else:
                    cells.append(Cell(chip, name, m, k, n, same_op=same_op, batch=batch))
    return Suite(tuple(cells), tuple(skipped))


# Seconds of one processor, on the machine that the targets are checked on.
_START, _PREFILL_S, _DECODE_S, _BF16_S, _CHAIN_S = 10.0, 2.6, 0.7, 1.5, 5.0


def plan(cells: Sequence[Cell], skipped: Iterable[str], known: int, jobs: int) -> str:
    """What pricing these cells means: how many there are of what, how many are known, how long it takes."""
    by_kind = collections.Counter(
        (cell.chip, cell.m, f"{cell.batch} x " * (cell.batch > 1)) for cell in cells
    )
    lines = [f"{count:5} {chip} {batch}M={m}" for (chip, m, batch), count in sorted(by_kind.items())]
    lines += [f"left out: {why}" for why in skipped]
    plain = {(cell.chip, cell.batch, cell.m, cell.k, cell.n) for cell in cells if cell.baselines}
    chains = sum(cell.baselines and cell.same_op for cell in cells)
    seconds = sum(_PREFILL_S if cell.m * cell.batch > BATCH_M else _DECODE_S for cell in cells)
    seconds += _BF16_S * len(plain) + _CHAIN_S * chains
    seconds *= 1 - known / len(cells) if cells else 0
    lines.append(
        f"{len(cells)} cells, {known} of them priced before; {len(plain)} prices of XLA's bfloat16, "
        f"{chains} of its chains for the same op: about {(seconds / jobs + _START) / 60:.0f} minutes with "
        f"{jobs} jobs"
    )
    return "\n".join(lines)
