"""Weak scaling to 256 chips, by arithmetic: from the bytes of the compiled collectives, and rates of chips.

Each device keeps the same number of tokens while devices are added; a model's weights and gradients are cut
over all of them (FSDP, ZeRO-3). In a step each weight is gathered twice, for the forward pass and for the
backward one, and each gradient is reduced and scattered once. With n devices a ring sends (n - 1) / n of a
weight's bytes per gather, so the bytes hardly grow; what they are per weight is taken from the programs that
bench.scale has compiled. Compute is 6 operations per weight and token, at the peak of the chip. Compute and
sending overlap, so the greater of both is the step: nobody reaches that, but what binds is seen.

Bandwidth: both directions of one ring, per chip, of "How to Scale Your Model" (jax-ml.github.io/scaling-book,
Rooflines and TPUs): 45 GB/s per direction on v5e, 90 on the others. Google Cloud's own figures per chip (200
GB/s over four ports on v5e, 400 on v6e, 1200 both ways over six on v5p) are a tenth more. Nothing here is
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwix_kernels.chips import CHIPS

RING_GBPS = {"v5e": 90, "v5p": 180, "v6e": 180, "v7x": 180}
WEIGHTS, TOKENS = 8.0e9, 8192  # Llama 3 8B; tokens per chip and step
SIZES = (8, 16, 32, 64, 128, 256)
WIDE = 2.0  # bytes of a bfloat16 weight or gradient


def per_weight(cells: Sequence[Mapping[str, Any]], values: int) -> dict[str, float]:
    """{op: bytes on the wire per value and ring}, of the compiled quantized gather and reduce-scatter."""
    found = {}
    for op in ("all_gather of QArrays", "reduce_scatter int8"):
        rows = [c for c in cells if c["op"] == op]
        if rows:
            n = rows[0]["devices"]
            found[op] = rows[0]["bytes"] / values / ((n - 1) / n)
    return found


def rows(chips: Sequence[str], narrow: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """A line per chip and number of chips: bfloat16 on the wire, and int8."""
    gather, scatter = narrow["all_gather of QArrays"], narrow["reduce_scatter int8"]
    for name in chips:
        chip = CHIPS[name]
        compute_ms = 6 * WEIGHTS * TOKENS / (chip.bf16 * chip.cores * 1e12) * 1e3
        for n in SIZES:
            sent = {"bf16": 3 * WIDE, "int8": 2 * gather + scatter}
            line: dict[str, Any] = {"chip": name, "chips": n, "compute_ms": compute_ms}
            for kind, each in sent.items():
                total = (n - 1) / n * WEIGHTS * each
                wire_ms = total / (RING_GBPS[name] * 1e9) * 1e3
                line |= {
                    f"{kind}_bytes": total,
                    f"{kind}_wire_ms": wire_ms,
                    f"{kind}_efficiency": compute_ms / max(compute_ms, wire_ms),
                }
            yield line
