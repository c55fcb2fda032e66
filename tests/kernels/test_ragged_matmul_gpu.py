"""The gmm for Hopper in the interpreter, where races and reads of nothing raise, and compiled for one that is
not attached."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from qwix_kernels import dispatch
from qwix_kernels.chips import CHIPS
from qwix_kernels.problem import Extras, RowQuantize, Tensor
from qwix_kernels.ragged_matmul import gmm_problem_of, gpu, gpu_visits, reference
from qwix_kernels.ragged_matmul.groups import local_groups
from qwix_kernels.ragged_matmul.problem import Groups

from bench import shapes
from bench.gpu_compile import compiled
from tests.kernels.test_matmul_tpu_interpret import BOUND, stored, tensor

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
H100 = CHIPS["h100"]
FEW_SMS = dataclasses.replace(H100, sms=3)  # so that each has several items
Config = gpu.Config
SMALL = Config(16, 128, 64, 2)


def assert_right(
    x, w, sizes, config=SMALL, act=None, out="bfloat16", extras=None, offset=None, activation=None, kn=False
):
    """Rows of no group hold NaN, where they can, and give zeros."""
    extras = extras or Extras()
    how = None if act is None else RowQuantize(act[0], BOUND[act[0]], act[1])
    problem = gmm_problem_of(
        x, w, np.asarray(sizes), extras, quantize_lhs=how, rhs_transposed=not kn, out_dtype=out,
        group_offset=offset, activation=activation,
    )  # fmt: skip
    gpu.check(problem, FEW_SMS)
    rest = slice(sum(sizes), None)
    dirty = jax.tree.map(lambda a: a.at[rest].set(jnp.nan) if a.dtype in ("float32", "bfloat16") else a, x)
    groups = local_groups(jnp.asarray(sizes), offset, problem.matrices)
    got = gpu.run(
        problem, jax.tree.map(lambda a: a[None], dirty), w, extras, groups,
        config=config, chip=FEW_SMS, interpret=INTERPRET,
    )  # fmt: skip
    first = sum(sizes[:offset]) if offset else 0
    mine = sizes[offset : offset + problem.matrices] if offset is not None else sizes
    got, want = np.asarray(got).astype(np.float64), reference.gmm(problem, x, w, mine, extras, first)
    bound = reference.gmm_error_bound(problem, x, w, mine, extras, first, multiplied="bfloat16")
    wrong = ~(np.abs(got - want) <= bound)
    assert not wrong.any(), (wrong.sum(), got[wrong][:3], want[wrong][:3])


def rows(rng, dtype, m, k, tile=None):
    """[M, K], with scales for runs of `tile` along K."""
    made = tensor(rng, dtype, (1, m, k), (1, tile) if tile else None)
    return jax.tree.map(lambda a: a[0], made)


def test_integer_sums_are_exact():
    """Of groups that share blocks and eights of rows; one is empty, and K and N fill no blocks."""
    rng = np.random.default_rng(0)
    x, w = rows(rng, "int8", 37, 160), Tensor(stored(rng, "int8", (4, 72, 160)))
    assert_right(x, w, [5, 0, 20, 3], out="int32")


@pytest.mark.parametrize(
    ("lhs", "rhs", "lhs_tile", "rhs_tile", "out"),
    [
        ("int8", "int8", 128, 128, "bfloat16"),
        ("float8_e4m3fn", "float8_e5m2", 64, 32, "float32"),
        ("int8", "int4", 128, 64, "bfloat16"),
        ("bfloat16", "int4", None, 128, "bfloat16"),
        ("bfloat16", "nf4", None, 64, "bfloat16"),
        pytest.param("bfloat16", "int8", None, 32, "bfloat16", marks=pytest.mark.large),
        pytest.param("float16", "float8_e4m3fn", None, 128, "float16", marks=pytest.mark.large),
        pytest.param("bfloat16", "bfloat16", None, None, "bfloat16", marks=pytest.mark.large),
    ],
)
def test_schemes(lhs, rhs, lhs_tile, rhs_tile, out):
    rng = np.random.default_rng(1)
    x, w = (
        rows(rng, lhs, 32, 128, lhs_tile),
        tensor(rng, rhs, (2, 64, 128), (1, rhs_tile) if rhs_tile else None),
    )
    assert_right(x, w, [9, 18], Config(16, 64, 64, 2, 1), out=out)


@pytest.mark.large
def test_what_is_fused_elsewhere_and_other_devices_groups():
    """Rows are quantized before the kernel; a gate, biases and an activation follow it."""
    rng = np.random.default_rng(2)
    weights = lambda: tensor(rng, "int8", (2, 64, 64), (64, 1))
    bias = jnp.asarray(rng.standard_normal((2, 1, 64)), jnp.float32)
    x, extras = rows(rng, "bfloat16", 32, 64), Extras(bias=bias, gate=weights(), gate_bias=bias[:1])
    assert_right(
        x, weights(), [6, 9, 7, 4], Config(24, 64, 64, 3, 1), act=("int8", 0), extras=extras, offset=1,
        activation="silu", kn=True,
    )  # fmt: skip


def matrices_of_rows(sizes, matrix, m):
    """[M] the matrix of each row, -1 for none."""
    batch, each = len(sizes), m // len(sizes)
    want = np.full((batch, each), -1)
    for row, mine, of in zip(want, sizes, matrix, strict=True):
        ends = np.minimum(np.cumsum(mine), each)
        for start, stop, which in zip([0, *ends[:-1]], ends, of, strict=True):
            row[start:stop] = which
    return want.reshape(-1)


@pytest.mark.parametrize(
    ("batch", "count", "m", "block", "mapped"),
    [(1, 8, 300, 16, False), (3, 5, 240, 64, True), (1, 1, 5, 8, False)],
)
def test_visits(batch, count, m, block, mapped):
    """Every row is stored once, with its group's matrix; no visit has more rows than a block."""
    rng = np.random.default_rng(3)
    for most in (m // count // batch, 2 * m // count):  # some rows are in no group; some groups do not fit
        sizes = rng.integers(0, most + 1, (batch, count)) * rng.integers(0, 2, (batch, count))
        matrix = (
            rng.integers(-1, 3, (batch, count)) if mapped else np.arange(batch * count).reshape(batch, -1)
        )
        given = Groups(jnp.asarray(sizes, jnp.int32), jnp.asarray(matrix, jnp.int32) if mapped else None)
        words = np.asarray(gpu_visits.visits(given, m, block))
        visits, done = words[:-1].reshape(4, -1).T, words[-1]
        assert done <= len(visits) == gpu_visits.most_visits(m, block, batch * count, batch)
        found = np.full(m, -2)
        for which, first, lo, hi in visits[:done]:
            assert first % gpu_visits.ALIGNED == 0 and 0 <= lo < hi <= block
            assert (found[first + lo : first + hi] == -2).all()
            found[first + lo : first + hi] = which
        np.testing.assert_array_equal(found, matrices_of_rows(sizes, matrix, m))


@pytest.mark.parametrize(
    "config", [Config(8, 64, 128, 4, 1), Config(16, 128, 64, 2), Config(64, 192, 64, 2, 3)]
)
def test_what_is_copied_lies_at_multiples_of_128_bytes(config):
    """Which the copy engine demands, and the interpreter does not."""
    struct: Any = jax.ShapeDtypeStruct
    x = Tensor(struct((64, 256), "int8"), struct((64, 4), "float32"))
    w = Tensor(struct((4, 384, 256), "int8"), struct((4, 384, 8), "float32"))
    problem = gmm_problem_of(x, w, struct((4,), "int32"), rhs_transposed=True, out_dtype="bfloat16")
    plan = gpu.resolve(problem, H100, config)
    assert plan.tiled == ("lhs", "rhs")
    for runs, size in plan.tile_scales.values():
        assert runs >= config.block_k // plan.run_k and runs * size * 4 % 128 == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"k": 120}, "K is 120"), ({"n": 100}, "N is 100"), ({"dtype": "float32"}, "multiplies int8")],
)
def test_what_is_left_to_xla(change, reason):
    of = {"k": 128, "n": 128, "dtype": "int8"} | change
    struct = jax.ShapeDtypeStruct
    x, w = struct((64, of["k"]), of["dtype"]), struct((4, of["n"], of["k"]), "int8")
    problem = gmm_problem_of(
        x,
        w,
        struct((4,), "int32"),
        rhs_transposed=True,
        out_dtype="float32" if of["dtype"] != "int8" else "bfloat16",
    )
    with pytest.raises(NotImplementedError, match=reason):
        gpu.check(problem, H100)
    assert dispatch.explain(problem, "h100").chosen == "xla"


def test_it_runs_where_it_is_named():
    """Until a GPU has run it."""
    struct = jax.ShapeDtypeStruct
    x, w = struct((4096, 4096), "int8"), struct((8, 4096, 4096), "int8")
    options = {"rhs_transposed": True, "out_dtype": "bfloat16"}
    problem = gmm_problem_of(x, w, struct((8,), "int32"), **options)
    explained = dispatch.explain(problem, "h100")
    assert explained.chosen == "xla" and "has not run on a h100" in str(explained)
    assert dispatch.explain(problem, "h100", implementation="mosaic_gpu").chosen == "mosaic_gpu"


# --- the real compiler


@pytest.mark.parametrize(
    ("scheme", "instruction"), [("w8a8", "IGMMA"), ("w4a16_g128", "HGMMA"), ("wf8af8_b128", "QGMMA")]
)
def test_kernels_compile(scheme, instruction):
    layer = shapes.RAGGED["canonical"][0]
    program = compiled("h100", "bench.gpu_ragged:gmm", scheme=scheme, layer=dataclasses.asdict(layer))
    kernel = program.kernels[-1]
    assert kernel.target == "sm_90a" and kernel.spill_bytes == 0 and kernel.local == 0
    assert any(name.startswith(instruction) for name in kernel.matrix)
    assert kernel.highest_register <= kernel.register_budget
