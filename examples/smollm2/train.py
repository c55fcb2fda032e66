"""Training SmolLM2, or some of its variables, on windows of text."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.nnx import filterlib
from tqdm import tqdm

from examples.smollm2.model import SmolLM2


@nnx.jit(donate_argnames=("model", "optimizer"), static_argnames=("wrt",))
def step(model: SmolLM2, optimizer: nnx.Optimizer, tokens: jax.Array, wrt: filterlib.Filter) -> jax.Array:
    """Updates both in place on one window `[1, length]`; returns the loss before, in nats per token."""

    def loss(model: SmolLM2) -> jax.Array:
        logits, _ = model(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
    optimizer.update(model, gradients)
    return value


def make_optimizer(model: SmolLM2, steps: int, learning_rate: float, wrt: filterlib.Filter) -> nnx.Optimizer:
    """Adam for the variables `wrt`: the learning rate rises for a tenth of the steps and falls to 0."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), steps)
    return nnx.Optimizer(model, optax.adam(schedule, b2=0.99), wrt=wrt)


def train(
    model: SmolLM2, optimizer: nnx.Optimizer, tokens: np.ndarray, steps: int, wrt: filterlib.Filter
) -> list[float]:
    """Steps over `tokens` `[windows, length]`, in a fixed random order, as often as `steps` need it.

    Returns the losses, in nats per token.
    """
    order = np.resize(np.random.default_rng(0).permutation(len(tokens)), steps)
    losses = []
    with tqdm(order, "train", unit="step") as bar:
        for window in bar:
            losses.append(float(step(model, optimizer, jnp.asarray(tokens[window : window + 1]), wrt)))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses
