"""What ops keep from one training step to the next: statistics of static scales, masks of sparsity.

A state is a dict of arrays, found by (module path, name). In scans over layers the module's states are
stacked along the first axes, as its params are, and an op sees its layer's row. Ops don't write: they emit
new rows (see op_trace), and whoever made the call stores them when it is over, outside of all
transformations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

State = dict[str, jax.Array]
Key = tuple[str, str]  # module path, name


class OpStates:
    """The states of one call.

    Args:
      read: (module path, name) -> what is stored, stacked; or None.
      changes: module path -> whether states of its ops are to change now.
      creates: whether states that aren't there can be made.
    """

    def __init__(
        self,
        read: Callable[[str, str], Mapping[str, jax.Array] | None],
        changes: Callable[[str], bool],
        *,
        creates: bool,
    ):
        self.read, self.changes, self.creates = read, changes, creates

    def step(
        self,
        key: Key,
        layer: Sequence[Any],
        init: Callable[[], State],
        update: Callable[[State], State],
        emitted: dict[Any, Any],
    ) -> tuple[State, bool]:
        """One op's state for this step, updated if states change now, and whether it was stored before.

        What is to be stored is added to `emitted`.
        """
        stored = self.read(*key)
        row = init() if stored is None else {k: _row(v, layer) for k, v in stored.items()}
        changes = self.changes(key[0]) and (stored is not None or self.creates)
        new = update(row) if changes else row
        if changes or (stored is None and self.creates):
            emitted[key] = new
        return new, stored is not None


def _row(array: jax.Array, layer: Sequence[Any]) -> jax.Array:
    for index in layer:
        array = jax.lax.dynamic_index_in_dim(array, index, keepdims=False)
    return array
