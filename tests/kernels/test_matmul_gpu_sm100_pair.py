"""Pairs of Blackwell multiprocessors with one MMA: interpreted with race detection, and compiled.

jax's interpreter runs clusters, but neither copies whose halves go to the two blocks of a pair nor MMAs that
read both. They are added to it here, by the documentation of `copy_gmem_to_smem`, `tcgen05_mma` and
`tcgen05_commit_arrive`.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from qwix_kernels import chips
from qwix_kernels.matmul import gpu_sm100, gpu_sm100_scaled, reference
from qwix_kernels.matmul.describe import problem_of
from qwix_kernels.matmul.gpu_sm100 import Config
from qwix_kernels.problem import Tensor

from bench import gpu_compile
from tests.kernels.test_matmul_gpu_sm100 import tensor

FOUR = dataclasses.replace(chips.chip("b200"), sms=4)  # two pairs


def of_block(key, block):
    return dataclasses.replace(key, block_id=block)


Copy = gpu_callbacks.AsyncCopyGmemToSmemTask


class HalfCopy(Copy):
    """A copy of which each block of the pair gets half, or all; the first one's barrier learns of both."""

    replicates = False  # whether copies that are not halved are for both blocks
    clock: Any
    halves: dict = {}  # noqa: RUF012  by barrier: the clock of what one block has got, and the other has not

    def __call__(self, tma_thread_id):
        memory: Any = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        value, (_, dtype), _ = memory.get_buffer_content(
            self.src_allocation_key, self.src_access, self.thread, logging_info=self.logging_info
        )
        if value is None or value.shape != self.src_access.shape:
            value = gpu_callbacks._pad_to_requested(value, self.src_access.shape, dtype, 0)
        if value.shape != self.dst_access.shape:
            value = np.split(value, 2)[self.thread.block_id]
        self.post_read(tma_thread_id, memory)
        memory.store_buffer_content(
            self.dst_allocation_key, self.dst_access, value, self.thread, logging_info=self.logging_info
        )
        with memory.lock:
            other = self.halves.pop(id(self.barrier), None)
            if other is None:
                self.halves[id(self.barrier)] = self.clock.copy()
                return
        other.update(self.clock)
        self.barrier.arrive(self.thread, other, self.logging_info)


def copy(*, barrier_allocation_key, **arguments):
    halves = arguments["src_access"].shape != arguments["dst_access"].shape
    if halves or HalfCopy.replicates:
        return HalfCopy(**arguments, barrier_allocation_key=of_block(barrier_allocation_key, 0))
    return Copy(**arguments, barrier_allocation_key=barrier_allocation_key)


def pair_mma(self, pipeline_clock, tma_thread_id):
    assert self.collective_axis is not None and self.thread.block_id == 0
    memory: Any = gpu_callbacks._get_shared_memory()
    races = gpu_callbacks.get_races()
    content = lambda key, access: memory.get_buffer_content(key, access, self.thread, logging_info=None)[0]
    clock = memory.get_clock(self.thread)
    if pipeline_clock is not None:
        clock.update(pipeline_clock)
    clock.inc(tma_thread_id)
    blocks, read = (0, 1), functools.partial(races.check_read, self.thread, source_info=self.source_info)
    stored = self.a_key.memory_space_id == self.b_key.memory_space_id  # else it is in tensor memory
    for block in blocks:
        a_clock = clock.async_smem_clock if stored else clock.generic_clock
        read(a_clock, of_block(self.a_key, block), self.a_access)
        read(clock.async_smem_clock, of_block(self.b_key, block), self.b_access)
    b = np.concatenate([content(of_block(self.b_key, block), self.b_access) for block in blocks], axis=1)
    for block in blocks:
        key = of_block(self.acc_key, block)
        dtype = memory.buffer_shape_and_dtype(key).dtype
        total = np.matmul(content(of_block(self.a_key, block), self.a_access), b, dtype=dtype)
        if self.accumulate:
            total = total + content(key, self.acc_access)
        memory.store_buffer_content(
            key, self.acc_access, total, self.thread, increment_clock=False, logging_info=None
        )
        races.check_write(
            self.thread, clock.generic_clock, key, self.acc_access, source_info=self.source_info
        )
    for block in blocks:
        memory.get_barrier(of_block(self.barrier_key, block)).arrive(
            thread=self.thread, clock=clock.copy(), logging_info=None
        )
    return clock.copy()


def pair_commit(
    *, token, mesh_location, thread, barrier_key_as_array, collective_axis=None, source_info=None
):
    del mesh_location, source_info
    assert collective_axis is not None
    memory: Any = gpu_callbacks._get_shared_memory()
    memory.incr_clock(thread)
    key = gpu_callbacks.HostAllocationKey.from_array(barrier_key_as_array)
    clock = memory.get_clock(thread)
    clock.update(memory.get_tcgen05_async_clock(thread))
    for block in (0, 1):
        memory.get_barrier(of_block(key, block)).arrive(thread, clock.copy(), None)
    return token


@pytest.fixture
def pairs(monkeypatch):
    monkeypatch.setattr(gpu_callbacks, "AsyncCopyGmemToSmemTask", copy)
    monkeypatch.setattr(gpu_callbacks.TcGen05Mma, "__call__", pair_mma)
    monkeypatch.setattr(gpu_callbacks, "tcgen05_commit_arrive", pair_commit)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("int8", (200, 192, 304)), pytest.param("bfloat16", (64, 192, 304), marks=pytest.mark.large)],
)
def test_interpreted(pairs, dtype, shape):
    rng = np.random.default_rng(0)
    (m, k, n), scaled = shape, 0 if dtype == "int8" else None
    check(tensor(rng, (1, m, k), dtype, scaled), tensor(rng, (1, n, k), dtype, scaled), 64)


def test_converted_weights_interpreted(pairs):
    rng = np.random.default_rng(2)
    check(tensor(rng, (1, 70, 256), "bfloat16"), tensor(rng, (1, 304, 256), "int4", 128), 128)


@pytest.mark.large
def test_block_scaled_interpreted(pairs, monkeypatch):
    """Of scales, that they arrive before the product that takes them, which here does without: they are 1."""

    def multiply(r, acc, slot, accumulate, interpret, **both):
        x = r.x_s.at[slot].transpose((1, 0))
        plgpu.tcgen05_mma(acc, r.w_s.at[slot], x, r.empty.at[slot], accumulate=accumulate, **both)

    monkeypatch.setattr(gpu_sm100_scaled, "multiply", multiply)
    monkeypatch.setattr(HalfCopy, "replicates", True)
    rng = np.random.default_rng(1)
    lhs, rhs = (tensor(rng, (1, n, 384), "float8_e4m3fn", 32, 1, "float8_e8m0fnu") for n in (70, 304))
    ones = lambda x: Tensor(x.values, jnp.ones_like(x.scale))
    check(ones(lhs), ones(rhs), 128)


def check(lhs, rhs, block_k):
    problem = problem_of(lhs, rhs, rhs_transposed=True, out_dtype="float32")
    config, races = Config(64, block_k, 3, pair=True), plgpu.InterpretGPUParams(detect_races=True)
    got = gpu_sm100.run(problem, lhs, rhs, config=config, chip=FOUR, interpret=races)
    over = np.abs(np.asarray(got) - reference.run(problem, lhs, rhs)) - reference.error_bound(
        problem, lhs, rhs
    )
    assert np.all(over <= 0)


@pytest.mark.large
@pytest.mark.parametrize("scheme", ["w8a8", "w16a16"])
def test_compiles(scheme):
    what = "tests.kernels.test_matmul_gpu_sm100:program"
    (kernel,) = gpu_compile.compiled("b200", what, scheme=scheme, m=4096, pair=True).kernels
    assert kernel.cluster == (2, 1, 1) and not kernel.spill_bytes
    assert set(kernel.matrix) == {"UTCIMMA" if scheme == "w8a8" else "UTCHMMA"}
