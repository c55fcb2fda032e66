"""Blocks of a convolution from a caller, a context and a tuning file, and what does not fit."""

import jax
import jax.numpy as jnp
import pytest
from qwix_kernels import dispatch, tuning
from qwix_kernels.chips import CHIPS
from qwix_kernels.conv import problem_of, tpu
from qwix_kernels.conv.tpu_config import Config
from qwix_kernels.problem import Tensor

V6E = CHIPS["v6e"]


def problem(size=28, features=128, out=128, kernel=3, groups=1):
    x = Tensor(
        jax.ShapeDtypeStruct((8, size, size, features), jnp.int8),
        jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32),
    )
    w = jax.ShapeDtypeStruct((kernel, kernel, features // groups, out), jnp.int8)
    scale = jax.ShapeDtypeStruct((1, 1, 1, out), jnp.float32)
    pad = ((kernel // 2,) * 2,) * 2
    return problem_of(x, Tensor(w, scale), padding=pad, groups=groups, out_dtype=jnp.bfloat16)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """No tables but those that a test writes."""
    monkeypatch.setattr(tuning, "_TABLES", tmp_path / "packaged")
    monkeypatch.setenv("QWIX_TUNING_CACHE", str(tmp_path / "user.json"))


@pytest.mark.parametrize(
    ("of", "kernel"),
    [
        ({}, "blocks"),
        ({"kernel": 1, "size": 56, "features": 64, "out": 256}, None),
        ({"groups": 128}, "depthwise"),
    ],
)
def test_the_heuristic_says_which_kernel(of, kernel):
    p = problem(**of)
    found = dispatch.explain(p, V6E, implementation="mosaic_tpu")
    assert found.config == tpu.heuristic_config(p, V6E) and found.config_source == "heuristic"
    assert kernel in (None, found.config.kernel)
    assert found.estimate == tpu.estimate(p, V6E, found.config)


def test_blocks_come_from_the_most_specific_source():
    p = problem()
    own = tpu.heuristic_config(p, V6E)
    tuned, given = (Config("blocks", 32, 1, rows, 128) for rows in (28, 14))
    tuning.save(p, V6E, "mosaic_tpu", tuned)
    found = dispatch.explain(p, V6E)
    assert own != tuned and (found.config, found.config_source) == (tuned, "user cache")
    with tuning.use(given):
        assert dispatch.explain(p, V6E).config == given
    assert dispatch.explain(p, V6E, config=given).config_source == "explicit"
    assert dispatch.explain(problem(out=256), V6E).config_source == "heuristic"  # of this very problem only


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config("depthwise"), "'depthwise' has no plan for conv 3x3 w8a8"),
        (Config("matmul"), "'matmul' has no plan for conv 3x3 w8a8"),
        (Config("blocks", 16, 1, 7, 128), "does not fit images whose rows have 28 places"),
        (Config("blocks", 32, 1, 28, 256), "and 128 features"),
        (Config("blocks", 32, 1, 28, 128, turns=3), "an odd number of turns"),
    ],
    ids=str,
)
def test_blocks_that_do_not_fit_are_refused(config, message):
    with pytest.raises(NotImplementedError, match=message):
        dispatch.explain(problem(), V6E, implementation="mosaic_tpu", config=config)


def test_blocks_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="kernel must be one of blocks, matmul, depthwise"):
        Config("fft")
    with pytest.raises(ValueError, match="Blocks are positive integers"):
        Config("blocks", 32, 0, 28, 128)


def test_keys_tell_problems_apart():
    keys = {
        problem(**of).tuning_key for of in ({}, {"size": 56}, {"out": 64}, {"kernel": 5}, {"groups": 128})
    }
    assert len(keys) == 5 and problem().tuning_key == (
        "conv n8 28k3s1d1x1p1:1,28k3s1d1x1p1:1 c128/1 o128 int8[float32:8x128] int8[float32:1x128] bfloat16"
    )
