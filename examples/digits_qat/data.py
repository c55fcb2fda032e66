"""scikit-learn's digits: 1797 labelled images of 8 x 8 pixels, shipped with the package."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_IMAGES = 600


@functools.partial(jax.tree_util.register_dataclass, data_fields=["pixels", "labels"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Images:
    """`pixels` float32 [count, 8, 8, 1] in [0, 1]; `labels` int32 [count]."""

    pixels: jax.Array
    labels: jax.Array

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, epochs: int, seed: int) -> Iterator["Images"]:
        """Shuffled batches of one size; what does not fill one is left for the next epoch."""
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            order = rng.permutation(len(self))
            for start in range(0, len(self) - size + 1, size):
                at = order[start : start + size]
                yield Images(self.pixels[at], self.labels[at])


def load() -> tuple[Images, Images]:
    """(train, test): 1197 and 600 images, every digit in the same share of both.

    Example:
      >>> train, test = load()
      >>> len(train), len(test), train.pixels.shape[1:]
      (1197, 600, (8, 8, 1))
    """
    digits: Any = load_digits()
    pixels = (digits.images / 16).astype(np.float32)[..., None]
    labels = digits.target.astype(np.int32)
    split = train_test_split(pixels, labels, test_size=TEST_IMAGES, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = map(jnp.asarray, split)
    return Images(train_x, train_y), Images(test_x, test_y)
