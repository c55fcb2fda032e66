"""The TPU matmul in the interpreter: uninitialised memory is NaN, reads out of bounds and races raise.

Integer accumulators are bit-equal to int64; floats are within `reference.error_bound`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qwix_kernels.chips import CHIPS
from qwix_kernels.matmul import reference, tpu
from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.describe import problem_of
from qwix_kernels.problem import MatmulProblem, RowQuantize, Tensor

INTERPRET = pltpu.InterpretParams(detect_races=True)
BOUND = {"int8": 127.5, "int4": 7.5, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def stored(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return jnp.asarray(rng.integers(info.min, info.max + 1, shape), jnp.int32).astype(dtype)
    spread = 1.0 if dtype in ("bfloat16", "float32") else 20.0
    return jnp.asarray(rng.standard_normal(shape) * spread, jnp.float32).astype(dtype)


def tensor(
    rng: np.random.Generator,
    dtype: str,
    shape: tuple[int, int, int],
    tiles: tuple[int, int] | None = None,
    *,
    scale_dtype: str = "float32",
    zero_point: bool = False,
) -> Tensor:
    """`tiles`: neighbours that share a scale along the last two axes; None for a plain array."""
    codebook = "nf4" if dtype == "nf4" else None
    dtype = "uint4" if codebook else dtype
    scale = zero = None
    if tiles:
        scale_shape = (shape[0], shape[1] // tiles[0], shape[2] // tiles[1])
        scale = jnp.asarray(rng.uniform(0.01, 0.1, scale_shape), scale_dtype)
        zero = stored(rng, dtype, scale_shape) if zero_point else None
    return Tensor(stored(rng, dtype, shape), scale, zero, codebook)


def run(problem: MatmulProblem, lhs: Tensor, rhs: Tensor, chip: str, config: tpu.Config | None = None):
    tpu.check(problem, CHIPS[chip])
    config = config or tpu.heuristic_config(problem, CHIPS[chip])
    return tpu.run(problem, lhs, rhs, config=config, chip=CHIPS[chip], interpret=INTERPRET)


def assert_right(problem, lhs, rhs, chip="v6e", config=None):
    got = np.asarray(run(problem, lhs, rhs, chip, config)).astype(np.float64)
    want = reference.run(problem, lhs, rhs)
    if problem.out_dtype == "int32":
        np.testing.assert_array_equal(got, want)
        return
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    # The matrix unit multiplies in bfloat16 whatever a plain operand or a dequantized value was in.
    allowed = reference.error_bound(problem, lhs, rhs, multiplied="bfloat16")
    good = (np.abs(got - want) <= allowed) | np.isnan(want)
    assert good.all(), f"{np.max(np.where(good, 0, np.abs(got - want) / allowed))} times the bound"


def weight_problem(
    rng, m, k, n, lhs, rhs, tiles, *, quantize=None, transposed=False, out="bfloat16", **kwargs
):
    """`tiles` along K and N."""
    shape, per = ((1, n, k), tiles[::-1]) if transposed else ((1, k, n), tiles)
    left, right = tensor(rng, lhs, (1, m, k)), tensor(rng, rhs, shape, per, **kwargs)
    problem = problem_of(left, right, quantize_lhs=quantize, rhs_transposed=transposed, out_dtype=out)
    return problem, left, right


@pytest.mark.parametrize("weight", ["int8", "int4", "float8_e4m3fn", "float8_e5m2", "nf4"])
@pytest.mark.parametrize("tile", [32, 128, 256])
def test_weight_only(weight, tile):
    rng = np.random.default_rng(0)
    chip = "v7x" if tile == 128 else "v6e"
    lhs = "float32" if tile == 256 else "bfloat16"
    transposed = weight in ("int4", "float8_e5m2")
    assert_right(*weight_problem(rng, 16, 256, 130, lhs, weight, (tile, 1), transposed=transposed), chip)


@pytest.mark.parametrize(
    ("act", "weight"),
    [
        ("int8", "int8"),
        ("int8", "int4"),
        ("int4", "int4"),
        ("float8_e4m3fn", "float8_e4m3fn"),
        ("float8_e4m3fn", "int4"),
        ("float8_e5m2", "float8_e4m3fn"),
        ("int8", "nf4"),
    ],
)
@pytest.mark.parametrize("tile", [0, 64, 128])
def test_dynamic_rows(act, weight, tile):
    rng = np.random.default_rng(1)
    chip = "v5e" if tile == 64 else "v7x"
    how = RowQuantize(act, BOUND[act], tile)
    assert_right(*weight_problem(rng, 9, 256, 128, "bfloat16", weight, (tile or 256, 1), quantize=how), chip)


@pytest.mark.parametrize("strategy", ["after", "before"])
@pytest.mark.parametrize("rows", [0, 128])
def test_strategies_and_several_blocks(strategy, rows):
    """Rows are quantized once for all column blocks; sums over parts of K meet in one accumulator."""
    rng = np.random.default_rng(2)
    how = RowQuantize("int8", 127.5, rows)
    args = weight_problem(rng, 300, 512, 300, "float32", "int8", (128, 1), quantize=how, out="float32")
    assert_right(*args, config=tpu.Config(256, 128, 256, strategy))


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v7x"])
@pytest.mark.parametrize(
    ("lhs", "rhs"),
    [("int8", "int8"), ("int8", "int4"), ("int4", "int4"), ("uint8", "int8"), ("uint4", "int8")],
)
def test_integer_accumulators_are_exact(chip, lhs, rhs):
    """One row and one column at their extremes, where a float32 sum over so long a K would round."""
    rng = np.random.default_rng(3)
    m, k, n = 5, 2111, 7
    transposed = chip == "v5p"
    worst = lambda dtype, shape: jnp.full(shape, jnp.iinfo(dtype).min or jnp.iinfo(dtype).max, dtype)
    left = Tensor(stored(rng, lhs, (1, m, k)).at[:, 0].set(worst(lhs, (k,))))
    values = stored(rng, rhs, (1, n, k)).at[:, 0].set(worst(rhs, (k,)))
    right = Tensor(values if transposed else jnp.swapaxes(values, 1, 2))
    assert_right(problem_of(left, right, rhs_transposed=transposed), left, right, chip)


@pytest.mark.parametrize("shape", [(1, 128, 1), (1, 127, 131), (13, 1, 17), (129, 257, 1), (33, 640, 130)])
@pytest.mark.parametrize("transposed", [False, True])
def test_odd_shapes(shape, transposed):
    rng = np.random.default_rng(4)
    m, k, n = shape
    how = RowQuantize("int8", 127.5)
    args = weight_problem(rng, m, k, n, "bfloat16", "int8", (k, 1), quantize=how, transposed=transposed)
    assert_right(*args)


@pytest.mark.parametrize("chip", ["v6e", "v7x"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("quantize", [None, RowQuantize("int8", 127.5)])
def test_k_tail(chip, transposed, quantize):
    """K = 300 in blocks of 128: what lies past the end must not reach the sum, whatever it holds."""
    rng = np.random.default_rng(5)
    args = weight_problem(
        rng,
        9,
        300,
        140,
        "bfloat16",
        "int8",
        (300, 1),
        quantize=quantize,
        transposed=transposed,
        zero_point=True,
    )
    assert_right(*args, chip, tpu.Config(16, 128, 128, "once"))


@pytest.mark.parametrize("strategy", ["after", "before"])
def test_k_tail_with_tiles(strategy):
    rng = np.random.default_rng(6)
    args = weight_problem(rng, 9, 640, 140, "bfloat16", "int4", (128, 1), zero_point=True)
    assert_right(*args, config=tpu.Config(16, 128, 256, strategy))


@pytest.mark.parametrize("sides", ["lhs", "rhs", "both"])
@pytest.mark.parametrize(("chip", "tile"), [("v5e", 256), ("v7x", 128), ("v5e", 64)])
def test_zero_points(sides, chip, tile):
    rng = np.random.default_rng(7)
    lhs = tensor(rng, "int8", (1, 9, 256), (1, tile), zero_point=sides != "rhs")
    rhs = tensor(rng, "int4", (1, 256, 130), (tile, 1), zero_point=sides != "lhs")
    assert_right(problem_of(lhs, rhs, out_dtype="float32"), lhs, rhs, chip)


@pytest.mark.parametrize("strategy", ["after", "before"])
@pytest.mark.parametrize("transposed", [False, True])
def test_zero_points_of_weights(strategy, transposed):
    rng = np.random.default_rng(8)
    args = weight_problem(
        rng, 9, 256, 128, "bfloat16", "int4", (128, 1), zero_point=True, transposed=transposed, out="float32"
    )
    assert_right(*args, config=tpu.Config(16, 128, 256, strategy))


@pytest.mark.parametrize("tiles", [(256, 130), (128, 65), (256, 13), (64, 10)])
@pytest.mark.parametrize("transposed", [False, True])
def test_scale_tiles(tiles, transposed):
    """One scale for all, per run of columns, and 2-D tiles."""
    rng = np.random.default_rng(9)
    args = weight_problem(
        rng, 9, 256, 130, "bfloat16", "int8", tiles, transposed=transposed, scale_dtype="bfloat16"
    )
    assert_right(*args)


def test_static_lhs_scales_of_unlike_tiles():
    rng = np.random.default_rng(10)
    lhs = tensor(rng, "int8", (1, 12, 512), (3, 256))
    rhs = tensor(rng, "int8", (1, 512, 128), (128, 1))
    problem = problem_of(lhs, rhs, out_dtype="float32")
    for strategy in ("after", "before"):
        assert_right(problem, lhs, rhs, config=tpu.Config(16, 128, 512, strategy))


@pytest.mark.parametrize("batches", [(3, 3), (3, 1), (1, 3)])
def test_batch(batches):
    rng = np.random.default_rng(11)
    lhs = tensor(rng, "int8", (batches[0], 9, 128), (1, 128))
    rhs = tensor(rng, "int8", (batches[1], 128, 130), (128, 1))
    assert_right(problem_of(lhs, rhs, out_dtype="float32"), lhs, rhs)


def test_batch_with_dynamic_rows_over_parts_of_k():
    rng = np.random.default_rng(12)
    lhs, rhs = tensor(rng, "bfloat16", (2, 9, 256)), tensor(rng, "int8", (2, 256, 256), (256, 1))
    problem = problem_of(lhs, rhs, quantize_lhs=RowQuantize("int8", 127.5), out_dtype="float32")
    assert_right(problem, lhs, rhs, config=tpu.Config(16, 128, 128, "once"))


@pytest.mark.parametrize("tile", [0, 128])
@pytest.mark.parametrize("act", ["int8", "float8_e4m3fn"])
def test_zero_nan_and_tiny_rows(tile, act):
    rng = np.random.default_rng(13)
    problem, lhs, rhs = weight_problem(
        rng, 8, 256, 128, "float32", "int8", (tile or 256, 1), quantize=RowQuantize(act, BOUND[act], tile)
    )
    x = lhs.values.at[0, 0].set(0).at[0, 1, 3].set(jnp.nan).at[0, 2].set(1e-30).at[0, 3, 7].set(jnp.inf)
    got = np.asarray(run(problem, Tensor(x), rhs, "v6e")).astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity times zero, on purpose
        want = reference.run(problem, Tensor(x), rhs)
        allowed = reference.error_bound(problem, Tensor(x), rhs, multiplied="bfloat16")
    finite = [0, 2, 4, 5, 6, 7]
    assert np.isnan(got[0, [1, 3]]).all()
    assert (np.abs(got - want) <= allowed)[0, finite].all()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_rounding_to_a_grid_is_the_cast(dtype):
    """All bfloat16 values, and float32 ones at and beside every tie."""
    top = float(jnp.finfo(dtype).max)
    every = jnp.arange(2**16, dtype=jnp.uint32).astype(jnp.uint16).view(jnp.bfloat16).astype(jnp.float32)
    x = jnp.concatenate([every, jnp.nextafter(every, jnp.inf), jnp.nextafter(every, -jnp.inf)])
    x = jnp.clip(x[jnp.isfinite(x)], -top, top)
    np.testing.assert_array_equal(values.on_grid(x, dtype), x.astype(dtype).astype(jnp.float32))


def test_nan_scales_and_weights():
    rng = np.random.default_rng(14)
    problem, lhs, rhs = weight_problem(rng, 8, 256, 128, "bfloat16", "int8", (128, 1))
    rhs = dataclasses.replace(rhs, scale=rhs.scale.at[0, 1, 5].set(jnp.nan))
    got = np.isnan(np.asarray(run(problem, lhs, rhs, "v6e")).astype(np.float32))
    assert got[..., 5].all() and not np.delete(got, 5, axis=2).any()


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "v7x"])
def test_every_chip_finds_blocks_that_fit(chip):
    """Real layers, from one row to a whole K that no block can hold."""
    for m, k, n in [
        (1, 4096, 4096),
        (16, 14336, 4096),
        (1024, 28672, 8192),
        (4096, 5120, 262144),
        (512, 262144, 5120),
    ]:
        for tile, act in [(0, None), (128, None), (128, "int8"), (0, "int8")]:
            lhs = jax.ShapeDtypeStruct((1, m, k), jnp.bfloat16)
            rhs = jax.ShapeDtypeStruct((1, k, n), jnp.int4)
            scale = jax.ShapeDtypeStruct((1, k // tile if tile else 1, n), jnp.bfloat16)
            weight = jax.eval_shape(lambda v, s: Tensor(v, s), rhs, scale)
            how = RowQuantize(act, 127.5, tile) if act else None
            problem = problem_of(lhs, weight, quantize_lhs=how, out_dtype=jnp.bfloat16)
            tpu.check(problem, CHIPS[chip])
            priced = tpu.estimate(problem, CHIPS[chip], tpu.heuristic_config(problem, CHIPS[chip]))
            assert priced.static_us >= 0.95 * priced.floor_us > 0


def refused(lhs, rhs, chip="v6e", **kwargs) -> str:
    with pytest.raises(NotImplementedError) as e:
        tpu.check(problem_of(lhs, rhs, **kwargs), CHIPS[chip])
    return str(e.value)


def test_refusals_name_the_constraint_and_the_shapes():
    rng = np.random.default_rng(15)
    plain, int8 = tensor(rng, "bfloat16", (1, 4, 64)), tensor(rng, "int8", (1, 64, 4), (64, 1))
    message = refused(plain, tensor(rng, "int8", (1, 64, 4), (8, 1)))
    assert "multiples of 16, not 8" in message and "[1, 4, 64] bfloat16" in message and "v6e" in message
    assert "precision 'highest'" in refused(plain, int8, precision="highest")
    assert "int16" in refused(tensor(rng, "int16", (1, 4, 64)), tensor(rng, "int16", (1, 64, 4)))
    assert "float16" in refused(tensor(rng, "float16", (1, 4, 64)), int8)
    assert "empty" in refused(tensor(rng, "bfloat16", (1, 0, 64)), int8)
    assert "needs a quantized operand" in refused(plain, tensor(rng, "bfloat16", (1, 64, 4)))
    zeros = [
        tensor(rng, "int8", (1, *d), t, zero_point=True)
        for d, t in (((1, 40000), (1, 40000)), ((40000, 1), (40000, 1)))
    ]
    assert "sure to hold 32768 of them" in refused(*zeros)
    assert "runs on TPUs" in refused(plain, int8, chip="h100")


def test_bad_configs():
    rng = np.random.default_rng(16)
    problem, _, _ = weight_problem(rng, 16, 256, 256, "bfloat16", "int8", (128, 1))
    with pytest.raises(ValueError, match="strategy must be one of"):
        tpu.Config(8, 128, 128, "sideways")
    for config, message in [
        (tpu.Config(12, 128, 256, "after"), "block_m"),
        (tpu.Config(16, 100, 256, "after"), "block_n"),
        (tpu.Config(16, 128, 64, "after"), "block_k"),
        (tpu.Config(16, 128, 256, "once"), "'once' is for problems without them"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            tpu.estimate(problem, CHIPS["v6e"], config)
