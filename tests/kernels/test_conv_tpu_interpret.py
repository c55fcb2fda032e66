"""The TPU convolutions in the interpreter: uninitialised memory is NaN, reads out of bounds and races raise.

Integer accumulators are bit-equal to int64; floats are within `reference.error_bound`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qwix_kernels.chips import CHIPS
from qwix_kernels.conv import ConvExtras, problem_of, reference, tpu
from qwix_kernels.conv.tpu_config import Config
from qwix_kernels.conv.tpu_plan import is_turned
from qwix_kernels.problem import RowQuantize, Tensor

INTERPRET = pltpu.InterpretParams(detect_races=True)
INT8 = RowQuantize("int8", 127.5)
SAME = ((1, 1), (1, 1))


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def stored(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return jnp.asarray(rng.integers(info.min, info.max + 1, shape), jnp.int32).astype(dtype)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)


def weights(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Tensor:
    scale = jnp.asarray(rng.uniform(0.01, 0.1, (1, 1, 1, shape[-1])), jnp.float32)
    return Tensor(stored(rng, dtype, shape), scale)


def assert_right(lhs, rhs, extras=None, *, chip="v6e", blocks=None, **options) -> None:
    """`blocks`: pitch, images, rows in a chunk, output features; None for the best."""
    lhs, rhs = (x if isinstance(x, Tensor) else Tensor(x) for x in (lhs, rhs))
    problem, extras = problem_of(lhs, rhs, extras, **options), extras or ConvExtras()
    tpu.check(problem, CHIPS[chip])
    config = Config("blocks", *blocks) if blocks else tpu.heuristic_config(problem, CHIPS[chip])
    got = tpu.run(problem, lhs, rhs, extras, config=config, chip=CHIPS[chip], interpret=INTERPRET)
    want = reference.run(problem, lhs, rhs, extras)
    if problem.out_dtype == "int32":
        np.testing.assert_array_equal(np.asarray(got), want)
        return
    if isinstance(got, Tensor):
        assert got.scale is extras.out_scale
        scale, got = np.asarray(extras.out_scale, np.float64), got.values
        steps = np.clip(np.round(want / scale), -128, 127)
        near = np.abs(want / scale - np.floor(want / scale) - 0.5) < 1e-4
        np.testing.assert_array_equal(np.asarray(got)[~near], steps[~near])
        return
    allowed = reference.error_bound(problem, lhs, rhs, extras, multiplied="bfloat16")
    wrong = np.abs(np.asarray(got, np.float64) - want) / allowed
    assert wrong.shape == problem.out_shape and (wrong <= 1).all(), f"{wrong.max()} times the bound"


# Pitches of whole native tiles, of half of one and of a quarter: few, more and many shifted copies.
@pytest.mark.parametrize(
    ("images", "size", "blocks"),
    [
        pytest.param(1, (5, 12), (32, 1, 2, 16), marks=pytest.mark.large),
        (1, (5, 12), (16, 1, 2, 16)),
        (2, (7, 7), (8, 2, 4, 16)),
    ],
    ids=str,
)
def test_accumulators_are_exact(images, size, blocks):
    rng = np.random.default_rng(0)
    lhs, rhs = stored(rng, "int8", (images, *size, 32)), stored(rng, "int8", (3, 3, 32, 16))
    assert_right(lhs, rhs, blocks=blocks, padding=SAME)


# Images in turns, each staged while the one before is multiplied; rows of the result side by side.
@pytest.mark.parametrize(
    ("images", "size", "options", "blocks"),
    [
        (3, (5, 12), {}, (32, 1, 2, 16, 2)),
        (4, (7, 7), {}, (8, 2, 16, 16, 2)),
        (2, (8, 12), {}, (32, 1, 2, 16, 2, 2)),
        (2, (8, 16), {"strides": (2, 2)}, (8, 1, 4, 16, 1, 2)),
        pytest.param(4, (8, 7), {}, (8, 2, 8, 16, 1, 2), marks=pytest.mark.large),
        pytest.param(2, (12, 16), {"strides": (2, 2)}, (32, 1, 1, 16, 2), marks=pytest.mark.large),
    ],
    ids=str,
)
def test_turns_and_bands(images, size, options, blocks):
    rng = np.random.default_rng(10)
    lhs, rhs = stored(rng, "int8", (images, *size, 32)), stored(rng, "int8", (3, 3, 32, 16))
    assert_right(lhs, rhs, blocks=blocks, padding=SAME, **options)


@pytest.mark.parametrize(
    ("images", "blocks"),
    [(4, (32, 1, 2, 16, 4)), (3, (16, 2, 12, 16, 2)), (2, (32, 1, 1, 16, 2, 2))],
    ids=str,
)
def test_quantized_in_turns(images, blocks):
    """A scale for each image, found two turns ahead; an image of zeros; bias and activation."""
    rng = np.random.default_rng(11)
    x = stored(rng, "bfloat16", (images, 4, 7, 32)) * (
        1 + jnp.arange(images, dtype=jnp.bfloat16)[:, None, None, None]
    )
    extras = ConvExtras(bias=jnp.asarray(rng.standard_normal(16), jnp.float32))
    options = {"padding": SAME, "quantize_lhs": INT8, "out_dtype": "bfloat16", "activation": "silu"}
    assert_right(x.at[1].set(0), weights(rng, "int8", (3, 3, 32, 16)), extras, blocks=blocks, **options)


def test_weights_with_inputs_along_the_lanes():
    rng = np.random.default_rng(12)
    x, w = stored(rng, "int8", (2, 4, 7, 256)), stored(rng, "int8", (1, 1, 256, 40))
    assert is_turned(problem_of(Tensor(x), Tensor(w)))
    assert_right(x, w)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": SAME, "strides": (2, 2)},
        pytest.param({"padding": ((2, 2), (2, 2)), "rhs_dilation": (2, 2)}, marks=pytest.mark.large),
        pytest.param({"padding": ((0, 1), (-1, 0)), "strides": (1, 2)}, marks=pytest.mark.large),
    ],
    ids=str,
)
def test_geometry(options):
    rng = np.random.default_rng(1)
    assert_right(stored(rng, "int8", (2, 6, 8, 32)), stored(rng, "int8", (3, 3, 32, 16)), **options)


def test_more_features_than_a_register_and_blocks_of_columns():
    rng = np.random.default_rng(2)
    lhs, rhs = stored(rng, "int8", (1, 4, 8, 160)), stored(rng, "int4", (3, 1, 160, 136))
    assert_right(lhs, rhs, blocks=(8, 1, 4, 128), padding=((1, 1), (0, 0)))


@pytest.mark.parametrize("features", [24, pytest.param(200, marks=pytest.mark.large)])
def test_features_that_fill_no_whole_registers(features):
    """What is left of each tap stands with that of others, with rows of zeros where lanes are left over."""
    rng = np.random.default_rng(13)
    lhs, rhs = stored(rng, "int8", (1, 4, 8, features)), stored(rng, "int8", (3, 1, features, 16))
    assert_right(lhs, rhs, blocks=(8, 1, 4, 16), padding=((1, 1), (0, 0)))


def test_one_spatial_axis():
    rng = np.random.default_rng(3)
    assert_right(stored(rng, "int8", (1, 9, 32)), stored(rng, "int8", (3, 32, 8)), padding=((2, 0),))


@pytest.mark.parametrize("chip", ["v6e", pytest.param("v7x", marks=pytest.mark.large)])
def test_quantized_on_the_way(chip):
    """A scale for each image; an image of zeros; bias and activation."""
    rng = np.random.default_rng(4)
    x = stored(rng, "bfloat16", (3, 4, 7, 32)).at[1].set(0)
    extras = ConvExtras(bias=jnp.asarray(rng.standard_normal(16), jnp.float32))
    options = {"padding": SAME, "quantize_lhs": INT8, "out_dtype": "bfloat16", "activation": "silu"}
    assert_right(x, weights(rng, "int8", (3, 3, 32, 16)), extras, chip=chip, **options)


@pytest.mark.large
def test_other_formats():
    rng = np.random.default_rng(5)
    x = stored(rng, "bfloat16", (1, 4, 7, 32))
    assert_right(x, weights(rng, "int4", (3, 3, 32, 16)), padding=SAME, out_dtype="float32")
    fp8 = RowQuantize("float8_e4m3fn", 448.0)
    options = {"padding": SAME, "quantize_lhs": fp8, "out_dtype": "bfloat16", "chip": "v7x"}
    assert_right(x, weights(rng, "float8_e4m3fn", (3, 3, 32, 16)), **options)


@pytest.mark.parametrize("per_image", [False, pytest.param(True, marks=pytest.mark.large)])
def test_a_chain_of_integers(per_image):
    """int8 in, with one scale or one for each image; int8 out by a static scale."""
    rng = np.random.default_rng(6)
    scale = jnp.asarray(rng.uniform(0.01, 0.1, (2 if per_image else 1, 1, 1, 1)), jnp.float32)
    lhs = Tensor(stored(rng, "int8", (2, 4, 8, 32)), scale)
    extras = ConvExtras(bias=jnp.ones(16), out_scale=jnp.full((1, 1, 1, 1), 2.0))
    how = dataclasses.replace(INT8, static=True)
    rhs = weights(rng, "int8", (3, 3, 32, 16))
    assert_right(lhs, rhs, extras, padding=SAME, activation="relu", quantize_out=how)


@pytest.mark.parametrize(
    ("stride", "quantized"),
    [
        (2, True),
        *(pytest.param(*case, marks=pytest.mark.large) for case in ((1, True), (1, False), (2, False))),
    ],
)
def test_depthwise(stride, quantized):
    rng = np.random.default_rng(7)
    options = {"padding": SAME, "strides": (stride, stride), "groups": 160}
    if not quantized:
        assert_right(stored(rng, "int8", (1, 5, 7, 160)), stored(rng, "int8", (3, 3, 1, 160)), **options)
        return
    x, extras = stored(rng, "bfloat16", (2, 5, 7, 160)), ConvExtras(bias=jnp.ones(160))
    options |= {"quantize_lhs": INT8, "out_dtype": "bfloat16", "activation": "relu6"}
    assert_right(x, weights(rng, "int8", (3, 3, 1, 160)), extras, **options)


@pytest.mark.parametrize("static", [False, pytest.param(True, marks=pytest.mark.large)])
def test_pointwise_by_the_matmul_kernel(static):
    rng = np.random.default_rng(8)
    extras = ConvExtras(jnp.full((1, 1, 1, 1), 0.03) if static else None, jnp.ones(16))
    how = dataclasses.replace(INT8, static=static)
    options = {"quantize_lhs": how, "out_dtype": "bfloat16", "activation": "relu"}
    x, w = stored(rng, "bfloat16", (1, 4, 8, 24)), weights(rng, "int8", (1, 1, 24, 16))
    assert tpu.tpu_pointwise.takes(problem_of(x, w, extras, **options), CHIPS["v6e"])
    assert_right(x, w, extras, **options)


REFUSED = [
    ({"groups": 2}, (3, 3, 16, 16), "depthwise ones, not 2"),
    ({"lhs_dilation": (2, 1)}, (3, 3, 32, 16), "no holes"),
    ({"quantize_lhs": RowQuantize("int8", 127.5, 16)}, (3, 3, 32, 16), "runs of 16 features"),
]


@pytest.mark.parametrize(("options", "shape", "said"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_is_refused_is_named(options, shape, said):
    rng = np.random.default_rng(9)
    x = stored(rng, "bfloat16", (1, 6, 6, 32))
    with pytest.raises(NotImplementedError, match=f"{said}.* on v5e"):
        tpu.check(problem_of(x, weights(rng, "int8", shape), padding=SAME, **options), CHIPS["v5e"])


def test_images_that_vmem_does_not_hold_are_refused():
    struct = jax.ShapeDtypeStruct
    w = Tensor(struct((3, 3, 512, 512), jnp.int8), struct((1, 1, 1, 512), jnp.float32))
    problem = problem_of(struct((1, 512, 512, 512), jnp.bfloat16), w, padding=SAME)
    with pytest.raises(NotImplementedError, match="keeps whole images"):
        tpu.check(problem, CHIPS["v5e"])
