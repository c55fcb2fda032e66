"""Row quantization by the GPU kernel, interpreted: bit for bit what XLA makes of the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from qwix_kernels import chips, dispatch, quantize
from qwix_kernels.matmul import elementwise
from qwix_kernels.problem import RowQuantize
from qwix_kernels.quantize import gpu, xla

from bench import gpu_compile

RACES = plgpu.InterpretGPUParams(detect_races=True)
H100 = chips.chip("h100")
BOUND = {"int8": 127.5, "int4": 7.5, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def _rows(shape, dtype):
    """Rows of very different sizes: zeros, subnormal and huge ones among them, and ties between integers."""
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    sizes = jnp.asarray([1.0, 0.0, 1e-30, 3e4, 1e-4, 127.5, 7.0, 1e4])[jnp.arange(shape[1]) % 8]
    return (x * sizes[:, None]).astype(dtype)


def _same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize(
    "dtype, x_dtype, shape",
    [
        ("int8", "bfloat16", (2, 8, 1280)),
        pytest.param("int8", "float32", (1, 4, 384), marks=pytest.mark.large),
        pytest.param("float8_e4m3fn", "bfloat16", (1, 8, 2048), marks=pytest.mark.large),
        ("float8_e5m2", "float16", (1, 3, 1024)),
    ],
)
def test_run(dtype, x_dtype, shape):
    problem = quantize.problem_of(jax.ShapeDtypeStruct(shape, x_dtype), dtype, BOUND[dtype], "rows")
    x, config = _rows(shape, x_dtype), gpu.heuristic_config(problem, H100)
    got = gpu.run(problem, x, config=config, chip=H100, interpret=RACES)
    _same(got, jax.jit(lambda x: xla.run(problem, x))(x))


@pytest.mark.parametrize(
    "how, shape",
    [
        (RowQuantize("int8", 127.5), (2, 4, 1024)),
        (RowQuantize("int8", 127.5, 128), (1, 16, 512)),
        pytest.param(RowQuantize("int4", 7.5, 64), (1, 16, 256), marks=pytest.mark.large),
        pytest.param(RowQuantize("float8_e4m3fn", 448.0, 128), (1, 8, 384), marks=pytest.mark.large),
        (RowQuantize("float8_e4m3fn", 448.0, 32, scale_dtype="float8_e8m0fnu"), (1, 32, 128)),
    ],
    ids=str,
)
def test_rows(how, shape):
    x = _rows(shape, "bfloat16")
    got, wanted = gpu.rows(x, how, interpret=RACES), elementwise.quantize_rows(x, how)
    _same((got.values, got.scale), (wanted.values, wanted.scale))


def test_reciprocal():
    """Correctly rounded, also of a quotient that is off by units in the last place."""
    d = np.asarray(jax.random.uniform(jax.random.key(1), (100_000,), minval=1.0, maxval=2.0))
    d = np.concatenate([d, d * np.float32(2**-60), d * np.float32(2**100)])
    exact = np.float32(1) / d
    np.testing.assert_array_equal(np.asarray(gpu._reciprocal(jnp.asarray(d))), exact)
    for units in (-3, -1, 2):
        off = jnp.asarray((exact.view(np.int32) + units).view(np.float32))
        near = off + off * gpu._residual(jnp.asarray(d), off)
        assert np.abs(np.asarray(near).view(np.int32) - exact.view(np.int32)).max() <= 1
    assert gpu._reciprocal(jnp.float32(jnp.inf)) == 0 and jnp.isnan(gpu._reciprocal(jnp.float32(jnp.nan)))


@pytest.mark.parametrize("chip", ["h100", "b200"])
def test_dispatch(chip):
    x = jax.ShapeDtypeStruct((1, 4096, 4096), jnp.bfloat16)
    plan = dispatch.explain(quantize.problem_of(x, "int8", 127.5, "rows"), chips.chip(chip))
    assert plan.chosen == "mosaic_gpu" and plan.config == gpu.Config(1)
    few = quantize.problem_of(jax.ShapeDtypeStruct((1, 16, 4096), jnp.bfloat16), "int8", 127.5, "rows")
    assert dispatch.explain(few, chips.chip(chip)).chosen == "mosaic_gpu"
    columns = dispatch.explain(quantize.problem_of(x, "int8", 127.5, "columns"), chips.chip(chip))
    assert columns.chosen == "xla" and "XLA's" in dict(columns.rejected)["mosaic_gpu"]


@pytest.mark.parametrize(
    "shape, dtype, how, reason",
    [
        ((1, 4, 1000), "bfloat16", RowQuantize("int8", 127.5), "evenly"),
        ((1, 4, 65536), "bfloat16", RowQuantize("int8", 127.5), "registers"),
        ((1, 4, 1024), "int32", RowQuantize("int8", 127.5), "int32"),
        ((1, 4, 1024), "bfloat16", RowQuantize("float4_e2m1fn", 6.0), "float4_e2m1fn"),
        ((1, 4, 1024), "bfloat16", RowQuantize("int8", 127.5, columns=True), "columns"),
    ],
)
def test_refused(shape, dtype, how, reason):
    with pytest.raises(NotImplementedError, match=reason):
        gpu.check_rows(shape, dtype, how)


def whole(columns, tile):
    """(function, shapes) of 256 rows to int8, for the compiler."""
    x = jax.ShapeDtypeStruct((1, 256, columns), jnp.bfloat16)
    how = RowQuantize("int8", 127.5, tile)
    return lambda x: jax.tree.leaves(gpu.rows(x, how)), [x]


@pytest.mark.parametrize(
    "columns, tile",
    [(14336, 0), (4096, 128), pytest.param(28672, 0, marks=pytest.mark.large)],
)
def test_registers(columns, tile):
    """Rows of 28672 are the longest that fit the registers of a warpgroup, and do so without spills."""
    (kernel,) = gpu_compile.compiled("h100", f"{__name__}:whole", columns=columns, tile=tile).kernels
    assert kernel.spill_bytes == kernel.local == 0 and kernel.threads == 128
    assert kernel.highest_register < kernel.register_budget and kernel.registers <= 255


def test_config_that_does_not_fit():
    problem = quantize.problem_of(jax.ShapeDtypeStruct((1, 6, 1024), "bfloat16"), "int8", 127.5, "rows")
    with pytest.raises(NotImplementedError, match="multiples of"):
        gpu.estimate(problem, H100, gpu.Config(4))
