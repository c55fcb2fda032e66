"""The TPU's gmm and tgmm in the interpreter: fresh memory is NaN, reads out of bounds and races raise.

And both compiled by the real compiler, for chips that are not attached.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qwix_kernels import dispatch
from qwix_kernels.chips import CHIPS
from qwix_kernels.problem import Extras, RowQuantize, Tensor
from qwix_kernels.ragged_matmul import gmm_problem_of, reference, tgmm_problem_of, tpu, tpu_tgmm, tpu_visits
from qwix_kernels.ragged_matmul.groups import local_groups
from qwix_kernels.ragged_matmul.problem import Groups

from bench.tpu_compile import compile_for
from tests.kernels.test_matmul_tpu_compile import shaped
from tests.kernels.test_matmul_tpu_interpret import BOUND, stored, tensor

INTERPRET = pltpu.InterpretParams(detect_races=True)
Config = tpu.Config


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def batched(x):
    return jax.tree.map(lambda a: a[None], x)


def assert_right(
    x,
    w,
    sizes,
    config,
    chip="v6e",
    act=None,
    transposed=False,
    out="bfloat16",
    extras=None,
    offset=None,
    activation=None,
):
    extras = extras or Extras()
    how = None if act is None else RowQuantize(act[0], BOUND[act[0]], act[1])
    problem = gmm_problem_of(
        x, w, np.asarray(sizes), extras, quantize_lhs=how, rhs_transposed=transposed, out_dtype=out,
        group_offset=offset, activation=activation,
    )  # fmt: skip
    tpu.check(problem, CHIPS[chip])
    groups = local_groups(jnp.asarray(sizes), offset, problem.matrices)
    got = tpu.run(
        problem, batched(x), w, extras, groups, config=config, chip=CHIPS[chip], interpret=INTERPRET
    )
    first = sum(sizes[:offset]) if offset else 0
    mine = sizes[offset : offset + problem.matrices] if offset is not None else sizes
    got, want = np.asarray(got).astype(np.float64), reference.gmm(problem, x, w, mine, extras, first)
    bound = reference.gmm_error_bound(problem, x, w, mine, extras, first, multiplied="bfloat16")
    wrong = ~(np.abs(got - want) <= bound)
    assert not wrong.any(), (wrong.sum(), got[wrong][:3], want[wrong][:3])


def test_integers_by_parts_of_tiles_that_groups_share():
    rng = np.random.default_rng(0)
    x, w = Tensor(stored(rng, "int8", (72, 128))), Tensor(stored(rng, "int8", (3, 128, 130)))
    assert_right(x, w, [5, 0, 36], Config(64, 128, 128, "once", 32), out="int32")


def test_rows_are_quantized_once_for_all_columns():
    """And rows of no group hold NaN, which reaches nothing."""
    rng = np.random.default_rng(1)
    x, w = Tensor(stored(rng, "bfloat16", (64, 128))), tensor(rng, "int8", (2, 128, 256), (128, 1))
    dirty = Tensor(x.values.at[40:].set(jnp.nan))
    config = Config(32, 128, 128, "once", 32)
    problem = gmm_problem_of(x, w, np.array([7, 33]), quantize_lhs=RowQuantize("int8", 127.5))
    assert tpu.resolve(problem, CHIPS["v6e"], config).keep
    assert_right(dirty, w, [7, 33], config, act=("int8", 0))


@pytest.mark.parametrize(
    ("weight", "tile", "strategy", "chip", "act"),
    [
        ("int4", 128, "after", "v6e", None),
        pytest.param("int4", 128, "before", "v7x", None, marks=pytest.mark.large),
        ("nf4", 64, "before", "v5e", None),
        pytest.param("float8_e4m3fn", 128, "after", "v7x", ("float8_e4m3fn", 128), marks=pytest.mark.large),
    ],
)
def test_weights_with_tiles(weight, tile, strategy, chip, act):
    rng = np.random.default_rng(2)
    x, w = Tensor(stored(rng, "bfloat16", (48, 256))), tensor(rng, weight, (2, 256, 128), (tile, 1))
    assert_right(x, w, [20, 21], Config(64, 128, 256, strategy, 32 if strategy == "after" else 64), chip, act)


def test_parts_of_k_zero_points_and_other_devices_groups():
    rng = np.random.default_rng(3)
    x, w = (
        Tensor(stored(rng, "bfloat16", (40, 256))),
        tensor(rng, "int8", (2, 128, 256), (1, 128), zero_point=True),
    )
    assert_right(x, w, [6, 20, 0, 9], Config(32, 128, 128, "after", 32), transposed=True, offset=1)


def test_a_gate_and_a_bias_of_each_group():
    rng = np.random.default_rng(4)
    x, w = Tensor(stored(rng, "bfloat16", (32, 128))), tensor(rng, "int8", (2, 128, 128), (128, 1))
    bias = jnp.asarray(rng.standard_normal((2, 1, 128)), jnp.float32)
    extras = Extras(bias=bias, gate=tensor(rng, "int8", (2, 128, 128), (128, 1)), gate_bias=bias)
    config = Config(32, 128, 128, "once", 32)
    assert_right(x, w, [9, 19], config, act=("int8", 0), extras=extras, activation="silu")


@pytest.mark.parametrize(
    ("lhs", "g", "out", "chip"),
    [("int8", "int8", "int32", "v6e"),
     pytest.param("int8", "bfloat16", "float32", "v5e", marks=pytest.mark.large),
     ("float8_e4m3fn", "float8_e5m2", "bfloat16", "v7x")],
)  # fmt: skip
def test_products_of_groups(lhs, g, out, chip):
    """An empty group in the middle, and rows of none that are not finite."""
    rng = np.random.default_rng(5)
    scale = lambda dtype, size: jnp.full((1, size), 0.5) if dtype != "bfloat16" and out != "int32" else None
    left, right = (Tensor(stored(rng, d, (72, n)), scale(d, n)) for d, n in ((lhs, 128), (g, 256)))
    sizes = [40, 0, 25]
    problem = tgmm_problem_of(left, right, np.asarray(sizes), out_dtype=out)
    tpu_tgmm.check(problem, CHIPS[chip])
    dirty = right
    if g == "bfloat16":
        dirty = Tensor(right.values.at[65:].set(jnp.inf), right.scale)
    got = tpu_tgmm.run(
        problem, batched(left), batched(dirty), local_groups(jnp.asarray(sizes), None, 3),
        config=tpu_tgmm.Config(32, 128, 128), chip=CHIPS[chip], interpret=INTERPRET,
    )  # fmt: skip
    want = reference.tgmm(problem, left, right, sizes)
    bound = reference.tgmm_error_bound(problem, left, right, sizes, multiplied="bfloat16")
    assert (np.abs(np.asarray(got).astype(np.float64) - want) <= bound).all()


@pytest.mark.parametrize("per_matrix", [False, True])
@pytest.mark.parametrize(
    ("sizes", "rows", "block", "matrix"),
    [
        ([[3, 0, 6]], 16, 4, None),
        ([[5, 20, 9], [0, 1, 0]], 32, 4, [[-1, 0, 1], [-1, 0, 1]]),
        ([[0, 0]], 40, 16, None),
    ],
)
def test_visits(sizes, rows, block, matrix, per_matrix):
    groups = Groups(jnp.array(sizes), None if matrix is None else jnp.array(matrix))
    count, words = tpu_visits.visits(groups, rows, block, per_matrix=per_matrix, interpret=INTERPRET)
    fields = np.asarray(words[:-1]).reshape(len(tpu_visits.FIELDS), -1)
    found = [tuple(visit) for visit in fields[:, : int(count)].T.tolist()]
    assert found == reference.visits(sizes, rows, block, matrix, per_matrix=per_matrix)
    assert int(words[-1]) == int(count) <= fields.shape[1]


# --- the real compiler


def gmm_of(weight, tile, act, m=192, k=512, n=384, g=3):
    struct = jax.ShapeDtypeStruct
    x, w = Tensor(struct((m, k), jnp.bfloat16)), shaped(weight, (g, k, n), (tile or k, 1))
    how = RowQuantize(act, BOUND[act], tile) if act else None
    return gmm_problem_of(x, w, struct((g,), jnp.int32), quantize_lhs=how, out_dtype=jnp.bfloat16), w


@pytest.mark.parametrize(
    ("chip", "scheme"),
    [
        ("v5e", ("int8", 0, "int8")),
        ("v5p", ("int4", 128, None)),
        ("v6e", ("nf4", 64, None)),
        ("v7x", ("float8_e4m3fn", 0, "float8_e4m3fn")),
    ],
    ids=str,
)
def test_kernels_compile(chip, scheme):
    problem, w = gmm_of(*scheme)
    explained = dispatch.explain(problem, chip, implementation="mosaic_tpu")
    run = lambda x, w, s: tpu.run(
        problem, Tensor(x), w, Extras(), Groups(s), config=explained.config, chip=CHIPS[chip]
    )
    x, sizes = jax.ShapeDtypeStruct((1, 192, 512), jnp.bfloat16), jax.ShapeDtypeStruct((1, 3), jnp.int32)
    text = compile_for(chip, run, x, w, sizes).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2  # the visits, and the product
    assert " gather(" not in text and " while(" not in text


@pytest.mark.parametrize(("chip", "dtype"), [("v5e", "int8"), ("v7x", "bfloat16")])
def test_products_of_groups_compile(chip, dtype):
    x, g = (Tensor(jax.ShapeDtypeStruct((192, size), dtype)) for size in (256, 384))
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    problem = tgmm_problem_of(x, g, sizes, out_dtype=jnp.float32)
    config = dispatch.explain(problem, chip, implementation="mosaic_tpu").config
    run = lambda x, g, s: tpu_tgmm.run(
        problem, Tensor(x), Tensor(g), Groups(s), config=config, chip=CHIPS[chip]
    )
    wide = lambda t: jax.ShapeDtypeStruct((1, *t.shape), dtype)
    text = compile_for(chip, run, wide(x), wide(g), jax.ShapeDtypeStruct((1, 3), jnp.int32)).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
