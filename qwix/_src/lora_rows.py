"""Several adapters of one base model, stacked along the rank: which of them each row of a batch uses.

Stacked, all adapters of a weight are one A and one B; x A is computed for all of them, and a mask of zeros
and ones leaves to each row that of its own adapter. The ranks of the adapters of one weight may differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix._src.adapter import AdapterSpec


@dataclasses.dataclass(frozen=True)
class Selected:
    """The choice of one call.

    Attributes:
      index: int32, a scalar for the whole batch or one per row of it; -1 is no adapter.
      names: of the adapters, in the order that `index` counts.
    """

    index: jax.Array
    names: tuple[str, ...]

    @classmethod
    def of(cls, adapter: Any, names: Sequence[str]) -> Selected:
        """The choice that a call gives: a name, a number, names or numbers per row; None is no adapter.

        Raises:
          ValueError: a name or a number that there isn't.
          TypeError: anything else.
        """
        names = tuple(names)
        if adapter is None or isinstance(adapter, str):
            adapter = _number(adapter, names)
        elif isinstance(adapter, list | tuple):
            adapter = [_number(a, names) if a is None or isinstance(a, str) else a for a in adapter]
        if not isinstance(adapter, jax.Array):
            adapter = np.asarray(adapter)
            if adapter.size and np.issubdtype(adapter.dtype, np.integer):
                low, high = int(adapter.min()), int(adapter.max())
                if low < -1 or high >= len(names):
                    raise ValueError(
                        f"adapter={low if low < -1 else high} is none of the {len(names)} adapters "
                        f"{list(names)}; -1 is no adapter."
                    )
        if not jnp.issubdtype(adapter.dtype, jnp.integer) or adapter.ndim > 1:
            raise TypeError(
                "adapter is a name, a number, or one of them per row of the batch; got "
                f"{adapter.dtype}{list(adapter.shape)}. The adapters are {list(names)}."
            )
        return cls(jnp.asarray(adapter, jnp.int32), names)

    def mask(self, spec: AdapterSpec, shape: Sequence[int], rows: int | None) -> jax.Array:
        """What x A is multiplied by: ones where the row's own adapter is.

        Args:
          spec: of the adapter.
          shape: of x A.
          rows: the axis of it that has the batch; None: it isn't there.

        Raises:
          ValueError: the batch isn't that of `index`.
        """
        owner = np.full(spec.rank, -2, np.int32)
        for name, (first, count) in spec.members:
            owner[first : first + count] = self.names.index(name)
        chosen = self.index
        ones = [1] * (len(shape) - 1)
        if chosen.ndim:
            if rows is None or shape[rows] % max(chosen.shape[0], 1):
                raise ValueError(
                    f"adapter has {chosen.shape[0]} entries, but an activation of shape {tuple(shape[:-1])} "
                    "has no such batch as its first axis. Give one adapter for all rows."
                )
            chosen = jnp.repeat(chosen, shape[rows] // chosen.shape[0])
            ones[rows] = shape[rows]
        return (chosen.reshape(*ones, 1) == owner).astype(jnp.float32)


def _number(name: str | None, names: Sequence[str]) -> int:
    if name is None:
        return -1
    if name not in names:
        raise ValueError(f"There is no adapter {name!r}; the model has {list(names)}.")
    return list(names).index(name)
