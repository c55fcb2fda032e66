"""Which implementation runs: order, refusals, prices, and the warning of a fallback."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import pytest
from qwix_kernels import chips, dispatch, tuning
from qwix_kernels.matmul import RowQuantize, Tensor, cost, problem_of


@dataclasses.dataclass(frozen=True)
class Problem:
    size: int
    scheme: str = "toy"
    batch: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    block: int = 8


def refuse_odd(problem, chip):
    if problem.size % 2:
        raise NotImplementedError(f"needs an even size, got {problem.size}")


def price(us):
    return lambda problem, chip, config: dispatch.Estimate(us, us, us, 1.0)


@pytest.fixture(autouse=True)
def toy_op(monkeypatch):
    kernel = dispatch.Implementation(
        "kernel", ("tpu",), refuse_odd, lambda p, chip, config: dispatch.Estimate(p.size, 0, p.size, 1.0),
        lambda *a, **k: None, lambda p, chip: Config(), lambda: Config,
    )  # fmt: skip
    portable = dispatch.Implementation("portable", (), lambda p, c: None, price(100.0), lambda *a, **k: None)
    monkeypatch.setitem(dispatch._IMPLEMENTATIONS, Problem, (kernel, portable))
    monkeypatch.setattr(dispatch, "_WARNED", set())
    monkeypatch.setattr(tuning, "key", str)
    monkeypatch.setenv("QWIX_TUNING_CACHE", "/nonexistent")


def test_the_first_that_can_run_is_chosen():
    got = dispatch.explain(Problem(4), "v5e")
    assert (got.chosen, got.config, got.config_source, got.rejected) == ("kernel", Config(), "heuristic", ())
    assert "kernel on v5e: 4.0 us" in str(got)


@pytest.mark.parametrize(
    ("size", "chip", "reason"),
    [
        (3, "v5e", "needs an even size, got 3"),
        (200, "v5e", "predicted slower than portable: 200.0 us against 100.0 us"),
        (4, "h100", "runs on tpu, not on cuda (h100)"),
    ],
)
def test_the_next_one_is_asked_and_the_reason_kept(size, chip, reason):
    got = dispatch.explain(Problem(size), chip)
    assert (got.chosen, got.rejected) == ("portable", (("kernel", reason),))
    assert f"not kernel: {reason}" in str(got)


def test_a_named_one_runs_though_it_is_slower():
    assert dispatch.explain(Problem(200), "v5e", implementation="kernel").chosen == "kernel"


def test_a_named_one_that_cannot_run_raises_with_constraint_and_problem():
    with pytest.raises(NotImplementedError, match=r"even size, got 3.*Problem\(size=3"):
        dispatch.explain(Problem(3), "v5e", implementation="kernel")
    assert dispatch.explain(Problem(3), "v5e", implementation=("kernel", "portable")).chosen == "portable"


def test_an_explicit_config_wins_and_must_be_of_the_right_type():
    got = dispatch.explain(Problem(4), "v5e", config=Config(16))
    assert (got.config, got.config_source) == (Config(16), "explicit")
    with pytest.raises(TypeError, match=r"config must be a .*Config, got 'big'"):
        dispatch.explain(Problem(4), "v5e", config="big")


def test_one_warning_for_each_reason():
    chip = chips.CHIPS["v5e"]
    with pytest.warns(
        UserWarning, match="toy runs through portable on v5e.*even size.*implementation='kernel'"
    ):
        dispatch.warn_of_fallback(dispatch.explain(Problem(3), chip), chip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.warn_of_fallback(dispatch.explain(Problem(5), chip), chip)  # the same reason, other numbers
        dispatch.warn_of_fallback(dispatch.explain(Problem(3), "cpu"), chips.CHIPS["cpu"])
    with pytest.warns(UserWarning, match="predicted slower"):
        dispatch.warn_of_fallback(dispatch.explain(Problem(200), chip), chip)


@pytest.mark.parametrize("m", [1024, 1023, 16])
def test_another_platforms_kernel_is_no_fallback(m):
    """On a GPU the GPU's kernel runs; that the TPU's does not is nothing to warn of."""
    chip, w = chips.CHIPS["h100"], problem(m)
    explained = dispatch.explain(dataclasses.replace(w, rhs_transposed=True), chip)
    assert explained.chosen == "mosaic_gpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.warn_of_fallback(explained, chip)


def test_problems_of_no_op():
    with pytest.raises(TypeError, match=r"No op takes a int; known problems: MatmulProblem"):
        dispatch.explain(3, "v5e")


def problem(m, rhs="int8", tile=None, quantize=None, k=4096, n=4096):
    shape = lambda s, d: jax.ShapeDtypeStruct(s, d)
    w = Tensor(shape((1, k, n), rhs), shape((1, k // tile if tile else 1, n), "bfloat16"))
    return problem_of(shape((1, m, k), jnp.bfloat16), w, quantize_lhs=quantize)


def test_floors_of_the_published_table():
    # W8A8 1024 x 4096 x 4096 is 131k cycles on v5e; W4A16 decode is bound by its 8.4 MB of weights.
    v5e = chips.CHIPS["v5e"]
    compute, memory = cost.floor(problem(1024, quantize=RowQuantize("int8", 127.5)), v5e)
    assert compute * 1.5e3 == pytest.approx(131e3, rel=0.01) and memory < compute
    compute, memory = cost.floor(problem(16, "int4", 128), v5e)
    assert memory * 1.5e3 == pytest.approx(16.4e3, rel=0.1) and compute < memory


def test_the_portable_path_pays_for_what_a_kernel_fuses():
    v5e, rows = chips.CHIPS["v5e"], RowQuantize("int8", 127.5)
    us = lambda *args, **kw: cost.xla_estimate(problem(*args, **kw), v5e).static_us
    assert us(1024, quantize=rows) > us(1024, quantize=None) / 2  # the matmul is twice as fast, and not alone
    assert us(1024, "int4", 128) > us(1024, "int4")  # a dequantized copy
    assert us(1024, tile=128, quantize=rows) > 3 * us(1024, quantize=rows)  # partial results
    for p in (problem(1, "int4", 128), problem(1024, quantize=rows)):
        e = cost.xla_estimate(p, v5e)
        assert e.static_us >= e.floor_us > 0
