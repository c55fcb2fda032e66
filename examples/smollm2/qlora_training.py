"""QLoRA of SmolLM2: adapters of rank 8 over its linear weights in nf4, trained, saved, loaded and merged.

Trains on Python's own documentation, all but its first 4096 tokens, which are what perplexity is measured on.
The base is rounded to nf4 in tiles of 64 (arXiv:2305.14314) and never changes; 2.4 of 135 million parameters
are trained. `qlora` is the program.
"""

import dataclasses
import pathlib
import resource
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qwix
from examples.smollm2 import evaluate, load, schemes
from examples.smollm2.model import SmolLM2
from examples.smollm2.train import make_optimizer, train
from qwix import lora

RULE = {"rank": 8, "alpha": 16.0, "weight_qtype": "nf4", "tile_size": 64}
# Perplexity of the held-out tokens over that of the float model (19.40): rounding to nf4 gives 1.303, and
# training must bring it under 19. As ratios, because the text differs a little between Pythons.
BEFORE, AFTER = (1.27, 1.34), 19.0 / schemes.FLOAT_PERPLEXITY
# Logits of the model whose adapters are merged into float weights, relative to those of the adapted one: the
# same products, summed in another order through 30 blocks.
MERGED_TOLERANCE = 1e-4
SECONDS = 20 * 60


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
      plain, before, after: perplexities of the held-out tokens: of the float model, and with the base in nf4
        before and after training.
      loaded_difference: the largest difference between logits of the trained model and those of a fresh one
        with its adapters, saved and loaded. `peft_difference`: the same, by way of PEFT's files.
      merged_difference: norm of the difference of the logits of the model that the adapters are merged into,
        in floats, over the norm of the logits.
      requantized, requantized_sqnr_db: perplexity of the model that they are merged into in nf4, and the mean
        quality of its weights.
      adapter_bytes, optimizer_bytes, base_bytes: on the device.
      losses: of every step, in nats per token.
    """

    plain: float
    before: float
    after: float
    loaded_difference: float
    peft_difference: float
    merged_difference: float
    requantized: float
    requantized_sqnr_db: float
    adapter_bytes: int
    optimizer_bytes: int
    base_bytes: int
    losses: list[float]
    seconds: float
    peak_gb: float

    def shortfalls(self) -> list[str]:
        """What misses its limit, in words."""
        lines = []
        low, high, limit = (self.plain * ratio for ratio in (*BEFORE, AFTER))
        if not low <= self.before <= high:
            lines.append(f"perplexity before training is {self.before:.2f}, not within {low:.2f}..{high:.2f}")
        if not self.after < limit:
            lines.append(f"perplexity after training is {self.after:.2f}, not under {limit:.2f}")
        for name, difference in (("loaded", self.loaded_difference), ("PEFT's", self.peft_difference)):
            if difference != 0:
                lines.append(f"logits of the {name} adapters differ by {difference}, not by 0")
        if not self.merged_difference <= MERGED_TOLERANCE:
            lines.append(
                f"logits of merged weights differ by {self.merged_difference}, over {MERGED_TOLERANCE}"
            )
        if self.optimizer_bytes > 2 * self.adapter_bytes + 64:  # Adam's two moments and its counters
            lines.append(f"the optimizer takes {self.optimizer_bytes} bytes, adapters {self.adapter_bytes}")
        if self.seconds > SECONDS:
            lines.append(f"it took {self.seconds:.0f} s, over {SECONDS}")
        return lines


def adapted(tokens: np.ndarray, seed: int) -> SmolLM2:
    """A fresh model: float weights rounded to nf4, adapters made of the seed."""
    provider = qwix.LoraProvider(module_path=schemes.LINEAR, **RULE)
    base = load.load_model(progress=False)
    return qwix.apply_lora_to_model(base, provider, jnp.asarray(tokens[:1]), rngs=nnx.Rngs(seed))


@nnx.jit
def logits_of(model: SmolLM2, tokens: jax.Array) -> jax.Array:
    return model(tokens)[0]


def peft_name(weight: str) -> str:
    """The name that Hugging Face's Llama has for a weight.

    >>> peft_name("layers/3/attention/q_proj/kernel")
    'model.layers.3.self_attn.q_proj'
    """
    module = weight.removesuffix("/kernel").replace("attention", "self_attn")
    return "model." + module.replace("/", ".")


def run(steps: int, learning_rate: float) -> Result:
    start = time.perf_counter()
    tokenizer = load.load_tokenizer()
    held_out, rest = evaluate.windows(tokenizer), evaluate.later_windows(tokenizer)
    plain = evaluate.perplexity(load.load_model(), held_out)
    model = adapted(held_out, seed=0)
    before = evaluate.perplexity(model, held_out)
    optimizer = make_optimizer(model, steps, learning_rate, nnx.LoRAParam)
    losses = train(model, optimizer, rest, steps, nnx.LoRAParam)
    after = evaluate.perplexity(model, held_out)
    adapters = lora.adapters_of(model)
    probe = jnp.asarray(held_out[:1])
    logits = logits_of(model, probe)
    with tempfile.TemporaryDirectory() as folder:
        files, peft = pathlib.Path(folder, "adapters"), pathlib.Path(folder, "peft")
        lora.save_adapters(files, model)
        config = lora.PeftConfig(r=RULE["rank"], lora_alpha=RULE["alpha"])
        lora.save_peft(peft, model, config=config, names=peft_name)
        fresh = lora.with_adapters(adapted(held_out, seed=1), lora.load_adapters(files))
        loaded = jnp.abs(logits_of(fresh, probe) - logits).max()
        from_peft, _ = lora.load_peft(peft, fresh, names=peft_name)
        through_peft = jnp.abs(logits_of(lora.with_adapters(fresh, from_peft), probe) - logits).max()
    floats = logits_of(lora.merge(model, requantize=False).model, probe)
    again = lora.merge(model)
    return Result(
        plain=plain,
        before=before,
        after=after,
        loaded_difference=float(loaded),
        peft_difference=float(through_peft),
        merged_difference=float(jnp.linalg.norm(floats - logits) / jnp.linalg.norm(logits)),
        requantized=evaluate.perplexity(again.model, held_out),
        requantized_sqnr_db=float(np.mean([quality or np.nan for quality in again.sqnr_db.values()])),
        adapter_bytes=evaluate.device_bytes(adapters),
        optimizer_bytes=evaluate.device_bytes(nnx.state(optimizer)),
        base_bytes=evaluate.linear_bytes(model),
        losses=losses,
        seconds=time.perf_counter() - start,
        peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    )
