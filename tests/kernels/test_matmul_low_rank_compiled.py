"""Matmuls with a low-rank update, and their gradients, compiled for TPUs that are not attached."""

import functools

import jax
import jax.numpy as jnp
import pytest
from qwix_kernels import matmul
from qwix_kernels.problem import Extras, RowQuantize, Tensor

from bench.compiled import instructions, kernels
from bench.tpu_compile import compile_for

M, K, N, RANK = 128, 256, 384, 16
FLOATS = ("f32", "bf16", "f16")


def _operands(weight: str, tile: int):
    struct = jax.ShapeDtypeStruct
    stored = struct((1, K, N), jnp.uint4 if weight == "nf4" else weight)
    scale = struct((1, K // (tile or K), N), jnp.bfloat16)
    factors = struct((1, K, RANK), jnp.bfloat16), struct((1, RANK, N), jnp.bfloat16)
    return (
        struct((1, M, K), jnp.bfloat16),
        Tensor(stored, scale, None, "nf4" if weight == "nf4" else None),
        *factors,
    )


@pytest.mark.parametrize(
    "chip,weight,tile,rows",
    [
        pytest.param("v5e", "int4", 128, None, marks=pytest.mark.large),
        ("v6e", "nf4", 64, None),
        ("v7x", "int8", 0, RowQuantize("int8", 127.5)),
    ],
)
def test_a_step_has_two_kernels_and_no_float_weight(chip, weight, tile, rows):
    """Forward and backward read the weight as it is stored; the rows are read by one kernel in each."""
    run = functools.partial(
        matmul.matmul,
        quantize_lhs=rows,
        low_rank_scaling=2.0,
        out_dtype=jnp.bfloat16,
        implementation="mosaic_tpu",
    )

    def step(x, w, a, b):
        out, pull = jax.vjp(lambda x, a, b: run(x, w, Extras(low_rank_a=a, low_rank_b=b)), x, a, b)
        return out, pull(out)

    text = compile_for(chip, step, *_operands(weight, tile)).as_text()
    assert sum(kernels(text).values()) == 2
    wide = [i.text for i in instructions(text) if i.dtype in FLOATS and i.elements >= K * N]
    assert not wide
