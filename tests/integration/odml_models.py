"""Models as people write them, small, for test_odml_models.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from examples.smollm2.model import Block, Config

# A block of SmolLM2 with heads that share keys, as the real one has, at a ninth of its width.
SMOLLM2 = Config(vocab_size=64, width=96, hidden=256, blocks=1, heads=3, kv_heads=1, head_size=32)


class ConvNormSilu(nn.Module):
    """Convolution, group norm and SiLU: the layer that diffusion models repeat."""

    features: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (3, 3))(x)
        x = nn.silu(nn.GroupNorm(num_groups=2)(x))
        return nn.Conv(4, (1, 1))(x)


class UNet(nn.Module):
    """Down and up again, with a skip connection over the middle."""

    @nn.compact
    def __call__(self, image):
        block = lambda x, n: nn.silu(nn.GroupNorm(num_groups=2)(nn.Conv(n, (3, 3))(x)))
        skip = block(image, 8)
        x = nn.max_pool(skip, (2, 2), (2, 2))
        x = block(x, 16) + nn.Conv(16, (1, 1))(x)
        batch, height, width, features = x.shape
        x = jax.image.resize(x, (batch, 2 * height, 2 * width, features), "nearest")
        x = block(jnp.concatenate([x, skip], axis=-1), 8)
        return nn.Conv(3, (1, 1))(x)


class EncoderLayer(nn.Module):
    """Attention and a feed-forward network, each behind a layer norm."""

    heads: int = 2

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(nn.LayerNorm()(x))
        y = nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y))


class Encoder(nn.Module):
    """Tokens to one vector: embeddings, two layers, the mean over positions."""

    @nn.compact
    def __call__(self, tokens):
        positions = self.param("positions", nn.initializers.normal(0.5), (tokens.shape[1], 16))
        x = nn.Embed(32, 16)(tokens) + positions
        for _ in range(2):
            x = EncoderLayer()(x)
        return nn.Dense(4)(nn.LayerNorm()(x).mean(axis=1))


class ScannedLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(x.shape[-1])(x)), None


class Scanned(nn.Module):
    """Layers as one scan over stacked weights."""

    layers: int = 3

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            ScannedLayer, variable_axes={"params": 0, "quant_stats": 0}, split_rngs={"params": True}
        )
        x, _ = stack()(x, jnp.zeros(self.layers))
        return nn.Dense(4)(x)


class Coder(nnx.Module):
    """Two methods: one file can offer both."""

    def __init__(self, rngs: nnx.Rngs):
        self.down = nnx.Linear(16, 4, rngs=rngs)
        self.up = nnx.Linear(4, 16, rngs=rngs)

    def encode(self, image):
        return {"code": nnx.relu(self.down(image))}

    def decode(self, code):
        return jnp.tanh(self.up(code))

    def __call__(self, image):
        return self.decode(self.encode(image)["code"])


class SmolLM2Block(nnx.Module):
    """A block of SmolLM2 on a whole text: its cache starts empty."""

    def __init__(self, rngs: nnx.Rngs, config: Config = SMOLLM2):
        self.config = config
        self.block = Block(config, rngs=rngs)

    def __call__(self, x):
        empty = jnp.zeros((*x.shape[:2], self.config.kv_heads, self.config.head_size), jnp.float32)
        return self.block(x, empty, empty, jnp.zeros((), jnp.int32))[0]
