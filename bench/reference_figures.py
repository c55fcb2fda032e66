"""What google/qwix 0.1.8 compiles to, for comparison. Static: the compiler's estimates, nothing was measured.

Thousands of cycles of one jax device for [M, 4096] times [4096, 4096] with bfloat16 activations, the sum over
its XLA ops, dynamic quantization of the activations included (jax 0.12.0.1, libtpu 0.0.50.1). A cell that is
missing was not compiled.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = "google/qwix 0.1.8, static"
K, N = 4096, 4096

# (scheme, M) -> {chip: thousands of cycles}
KCYCLES: Mapping[tuple[str, int], Mapping[str, int]] = {
    ("w8a8", 1024): {"v5e": 265, "v6e": 149, "v7x": 127},
    ("w8a8_g128", 1024): {"v5e": 1662, "v6e": 1018, "v7x": 616},
    ("w8a16_g128", 1024): {"v5e": 472, "v6e": 241, "v7x": 215},
    ("w4a16_g128", 1024): {"v5e": 455, "v6e": 232, "v7x": 211},
    ("wf8af8", 1024): {"v5e": 398, "v6e": 163, "v7x": 91},
    ("wf8a16_g128", 1024): {"v5e": 472, "v6e": 241, "v7x": 215},
    ("w8a16_g128", 16): {"v5e": 212, "v6e": 137},
    ("w4a16_g128", 16): {"v5e": 195, "v6e": 128},
    ("wf8a16_g128", 16): {"v5e": 212, "v6e": 137},
}


def kcycles(chip: str, scheme: str, m: int, k: int, n: int) -> int | None:
    """The figure for a cell, or None where there is none.

    >>> kcycles("v5e", "w8a8", 1024, 4096, 4096), kcycles("v5p", "w8a8", 1024, 4096, 4096)
    (265, None)
    """
    return KCYCLES.get((scheme, m), {}).get(chip) if (k, n) == (K, N) else None
