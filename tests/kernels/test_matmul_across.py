"""Products with a weight turned round, as in its matmul's gradient: tiles along the result's columns."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qwix_kernels.chips import CHIPS
from qwix_kernels.matmul import problem_of, reference, tpu
from qwix_kernels.problem import Tensor

INTERPRET = pltpu.InterpretParams(detect_races=True)
LARGE = functools.partial(pytest.param, marks=pytest.mark.large)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def weight(name: str, k: int, n: int, tile: int, zero: bool) -> Tensor:
    """[1, K, N] with scales by runs of `tile` columns and element of K."""
    rng = np.random.default_rng(7)
    low, high, stored = {"nf4": (0, 16, "uint4"), "int4": (-8, 8, "int4"), "int8": (-128, 128, "int8")}[name]
    shape = (1, k, n // tile)
    values = jnp.asarray(rng.integers(low, high, (1, k, n)), stored)
    zeros = jnp.asarray(rng.integers(-4, 4, shape), stored) if zero else None
    scale = jnp.asarray(rng.uniform(0.01, 0.1, shape), jnp.float32)
    return Tensor(values, scale, zeros, "nf4" if name == "nf4" else None)


@pytest.mark.parametrize(
    "chip,name,tile,transposed,k,n,config",
    [
        ("v6e", "nf4", 64, True, 128, 128, tpu.Config(32, 128, 128, "before")),
        ("v5e", "int4", 128, True, 200, 256, tpu.Config(32, 128, 128, "before")),  # K with a tail
        LARGE("v7x", "int4", 32, False, 200, 256, tpu.Config(32, 128, 128, "before")),
        ("v6e", "int8", 256, True, 72, 256, tpu.Config(32, 128, 72, "before")),  # one tile for all columns
        LARGE("v6e", "nf4", 128, False, 72, 128, tpu.Config(32, 128, 72, "before")),
        LARGE("v6e", "int8", 64, True, 72, 128, tpu.Config(32, 128, 72, "before")),
    ],
)
def test_kernel_is_within_the_bound(chip, name, tile, transposed, k, n, config):
    lhs = Tensor(jnp.asarray(np.random.default_rng(0).standard_normal((1, 21, k)), jnp.bfloat16))
    rhs = weight(name, k, n, tile, zero=name == "int8")
    if transposed:
        turn = lambda x: None if x is None else jnp.swapaxes(x, 1, 2)
        rhs = Tensor(turn(rhs.values), turn(rhs.scale), turn(rhs.zero_point), rhs.codebook)
    problem = problem_of(lhs, rhs, rhs_transposed=transposed, out_dtype="float32")
    tpu.check(problem, CHIPS[chip])
    got = tpu.run(problem, lhs, rhs, config=config, chip=CHIPS[chip], interpret=INTERPRET)
    bound = reference.error_bound(problem, lhs, rhs, multiplied="bfloat16")
    assert np.max(np.abs(np.asarray(got, np.float64) - reference.run(problem, lhs, rhs)) / bound) <= 1


def test_blocks_that_share_no_whole_tiles_are_refused():
    lhs, rhs = Tensor(jnp.ones((1, 8, 256), jnp.bfloat16)), weight("int4", 256, 384, 96, zero=False)
    problem = problem_of(lhs, rhs)
    for config in (tpu.Config(8, 128, 256, "before"), tpu.Config(8, 384, 256, "after")):
        with pytest.raises(NotImplementedError, match="multiples of the 96 that share it"):
            tpu.run(problem, lhs, rhs, config=config, chip=CHIPS["v6e"])
