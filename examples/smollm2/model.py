"""SmolLM2 in Flax NNX: a Llama with grouped-query attention, SwiGLU and a tied embedding.

There is one way through the network: tokens are written into a key-value cache and attend to everything in
it. Without a cache a fresh one of the tokens' length is made, so scoring a text and generating one share all
code. RoPE turns interleaved pairs (x0, x1), (x2, x3), ..., the layout of the weights in GGUF files.
Linear layers are plain `nnx.Linear`; nothing here knows about quantization.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network; the defaults are those of SmolLM2-135M."""

    vocab_size: int = 49152
    width: int = 576
    hidden: int = 1536
    blocks: int = 30
    heads: int = 9
    kv_heads: int = 3
    head_size: int = 64
    norm_epsilon: float = 1e-5
    rope_base: float = 100_000.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every block, `[batch, capacity, kv_heads, head_size]`, the first `length` in use."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array

    @classmethod
    def empty(cls, config: Config, batch: int, capacity: int) -> Self:
        shape = (batch, capacity, config.kv_heads, config.head_size)
        # Separate buffers, so that a caller may donate the cache.
        zeros = lambda: tuple(jnp.zeros(shape, jnp.float32) for _ in range(config.blocks))
        return cls(zeros(), zeros(), jnp.zeros((), jnp.int32))


def rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864) on interleaved pairs.

    Args:
      x: `[batch, length, heads, head_size]`.
      positions: `[length]`, of each token in the sequence.
      base: the longest wavelength is about `2 pi base` tokens.

    Returns:
      Like x, pair i of each head turned by `position * base ** (-2 i / head_size)`.
    """
    size = x.shape[-1]
    frequencies = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = positions[:, None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


class Attention(nnx.Module):
    """Causal attention; `heads / kv_heads` queries share a key and a value."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        linear = lambda inputs, outputs: nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)
        self.config = config
        self.q_proj = linear(config.width, config.heads * config.head_size)
        self.k_proj = linear(config.width, config.kv_heads * config.head_size)
        self.v_proj = linear(config.width, config.kv_heads * config.head_size)
        self.o_proj = linear(config.heads * config.head_size, config.width)

    def __call__(self, x: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array):
        """Attends from `x` `[batch, length, width]`; returns the output and the grown cache.

        Args:
          x: activations of the tokens at `start, start + 1, ...`.
          keys: cached keys, `[batch, capacity, kv_heads, head_size]`.
          values: cached values, same shape.
          start: how much of the cache is in use.
        """
        config, (batch, length, _) = self.config, x.shape
        positions = start + jnp.arange(length)
        split = lambda y: y.reshape(batch, length, -1, config.head_size)
        query = rope(split(self.q_proj(x)), positions, config.rope_base)
        key = rope(split(self.k_proj(x)), positions, config.rope_base)
        keys = jax.lax.dynamic_update_slice_in_dim(keys, key, start, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, split(self.v_proj(x)), start, axis=1)
        # Causal, and nothing of the cache that is not filled yet.
        mask = jnp.arange(keys.shape[1]) <= positions[:, None]
        mixed = jax.nn.dot_product_attention(query, keys, values, mask=mask[None, None])
        return self.o_proj(mixed.reshape(batch, length, -1)), keys, values


class SwiGLU(nnx.Module):
    """The gated feed-forward network of https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.gate_proj = nnx.Linear(config.width, config.hidden, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(config.width, config.hidden, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(config.hidden, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        norm = lambda: nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array):
        mixed, keys, values = self.attention(self.attention_norm(x), keys, values, start)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), keys, values


class SmolLM2(nnx.Module):
    """The language model.

    Example:
      >>> config = Config(vocab_size=16, width=8, hidden=16, blocks=2, heads=2, kv_heads=1, head_size=4)
      >>> model = SmolLM2(config, rngs=nnx.Rngs(0))
      >>> logits, cache = model(jnp.array([[1, 2, 3]]))
      >>> logits.shape, int(cache.length)
      ((1, 3, 16), 3)
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.width, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.blocks)])
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)

    def __call__(self, tokens: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        """Scores every next token.

        Args:
          tokens: int `[batch, length]`, which follow those in the cache.
          cache: what came before; must have room for `length` more. None: nothing came before.

        Returns:
          Logits `[batch, length, vocab_size]`, and the cache with these tokens in it.
        """
        if cache is None:
            cache = Cache.empty(self.config, *tokens.shape)
        x = self.embed(tokens)
        keys, values = list(cache.keys), list(cache.values)
        for i, block in enumerate(self.layers):
            x, keys[i], values[i] = block(x, keys[i], values[i], cache.length)
        logits = self.embed.attend(self.norm(x))
        return logits, Cache(tuple(keys), tuple(values), cache.length + tokens.shape[1])
