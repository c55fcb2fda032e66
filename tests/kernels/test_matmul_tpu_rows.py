"""The rows of the TPU matmul in the interpreter: what is stored is bit-equal to `reference.quantize_rows`.

A weight that is the identity shows it: each result is one stored value times its scale.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qwix_kernels.chips import CHIPS
from qwix_kernels.matmul import reference, tpu
from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.describe import problem_of
from qwix_kernels.problem import Extras, RowQuantize, Tensor

INTERPRET = pltpu.InterpretParams(detect_races=True)
BOUND = {"int8": 127.5, "int4": 7.5, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def hard_rows(k: int, dtype: str = "bfloat16") -> jax.Array:
    """[1, 17, K]: greatest values of either sign, ties, zeros, tiny numbers, an infinity, in float32 a NaN.

    XLA:CPU, which runs the interpreter, loses a NaN in the greatest of bfloat16 values that it widens.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 17, k)) * np.exp2(rng.integers(-20, 20, (1, 17, 1)))
    x[0, 0] = 0
    x[0, 1] = np.where(np.arange(k) % 2, 255, 255 - 2 * (np.arange(k) % 128)) / 2  # halves
    x[0, 2] = -x[0, 1]
    x[0, 3], x[0, 4, 5:] = 1e-21, 1e-30
    x[0, 5, 3], x[0, 6, 7] = np.nan if dtype == "float32" else 1, np.inf
    x[0, 7, : k // 2] = 0
    return jnp.asarray(x, dtype)


def identity(k: int, dtype: str, tile: int) -> Tensor:
    return Tensor(jnp.eye(k, dtype=jnp.float32).astype(dtype)[None], jnp.ones((1, k // (tile or k), k)))


def shown(x, how, weight, chip, config=None, scale=None, out="float32"):
    """The stored values times their scales, as the kernel multiplies them with the identity."""
    k = x.shape[2]
    extras = Extras(lhs_scale=scale)
    lhs, rhs = Tensor(x), identity(k, weight, how.tile_k)
    problem = problem_of(lhs, rhs, extras, quantize_lhs=how, out_dtype=out)
    tpu.check(problem, CHIPS[chip])
    config = config or tpu.heuristic_config(problem, CHIPS[chip])
    got = tpu.run(problem, lhs, rhs, extras, config=config, chip=CHIPS[chip], interpret=INTERPRET)
    return np.asarray(got).astype(np.float32), config.strategy


def expected(x, how, strategy, scale=None) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        stored = reference.quantize_rows(np.asarray(x), how, Extras(lhs_scale=scale))
        q, s = np.asarray(stored.values).astype(np.float32), np.asarray(stored.scale, np.float32)
        s = np.repeat(s, q.shape[2] // s.shape[2], axis=2)
        product = q * s
    return product.astype(ml_dtypes.bfloat16).astype(np.float32) if strategy == "before" else product


def assert_same(got: np.ndarray, want: np.ndarray):
    """Bit-equal in rows of numbers. A NaN or an infinity makes its whole row, or run, not a number."""
    finite = np.isfinite(want).all(axis=(0, 2))
    np.testing.assert_array_equal(got[:, finite], want[:, finite])
    assert not np.isfinite(got[:, ~finite][~np.isfinite(want[:, ~finite])]).any()


@pytest.mark.parametrize(
    ("dtype", "bound"), [*BOUND.items(), ("int8", 127.0), ("int8", 31.5)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("tile", [0, 128])
def test_stored_values(dtype, bound, tile):
    how = RowQuantize(dtype, bound, tile)
    weight = "int8" if dtype.startswith("int") else "float8_e4m3fn"
    x = hard_rows(256, "float32" if bound == 127.0 else "bfloat16")
    for chip in ("v5e", "v7x"):
        got, strategy = shown(x, how, weight, chip)
        assert_same(got, expected(x, how, strategy))


@pytest.mark.parametrize("strategy", ["after", "before"])
@pytest.mark.parametrize("tile", [32, 64, 256])
def test_tiles_of_other_widths(strategy, tile):
    how, x = RowQuantize("int8", 127.5, tile), hard_rows(512)
    got, _ = shown(x, how, "int8", "v6e", tpu.Config(32, 512, 512, strategy))
    assert_same(got, expected(x, how, strategy))


def test_rows_in_several_steps():
    """More rows than are quantized at a time, and a tail of them; K in parts that do not divide it."""
    how = RowQuantize("int8", 127.5)
    x = jnp.tile(hard_rows(300), (1, 9, 1))
    for config in (tpu.Config(128, 384, 300), tpu.Config(96, 384, 128)):
        got, strategy = shown(x, how, "int8", "v6e", config)
        assert_same(got, expected(x, how, strategy))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("chip", ["v5e", "v7x"])
def test_powers_of_two_as_scales(dtype, chip):
    """Elements of MXFP8 and MXINT8: one scale of 8 exponent bits for 32 neighbours."""
    how = RowQuantize(dtype, BOUND[dtype], 32, scale_dtype="float8_e8m0fnu")
    x = hard_rows(256)
    got, strategy = shown(x, how, "int8" if dtype == "int8" else "float8_e4m3fn", chip)
    assert_same(got, expected(x, how, strategy))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("rows", "tile"), [(1, 0), (17, 0), (1, 128), (17, 128), (1, 64)])
def test_static_scales(dtype, rows, tile):
    """Values past the range are clipped at both ends; one scale for all rows serves them all."""
    rng = np.random.default_rng(1)
    how = RowQuantize(dtype, BOUND[dtype], tile, static=True)
    x = hard_rows(256).at[0, 5:7].set(1e4)
    x = x.at[0, 8].set(-x[0, 5])
    scale = jnp.asarray(rng.uniform(0.01, 1, (1, rows, 256 // (tile or 256))), jnp.float32)
    got, strategy = shown(x, how, dtype, "v6e", scale=scale)
    assert_same(got, expected(x, how, strategy, scale))


@pytest.mark.parametrize("strategy", ["after", "before"])
def test_static_scales_over_parts_of_k(strategy):
    how = RowQuantize("int8", 127.5, 128, static=True)
    x, scale = hard_rows(512).at[0, 5:7].set(1.0), jnp.full((1, 1, 4), 0.125) * jnp.arange(1, 5)
    got, _ = shown(x, how, "int8", "v6e", tpu.Config(32, 512, 256, strategy), scale)
    assert_same(got, expected(x, how, strategy, scale))


def norm_problem(k: int, how: RowQuantize | None, weight: str, tile: int, dtype: str = "bfloat16"):
    rng = np.random.default_rng(2)
    lhs = Tensor(jnp.asarray(rng.standard_normal((1, 17, k)) * 3, dtype))
    rhs = Tensor(
        jnp.asarray(rng.integers(-7, 8, (1, k, 128)), jnp.int32).astype(weight),
        jnp.asarray(rng.uniform(0.01, 0.1, (1, k // (tile or k), 128)), jnp.float32),
    )
    extras = Extras(norm_weight=jnp.asarray(rng.uniform(0.5, 2, (1, 1, k)), dtype))
    problem = problem_of(lhs, rhs, extras, quantize_lhs=how, norm_eps=1e-5, out_dtype="float32")
    return problem, lhs, rhs, extras


@pytest.mark.parametrize(
    ("how", "weight", "tile", "k"),
    [
        (None, "int4", 128, 256),
        (None, "int8", 0, 200),
        (RowQuantize("int8", 127.5), "int8", 0, 200),
        (RowQuantize("int8", 127.5, 128), "int8", 128, 256),
        (RowQuantize("float8_e4m3fn", 448.0, 32, scale_dtype="float8_e8m0fnu"), "float8_e4m3fn", 32, 256),
    ],
    ids=str,
)
def test_rms_norm(how, weight, tile, k):
    problem, lhs, rhs, extras = norm_problem(k, how, weight, tile)
    tpu.check(problem, CHIPS["v6e"])
    config = tpu.heuristic_config(problem, CHIPS["v6e"])
    got = tpu.run(problem, lhs, rhs, extras, config=config, chip=CHIPS["v6e"], interpret=INTERPRET)
    want = reference.run(problem, lhs, rhs, extras)
    allowed = reference.error_bound(problem, lhs, rhs, extras, multiplied="bfloat16")
    assert (np.abs(np.asarray(got, np.float64) - want) <= allowed).all()


def test_rms_norm_needs_whole_rows():
    problem, *_ = norm_problem(256, None, "int8", 0)
    with pytest.raises(NotImplementedError, match="the whole K is in one block"):
        tpu.estimate(problem, CHIPS["v6e"], tpu.Config(32, 128, 128))


@pytest.mark.parametrize("how", [RowQuantize(d, b) for d, b in BOUND.items()], ids=str)
def test_an_end_that_is_not_clipped_is_not_reached(how):
    """The greatest value of a row, scaled: over every bfloat16, and neighbours in float32."""
    bits = np.arange(0x2000, 0x7F00, dtype=np.uint16)
    top = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    top = np.concatenate([top, np.nextafter(top, np.float32(0))])
    scale = top * np.float32(how.reciprocal)
    scaled = top * (np.float32(1) / scale)
    for x in (scaled, -scaled):
        got = np.asarray(values.quantize(jnp.asarray(x), how).astype(how.dtype)).astype(np.float32)
        want = np.clip(np.round(x) if how.dtype.startswith("int") else x, *how.limits)
        np.testing.assert_array_equal(got, want.astype(how.dtype).astype(np.float32))


def test_given_scales_are_spread_once():
    """An lhs that is quantized already, scaled after the dot, over several blocks of rows, columns and K."""
    rng = np.random.default_rng(3)
    stored = lambda shape: jnp.asarray(rng.integers(-128, 128, shape), jnp.int8)
    lhs = Tensor(stored((1, 70, 512)), jnp.asarray(rng.uniform(0.5, 2, (1, 70, 4)), jnp.float32))
    rhs = Tensor(stored((1, 512, 256)), jnp.asarray(rng.uniform(0.5, 2, (1, 4, 256)), jnp.float32))
    problem = problem_of(lhs, rhs, out_dtype="float32")
    want = reference.run(problem, lhs, rhs)
    allowed = reference.error_bound(problem, lhs, rhs, multiplied="float32")
    for config in (tpu.Config(32, 128, 512, "after"), tpu.Config(128, 128, 256, "after")):
        got = tpu.run(problem, lhs, rhs, config=config, chip=CHIPS["v5e"], interpret=INTERPRET)
        assert (np.abs(np.asarray(got, np.float64) - want) <= allowed).all()


@pytest.mark.large
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "v7x"])
def test_compiles(chip):
    """Static scales, power-of-two scales and RMSNorm, on real layer widths."""
    from bench.tpu_compile import compile_for

    hows = [
        RowQuantize("int8", 127.5, static=True),
        RowQuantize("int8", 127.5, 128, static=True),
        RowQuantize("float8_e4m3fn", 448.0, 32, scale_dtype="float8_e8m0fnu"),
        RowQuantize("int8", 127.5, 128),
        None,
    ]
    for how, m, norm in itertools.product(hows, (16, 256), (False, True)):
        if how and how.static and norm:
            continue
        tile = how.tile_k if how else 128
        weight = how.dtype if how else "int4"
        sds = jax.ShapeDtypeStruct
        rhs = (sds((1, 1024, 512), jnp.dtype(weight)), sds((1, 1024 // (tile or 1024), 512), jnp.float32))
        scale = sds((1, 1, 1024 // (tile or 1024)), jnp.float32) if how and how.static else None
        given: Any = (scale, sds((1, 1, 1024), jnp.bfloat16) if norm else None)
        extras = Extras(*given)

        def op(x, w, extras, how=how):
            problem = problem_of(x, Tensor(*w), extras, quantize_lhs=how, out_dtype="bfloat16")
            tpu.check(problem, CHIPS[chip])
            config = tpu.heuristic_config(problem, CHIPS[chip])
            return tpu.run(problem, Tensor(x), Tensor(*w), extras, config=config, chip=CHIPS[chip])

        assert (
            "tpu_custom_call" in compile_for(chip, op, sds((1, m, 1024), jnp.bfloat16), rhs, extras).as_text()
        )
