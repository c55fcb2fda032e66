"""A matmul with a low-rank update of its weight: within the bound of the float64 reference, in every form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qwix_kernels import matmul
from qwix_kernels.chips import CHIPS
from qwix_kernels.matmul import problem_of, reference, tpu, tpu_split
from qwix_kernels.problem import Extras, RowQuantize, Tensor

INTERPRET = pltpu.InterpretParams(detect_races=True)
INT8_ROWS = RowQuantize("int8", 127.5)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def normal(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def weight(name: str, shape, tile: int, transposed: bool = False) -> Tensor:
    """[batch, K, N] values of a scheme with scales by column and K tile; [batch, N, K] if transposed."""
    batch, k, n = shape
    rng = np.random.default_rng(7)
    if name == "float8_e4m3fn":
        values = normal(7, shape).astype(name)
    else:
        low, high, stored = {"nf4": (0, 16, "uint4"), "int4": (-8, 8, "int4"), "int8": (-128, 128, "int8")}[
            name
        ]
        values = jnp.asarray(rng.integers(low, high, shape), stored)
    scale = jnp.asarray(rng.uniform(0.01, 0.1, (batch, k // (tile or k), n)), jnp.float32)
    turn = lambda x: jnp.swapaxes(x, 1, 2) if transposed else x
    return Tensor(turn(values), turn(scale), None, "nf4" if name == "nf4" else None)


def update(batch, m, k, n, rank, mask=False, dtype="bfloat16") -> Extras:
    pick = jnp.asarray(np.random.default_rng(3).integers(0, 2, (batch, m, rank)), jnp.float32)
    factors = normal(1, (batch, k, rank), dtype), normal(2, (batch, rank, n), dtype)
    return Extras(low_rank_a=factors[0], low_rank_b=factors[1], low_rank_mask=pick if mask else None)


def interpreted(chip, lhs, rhs, extras, config=None, **options):
    """(result, problem) of the kernel; `config` is a `tpu.Config` or what `heuristic_config` says."""
    problem = problem_of(lhs, rhs, extras, low_rank_scaling=0.5, **options)
    tpu.check(problem, CHIPS[chip])
    config = config or tpu.heuristic_config(problem, CHIPS[chip])
    lhs, rhs = Tensor(lhs), rhs
    return tpu.run(problem, lhs, rhs, extras, config=config, chip=CHIPS[chip], interpret=INTERPRET), problem


def assert_within(got, problem, lhs, rhs, extras, multiplied=None):
    want = reference.run(problem, Tensor(lhs), rhs, extras)
    bound = reference.error_bound(problem, Tensor(lhs), rhs, extras, multiplied=multiplied)
    worst = np.max(np.abs(np.asarray(got).astype(np.float64) - want) / bound)
    assert worst <= 1, worst
    return want, bound


@pytest.mark.parametrize(
    "chip,name,tile,k,config,rank",
    [
        ("v6e", "nf4", 64, 128, tpu.Config(64, 128, 128, "before"), 16),
        ("v5e", "int4", 128, 256, tpu.Config(16, 128, 256, "after"), 8),
        ("v7x", "int8", 0, 256, tpu.Config(32, 256, 128), 1),  # K in two blocks
        ("v6e", "float8_e4m3fn", 0, 128, tpu.Config(128, 256, 128), 130),
    ],
)
def test_kernel_is_within_the_bound(chip, name, tile, k, config, rank):
    """M and N that blocks do not divide; rows in one block and in several, found in either order."""
    m, n = 37, 200
    lhs, rhs, extras = (
        normal(0, (1, m, k), "bfloat16"),
        weight(name, (1, k, n), tile),
        update(1, m, k, n, rank),
    )
    got, problem = interpreted(chip, lhs, rhs, extras, config, out_dtype="float32")
    assert_within(got, problem, lhs, rhs, extras, "bfloat16")


@pytest.mark.parametrize("block_k,block_m", [pytest.param(384, 128, marks=pytest.mark.large), (256, 128)])
def test_rows_that_the_kernel_quantizes(block_k, block_m):
    """The update gets the rows before quantization. K in one block, and in two with a tail."""
    lhs = normal(0, (1, 130, 384), "bfloat16")
    rhs, extras = weight("int8", (1, 384, 128), 0), update(1, 130, 384, 128, 16, mask=True)
    config = tpu.Config(block_m, 128, block_k)
    got, problem = interpreted("v6e", lhs, rhs, extras, config, quantize_lhs=INT8_ROWS, out_dtype="float32")
    want, _ = assert_within(got, problem, lhs, rhs, extras, "bfloat16")
    without = dataclasses.replace(problem, low_rank=None)
    assert np.abs(want - reference.run(without, Tensor(lhs), rhs)).max() > 1


def test_batches_masks_and_the_epilogue():
    """A weight and an update for each batch; the update comes before bias and activation."""
    lhs, rhs = normal(0, (2, 20, 256)), weight("int4", (2, 256, 128), 128, transposed=True)
    extras = dataclasses.replace(update(2, 20, 256, 128, 16, mask=True), bias=normal(4, (1, 1, 128)))
    config = tpu.Config(32, 128, 128, "before")
    options = {"rhs_transposed": True, "activation": "silu", "out_dtype": "bfloat16"}
    got, problem = interpreted("v7x", lhs, rhs, extras, config, **options)
    assert_within(got, problem, lhs, rhs, extras, "bfloat16")


def test_nothing_to_add_gives_the_base_bits():
    lhs, rhs = normal(0, (1, 24, 256), "bfloat16"), weight("int4", (1, 256, 128), 128)
    extras = dataclasses.replace(update(1, 24, 256, 128, 16), low_rank_b=jnp.zeros((1, 16, 128)))
    config = tpu.Config(32, 128, 256, "before")
    got, problem = interpreted("v6e", lhs, rhs, extras, config, out_dtype="bfloat16")
    base = dataclasses.replace(problem, low_rank=None)
    want = tpu.run(base, Tensor(lhs), rhs, config=config, chip=CHIPS["v6e"], interpret=INTERPRET)
    np.testing.assert_array_equal(got, want)
    portable = matmul.matmul(lhs, rhs, extras, out_dtype="bfloat16")
    np.testing.assert_array_equal(portable, matmul.matmul(lhs, rhs, out_dtype="bfloat16"))


@pytest.mark.large
def test_what_the_kernel_leaves_to_xla(monkeypatch):
    """All that follows the product, and the update too; a gate gets none of it."""
    lhs, rhs = normal(0, (1, 8, 128), "bfloat16"), weight("int8", (1, 128, 128), 0)
    gate = dataclasses.replace(rhs, scale=rhs.scale * 2)
    extras = dataclasses.replace(update(1, 8, 128, 128, 16), gate=gate)
    problem = problem_of(lhs, rhs, extras, low_rank_scaling=0.5, activation="silu", out_dtype="float32")
    whole, *less = tpu_split._parts(problem)
    assert whole == problem and [bool(part.low_rank) for part in less] == [True, False]
    for part in less:
        monkeypatch.setattr(tpu_split, "_kernel_part", lambda *_, part=part: part)
        config, chip = tpu.Config(8, 128, 128), CHIPS["v6e"]
        got = tpu_split.run(problem, Tensor(lhs), rhs, extras, config=config, chip=chip, interpret=INTERPRET)
        assert_within(got, problem, lhs, rhs, extras, "bfloat16")
        note = tpu_split.estimate(problem, chip, config).note
        assert ("low_rank:16" in note) == (part.low_rank is None) and "gate silu" in note


# --- the portable path, gradients and transformations


def wide(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("rank,rows", [(1, None), (130, None), (8, INT8_ROWS)], ids=str)
def test_portable_path_is_within_the_bound(rank, rows):
    lhs, rhs = normal(0, (2, 7, 64)), weight("int8", (1, 64, 24), 0)
    extras = update(2, 7, 64, 24, rank, mask=True)
    options = {"quantize_lhs": rows, "out_dtype": "float32"}
    got = matmul.matmul(lhs, rhs, extras, low_rank_scaling=0.5, implementation="xla", **options)
    problem = problem_of(lhs, rhs, extras, low_rank_scaling=0.5, **options)
    assert_within(got, problem, lhs, rhs, extras)


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients(batch):
    """Against float64: of the rows, both factors and the mask, shared by all batches or not."""
    m, k, n, rank = 5, 32, 24, 4
    x, g = normal(0, (2, m, k)), normal(5, (2, m, n))
    rhs, extras = weight("int8", (batch, k, n), 0), update(batch, m, k, n, rank, dtype="float32")
    args = x, extras.low_rank_a, extras.low_rank_b, normal(6, (batch, m, rank))

    def run(x, a, b, mask):
        extras = Extras(low_rank_a=a, low_rank_b=b, low_rank_mask=mask)
        return matmul.matmul(x, rhs, extras, low_rank_scaling=0.5, out_dtype="float32")

    got = jax.vjp(run, *args)[1](g)
    w = reference.dequantize(rhs)
    exact, total = (_gradients(*(f(wide(v)) for v in (*args, g, w))) for f in (lambda v: v, np.abs))
    for mine, want, size in zip(got, exact, total, strict=True):
        assert mine.dtype == jnp.float32 and mine.shape == want.shape
        assert np.all(abs(wide(mine) - want) <= (2 * m + k + n + rank + 10) * 2.0**-24 * size)


def _gradients(x, a, b, mask, g, w):
    """Of x, a, b and the mask, written out; a batch of 1 gets the sum over the others."""
    turn = lambda v: np.swapaxes(v, 1, 2)
    t, s = 0.5 * x @ a, g @ turn(b)
    dx = g @ turn(w) + 0.5 * (s * mask) @ turn(a)
    of = lambda d, like: d.sum(0, keepdims=True) if like.shape[0] == 1 else d
    return dx, of(turn(x) @ (0.5 * s * mask), a), of(turn(t * mask) @ g, b), of(t * s, mask)


def test_gradients_through_an_activation():
    """The sums that it needs again have the update in them."""
    x, rhs, extras = normal(0, (1, 5, 32)), weight("int8", (1, 32, 24), 0), update(1, 5, 32, 24, 4)
    w = jnp.asarray(reference.dequantize(rhs), jnp.float32)
    g = normal(5, (1, 5, 24))

    def fused(x, a, b):
        return matmul.matmul(
            x, rhs, Extras(low_rank_a=a, low_rank_b=b), low_rank_scaling=0.5, activation="silu"
        )

    def plain(x, a, b):
        return jax.nn.silu(x @ w + 0.5 * (x @ a) @ b)

    args = x, extras.low_rank_a.astype(jnp.float32), extras.low_rank_b.astype(jnp.float32)
    for mine, want in zip(*(jax.vjp(f, *args)[1](g) for f in (fused, plain)), strict=True):
        np.testing.assert_allclose(mine, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [(None, 0, 0, None), (0, 0, 0, 0), (0, None, None, 0)])
@pytest.mark.parametrize("shared", [True, False], ids=["one weight", "a weight for each batch"])
def test_vmap(axes, shared):
    """Rows, adapters and masks mapped together and apart stay one op with the same numbers."""
    lhs, rhs = normal(0, (3, 2, 6, 32)), weight("int4", (1 if shared else 2, 32, 16), 0)
    a, b = normal(1, (3, 1, 32, 4)), normal(2, (3, 1, 4, 16))
    args = lhs, a, b, normal(3, (3, 2, 6, 4))

    def run(x, a, b, mask):
        extras = Extras(low_rank_a=a, low_rank_b=b, low_rank_mask=mask)
        return matmul.matmul(x, rhs, extras, low_rank_scaling=0.5, out_dtype="float32")

    given = [v if axis == 0 else v[0] for v, axis in zip(args, axes, strict=True)]
    mapped = jax.vmap(run, in_axes=axes)
    assert str(jax.make_jaxpr(mapped)(*given)).count("qwix_matmul") == 1
    each = [run(*(v[i] if axis == 0 else v[0] for v, axis in zip(args, axes, strict=True))) for i in range(3)]
    np.testing.assert_allclose(mapped(*given), jnp.stack(each), rtol=1e-5, atol=1e-5)


def test_what_is_wrong_is_named():
    lhs, rhs, extras = normal(0, (1, 5, 32)), weight("int8", (1, 32, 24), 0), update(1, 5, 32, 24, 4)
    wrong = lambda **changes: matmul.matmul(lhs, rhs, dataclasses.replace(extras, **changes))
    with pytest.raises(ValueError, match=r"low_rank_b has shape \(1, 5, 24\); it must be .*4, 24\)"):
        wrong(low_rank_b=jnp.ones((1, 5, 24)))
    with pytest.raises(ValueError, match=r"low_rank_a has shape \(1, 16, 4\)"):
        wrong(low_rank_a=jnp.ones((1, 16, 4)))
    with pytest.raises(ValueError, match=r"low_rank_mask has shape \(1, 3, 4\)"):
        wrong(low_rank_mask=jnp.ones((1, 3, 4)))
    with pytest.raises(ValueError, match="given together"):
        wrong(low_rank_b=None)
    with pytest.raises(ValueError, match="norm_weight exclude each other"):
        wrong(norm_weight=jnp.ones(32))
    with pytest.raises(ValueError, match="multiplies a plain float lhs"):
        matmul.matmul(jnp.ones((1, 5, 32), jnp.int8), rhs, extras)
    with pytest.raises(TypeError, match="low_rank_a has dtype int32"):
        wrong(low_rank_a=jnp.ones((1, 32, 4), jnp.int32))
