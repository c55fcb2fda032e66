"""MobileNetV2 (https://arxiv.org/abs/1801.04381) in Flax NNX, images last-channel, without batch norms.

At inference a batch norm is a scale and an offset for each channel; they are in the weights and biases here
(see load.py), so the network is convolutions, clipped ReLUs and additions. Padding is torchvision's: one
pixel on each side, also where the stride is 2. Nothing here knows about quantization.
"""

import dataclasses

import jax
from flax import nnx

# Of each stage: expansion, output channels, blocks, stride of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network; the defaults are those of ImageNet's, width 1.0."""

    stem: int = 32
    stages: tuple[tuple[int, int, int, int], ...] = STAGES
    head: int = 1280
    classes: int = 1000


def conv3x3(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (3, 3), strides=stride, padding=1, feature_group_count=groups, rngs=rngs)


class Block(nnx.Module):
    """An inverted residual: to more channels, each convolved by itself, and back to few.

    `expand` is None where the expansion is 1.
    """

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int, rngs: nnx.Rngs):
        hidden = inputs * expansion
        self.expand = nnx.Conv(inputs, hidden, (1, 1), rngs=rngs) if expansion > 1 else None
        self.depthwise = conv3x3(hidden, hidden, stride=stride, groups=hidden, rngs=rngs)
        self.project = nnx.Conv(hidden, outputs, (1, 1), rngs=rngs)
        self.is_residual = stride == 1 and inputs == outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.expand is None else nnx.relu6(self.expand(x))
        y = self.project(nnx.relu6(self.depthwise(y)))
        return x + y if self.is_residual else y


class MobileNetV2(nnx.Module):
    """The classifier.

    Example:
      >>> config = Config(stem=8, stages=((1, 8, 1, 1), (6, 8, 2, 2)), head=16, classes=10)
      >>> images = jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")
      >>> jax.eval_shape(lambda x: MobileNetV2(config, rngs=nnx.Rngs(0))(x), images).shape
      (2, 10)
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.stem = conv3x3(3, config.stem, stride=2, rngs=rngs)
        self.blocks = nnx.List([])
        channels = config.stem
        for expansion, outputs, blocks, stride in config.stages:
            for i in range(blocks):
                step = stride if i == 0 else 1
                self.blocks.append(Block(channels, outputs, expansion=expansion, stride=step, rngs=rngs))
                channels = outputs
        self.head = nnx.Conv(channels, config.head, (1, 1), rngs=rngs)
        self.classifier = nnx.Linear(config.head, config.classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Scores every class.

        Args:
          images: `[batch, height, width, 3]`, each channel with mean 0 and variance 1 over ImageNet.

        Returns:
          Logits `[batch, classes]`.
        """
        x = nnx.relu6(self.stem(images))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu6(self.head(x))
        return self.classifier(x.mean(axis=(1, 2)))
