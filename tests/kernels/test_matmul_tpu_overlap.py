"""Rows prepared between the dots of the first column block give the same bits as rows prepared in front."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qwix_kernels.chips import CHIPS
from qwix_kernels.matmul import Tensor, problem_of, tpu, tpu_plan
from qwix_kernels.problem import RowQuantize

INTERPRET = pltpu.InterpretParams(detect_races=True)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def _operands(m: int, k: int, n: int, tile: int):
    rng = np.random.default_rng(m + n)
    x = jnp.asarray(rng.standard_normal((1, m, k)), jnp.bfloat16)
    w = jnp.asarray(rng.integers(-127, 128, (1, k, n)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 2, (1, k // tile, n)), jnp.float32)
    return Tensor(x), Tensor(w, scale)


def _run(m, n, tile, chip, config):
    k, how = 256, RowQuantize("int8", 127.5, tile % 256)
    lhs, rhs = _operands(m, k, n, tile)
    problem = problem_of(lhs, rhs, quantize_lhs=how, out_dtype="float32")
    run = functools.partial(tpu.run, config=config, chip=chip, interpret=INTERPRET)
    return tpu_plan.resolve(problem, chip, config), np.asarray(run(problem, lhs, rhs))


@pytest.mark.parametrize(
    "chip,tile,strategy,limit,columns,overlapped",
    [
        ("v6e", 256, "once", 256 * 512, 256, 512),
        ("v5p", 256, "once", 256 * 300, 128, 256),
        ("v7x", 256, "once", 256 * 128, 128, 128),
        ("v6e", 128, "before", 256 * 512, 128, 512),
    ],
)
def test_same_bits_wherever_rows_are_prepared(monkeypatch, chip, tile, strategy, limit, columns, overlapped):
    config = tpu.Config(512, columns, 256, strategy)
    monkeypatch.setattr(tpu_plan, "OVERLAP", 0)
    plan, want = _run(500, 256, tile, CHIPS[chip], config)
    assert plan.overlapped_rows == 0
    monkeypatch.setattr(tpu_plan, "OVERLAP", limit)
    plan, got = _run(500, 256, tile, CHIPS[chip], config)
    assert plan.overlapped_rows == overlapped
    np.testing.assert_array_equal(got, want)


def test_one_buffer_of_rows_where_two_do_not_fit(monkeypatch):
    monkeypatch.setattr(tpu_plan, "LONG_K", 128)
    config, v7x = tpu.Config(64, 128, 256), CHIPS["v7x"]
    plenty, want = _run(190, 256, 256, v7x, config)
    need = tpu_plan.vmem_bytes(plenty) - 64 * 256 * 2
    short = dataclasses.replace(v7x, vmem_bytes=int(need / tpu_plan.VMEM_SHARE) + 1)
    plan, got = _run(190, 256, 256, short, config)
    assert (plenty.lhs_buffers, plan.lhs_buffers) == (2, 1)
    np.testing.assert_array_equal(got, want)
    with pytest.raises(NotImplementedError, match="of VMEM for"):
        _run(190, 256, 256, dataclasses.replace(v7x, vmem_bytes=need), config)


def test_no_overlap_where_rows_do_not_fit_one_block_or_are_normalised():
    lhs = Tensor(jax.ShapeDtypeStruct((1, 512, 1 << 15), jnp.bfloat16))
    rhs = Tensor(
        jax.ShapeDtypeStruct((1, 1 << 15, 256), jnp.int8), jax.ShapeDtypeStruct((1, 1, 256), jnp.float32)
    )
    problem = problem_of(lhs, rhs, quantize_lhs=RowQuantize("int8", 127.5))
    parts = tpu_plan.resolve(problem, CHIPS["v6e"], tpu.Config(512, 256, 1 << 12))
    assert parts.steps_k == 8 and parts.overlapped_rows == 0
