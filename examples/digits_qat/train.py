"""One jitted training step for any of the networks, accuracy, and quantization after training."""

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import qwix
from examples.digits_qat.data import Images
from examples.digits_qat.models import AutoEncoder, Classifier

Network = Classifier | AutoEncoder
BATCH, LEARNING_RATE = 57, 3e-3  # 57 x 21 = 1197: every image in every epoch


@nnx.jit
def step(model: Network, optimizer: nnx.Optimizer, images: Images, key: jax.Array) -> jax.Array:
    """Updates `model` in place, statistics of static ranges included; returns the loss before it."""
    loss, gradients = nnx.value_and_grad(lambda m: m.loss(images, key))(model)
    optimizer.update(model, gradients)
    return loss


def prepared[N: Network](model: N, provider: qwix.QtProvider | None, images: Images) -> N:
    """The model that trains under `provider`; with None the model itself."""
    if provider is None:
        return model
    key = () if isinstance(model, Classifier) else (jax.random.key(0),)
    return qwix.quantize_model(model, provider, images.pixels[:2], *key)


def train(
    model: Network, images: Images, *, epochs: int, seed: int, name: str, progress: bool = True
) -> list[float]:
    """Adam with a cosine schedule, in place. Returns the mean loss of every epoch."""
    steps = epochs * (len(images) // BATCH)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(seed), steps)
    losses = []
    batches = images.batches(BATCH, epochs, seed)
    bar = tqdm(batches, name, total=steps, unit="step", leave=False, disable=None if progress else True)
    for batch, key in zip(bar, keys, strict=True):
        losses.append(step(model, optimizer, batch, key))
    return np.array(losses).reshape(epochs, -1).mean(axis=1).tolist()


@nnx.jit
def correct(model: Classifier, images: Images) -> jax.Array:
    """How many labels the model gets right."""
    return (model(images.pixels).argmax(-1) == images.labels).sum()


def accuracy(model: Classifier, images: Images) -> float:
    """Share of right labels, in percent; leaves statistics as they are."""
    model.set_attributes(disable_quant_stats_update=True, raise_if_not_found=False)
    right = int(correct(model, images))
    model.set_attributes(disable_quant_stats_update=False, raise_if_not_found=False)
    return 100 * right / len(images)


@nnx.jit
def _loss(model: Network, images: Images, key: jax.Array) -> jax.Array:
    return model.loss(images, key)


def loss(model: Network, images: Images) -> float:
    """The loss on `images`, with one draw of the latents; leaves statistics as they are."""
    model.set_attributes(disable_quant_stats_update=True, raise_if_not_found=False)
    value = float(_loss(model, images, jax.random.key(1)))
    model.set_attributes(disable_quant_stats_update=False, raise_if_not_found=False)
    return value


def quantized(trained: Classifier, rule: qwix.QuantizationRule, images: Images) -> Classifier:
    """A classifier that stores quantized weights, made from a trained one, float or under a `QtProvider`.

    Statistics that training collected become the static scales of its activations.
    """
    sample = images.pixels[:2]
    model = qwix.quantize_model(Classifier(nnx.Rngs(0)), qwix.PtqProvider([rule]), sample)
    params = nnx.to_pure_dict(nnx.state(trained, nnx.Param))
    stats = nnx.to_pure_dict(nnx.state(trained, qwix.QuantStat))
    nnx.update(model, qwix.quantize_params(params, model, stats))
    return model
