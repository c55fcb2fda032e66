"""Quantization-aware training of SmolLM2 with 4-bit weights.

Trains on Python's own documentation, all but its first 4096 tokens, which are what perplexity is measured on.
Every linear weight is rounded to int4 in tiles of 64 in the forward pass and updated in float32; embedding
and norms stay as they are, all the rest is trained: 106 of 135 million parameters. Then the weights are
quantized for good, and the served model is scored as well.

python -m examples.smollm2.finetune --json FILE --check      # about a quarter of an hour on two CPU cores
"""

import dataclasses
import resource
import time

import jax.numpy as jnp
import numpy as np
from flax import nnx

import qwix
from examples.smollm2 import evaluate, load, schemes
from examples.smollm2.model import SmolLM2
from examples.smollm2.train import make_optimizer, train

RULE = {"weight_qtype": "int4", "tile_size": 64}
# Perplexity of the held-out tokens over that of the float model (19.40): plain rounding gives 1.56, and
# training must bring it well under that. As ratios, because the text differs a little between Pythons.
BEFORE, AFTER = (1.52, 1.60), 24.0 / schemes.FLOAT_PERPLEXITY
# The served model multiplies what the trained one does, in another order.
SERVED_TOLERANCE = 0.005


@dataclasses.dataclass(frozen=True)
class Result:
    """Perplexities of the held-out tokens: of the `plain` float model, `before` and `after` training in int4,
    and of the model `served` from it. `losses`: of every step, in nats per token.
    """

    plain: float
    before: float
    after: float
    served: float
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
        if abs(self.served / self.after - 1) > SERVED_TOLERANCE:
            lines.append(f"the served model's perplexity is {self.served:.3f}, in training {self.after:.3f}")
        return lines


def linear(path: tuple, value: object) -> bool:
    """Whether a variable is the kernel of a linear layer: what is quantized, and all that is trained."""
    return isinstance(value, nnx.Param) and path[-1] == "kernel"


def served(trained: SmolLM2, fresh: SmolLM2, tokens: np.ndarray) -> SmolLM2:
    """The model with its trained weights stored in int4. `fresh`: a float model, to be overwritten."""
    nnx.update(fresh, nnx.state(trained, nnx.Param))
    rule = qwix.QuantizationRule(module_path=schemes.LINEAR, **RULE)
    return qwix.quantize_model(fresh, qwix.PtqProvider([rule]), jnp.asarray(tokens[:1]))


def run(steps: int, learning_rate: float) -> Result:
    start = time.perf_counter()
    tokenizer = load.load_tokenizer()
    held_out, rest = evaluate.windows(tokenizer), evaluate.later_windows(tokenizer)
    rule = qwix.QtRule(module_path=schemes.LINEAR, **RULE)
    plain_model = load.load_model()
    plain = evaluate.perplexity(plain_model, held_out)
    model = qwix.quantize_model(plain_model, qwix.QtProvider([rule]), jnp.asarray(held_out[:1]))
    before = evaluate.perplexity(model, held_out)
    losses = train(model, make_optimizer(model, steps, learning_rate, linear), rest, steps, linear)
    after = evaluate.perplexity(model, held_out)
    serving = served(model, load.load_model(progress=False), held_out)
    return Result(
        plain=plain,
        before=before,
        after=after,
        served=evaluate.perplexity(serving, held_out),
        losses=losses,
        seconds=time.perf_counter() - start,
        peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    )
