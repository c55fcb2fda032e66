"""Quantization-aware training of SmolLM2, at toy size: what moves, what stays, what is served afterwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from examples.smollm2 import evaluate, finetune, schemes, train
from examples.smollm2.model import Config, SmolLM2

TINY = Config(vocab_size=96, width=64, hidden=128, blocks=1, heads=4, kv_heads=2, head_size=16)
WINDOWS = np.tile(np.arange(16, dtype=np.int32) * 7 % TINY.vocab_size, (4, 1))
GOOD = finetune.Result(
    plain=19.4, before=30.3, after=22.0, served=22.01, losses=[3.0], seconds=1.0, peak_gb=1.0
)


def float_model(seed: int = 0) -> SmolLM2:
    return SmolLM2(TINY, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def trained() -> tuple[SmolLM2, list[float]]:
    rule = qwix.QtRule(module_path=schemes.LINEAR, **finetune.RULE)
    model = qwix.quantize_model(float_model(), qwix.QtProvider([rule]), jnp.asarray(WINDOWS[:1]))
    optimizer = train.make_optimizer(model, 30, 3e-3, finetune.linear)
    return model, train.train(model, optimizer, WINDOWS, 30, finetune.linear)


def test_training_lowers_the_loss_and_moves_linear_weights_only(trained):
    model, losses = trained
    assert len(losses) == 30
    assert losses[-1] < losses[0] / 2
    before, after = (nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (float_model(), model))
    for (path, old), (_, new) in zip(before, after, strict=True):
        moved = bool(jnp.any(old[...] != new[...]))
        assert moved == (path[-1] == "kernel"), path


def test_the_served_model_is_the_trained_one(trained):
    model, _ = trained
    serving = finetune.served(model, float_model(seed=1), WINDOWS)
    arrays = [leaf for leaf in jax.tree.leaves(nnx.state(serving)) if leaf.dtype == jnp.int4]
    assert len(arrays) == 7 * TINY.blocks
    scores = [evaluate.perplexity(m, WINDOWS, progress=False) for m in (model, serving)]
    assert abs(scores[1] / scores[0] - 1) < finetune.SERVED_TOLERANCE


@pytest.mark.parametrize(
    "change, said",
    [
        ({"before": 25.0}, "before training"),
        ({"after": 24.1, "served": 24.1}, "after training"),
        ({"served": 22.2}, "the served model"),
    ],
)
def test_a_result_that_falls_short_says_where(change, said):
    assert not GOOD.shortfalls()
    (line,) = dataclasses.replace(GOOD, **change).shortfalls()
    assert said in line
