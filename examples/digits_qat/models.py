"""The two networks. Nothing in them knows about quantization."""

from typing import Self

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.digits_qat.data import Images

PIXELS = 64


class Classifier(nnx.Module):
    """Two convolutions and two linear layers: [batch, 8, 8, 1] -> logits [batch, 10]."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv1(pixels))
        x = nnx.relu(self.conv2(x))
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.out(x)

    def loss(self: Self, images: Images, key: jax.Array) -> jax.Array:
        """Mean cross entropy, in nats."""
        del key
        logits = self(images.pixels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, images.labels).mean()


class AutoEncoder(nnx.Module):
    """A variational auto-encoder with 8 latents (arXiv 1312.6114): pixels -> logits of the pixels."""

    latents = 8

    def __init__(self, rngs: nnx.Rngs):
        self.encoder = nnx.Linear(PIXELS, 128, rngs=rngs)
        self.moments = nnx.Linear(128, 2 * self.latents, rngs=rngs)
        self.decoder = nnx.Linear(self.latents, 128, rngs=rngs)
        self.out = nnx.Linear(128, PIXELS, rngs=rngs)

    def __call__(self, pixels: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """-> (logits [batch, 64], mean [batch, 8], log variance [batch, 8])"""
        x = nnx.relu(self.encoder(pixels.reshape(pixels.shape[0], PIXELS)))
        mean, log_variance = jnp.split(self.moments(x), 2, axis=-1)
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        return self.out(nnx.relu(self.decoder(z))), mean, log_variance

    def loss(self: Self, images: Images, key: jax.Array) -> jax.Array:
        """Negative evidence lower bound per image, in nats."""
        logits, mean, log_variance = self(images.pixels, key)
        pixels = images.pixels.reshape(logits.shape)
        reconstruction = optax.sigmoid_binary_cross_entropy(logits, pixels).sum(-1)
        divergence = 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum(-1)
        return (reconstruction + divergence).mean()
