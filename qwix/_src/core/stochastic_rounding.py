"""Noise for stochastic rounding: added before rounding to the nearest, it makes rounding unbiased."""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp


def uniform_noise(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Uniform in [-0.5, 0.5), float32."""
    return jax.random.uniform(key, shape, jnp.float32, -0.5, 0.5)


def low_bit_uniform_noise(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """One of 256 levels, (k + 0.5) / 256 - 0.5, from 8 random bits each: a quarter of the cost of 32."""
    bits = jax.random.bits(key, shape, jnp.uint8)
    return bits.astype(jnp.float32) / 256 - 0.5 + 1 / 512


_METHODS = {"uniform": uniform_noise, "low_bit_uniform": low_bit_uniform_noise}


@flax.struct.dataclass
class NoiseFn:
    """A callable from a shape to noise that varies along `channelwise_noise_axes` only (size 1 elsewhere)."""

    key: jax.Array
    method: str = flax.struct.field(pytree_node=False)
    channelwise_noise_axes: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def __call__(self, shape: Sequence[int]) -> jax.Array:
        if self.method not in _METHODS:
            raise ValueError(f"Unknown method {self.method!r}: one of {', '.join(_METHODS)}.")
        axes = {a % len(shape) for a in self.channelwise_noise_axes} if shape else set()
        return _METHODS[self.method](self.key, [d if a in axes else 1 for a, d in enumerate(shape)])


def get_noise_fn(method: str, key: jax.Array, channelwise_noise_axes: Sequence[int] = (0,)) -> NoiseFn:
    """The noise function of a method: 'uniform' or 'low_bit_uniform'.

    >>> get_noise_fn("uniform", jax.random.key(0))((4, 8)).shape
    (4, 1)
    """
    return NoiseFn(key, method, tuple(channelwise_noise_axes))
