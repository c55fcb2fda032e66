"""The table of price.py measured: the same programs on the accelerator that is here, by its own profiler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from qwix_kernels import chips, dispatch
from qwix_kernels.problem import dtype_bits

from bench import floors, problems
from bench.device_trace import time_on_device
from bench.shapes import scheme


def local_chip() -> chips.Chip | None:
    """The accelerator that jax runs on, or None for a CPU and for one that chips.py does not know."""
    found = chips.chip_of_kind(jax.devices()[0].device_kind)
    return None if found is None or found.platform == "cpu" else found


def measure(
    chip: chips.Chip, schemes: Sequence[str], shapes: Sequence[tuple[int, int, int]], rounds: int
) -> Iterator[dict[str, Any]]:
    """One row per (M, K, N) and scheme, losing ones included. Times are microseconds of device time.

    Our op, XLA's bfloat16 product and XLA's chain for the same op run in turn, round by round.
    """
    for m, k, n in shapes:
        for name in schemes:
            wanted = scheme(name)
            programs = {
                f"qdot_{kind}": (fn, [data(arguments)]) for kind, fn, arguments in _programs(wanted, m, k, n)
            }
            times = time_on_device(programs, rounds)
            plan = dispatch.explain(problems.problem(wanted, m, k, n), chip)
            yield row(chip.name, name, (m, k, n), times, floors.floor(chip, wanted, m, k, n).us) | {
                "implementation": plan.chosen,
                "note": "; ".join(f"not {other}: {reason}" for other, reason in plan.rejected),
            }


def row(
    chip: str, scheme_name: str, shape: tuple[int, int, int], times: dict[str, float], floor: float
) -> dict[str, Any]:
    """What is said about one cell. A ratio over 1 to XLA means that XLA is faster.

    >>> times = {"qdot_ours": 110.0, "qdot_bf16": 220.0, "qdot_same": 100.0}
    >>> r = row("v5e", "w8a8", (1024, 4096, 4096), times, 88.0)
    >>> r["percent_of_floor"], r["ratio_to_xla_bf16"], r["ratio_to_xla_same_op"], r["loses"]
    (80.0, 0.5, 1.1, True)
    """
    us, bf16, same = (times[f"qdot_{kind}"] for kind in ("ours", "bf16", "same"))
    m, k, n = shape
    return {
        "chip": chip,
        "scheme": scheme_name,
        "m": m,
        "k": k,
        "n": n,
        "us": us,
        "floor_us": floor,
        "percent_of_floor": 100 * floor / us,
        "xla_bf16_us": bf16,
        "xla_same_op_us": same,
        "ratio_to_xla_bf16": us / bf16,
        "ratio_to_xla_same_op": us / same,
        "loses": us > min(bf16, same),
    }


def _programs(wanted: Any, m: int, k: int, n: int) -> Iterator[tuple[str, Any, tuple]]:
    """(name, function, its arguments' shapes)"""
    yield "ours", problems.kernel(wanted), problems.operands(wanted, m, k, n)
    floats = tuple(jax.ShapeDtypeStruct((1, *s), jnp.bfloat16) for s in ((m, k), (k, n)))
    yield "bf16", problems.xla_bf16, floats
    yield "same", problems.xla_same_op(wanted), tuple(problems.shapes_of(wanted, m, k, n))


def data(shapes: Any) -> Any:
    """Arrays of these shapes: integers over their whole range, floats normal; all finite."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [_array(*pair) for pair in zip(keys, leaves, strict=True)])


def _array(key: jax.Array, like: Any) -> jax.Array:
    if not jnp.issubdtype(like.dtype, jnp.integer):
        return jax.random.normal(key, like.shape, jnp.float32).astype(like.dtype)
    info = jnp.iinfo(like.dtype)
    wide = jnp.int32 if dtype_bits(like.dtype.name) < 32 else like.dtype
    return jax.random.randint(key, like.shape, info.min, info.max + 1, wide).astype(like.dtype)
