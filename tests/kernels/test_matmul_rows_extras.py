"""Rows that are multiplied by columns and rounded with given noise before the product: `RowQuantize`.

A weight that is the identity shows what is stored. The reference, the portable path and the TPU kernel (in
the interpreter, races looked for) store the same, bit for bit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qwix_kernels import matmul as matmul_kernel
from qwix_kernels.chips import CHIPS
from qwix_kernels.matmul import reference, tpu, xla
from qwix_kernels.matmul.describe import problem_of
from qwix_kernels.problem import Extras, RowQuantize, Tensor

HOW = RowQuantize("int8", 127.5)
BOTH = dataclasses.replace(HOW, columns=True, noise=True)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def operands(m: int, k: int, *, per_row: bool = True):
    """Rows with their greatest value at either end of the range, columns of all sizes, noise to its ends."""
    rng = np.random.default_rng(k)
    x = rng.standard_normal((1, m, k)).astype(np.float32)
    columns = np.exp2(rng.integers(-6, 6, (1, 1, k))).astype(np.float32) * rng.uniform(1, 2, (1, 1, k))
    noise = rng.uniform(-0.5, 0.5, (1, m if per_row else 1, 1))
    noise[0, :3] = np.array([-0.5, 0.5 - 2.0**-24, 0.0])[: noise.shape[1], None]
    given = Extras(lhs_columns=jnp.asarray(columns, jnp.float32), lhs_noise=jnp.asarray(noise, jnp.float32))
    return jnp.asarray(x, jnp.bfloat16), given


def pick(how: RowQuantize, extras: Extras) -> Extras:
    return Extras(
        lhs_scale=extras.lhs_scale,
        lhs_columns=extras.lhs_columns if how.columns else None,
        lhs_noise=extras.lhs_noise if how.noise else None,
    )


def shown(x, how, extras, chip, config=None):
    """(by the kernel, by the portable path): stored values times their scales."""
    k = x.shape[2]
    lhs, rhs = Tensor(x), Tensor(jnp.eye(k, dtype=jnp.int8)[None], jnp.ones((1, 1, k), jnp.float32))
    problem = problem_of(lhs, rhs, extras, quantize_lhs=how, out_dtype="float32")
    tpu.check(problem, CHIPS[chip])
    config = config or tpu.heuristic_config(problem, CHIPS[chip])
    interpret = pltpu.InterpretParams(detect_races=True)
    got = tpu.run(problem, lhs, rhs, extras, config=config, chip=CHIPS[chip], interpret=interpret)
    return np.asarray(got), np.asarray(jax.jit(functools.partial(xla.run, problem))(lhs, rhs, extras))


def expected(x, how, extras) -> np.ndarray:
    stored = reference.quantize_rows(np.asarray(x), how, extras)
    return np.asarray(stored.values).astype(np.float32) * np.asarray(stored.scale)


@pytest.mark.parametrize(
    ("chip", "how", "config"),
    [
        ("v5e", BOTH, None),
        ("v6e", dataclasses.replace(BOTH, bound=31.5), tpu.Config(32, 256, 160)),
        ("v7x", dataclasses.replace(HOW, noise=True), tpu.Config(32, 256, 160)),
        ("v6e", BOTH, tpu.Config(32, 256, 128)),  # K in parts, with a tail
    ],
)
def test_stored_values_are_the_references(chip, how, config):
    x, extras = operands(40, 160)
    extras = pick(how, extras)
    want = expected(x, how, extras)
    for got in shown(x, how, extras, chip, config):
        np.testing.assert_array_equal(got, want)


def test_noise_shared_by_all_rows_and_static_scales():
    x, extras = operands(40, 128, per_row=False)
    how = dataclasses.replace(BOTH, static=True)
    extras = dataclasses.replace(extras, lhs_scale=jnp.full((1, 1, 1), 0.05, jnp.float32))
    for got in shown(x, how, extras, "v6e"):
        np.testing.assert_array_equal(got, expected(x, how, extras))


def test_noise_rounds_up_as_often_as_it_should():
    """128 rows of 0.3 steps: without noise all are 0; with evenly spread noise, 0.3 of them are 1."""
    rows = 128
    x = jnp.zeros((1, rows, 8), jnp.float32).at[:, :, 0].set(127.5).at[:, :, 1].set(0.3)
    noise = jnp.asarray((np.arange(rows) + 0.5) / rows - 0.5, jnp.float32).reshape(1, rows, 1)
    how = dataclasses.replace(HOW, noise=True)
    stored = reference.quantize_rows(np.asarray(x), how, Extras(lhs_noise=noise))
    ones = np.asarray(stored.values)[0, :, 1].astype(int)
    assert set(ones) == {0, 1} and abs(ones.mean() - 0.3) <= 1 / rows


def test_batches_have_noise_and_columns_of_their_own():
    """vmap over all of it is a loop over all of it; batches that share a weight become rows."""
    parts = [operands(8, 32 * (1 + i))[1] for i in range(3)]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 8, 32)), jnp.float32)
    noise = jnp.stack([p.lhs_noise for p in parts])
    columns = jnp.stack([p.lhs_columns[:, :, :32] for p in parts])
    w = jnp.asarray(np.random.default_rng(1).integers(-8, 8, (1, 32, 16)), jnp.int8)

    def one(x, noise, columns):
        extras = Extras(lhs_noise=noise, lhs_columns=columns)
        return matmul_kernel.matmul(x, Tensor(w, jnp.ones((1, 1, 16))), extras, quantize_lhs=BOTH)

    want = jnp.stack([one(*args) for args in zip(x, noise, columns, strict=True)])
    np.testing.assert_array_equal(jax.vmap(one)(x, noise, columns), want)
    shared = jax.vmap(one, in_axes=(0, 0, None))(x, noise, columns[0])
    np.testing.assert_array_equal(shared[0], want[0])


@pytest.mark.parametrize(
    ("how", "extras", "message"),
    [
        (BOTH, Extras(lhs_columns=jnp.ones((1, 1, 32))), "lhs_noise is not given"),
        (HOW, Extras(lhs_noise=jnp.zeros((1, 8, 1))), "lhs_noise is given"),
        (
            dataclasses.replace(HOW, noise=True),
            Extras(lhs_noise=jnp.zeros((1, 4, 1))),
            "must be .1 or batch, 1 or M, 1., with batch 1 and M 8",
        ),
        (
            RowQuantize("float8_e4m3fn", 448.0, noise=True),
            Extras(lhs_noise=jnp.zeros((1, 8, 1))),
            "to integers",
        ),
    ],
)
def test_what_does_not_fit_is_refused(how, extras, message):
    with pytest.raises(ValueError, match=message):
        problem_of(
            jax.ShapeDtypeStruct((1, 8, 32), jnp.float32),
            jax.ShapeDtypeStruct((1, 32, 16), jnp.int8),
            extras,
            quantize_lhs=how,
        )
