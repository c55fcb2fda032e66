"""The process that prices the programs of the lora suite: requests as lora_price.py makes them.

A program is x @ w, or the gradient g @ w.T that reaches x, with w quantized and frozen, alone or with a
low-rank update of w; whatever XLA does round the kernel is in its price.

Run as `python -m bench.lora_compile FOLDER [CACHE]`.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

from bench import op_worker, shapes, tpu_compile
from bench.cache import Cache

SCALING = 2.0


def program(scheme: str, m: int, k: int, n: int, rank: int, backward: bool) -> tuple[Callable, tuple]:
    """A function and its operands without data; with `rank` 0 nothing is added to the weight."""
    import jax
    import jax.numpy as jnp
    from qwix_kernels import matmul
    from qwix_kernels.problem import Extras

    from bench import problems

    wanted, bf16 = shapes.scheme(scheme), jnp.bfloat16
    x, w = problems.operands(wanted, m, k, n)
    of: Callable[..., Any] = lambda *shape: jax.ShapeDtypeStruct(shape, bf16)
    extras = Extras(low_rank_a=of(1, k, rank), low_rank_b=of(1, rank, n)) if rank else Extras()
    run = functools.partial(
        matmul.matmul,
        quantize_lhs=problems.row_quantize(wanted),
        out_dtype=bf16,
        low_rank_scaling=SCALING if rank else 1.0,
    )

    def op(rows: Any, w: Any, extras: Any) -> Any:
        if not backward:
            return run(rows, w, extras)
        any_rows = jnp.zeros((1, m, k), bf16)  # the gradient does not depend on them
        return jax.vjp(lambda x: run(x, w, extras), any_rows)[1](rows)[0]

    return op, (of(1, m, n) if backward else x, w, extras)


def price(request: dict[str, Any], dump: str, cache: Cache | None) -> tpu_compile.ProgramCost:
    """The cost of one program on the chip."""
    request = dict(request)
    chip = request.pop("chip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fallback is in the row
        op, arrays = program(**request)
        return tpu_compile.price(chip, dump, op, *arrays, cache=cache, row_major=True)


if __name__ == "__main__":
    op_worker.serve(price, *sys.argv[1:])
