"""The Blackwell matmul kernel, interpreted with race detection, and compiled for a B200."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from qwix_kernels import chips
from qwix_kernels.matmul import gpu_sm100, gpu_sm100_plan, gpu_sm100_scaled, reference
from qwix_kernels.matmul.describe import problem_of
from qwix_kernels.matmul.gpu_sm100 import Config
from qwix_kernels.problem import Tensor

from bench import gpu_compile

B200 = dataclasses.replace(chips.chip("b200"), sms=2)  # two blocks, each with several items


def values(rng, shape, dtype):
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return jnp.asarray(rng.integers(int(info.min), int(info.max) + 1, shape)).astype(dtype)
    return jnp.asarray(rng.standard_normal(shape) * 2, jnp.float32).astype(dtype)


def tensor(rng, shape, dtype, tile_k=None, tile_free=1, scale_dtype="float32"):
    """`tile_k` None: not scaled; 0: a scale for all of K."""
    if tile_k is None:
        return Tensor(values(rng, shape, dtype))
    batch, free, k = shape
    scale = rng.random((batch, free // tile_free, k // (tile_k or k))) + 0.5
    if scale_dtype == "float8_e8m0fnu":
        scale = 2.0 ** rng.integers(-4, 5, scale.shape)
    return Tensor(values(rng, shape, dtype), jnp.asarray(scale, jnp.float32).astype(scale_dtype))


def interpreted(lhs, rhs, config, out_dtype="float32"):
    problem = problem_of(lhs, rhs, rhs_transposed=True, out_dtype=out_dtype)
    run = lambda a, b: gpu_sm100.run(
        problem, a, b, config=config, chip=B200, interpret=plgpu.InterpretGPUParams(detect_races=True)
    )
    return problem, np.asarray(run(lhs, rhs)).astype(np.float64)


def check(lhs, rhs, config, out_dtype="float32"):
    problem, got = interpreted(lhs, rhs, config, out_dtype)
    want = reference.run(problem, lhs, rhs)
    assert got.shape == want.shape
    if out_dtype == "int32":
        np.testing.assert_array_equal(got, want)
        return
    over = np.abs(got - want) - reference.error_bound(problem, lhs, rhs)
    assert np.all(over <= 0), f"{np.sum(~(over <= 0))} elements off by up to {over.max()} too much"


SMALL = Config(block_m=32, block_k=64, steps=2)


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "shape", "batches"),
    [
        ("int8", "int32", (40, 128, 136), (1, 1)),
        ("float8_e4m3fn", "bfloat16", (70, 160, 160), (2, 1)),
        pytest.param("bfloat16", "float32", (33, 80, 104), (2, 2), marks=pytest.mark.large),
        pytest.param("float16", "float16", (16, 64, 128), (1, 2), marks=pytest.mark.large),
        pytest.param("int8", "float32", (1, 32, 8), (1, 1), marks=pytest.mark.large),
    ],
)
def test_native(dtype, out_dtype, shape, batches):
    rng = np.random.default_rng(0)
    (m, k, n), scaled = shape, None if out_dtype == "int32" or "float16" in dtype else 0
    lhs = tensor(rng, (batches[0], m, k), dtype, scaled)
    check(lhs, tensor(rng, (batches[1], n, k), dtype, scaled), SMALL, out_dtype)


@pytest.mark.parametrize(
    ("lhs", "rhs", "config"),
    [
        (("int8", 128), ("int8", 64), Config(64, 64, 2)),
        pytest.param(("float8_e5m2", 128), ("float8_e4m3fn", 0), Config(32, 128, 2), marks=pytest.mark.large),
        pytest.param(("int8", 0), ("int4", 128), Config(32, 128, 2), marks=pytest.mark.large),
        pytest.param(("int4", 128), ("int4", 128), Config(16, 64, 2, splits=2), marks=pytest.mark.large),
    ],
)
def test_runs_of_k_are_scaled_on_their_own(lhs, rhs, config):
    rng = np.random.default_rng(1)
    lhs, rhs = tensor(rng, (1, 72, 256), *lhs), tensor(rng, (1, 144, 256), *rhs)
    check(lhs, rhs, config)


@pytest.mark.parametrize(
    ("lhs", "rhs", "config", "splits"),
    [
        (("bfloat16",), ("int4", 32), Config(32, 128, 2, converters=2), 2),
        pytest.param(("bfloat16",), ("int8", 0), Config(32, 128, 2), 1, marks=pytest.mark.large),
        pytest.param(("bfloat16",), ("int4", 256), Config(16, 256, 2), 1, marks=pytest.mark.large),
        pytest.param(("bfloat16",), ("float8_e4m3fn", 128), Config(32, 128, 2), 1, marks=pytest.mark.large),
        pytest.param(("float16",), ("float8_e5m2", 0), Config(32, 128, 2), 1, marks=pytest.mark.large),
        pytest.param(
            ("bfloat16",), ("float4_e2m1fn", 32, 1, "float8_e8m0fnu"), SMALL, 1, marks=pytest.mark.large
        ),
        pytest.param(("int8", 0), ("int4", 0), Config(32, 256, 2), 1, marks=pytest.mark.large),
        pytest.param(("float8_e4m3fn", 0), ("int4", 0), Config(32, 128, 2), 2, marks=pytest.mark.large),
    ],
)
def test_converted_weights(lhs, rhs, config, splits):
    rng = np.random.default_rng(2)
    lhs, rhs = tensor(rng, (1, 40, 512), *lhs), tensor(rng, (1, 200, 512), *rhs)
    check(lhs, rhs, dataclasses.replace(config, splits=splits), "float32")


@pytest.mark.parametrize(
    ("dtype", "tile_k", "scale_dtype", "shape"),
    [
        pytest.param("float8_e4m3fn", 32, "float8_e8m0fnu", (40, 320, 136), marks=pytest.mark.large),
        pytest.param("float4_e2m1fn", 32, "float8_e8m0fnu", (200, 256, 136), marks=pytest.mark.large),
        ("float4_e2m1fn", 16, "float8_e4m3fn", (37, 192, 128)),
    ],
)
def test_block_scaled(dtype, tile_k, scale_dtype, shape):
    rng = np.random.default_rng(3)
    m, k, n = shape
    lhs = tensor(rng, (1, m, k), dtype, tile_k, 1, scale_dtype)
    rhs = tensor(rng, (1, n, k), dtype, tile_k, 1, scale_dtype)
    check(lhs, rhs, Config(32 if m < 64 else 192, 128, 2))


def test_scales_lie_as_the_tensor_core_reads_them():
    """PTX ISA: of 128 rows, row r's four scales are bytes 4 (r / 32) .. + 3 of line r mod 32."""
    scale = jnp.asarray(np.arange(300 * 8).reshape(1, 300, 8) % 251, jnp.uint8)
    scale = jax.lax.bitcast_convert_type(scale, jnp.float8_e8m0fnu)
    got = gpu_sm100_scaled.arranged(scale, 160)
    got = np.asarray(jax.lax.bitcast_convert_type(got, jnp.uint8))
    assert got.shape == (1, 2, 2, 2, 32, 16)
    for row, along in [(0, 0), (33, 1), (159, 7), (160, 4), (299, 3)]:
        block, within = divmod(row, 160)
        tile, line = divmod(within, 128)
        byte = 4 * (line // 32) + along % 4
        assert got[0, block, tile, along // 4, line % 32, byte] == (row * 8 + along) % 251
    assert not got[0, 0, 1, :, :, 4:].any()  # rows 160 to 255 of the first block are none of its own


@pytest.mark.large
def test_scales_of_tiles_of_rows():
    rng = np.random.default_rng(4)
    lhs = tensor(rng, (1, 32, 64), "int8", 0, tile_free=32)
    check(lhs, tensor(rng, (1, 64, 64), "int8", 0, tile_free=4), SMALL)


@pytest.mark.parametrize(
    ("lhs", "rhs", "reason"),
    [
        (("float32",), ("int8", 0), "float32 rows with int8 weights"),
        (("bfloat16",), ("uint8", 0), "bfloat16 rows with uint8 weights"),
        (("int8", 0), ("bfloat16",), "int8 rows with bfloat16 weights"),
        (("float4_e2m1fn", 0), ("float4_e2m1fn", 0), "4-bit floats on both sides have scales"),
        (("float16",), ("int4", 64), "float16 may not hold scales"),
        (("int8", 16), ("int8", 16), "multiples of 32"),
    ],
)
def test_refusals_name_the_constraint(lhs, rhs, reason):
    rng = np.random.default_rng(5)
    lhs, rhs = tensor(rng, (1, 8, 192), *lhs), tensor(rng, (1, 16, 192), *rhs)
    problem = problem_of(lhs, rhs, rhs_transposed=True)
    with pytest.raises(NotImplementedError, match=reason):
        gpu_sm100.check(problem, chips.chip("b200"))


def test_copies_need_aligned_rows():
    rng = np.random.default_rng(6)
    lhs, rhs = tensor(rng, (1, 8, 32), "int8", 0), tensor(rng, (1, 15, 32), "int8", 0)
    with pytest.raises(NotImplementedError, match="N is 15; the copy engine needs multiples of 8"):
        gpu_sm100.check(problem_of(lhs, rhs, rhs_transposed=True), chips.chip("b200"))
    lhs, rhs = tensor(rng, (1, 8, 24), "int8", 0), tensor(rng, (1, 16, 24), "int8", 0)
    with pytest.raises(NotImplementedError, match="24 bytes; the copy engine needs multiples of 32"):
        gpu_sm100.check(problem_of(lhs, rhs, rhs_transposed=True), chips.chip("b200"))


# --- compiled


def shaped(scheme, m, k, n):
    """(lhs, rhs) of a scheme, described only."""
    x, w, tile_k, scale_dtype, rows = SCHEMES[scheme]
    make: Any = jax.ShapeDtypeStruct

    def side(free, dtype, scaled, tile):
        scale = make((1, free, k // (tile or k)), jnp.dtype(scale_dtype)) if scaled else None
        return Tensor(make((1, free, k), jnp.dtype(dtype)), scale)

    return side(m, x, rows is not None, rows), side(n, w, "float16" not in w, tile_k)


# rows, weights, tiles along K of the weights' scales, the scales' dtype, tiles along K of the rows' (or none)
SCHEMES = {
    "w8a8": ("int8", "int8", 0, "float32", 0),
    "wf8af8": ("float8_e4m3fn", "float8_e4m3fn", 0, "float32", 0),
    "w16a16": ("bfloat16", "bfloat16", 0, "float32", None),
    "w8a8_g128": ("int8", "int8", 128, "float32", 128),
    "wf8af8_g128": ("float8_e4m3fn", "float8_e4m3fn", 128, "float32", 128),
    "mxfp8": ("float8_e4m3fn", "float8_e4m3fn", 32, "float8_e8m0fnu", 32),
    "mxfp4": ("float4_e2m1fn", "float4_e2m1fn", 32, "float8_e8m0fnu", 32),
    "nvfp4": ("float4_e2m1fn", "float4_e2m1fn", 16, "float8_e4m3fn", 16),
    "w8a16": ("bfloat16", "int8", 0, "float32", None),
    "w4a16_g128": ("bfloat16", "int4", 128, "float32", None),
    "w4a16_g32": ("bfloat16", "int4", 32, "float32", None),
    "wf8a16": ("bfloat16", "float8_e4m3fn", 0, "float32", None),
    "w4a8": ("int8", "int4", 0, "float32", 0),
    "w4a8_g128": ("int8", "int4", 128, "float32", 0),
}


def problem(scheme, m, k=4096, n=4096):
    lhs, rhs = shaped(scheme, m, k, n)
    return problem_of(lhs, rhs, rhs_transposed=True, out_dtype="bfloat16")


def program(scheme, m, k=4096, n=4096, pair=False):
    """For a process that compiles: the function, and its arguments' shapes."""
    chip, described = chips.chip("b200"), problem(scheme, m, k, n)
    config = gpu_sm100.heuristic_config(described, chip)
    config = Config(256, config.block_k, 6, pair=True) if pair else config
    run = lambda a, b: gpu_sm100.run(described, a, b, config=config, chip=chip)
    return run, shaped(scheme, m, k, n)


MATRIX = {"int8": "UTCIMMA", "float8_e4m3fn": "UTCQMMA", "bfloat16": "UTCHMMA", "float4_e2m1fn": "UTCOMMA"}
FEW = {("w8a8", 4096), ("mxfp8", 4096), ("w4a16_g128", 16)}


@pytest.mark.parametrize(
    ("scheme", "m"),
    [
        pytest.param(scheme, m, marks=() if (scheme, m) in FEW else pytest.mark.large)
        for scheme in SCHEMES
        for m in (4096, 16)
    ],
)
def test_compiles_for_b200(scheme, m):
    made = gpu_compile.compiled("b200", "tests.kernels.test_matmul_gpu_sm100:program", scheme=scheme, m=m)
    (kernel,) = made.kernels
    assert kernel.target == "sm_100a"
    assert not kernel.spill_bytes and not kernel.local_in_loops
    assert kernel.highest_register < kernel.register_budget
    assert any(name.startswith(MATRIX[SCHEMES[scheme][0]]) for name in kernel.matrix), kernel.matrix
    assert kernel.tma_loads >= 2 and kernel.tma_stores >= 1


@pytest.mark.large
@pytest.mark.parametrize(
    ("scheme", "m", "k", "n"),
    [
        ("w8a8", 20, 4128, 4104),
        ("w4a16_g32", 130, 4160, 2056),
        ("mxfp8", 1, 1056, 200),
        ("nvfp4", 75, 2112, 1000),
        ("w4a8_g128", 100, 640, 264),
    ],
)
def test_odd_sizes_compile_for_b200(scheme, m, k, n):
    what = "tests.kernels.test_matmul_gpu_sm100:program"
    made = gpu_compile.compiled("b200", what, scheme=scheme, m=m, k=k, n=n)
    (kernel,) = made.kernels
    assert not kernel.spill_bytes and not kernel.local_in_loops


@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_copies_of_scales_end_at_128_bytes(block_m):
    """Where the copy engine writes, which neither the interpreter nor the compiler checks."""
    rng = np.random.default_rng(0)
    lhs, rhs = tensor(rng, (1, 16, 256), "int8", 128), tensor(rng, (1, 128, 256), "int8", 128)
    problem = problem_of(lhs, rhs, rhs_transposed=True, out_dtype="float32")
    config = Config(block_m=block_m, block_k=128, steps=2)
    assert gpu_sm100_plan.plan(problem, chips.chip("b200"), config).copied_scales * 4 % 128 == 0
