"""The TPU matmul's weight formats in the interpreter, with race detection: every format by every strategy.

Small shapes; results within `reference.error_bound`. What the compilers say is in the tests marked `large`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qwix_kernels.chips import CHIPS
from qwix_kernels.matmul import reference, tpu
from qwix_kernels.matmul.describe import problem_of
from qwix_kernels.problem import CODEBOOKS, RowQuantize, Tensor

from bench.tpu_compile import TOPOLOGY, compile_for

INTERPRET = pltpu.InterpretParams(detect_races=True)
FP4, E8M0 = "float4_e2m1fn", "float8_e8m0fnu"
# (weights, scales, tile)
BLOCK_FORMATS = {
    "mxfp4": (FP4, E8M0, 32),
    "nvfp4": (FP4, "float8_e4m3fn", 16),
    "mxfp8": ("float8_e4m3fn", E8M0, 32),
    "mxfp8_e5m2": ("float8_e5m2", E8M0, 32),
    "int4_16": ("int4", "bfloat16", 16),
    "int4_64": ("int4", "float32", 64),
    "nf4_64": ("nf4", "bfloat16", 64),
}


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def stored(rng, dtype, shape):
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return jnp.asarray(rng.integers(info.min, info.max + 1, shape), jnp.int32).astype(dtype)
    return jnp.asarray(rng.standard_normal(shape) * (2 if dtype == FP4 else 20), jnp.float32).astype(dtype)


def scales(rng, dtype, shape):
    if dtype == E8M0:
        return jnp.asarray(2.0 ** rng.integers(-9, -3, shape), jnp.float32).astype(dtype)
    return jnp.asarray(rng.uniform(0.01, 0.1, shape), jnp.float32).astype(dtype)


def weight(rng, kind, k, n, *, batch=1, transposed=False, columns=1, zero_point=False):
    """[batch, k, n] or [batch, n, k]; `columns` share a scale."""
    dtype, scale_dtype, tile = BLOCK_FORMATS[kind]
    codebook = "nf4" if dtype == "nf4" else None
    dtype = "uint4" if codebook else dtype
    turn = lambda shape: (shape[0], shape[2], shape[1]) if transposed else shape
    size = turn((batch, k // tile, n // columns))
    zero = stored(rng, dtype, size) if zero_point else None
    return Tensor(stored(rng, dtype, turn((batch, k, n))), scales(rng, scale_dtype, size), zero, codebook)


def check(problem, lhs, rhs, chip, config=None):
    tpu.check(problem, CHIPS[chip])
    config = config or tpu.heuristic_config(problem, CHIPS[chip])
    got = tpu.run(problem, lhs, rhs, config=config, chip=CHIPS[chip], interpret=INTERPRET)
    got, want = np.asarray(got).astype(np.float64), reference.run(problem, lhs, rhs)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    allowed = reference.error_bound(problem, lhs, rhs, multiplied="bfloat16")
    good = (np.abs(got - want) <= allowed) | np.isnan(want)
    assert good.all(), f"{np.max(np.where(good, 0, np.abs(got - want) / allowed))} times the bound"


@pytest.mark.parametrize("kind", list(BLOCK_FORMATS))
@pytest.mark.parametrize(("strategy", "chip"), [("after", "v5e"), ("before", "v6e"), ("after", "v7x")])
def test_block_formats(kind, strategy, chip):
    rng = np.random.default_rng(0)
    lhs = Tensor(stored(rng, "bfloat16", (1, 16, 256)))
    rhs = weight(rng, kind, 256, 128, transposed=chip == "v7x")
    problem = problem_of(lhs, rhs, rhs_transposed=chip == "v7x", out_dtype="float32")
    check(problem, lhs, rhs, chip, tpu.Config(16, 128, 128, strategy))


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp8", "int4_16"])
@pytest.mark.parametrize("chip", ["v5e", "v7x"])
def test_rows_of_several_blocks(kind, chip):
    """More rows than one pass takes: the weights of a step are made ready once, in VMEM."""
    rng = np.random.default_rng(1)
    lhs, rhs = Tensor(stored(rng, "bfloat16", (1, 256, 128))), weight(rng, kind, 128, 128)
    check(problem_of(lhs, rhs, out_dtype="float32"), lhs, rhs, chip, tpu.Config(256, 128, 128, "after"))


@pytest.mark.parametrize("act", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("kind", ["mxfp4", "int4_64"])
def test_quantized_rows_by_narrow_tiles(act, kind):
    rng = np.random.default_rng(2)
    tile = BLOCK_FORMATS[kind][2]
    how = RowQuantize(act, 127.5 if act == "int8" else 448.0, tile)
    lhs, rhs = Tensor(stored(rng, "bfloat16", (1, 8, 128))), weight(rng, kind, 128, 128)
    problem = problem_of(lhs, rhs, quantize_lhs=how, out_dtype="float32")
    check(problem, lhs, rhs, "v5e" if act == "int8" else "v7x", tpu.Config(8, 128, 128, "after"))


@pytest.mark.parametrize("dtype", [FP4, "int4"])
@pytest.mark.parametrize("chip", ["v5e", "v7x"])
def test_weights_without_tiles(dtype, chip):
    """One scale for all of K, and none at all."""
    rng = np.random.default_rng(3)
    lhs = Tensor(stored(rng, "bfloat16", (1, 8, 96)))
    for scale in (scales(rng, E8M0, (1, 1, 128)), None):
        rhs = Tensor(stored(rng, dtype, (1, 96, 128)), scale)
        check(problem_of(lhs, rhs, out_dtype="float32"), lhs, rhs, chip)


@pytest.mark.parametrize("strategy", ["after", "before"])
def test_zero_points_of_narrow_tiles(strategy):
    rng = np.random.default_rng(4)
    lhs = Tensor(stored(rng, "bfloat16", (1, 8, 128)))
    rhs = weight(rng, "int4_64", 128, 128, zero_point=True)
    problem = problem_of(lhs, rhs, out_dtype="float32")
    check(problem, lhs, rhs, "v5e", tpu.Config(8, 128, 128, strategy))


@pytest.mark.parametrize("kind", ["mxfp4", "nf4_64"])
@pytest.mark.parametrize("strategy", ["after", "before"])
def test_k_tail(kind, strategy):
    """K = 384 in blocks of 256."""
    rng = np.random.default_rng(5)
    lhs, rhs = Tensor(stored(rng, "bfloat16", (1, 8, 384))), weight(rng, kind, 384, 128)
    problem = problem_of(lhs, rhs, out_dtype="float32")
    check(problem, lhs, rhs, "v6e", tpu.Config(8, 128, 256, strategy))


@pytest.mark.parametrize("strategy", ["after", "before"])
def test_nan_zero_and_tiny_scales(strategy):
    rng = np.random.default_rng(6)
    lhs, rhs = Tensor(stored(rng, "bfloat16", (1, 8, 128))), weight(rng, "mxfp4", 128, 128)
    bits = jax.lax.bitcast_convert_type(rhs.scale, jnp.uint8)
    bits = bits.at[0, 1, 5].set(255).at[0, 2, 6].set(0)  # NaN and 2^-127
    nothing = rhs.values.at[0, 32:64, 7].set(0)
    rhs = dataclasses.replace(
        rhs, values=nothing, scale=jax.lax.bitcast_convert_type(bits, jnp.float8_e8m0fnu)
    )
    problem = problem_of(lhs, rhs, out_dtype="float32")
    check(problem, lhs, rhs, "v5e", tpu.Config(8, 128, 128, strategy))


@pytest.mark.parametrize("chip", ["v5e", "v7x"])
def test_batches_and_two_dimensional_scales(chip):
    rng = np.random.default_rng(7)
    lhs = Tensor(stored(rng, "bfloat16", (2, 8, 128)))
    rhs = weight(rng, "int4_64", 128, 256, batch=2, columns=128)
    check(problem_of(lhs, rhs, out_dtype="float32"), lhs, rhs, chip)


def test_every_fp4_value_is_exact():
    """All sixteen, in every position of a word, times one."""
    codes = jnp.tile(jnp.arange(16, dtype=jnp.int32), 256).reshape(1, 32, 128).astype(jnp.uint4)
    rhs = Tensor(jax.lax.bitcast_convert_type(codes, jnp.float4_e2m1fn))
    lhs = Tensor(jnp.eye(32, dtype=jnp.bfloat16)[None])
    problem = problem_of(lhs, rhs, out_dtype="float32")
    config = tpu.Config(32, 128, 32, "once")
    got = tpu.run(problem, lhs, rhs, config=config, chip=CHIPS["v6e"], interpret=INTERPRET)
    np.testing.assert_array_equal(got, rhs.values.astype(jnp.float32))


@pytest.mark.parametrize("n", [128, 130])
@pytest.mark.parametrize("tile", [32, 128])
def test_codebook_with_scales_of_every_sign(tile, n):
    """Looked up with their scales where columns fill registers, one by one where not; NaN stays put."""
    rng = np.random.default_rng(9)
    lhs = Tensor(stored(rng, "bfloat16", (1, 8, 128)))
    scale = jnp.asarray(rng.standard_normal((1, 128 // tile, n)), jnp.float32)
    scale = (
        scale.at[0, 0, 3].set(0).at[0, 0, 4].set(jnp.nan).at[0, 0, 5].set(-1.0).at[0, 0, 6].set(-(2.0**-125))
    )
    rhs = Tensor(stored(rng, "uint4", (1, 128, n)), scale, None, "nf4")
    problem = problem_of(lhs, rhs, out_dtype="float32")
    config = tpu.Config(8, n, 128, "once" if tile == 128 else "before")
    check(problem, lhs, rhs, "v6e", config)


def test_every_code_is_rounded_once():
    """Sixteen entries, in every row of a register, times one."""
    codes = ((jnp.arange(32)[:, None] * 5 + jnp.arange(128)) % 16)[None].astype(jnp.uint4)
    rhs = Tensor(codes, None, None, "nf4")
    lhs = Tensor(jnp.eye(32, dtype=jnp.bfloat16)[None])
    problem = problem_of(lhs, rhs, out_dtype="float32")
    config = tpu.Config(32, 128, 32, "once")
    got = tpu.run(problem, lhs, rhs, config=config, chip=CHIPS["v5e"], interpret=INTERPRET)
    want = jnp.asarray(CODEBOOKS["nf4"], jnp.bfloat16).astype(jnp.float32)[codes.astype(jnp.int32)]
    np.testing.assert_array_equal(got, want)


def test_refusals():
    rng = np.random.default_rng(8)
    lhs = Tensor(stored(rng, "bfloat16", (1, 8, 144)))
    rhs = weight(rng, "nvfp4", 144, 128)
    with pytest.raises(NotImplementedError, match="by 32 rows"):
        tpu.check(problem_of(lhs, rhs), CHIPS["v6e"])
    tpu.check(problem_of(lhs, rhs), CHIPS["v7x"])
    with pytest.raises(NotImplementedError, match="K tiles below 128 needs a K of whole 128s"):
        tpu.estimate(problem_of(lhs, rhs), CHIPS["v7x"], tpu.Config(8, 128, 144, "after"))
    with pytest.raises(NotImplementedError, match="as lhs"):
        tpu.check(problem_of(stored(rng, FP4, (1, 8, 128)), stored(rng, FP4, (1, 128, 8))), CHIPS["v7x"])


@pytest.mark.large
@pytest.mark.parametrize("chip", tuple(TOPOLOGY))
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4", "mxfp8", "int4_64", "nf4_64"])
def test_block_formats_compile_for_every_chip(chip, kind):
    """One custom call, and nothing done to the weight or its scales outside of it."""
    dtype, scale_dtype, tile = BLOCK_FORMATS[kind]
    codebook = "nf4" if dtype == "nf4" else None
    struct = jax.ShapeDtypeStruct
    lhs = Tensor(struct((1, 16, 512), jnp.bfloat16))
    values = struct((1, 512, 512), "uint4" if codebook else dtype)
    rhs = Tensor(values, struct((1, 512 // tile, 512), scale_dtype), None, codebook)
    problem = problem_of(lhs, rhs, out_dtype="bfloat16")
    tpu.check(problem, CHIPS[chip])
    for strategy in ("after", "before"):
        config = tpu.Config(16, 256, 512, strategy)
        run = lambda x, w, config=config: tpu.run(problem, x, w, config=config, chip=CHIPS[chip])
        text = compile_for(chip, run, lhs, rhs).as_text()
        assert text.count("custom-call(") == 1
        assert not any(f" {op}(" in text for op in ("transpose", "convert", "copy", "broadcast"))
