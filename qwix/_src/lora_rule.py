"""The rule of adapters: a `QuantizationRule` that gives the weights it matches a low-rank change to train."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from qwix._src import qconfig

Initializer = Callable[..., jax.Array]


def he_uniform(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """`jax.nn.initializers.he_uniform()`, as a function that can be pickled."""
    return jax.nn.initializers.he_uniform()(key, shape, dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraRule(qconfig.QuantizationRule):
    """Which weights get an adapter, and what it's like. The fields of `QuantizationRule` say how the weights
    themselves are stored: with a `weight_qtype` this is QLoRA.

    Attributes:
      rank: of the change A B; of a grouped convolution, in each group.
      alpha: the change is multiplied by alpha / rank (see `use_rslora`).
      dropout: the part of the activations that the adapter doesn't see in training, from 0 up to 1.
      use_rslora: multiply by alpha / sqrt(rank) (arXiv:2312.03732), which keeps large ranks learning.
      use_dora: train magnitudes of the features, too (arXiv:2402.09353).
      lora_a_initializer: (key, shape, dtype) -> A; `shape` is that of one layer's A.
      lora_b_initializer: the same for B; zeros begin with the weights as they are.

    Raises:
      ValueError, TypeError: at construction, for anything that could never work.

    >>> LoraRule(weight_qtype="nf4", tile_size=64, rank=16, alpha=8.0).scaling
    0.5
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_a_initializer: Initializer = he_uniform
    lora_b_initializer: Initializer = jax.nn.initializers.zeros

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.rank, bool) or not isinstance(self.rank, int):
            raise TypeError(f"rank is a count, got {self.rank!r}.")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}.")
        for field in ("alpha", "dropout"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{field} is a number, got {value!r}.")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout is a part of the activations, from 0 up to but not 1; got {self.dropout}."
            )
        for field in ("lora_a_initializer", "lora_b_initializer"):
            if not callable(getattr(self, field)):
                raise TypeError(
                    f"{field} is a function of (key, shape, dtype) such as jax.nn.initializers.he_uniform(), "
                    f"got {getattr(self, field)!r}."
                )

    @property
    def scaling(self) -> float:
        """What A B is multiplied by."""
        return float(self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank))
