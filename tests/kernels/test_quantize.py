"""Quantization of whole arrays: one arithmetic for the reference, XLA, the TPU kernel and `qwix.quantize`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from qwix_kernels import dispatch, quantize
from qwix_kernels.chips import CHIPS
from qwix_kernels.quantize import reference, tpu

import qwix
from bench.tpu_compile import TOPOLOGY, compile_for

INTERPRET = pltpu.InterpretParams(detect_races=True)
BOUND = {"int8": 127.5, "int4": 7.5, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def array(shape, dtype="bfloat16", seed=0) -> jax.Array:
    """Normal values of many sizes; a column of zeros and a row of tiny values."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1, shape[2])))
    x[:, :, 1], x[:, 2] = 0, 1e-30
    return jnp.asarray(x, dtype)


def assert_same(got, problem, x):
    for g, w in zip(got, reference.quantize(problem, np.asarray(x)), strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        np.testing.assert_array_equal(np.asarray(g).view(np.uint8), w.view(np.uint8))


def on_tpu(problem, x, chip="v6e", config=None):
    tpu.check(problem, CHIPS[chip])
    config = config or tpu.heuristic_config(problem, CHIPS[chip])
    return tpu.run(problem, x, config=config, chip=CHIPS[chip], interpret=INTERPRET)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2", "int4"])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("scale_of", ["rows", "columns"])
def test_xla_is_bit_equal_to_the_reference_and_to_qwix(dtype, x_dtype, scale_of):
    x = array((2, 40, 72), x_dtype)
    got = quantize.quantize(x, dtype, BOUND[dtype], scale_of)
    assert_same(got, quantize.problem_of(x, dtype, BOUND[dtype], scale_of), x)
    axes = (0, 2) if scale_of == "columns" else (0, 1)
    public = jax.jit(lambda x: qwix.quantize(x, dtype, channelwise_axes=axes))(x)
    np.testing.assert_array_equal(got[0], public.qvalue)
    np.testing.assert_array_equal(got[1], public.scale)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])  # without and with arithmetic on packed bfloat16
@pytest.mark.parametrize(
    ("shape", "scale_of", "x_dtype", "dtype", "block"),
    [
        ((2, 64, 256), "columns", "bfloat16", "int8", 128),
        ((1, 300, 200), "columns", "float32", "int8", 128),  # neither rows nor columns fill their blocks
        ((1, 20, 130), "columns", "bfloat16", "float8_e4m3fn", 256),  # less than a native tile of rows
        ((1, 72, 640), "rows", "bfloat16", "int8", 32),
        ((2, 40, 200), "rows", "float32", "float8_e5m2", 64),
    ],
)
def test_the_kernel_is_bit_equal_to_the_reference(chip, shape, scale_of, x_dtype, dtype, block):
    x = array(shape, x_dtype)
    problem = quantize.problem_of(x, dtype, BOUND[dtype], scale_of)
    assert_same(on_tpu(problem, x, chip, tpu.Config(block)), problem, x)


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scale_of", ["rows", "columns"])
def test_nan_and_infinity_stay_where_they_are(scale_of, x_dtype):
    x = array((1, 256, 128), x_dtype).at[0, 3, 5].set(jnp.nan).at[0, 40, 70].set(jnp.inf)
    problem = quantize.problem_of(x, "int8", 127.5, scale_of)
    want = reference.quantize(problem, np.asarray(x))
    assert np.isnan(want[1].astype(np.float32)).sum() == 1
    clean = np.isfinite(np.asarray(x, np.float32)).all(axis=1 if scale_of == "columns" else 2, keepdims=True)
    results = [quantize.quantize(x, "int8", 127.5, scale_of)]
    if scale_of == "columns" and x_dtype == "bfloat16":
        # XLA:CPU, which runs the interpreter, loses a NaN in the maximum of float32.
        results.append(on_tpu(problem, x))
    for values, scale in results:
        np.testing.assert_array_equal(np.asarray(scale, np.float32), want[1].astype(np.float32))
        np.testing.assert_array_equal(np.where(clean, values, 0), np.where(clean, want[0], 0))


@pytest.mark.parametrize("chip", TOPOLOGY)
@pytest.mark.parametrize(
    ("shape", "scale_of", "dtype"),
    [
        ((1, 4096, 1024), "columns", "int8"),
        ((2, 1000, 576), "rows", "float8_e4m3fn"),
    ],
)
def test_it_compiles_as_one_kernel(chip, shape, scale_of, dtype):
    run = lambda x: quantize.quantize(x, dtype, BOUND[dtype], scale_of, implementation="mosaic_tpu")
    text = compile_for(chip, run, jax.ShapeDtypeStruct(shape, jnp.bfloat16)).as_text()
    assert text.count("tpu_custom_call") == 1 and f"qwix_quantize_{dtype}_{scale_of}" in text


def test_what_dispatch_chooses():
    weight = quantize.problem_of(
        jax.ShapeDtypeStruct((1, 4096, 14336), jnp.bfloat16), "int8", 127.5, "columns"
    )
    e = dispatch.explain(weight, "v6e")
    assert e.chosen == "mosaic_tpu"
    assert e.estimate.memory_us == pytest.approx(4096 * 14336 * 3 / 1640e3, rel=0.01)  # 3 bytes a value
    assert (
        e.estimate.static_us * 1.5 < dispatch.explain(weight, "v6e", implementation="xla").estimate.static_us
    )
    small = quantize.problem_of(jax.ShapeDtypeStruct((1, 256, 256), jnp.bfloat16), "int8", 127.5, "columns")
    assert "predicted slower than xla" in dispatch.explain(small, "v6e").rejected[0][1]
    assert dispatch.explain(weight, "cpu").chosen == "xla"
    long = quantize.problem_of(jax.ShapeDtypeStruct((1, 1 << 20, 128), jnp.float32), "int8", 127.5, "columns")
    assert "1048576 rows are too many" in dispatch.explain(long, "v5e").rejected[0][1]


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "reason"), [("float16", "int8", "not float16"), ("bfloat16", "int4", "not int4")]
)
def test_what_the_kernel_refuses(x_dtype, dtype, reason):
    problem = quantize.problem_of(jax.ShapeDtypeStruct((1, 64, 128), x_dtype), dtype, 7.5, "rows")
    with pytest.raises(NotImplementedError, match=reason):
        dispatch.explain(problem, "v6e", implementation="mosaic_tpu")


def test_a_kernel_that_is_named_must_run():
    with pytest.raises(NotImplementedError, match="runs on tpu, not on cpu"):
        quantize.quantize(array((1, 8, 16)), "int8", 127.5, "rows", implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="did you mean 'mosaic_tpu'"):
        quantize.quantize(array((1, 8, 16)), "int8", 127.5, "rows", implementation="mosaic")
    with pytest.raises(ValueError, match=r"\[batch, rows, columns\]"):
        quantize.quantize(jnp.ones((8, 16)), "int8", 127.5, "rows")


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "bound", "said"),
    [
        ("int32", "int8", 127.5, "got int32; convert it first"),
        ("float32", "int16", 32767.5, "got int16"),
        ("float32", "int8", -1.0, "above 0, got -1.0"),
        ("float32", "int8", float("nan"), "above 0, got nan"),
    ],
)
def test_what_cannot_be_quantized_is_named(x_dtype, dtype, bound, said):
    with pytest.raises(ValueError, match=said):
        quantize.quantize(jnp.ones((1, 8, 16), x_dtype), dtype, bound, "rows")


def test_transformations():
    x = array((3, 16, 32))
    want = quantize.quantize(x, "int8", 127.5, "columns")
    one = lambda x: quantize.quantize(x[None], "int8", 127.5, "columns")
    for got in (jax.vmap(one)(x), jax.vmap(one, in_axes=2)(jnp.moveaxis(x, 0, 2)), jax.lax.map(one, x)):
        np.testing.assert_array_equal(got[0][:, 0], want[0])
        np.testing.assert_array_equal(got[1][:, 0], want[1])
    empty = quantize.quantize(jnp.ones((1, 0, 4)), "int8", 127.5, "columns")
    assert empty[0].shape == (1, 0, 4) and empty[1].tolist() == [[[1.0] * 4]]
    exported = jax.export.export(jax.jit(one))(
        jax.ShapeDtypeStruct(jax.export.symbolic_shape("a, b"), x.dtype)
    )
    np.testing.assert_array_equal(exported.call(x[0])[0], want[0][:1])


def test_meshes():
    x = array((1, 16, 64))
    want = quantize.quantize(x, "int8", 127.5, "columns")
    run = lambda x: quantize.quantize(x, "int8", 127.5, "columns")
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, None, "d")
    apart = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, spec))
    explicit = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    results = [jax.jit(apart)(x), jax.jit(run)(sharded)]
    with jax.set_mesh(explicit):
        results.append(jax.jit(run)(jax.device_put(x, jax.NamedSharding(explicit, spec))))
        assert results[-1][1].sharding.spec == spec
        with pytest.raises(NotImplementedError, match="runs on tpu, not on cpu"):
            quantize.quantize(x, "int8", 127.5, "rows", implementation="mosaic_tpu")
    for got in results:
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
