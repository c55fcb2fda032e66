"""Prices of real compiles, against cycles and bytes that are known by arithmetic.

One child process compiles all of it: libtpu reads its settings once, before jax is imported.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from bench import tpu_compile

ROOT = pathlib.Path(__file__).parents[2]
CHILD = '''
import dataclasses, json, os, shutil, sys
from bench import tpu_compile
from bench.cache import Cache
tpu_compile.prepare(sys.argv[1])
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)

def matmul(m, k, n, bm, bn, bk, dtype, semantics=("parallel", "parallel", "arbitrary")):
    acc_type = jnp.int32 if dtype == "int8" else jnp.float32
    def kernel(a, b, o, acc):
        step = pl.program_id(2)
        @pl.when(step == 0)
        def _():
            acc[...] = jnp.zeros_like(acc)
        acc[...] += jnp.dot(a[...], b[...], preferred_element_type=acc_type)
        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            o[...] = acc[...].astype(o.dtype)
    call = pl.pallas_call(
        kernel, grid=(m // bm, n // bn, k // bk),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda i, j, k: (i, k)),
            pl.BlockSpec((bk, bn), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
        out_shape=shape(m, n, dtype=jnp.bfloat16), scratch_shapes=[pltpu.VMEM((bm, bn), acc_type)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
    )
    return call, shape(m, k, dtype=jnp.dtype(dtype)), shape(k, n, dtype=jnp.dtype(dtype))

def chain(trips, when_below=None):
    # One vector register, multiplied `trips` times in a row in each of 6 steps; with `when_below`, in fewer.
    def kernel(x, o):
        def heavy():
            o[...] = jax.lax.fori_loop(0, trips, lambda i, y: y * 1.5 + 2.0, x[...])
        o[...] = x[...]
        if when_below is None:
            heavy()
        else:
            pl.when(pl.program_id(0) < when_below)(heavy)
    spec = pl.BlockSpec((8, 128), lambda i: (i, 0))
    call = pl.pallas_call(kernel, grid=(6,), in_specs=[spec], out_specs=spec, out_shape=shape(48, 128))
    return call, shape(48, 128)

def int4(n):
    def kernel(x, o):
        o[...] = x[...].astype(jnp.float32)
    return pl.pallas_call(
        kernel, grid=(4, n // 256), in_specs=[pl.BlockSpec((512, 256), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((512, 256), lambda i, j: (i, j)), out_shape=shape(2048, n),
    ), shape(512, n, dtype=jnp.int4)

def nested(blocks):
    # In each of 3 steps a pipeline of its own goes over the whole array.
    def kernel(x, o):
        def body(x_block, o_block):
            o_block[...] = x_block[...] * 2.0
        spec = pl.BlockSpec((64, 128), lambda i: (i, 0))
        pltpu.emit_pipeline(body, grid=(blocks,), in_specs=[spec], out_specs=[spec])(x, o)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel, grid=(3,), in_specs=[anywhere], out_specs=anywhere, out_shape=shape(64 * blocks, 128)
    ), shape(64 * blocks, 128)

PROGRAMS = {
    "nested 8": ("v5e", nested(8)),
    "nested 16": ("v5e", nested(16)),
    "nested 32": ("v5e", nested(32)),
    "bf16 v5e": ("v5e", matmul(1024, 4096, 4096, 512, 512, 1024, "bfloat16")),
    "int8 v6e": ("v6e", matmul(512, 1024, 1024, 512, 256, 1024, "int8")),
    "bf16 v7x": ("v7x", matmul(512, 1024, 1024, 512, 512, 512, "bfloat16")),
    "bf16 v5p": ("v5p", matmul(512, 512, 1024, 256, 512, 512, "bfloat16")),
    "chain 10": ("v5e", chain(10)),
    "chain 20": ("v5e", chain(20)),
    "chain 40": ("v5e", chain(40)),
    "chain 20 when 2": ("v5e", chain(20, 2)),
    "chain 40 when 2": ("v5e", chain(40, 2)),
    "int4 v6e": ("v6e", int4(1024)),
    "xla v5e": ("v5e", (jnp.dot, *2 * (shape(512, 512, dtype=jnp.bfloat16),))),
}
for name, (chip, (fn, *args)) in PROGRAMS.items():
    cost = tpu_compile.price(chip, sys.argv[1], fn, *args)
    ops = [dataclasses.asdict(op) for op in cost.ops]
    print("@" + json.dumps([name, ops, cost.static_us, cost.compute_us, cost.memory_us]), flush=True)

# What is kept: found again for the same program from other lines of source, and only for that.
DOUBLE = """
def kernel(x, o):
    o[...] = x[...] * FACTOR
def fn(x):
    return pl.pallas_call(kernel, out_shape=shape(8, 128))(x)
"""
def double(lines, factor):
    names = {"pl": pl, "shape": shape, "FACTOR": factor}
    exec(compile("\\n" * lines + DOUBLE, "double.py", "exec"), names)
    return names["fn"]

kept = Cache(sys.argv[1] + " kept")
first = tpu_compile.price("v5e", sys.argv[1], double(0, 2.0), shape(8, 128), cache=kept)
shutil.rmtree(sys.argv[1])
read = Cache(sys.argv[1] + " kept")
again = tpu_compile.price("v5e", sys.argv[1], double(7, 2.0), shape(8, 128), cache=read)
compiled = os.path.exists(sys.argv[1])
tpu_compile.price("v5e", sys.argv[1], double(0, 3.0), shape(8, 128), cache=kept)
facts = [first == again, compiled, os.path.exists(sys.argv[1])]
print("@" + json.dumps(["kept", [], *map(float, facts)]), flush=True)
'''


@pytest.fixture(scope="module")
def priced(tmp_path_factory):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_", "LIBTPU", "XLA_"))}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path_factory.mktemp("dump"))],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
    return {name: {"ops": ops, "us": us} for name, ops, *us in lines}


def only(priced, name):
    (op,) = priced[name]["ops"]
    return op


def test_a_bf16_matmul_takes_what_its_matrix_unit_takes(priced):
    op = only(priced, "bf16 v5e")
    # 4 units of 128 x 128, one row each per cycle; the published peak says 0.2 % more.
    floor = 1024 * 4096 * 4096 // (4 * 128 * 128)
    assert 0.997 * floor < op["cycles"] < 1.05 * floor
    assert op["bundles"] < floor  # the schedule alone would be faster than the unit is
    assert op["units"]["MXU"] > 0.8


def test_refetched_blocks_are_counted(priced):
    # The lhs goes by once per column block (8 of them), the rhs once per row block (2).
    lhs, rhs, out = 1024 * 4096 * 2, 4096 * 4096 * 2, 1024 * 4096 * 2
    assert only(priced, "bf16 v5e")["hbm_bytes"] == 8 * lhs + 2 * rhs + out


def test_blocks_that_stay_are_fetched_once(priced):
    op = only(priced, "int8 v6e")
    assert op["hbm_bytes"] == 512 * 1024 + 1024 * 1024 + 512 * 1024 * 2
    floor = 2 * 512 * 1024 * 1024 / (1836e12 / 1.75e9)
    assert floor < op["cycles"] < 3 * floor


def test_four_bits_are_half_a_byte(priced):
    # Four rows of the grid, so each of the four blocks of 512 x 256 is fetched four times.
    assert only(priced, "int4 v6e")["hbm_bytes"] == 4 * 512 * 1024 // 2 + 2048 * 1024 * 4


def test_a_megacore_shares_the_grid(priced):
    op = only(priced, "bf16 v5p")
    per_core = 512 * 512 * 1024 // (4 * 128 * 128) // 2
    assert per_core < op["cycles"] < 2 * per_core
    assert op["hbm_bytes"] >= (512 * 512 + 512 * 1024 + 512 * 1024) * 2


def test_v7x_is_held_to_its_peak(priced):
    op = only(priced, "bf16 v7x")
    floor = 2 * 512 * 1024 * 1024 / (2307e12 / 2 / 2.2e9)
    assert floor < op["cycles"] < 2 * floor


def test_loops_inside_a_kernel_are_run_through(priced):
    bundles = [only(priced, f"chain {n}")["bundles"] for n in (10, 20, 40)]
    per_trip = (bundles[1] - bundles[0]) / (6 * 10)
    # Exactly linear in the trips; a trip has a multiply that needs the trip before it, an add, and may be
    # unrolled, so it takes between 2 bundles and a loop's overhead.
    assert bundles[2] - bundles[1] == 6 * 20 * per_trip
    assert 2 <= per_trip <= 16


def test_a_body_under_when_is_charged_only_in_its_steps(priced):
    always = only(priced, "chain 40")["bundles"] - only(priced, "chain 20")["bundles"]
    sometimes = only(priced, "chain 40 when 2")["bundles"] - only(priced, "chain 20 when 2")["bundles"]
    assert sometimes * 6 == always * 2


def test_a_pipeline_in_a_step_of_the_grid(priced):
    bundles = [only(priced, f"nested {n}")["bundles"] for n in (8, 16, 32)]
    assert bundles[2] - bundles[1] == 2 * (bundles[1] - bundles[0])
    # Each block is loaded, doubled and stored: eight registers of 1024 numbers, one store a bundle.
    assert bundles[1] - bundles[0] >= 3 * 8 * 8
    for n in (8, 16, 32):
        assert only(priced, f"nested {n}")["hbm_bytes"] == 3 * 2 * n * 64 * 128 * 4


def test_a_price_that_is_kept(priced):
    same, compiled_again, other_compiled = priced["kept"]["us"]
    assert same and not compiled_again and other_compiled


def test_xla_ops_carry_the_compilers_estimate(priced):
    ops = priced["xla v5e"]["ops"]
    assert not any(op["is_kernel"] for op in ops)
    assert sum(op["cycles"] for op in ops) > 0


def test_times_are_those_of_the_chip(priced):
    op, (static, compute, memory) = only(priced, "bf16 v5e"), priced["bf16 v5e"]["us"]
    assert compute == pytest.approx(op["cycles"] / 1.5e3)
    assert memory == pytest.approx(op["hbm_bytes"] / 819e3)
    assert static == max(compute, memory)


def test_a_chip_that_is_no_tpu_we_know():
    with pytest.raises(ValueError, match=r"'v4'.*v5e, v5p, v6e, v7x"):
        tpu_compile.compile_for("v4", lambda: None)


def test_settings_come_before_jax(tmp_path):
    with pytest.raises(RuntimeError, match="imported already"):
        tpu_compile.prepare(str(tmp_path))
