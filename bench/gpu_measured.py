"""The table of matmuls measured on the GPU that is here, by its own profiler.

What a figure is held against is measured on the same device, minutes apart at most:

    copy     GB/s of an elementwise pass over 1 GiB, both ways: what decode can hope for
    peak     the best rate of XLA's bfloat16 products here, times 2 for 8-bit operands: what prefill can
             hope for
    XLA      its bfloat16 product, its chain of ops for the same scheme, and (8-bit schemes) its own 8-bit
             product without scales

Small weights would stay in the L2 cache from run to run, as they never do in a model: runs rotate over copies
of the weight of together more than `ROTATE_BYTES`. A cell that fails is a row with its error.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from qwix_kernels import chips, dispatch
from qwix_kernels.problem import dtype_bits

from bench import device_trace, gpu_problems, measured, problems
from bench.gpu_problems import Cell
from bench.shapes import scheme

ROTATE_BYTES = 128 << 20  # the L2 caches of the GPUs in chips.py hold 50 and 126 MB
_COPIED = 1 << 28  # float32 values
_PEAK = (8192, 8192, 8192)
_COMPILING = 8  # programs at a time
_FEW_ROWS = 256  # beyond, weights are read once from HBM for much work


def default_cells(chip: str) -> list[Cell]:
    """int8 and fp8 prefill of 4096^3, and every scheme at prefill and decode."""
    big = [Cell(chip, name, *gpu_problems.PREFILL[0]) for name in gpu_problems.SCHEMES]
    return big + [Cell(chip, name, *gpu_problems.DECODE[0]) for name in gpu_problems.SCHEMES]


def limits(rounds: int) -> dict[str, float]:
    """What this device does at best: {"copy_gbps", "bf16_tflops"}."""
    ones = jnp.ones(_COPIED, jnp.float32)
    m, k, n = _PEAK
    square = tuple(measured.data([jax.ShapeDtypeStruct((1, *s), jnp.bfloat16) for s in ((m, k), (n, k))]))
    programs = {"copy": (lambda x: x + 1, [(ones,)]), "peak": (gpu_problems.xla_bf16, [square])}
    times = device_trace.time_on_device(programs, rounds)
    copied, multiplied = 2 * ones.nbytes, 2 * m * k * n
    return {"copy_gbps": copied / times["copy"] / 1e3, "bf16_tflops": multiplied / times["peak"] / 1e6}


def measure(chip: chips.Chip, cells: Sequence[Cell], rounds: int) -> Iterator[dict[str, Any]]:
    """A row per cell, losing ones included; microseconds of device time per run.

    All programs are compiled before the first is timed: XLA tunes its own on the device.
    """
    wanted = dict.fromkeys(key for cell in cells for key in _baselines(cell).values())
    with concurrent.futures.ThreadPoolExecutor(_COMPILING) as pool:
        own = {cell: pool.submit(_own, cell) for cell in cells}
        baselines = {key: pool.submit(_baseline, *key) for key in wanted}
    for cell, futures in own.items():
        try:
            programs = dict(futures.result())
            programs |= {name: baselines[key].result() for name, key in _baselines(cell).items()}
            yield _row(chip, cell, programs, rounds)
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            text = f"{type(error).__name__}: {error}"
            yield {**_named(cell), "error": text[:500]}


def _named(cell: Cell) -> dict[str, Any]:
    return {"chip": cell.chip, "scheme": cell.scheme, "m": cell.m, "k": cell.k, "n": cell.n}


def _row(
    chip: chips.Chip, cell: Cell, programs: Mapping[str, device_trace.Program], rounds: int
) -> dict[str, Any]:
    times = device_trace.time_compiled(programs, rounds)
    plan = dispatch.explain(cell.problem, chip)
    compute, memory = cell.floor(chip)
    return {
        **_named(cell),
        "implementation": plan.chosen,
        "us": times["ours"],
        "floor_us": max(compute, memory),
        "memory_bound": memory > compute,
        "bytes": memory * chip.hbm_gbps * 1e3,
        "eight_bits": _is_8bit(cell),
        "xla_bf16_us": times["bf16"],
        "xla_same_op_us": times["same"],
        "xla_dot_us": times.get("dot"),
        "difference": _difference(programs),
        "loses": times["ours"] > min(times["bf16"], times["same"]),
        "note": "; ".join(f"not {name}: {reason}" for name, reason in plan.rejected if name != "mosaic_tpu"),
    }


def _is_8bit(cell: Cell) -> bool:
    """Whether the operands meet in 8 bits: half the work of bfloat16."""
    return dtype_bits(scheme(cell.scheme).activation) == 8


def _baselines(cell: Cell) -> dict[str, tuple[str, int, int, int]]:
    """XLA's products to compare with, by name: dtype, M, K, N."""
    size = (cell.m, cell.k, cell.n)
    found = {"bf16": ("bfloat16", *size)}
    return found | {"dot": (scheme(cell.scheme).activation, *size)} if _is_8bit(cell) else found


@functools.cache
def _baseline(dtype: str, m: int, k: int, n: int) -> device_trace.Program:
    name, product = ("bf16", gpu_problems.xla_bf16) if dtype == "bfloat16" else ("dot", gpu_problems.xla_dot)
    given = _rotating([jax.ShapeDtypeStruct((1, *s), jnp.dtype(dtype)) for s in ((m, k), (n, k))], 1)
    return device_trace.compiled({name: (product, given)})[name]


def _own(cell: Cell) -> dict[str, device_trace.Program]:
    """Our op, and XLA's chain of ops for the same scheme."""
    wanted = scheme(cell.scheme)
    given = _rotating(gpu_problems.shapes_of(wanted, cell.m, cell.k, cell.n), 1 + wanted.static)
    tensors = [problems.tensors(wanted, arrays) for arrays in given]
    chain = gpu_problems.xla_same_op(wanted)
    return device_trace.compiled({"ours": (gpu_problems.kernel(wanted), tensors), "same": (chain, given)})


def _rotating(arrays: Sequence[jax.ShapeDtypeStruct], lhs: int) -> list[tuple[jax.Array, ...]]:
    """Arguments with the same activations (the first `lhs`) and weights that fill more than the L2 cache."""
    weight = arrays[lhs]
    size = weight.size * dtype_bits(weight.dtype.name) // 8
    first = tuple(measured.data(list(arrays)))
    copies = -(-ROTATE_BYTES // size) if arrays[0].shape[1] <= _FEW_ROWS else 1
    more = [tuple(x.copy() for x in first[lhs:]) for _ in range(copies - 1)]
    return [first, *((*first[:lhs], *weights) for weights in more)]


def _difference(programs: Mapping[str, device_trace.Program]) -> float:
    """Between our result and that of XLA's chain, relative to the norm of the chain's."""
    ours, same = (fn(*given[0]).astype(jnp.float32) for fn, given in (programs["ours"], programs["same"]))
    return float(jnp.linalg.norm(ours - same) / jnp.linalg.norm(same))
