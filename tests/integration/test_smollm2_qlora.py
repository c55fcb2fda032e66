"""QLoRA of a language model as small as a test can afford, and what the example says of results."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from examples.smollm2 import evaluate, qlora_training, schemes, train
from examples.smollm2.model import Config, SmolLM2
from qwix import lora

TINY = Config(vocab_size=96, width=64, hidden=128, blocks=1, heads=4, kv_heads=2, head_size=16)
WINDOWS = np.tile(np.arange(16, dtype=np.int32) * 7 % TINY.vocab_size, (4, 1))
GOOD = qlora_training.Result(
    plain=19.4,
    before=25.3,
    after=13.0,
    loaded_difference=0.0,
    peft_difference=0.0,
    merged_difference=2e-6,
    requantized=16.0,
    requantized_sqnr_db=22.0,
    adapter_bytes=9_800_000,
    optimizer_bytes=19_600_016,
    base_bytes=59_700_000,
    losses=[3.0],
    seconds=600.0,
    peak_gb=4.0,
)


def adapted(seed: int) -> SmolLM2:
    provider = qwix.LoraProvider(module_path=schemes.LINEAR, **qlora_training.RULE)
    base = SmolLM2(TINY, rngs=nnx.Rngs(0))
    return qwix.apply_lora_to_model(base, provider, jnp.asarray(WINDOWS[:1]), rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def trained() -> tuple[SmolLM2, list[float], int]:
    model = adapted(seed=1)
    optimizer = train.make_optimizer(model, 40, 1e-2, nnx.LoRAParam)
    losses = train.train(model, optimizer, WINDOWS, 40, nnx.LoRAParam)
    return model, losses, evaluate.device_bytes(nnx.state(optimizer))


def test_training_moves_adapters_only(trained):
    model, losses, optimizer_bytes = trained
    assert losses[-1] < losses[0] / 2
    rest = [nnx.to_flat_state(nnx.state(m, nnx.Not(nnx.LoRAParam))) for m in (adapted(seed=1), model)]
    for (path, old), (_, new) in zip(*rest, strict=True):
        np.testing.assert_array_equal(old.get_value(), new.get_value(), err_msg=str(path))
    adapters = lora.adapters_of(model)
    assert len(jax.tree.leaves(adapters)) == 2 * 7 * TINY.blocks
    assert optimizer_bytes <= 2 * evaluate.device_bytes(adapters) + 64


def test_saved_loaded_and_merged_it_is_the_same_model(trained, tmp_path):
    model, _, _ = trained
    probe = jnp.asarray(WINDOWS[:1])
    logits = qlora_training.logits_of(model, probe)
    lora.save_adapters(tmp_path / "adapters", model)
    fresh = lora.with_adapters(adapted(seed=2), lora.load_adapters(tmp_path / "adapters"))
    np.testing.assert_array_equal(qlora_training.logits_of(fresh, probe), logits)
    config = lora.PeftConfig(r=8, lora_alpha=16.0)
    lora.save_peft(tmp_path / "peft", model, config=config, names=qlora_training.peft_name)
    from_peft, _ = lora.load_peft(tmp_path / "peft", fresh, names=qlora_training.peft_name)
    again = lora.with_adapters(adapted(seed=3), from_peft)
    np.testing.assert_array_equal(qlora_training.logits_of(again, probe), logits)
    merged = qlora_training.logits_of(lora.merge(model, requantize=False).model, probe)
    assert jnp.linalg.norm(merged - logits) < 1e-5 * jnp.linalg.norm(logits)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"before": 24.0}, "before training"),
        ({"after": 19.1}, "after training"),
        ({"loaded_difference": 1e-7}, "loaded adapters differ"),
        ({"peft_difference": float("nan")}, "PEFT's adapters differ"),
        ({"merged_difference": float("nan")}, "merged weights differ"),
        ({"optimizer_bytes": 39_000_000}, "the optimizer takes"),
        ({"seconds": 1201.0}, "it took 1201 s"),
    ],
)
def test_a_result_that_falls_short_says_where(change, said):
    assert not GOOD.shortfalls()
    (line,) = dataclasses.replace(GOOD, **change).shortfalls()
    assert said in line
