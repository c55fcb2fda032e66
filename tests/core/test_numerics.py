"""Number formats: spelling, bounds, conversions; one test per trap."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwix._src.core import numerics


@pytest.mark.parametrize(
    "qtype, bound",
    [
        ("int1", 0.5), ("int2", 1.5), ("int3", 3.5), ("int4", 7.5), ("int5", 15.5), ("int6", 31.5),
        ("int7", 63.5), ("int8", 127.5), ("int16", 32768.0), (jnp.int2, 1.5), ("uint4", 15.5),
        ("uint8", 255.5), ("nf4", 1.0), (jnp.float8_e4m3fn, 448.0), (jnp.float8_e4m3, 240.0),
        (jnp.float8_e5m2, 57344.0), (jnp.float8_e4m3b11fnuz, 30.0), ("float4_e2m1fn", 6.0),
        ("mxfp8", 448.0), ("mxfp8_16", 448.0), ("mxfp4", 6.0), ("nvfp4", 6.0),
    ],
)  # fmt: skip
def test_symmetric_bounds(qtype, bound):
    assert numerics.get_symmetric_bound(qtype) == bound


@pytest.mark.parametrize("qtype", ["uint8", "int6", "nf4", jnp.float8_e4m3fn])
def test_asymmetric_quantization_is_for_three_types(qtype):
    assert numerics.get_asymmetric_bound("int16") == (-32768.0, 32767.0)
    with pytest.raises(ValueError, match="doesn't support asymmetric quantization"):
        numerics.get_asymmetric_bound(qtype)


@pytest.mark.parametrize(
    "qtype, values, expected",
    [
        ("int8", [1.2, 3.5, -127.5, 129, -1300], [1, 4, -128, 127, -128]),
        ("int4", [1.2, 3.5, 8, -1300], [1, 4, 7, -8]),
        ("int16", [-32768.5, 32769, -40000], [-32768, 32767, -32768]),
        ("int6", [1.2, 3.5, 129, -1300], [1, 4, 31, -32]),
        ("uint8", [-1.2, 3.5, 129, 1300], [0, 4, 129, 255]),
        ("nf4", [-1, -0.5, 0, 0.8, 1], [0, 2, 7, 14, 15]),
        ("int8", [np.inf, -np.inf, 0.5, 1.5, 2.5], [127, -128, 0, 2, 2]),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_convert_to_rounds_half_even_and_saturates(qtype, values, expected, dtype):
    out = numerics.convert_to(jnp.array(values, dtype), qtype)
    assert out.dtype == numerics.storage_dtype(qtype)
    np.testing.assert_array_equal(np.asarray(out).astype(int), expected)


def test_int1_keeps_the_sign():
    out = numerics.convert_to(jnp.array([-2, -0.6, 0.4, 0.6, 1.5, 2.5]), "int1")
    np.testing.assert_array_equal(np.asarray(out).astype(int), [-1, -1, 1, 1, 1, 1])
    assert numerics.canonical_qtype(jnp.int1) == "int1"


@pytest.mark.parametrize("name", [n for n in numerics.NATIVE if n.startswith("float") and "e8m0" not in n])
def test_float_conversion_is_nearest_even_within_range(name):
    dtype = getattr(ml_dtypes, name)
    x = np.linspace(-7, 7, 401).astype(np.float32)
    info = ml_dtypes.finfo(dtype)
    expected = np.clip(x, np.float32(info.min), np.float32(info.max)).astype(dtype)
    out = np.asarray(numerics.convert_to(jnp.array(x), name))
    np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))


@settings(max_examples=25)
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=16))
def test_nf4_takes_the_nearest_value(values):
    x = np.array(values, np.float32)
    table = np.asarray(numerics.get_nf4_buckets(), np.float64)
    chosen = table[np.asarray(numerics.fp_to_nf4(jnp.array(x))).astype(int)]
    best = np.abs(table - np.float64(x)[:, None]).min(1)
    np.testing.assert_allclose(np.abs(chosen - x), best, rtol=0, atol=1e-7)


def test_nf4_round_trips_and_others_convert_from_as_they_are():
    index = jnp.arange(16).astype(jnp.uint4)
    back = numerics.fp_to_nf4(numerics.convert_from(index, "nf4"))
    np.testing.assert_array_equal(np.asarray(back).astype(int), np.arange(16))
    x = jnp.ones(3, jnp.int8)
    assert numerics.convert_from(x, "int8") is x


def test_every_spelling_is_one_qtype():
    spellings = ("int8", jnp.int8, np.int8, np.dtype("int8"), jnp.dtype("int8"))
    assert len({numerics.canonical_qtype(q) for q in spellings}) == 1
    assert numerics.canonical_qtype("float8_e4m3fn") == numerics.canonical_qtype(jnp.float8_e4m3fn)
    assert numerics.storage_dtype("int2") == jnp.int4 and numerics.storage_dtype(jnp.int2) == jnp.int2


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("int9", "'int8'"),
        ("nf5", "'nf4'"),
        ("float8_e4m3f", "'float8_e4m3fn'"),
        ("INT4", "'int4'"),
        ("mxpf4", "'mxfp4'"),
    ],
)
def test_a_wrong_name_gets_the_nearest_valid_one(wrong, near):
    with pytest.raises(ValueError, match=f"Did you mean {near}"):
        numerics.canonical_qtype(wrong)


@pytest.mark.parametrize("wrong", [None, jnp.int32, jnp.bfloat16, jnp.float32, bool])
def test_types_that_are_not_quantized_are_refused(wrong):
    with pytest.raises(ValueError, match="Cannot use"):
        numerics.get_symmetric_bound(wrong)


@pytest.mark.parametrize("qtype", ["int8", "int6", "int3", "uint4"])
def test_noise_reaches_every_integer_type(qtype):
    noise = lambda shape: jnp.full(shape, 0.4, jnp.float32)
    out = numerics.convert_to(jnp.array([1.2, 0.0]), qtype, noise)
    np.testing.assert_array_equal(np.asarray(out).astype(int), [2, 0])


@pytest.mark.parametrize("qtype", ["nf4", "int1", "float8_e8m0fnu"])
def test_noise_is_refused_where_it_has_no_meaning(qtype):
    with pytest.raises(ValueError, match="noise_fn"):
        numerics.convert_to(jnp.ones(2), qtype, lambda shape: jnp.zeros(shape))


@pytest.mark.parametrize("qtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "mxfp4"])
def test_floats_are_rounded_to_a_neighbour_by_noise(qtype):
    """Each value of the dtype stays under any noise; between two of them, noise decides where it should."""
    stored = numerics.storage_dtype(qtype)
    bits = jnp.arange(2 ** jnp.finfo(stored).bits, dtype=jnp.uint8)
    if jnp.finfo(stored).bits == 4:
        bits = bits.astype(jnp.uint4)
    values = np.asarray(jax.lax.bitcast_convert_type(bits, stored), np.float64)
    values = jnp.array(sorted(set(values[np.isfinite(values)])), jnp.float32)
    for noise in (-0.5, 0.0, 0.25, 0.5 - 2.0**-24):
        out = numerics.convert_to(values, qtype, lambda shape, v=noise: jnp.full(shape, v))
        np.testing.assert_array_equal(np.asarray(out, np.float32), values)
    low, high = values[:-1], values[1:]
    quarter = low + (high - low) / 4
    for noise in (-0.3, 0.2, 0.3):
        out = np.asarray(numerics.convert_to(quarter, qtype, lambda shape, v=noise: jnp.full(shape, v)))
        # a quarter of the way from zero for positive numbers, three quarters for negative ones
        up = jnp.where(quarter > 0, noise >= 0.25, noise < -0.25)
        np.testing.assert_array_equal(out.astype(np.float32), jnp.where(up, high, low))


def test_conversions_work_in_a_trace():
    x = jnp.linspace(-3, 3, 33)
    for qtype in ("int8", "int3", "nf4", "float8_e5m2", "int1"):
        eager, jitted = (
            numerics.convert_to(x, qtype),
            jax.jit(lambda x, q=qtype: numerics.convert_to(x, q))(x),
        )
        assert jnp.array_equal(eager.astype(jnp.float32), jitted.astype(jnp.float32))
