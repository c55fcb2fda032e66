"""`x[idx]` for an array together with its scales: one index per child, derived from the values' shape.

An axis along which a child has one entry per value takes the same index; one with a single entry is left
alone; one with runs takes whole runs. What would cut a run in two is refused, with the bounds that
wouldn't.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def child_index(idx: Any, shape: Sequence[int]) -> Callable[[Sequence[int]], tuple[Any, ...]]:
    """Returns a function from a child's shape to the index that belongs to it.

    Raises:
      IndexError: too many indices, or an integer that is out of range.
      ValueError: an index that cuts a run of values with one scale.

    >>> child_index(slice(32, 96), (128, 8))((4, 8))
    (slice(1, 3, 1), slice(None, None, None))
    """
    idx = _expand(idx, len(shape))
    arrays = [i for i in idx if _is_array(i) and i.ndim]

    def index(child: Sequence[int]) -> tuple[Any, ...]:
        result: list[Any] = []
        axis = 0
        for i in idx:
            if i is None:
                result.append(None)
                continue
            result.append(_one(i, axis, shape[axis], child[axis], only_array=len(arrays) == 1))
            axis += 1
        return tuple(result)

    index(shape)  # an index that is wrong for the values is reported once, here
    return index


def _is_array(i: Any) -> bool:
    return isinstance(i, jax.Array | np.ndarray)


def _expand(idx: Any, ndim: int) -> tuple[Any, ...]:
    """A tuple with one entry per axis (and None for new ones): no Ellipsis, no masks, no lists."""
    items = list(idx) if isinstance(idx, tuple) else [idx]
    items = [_as_integers(i) for i in items]
    dots = [n for n, i in enumerate(items) if i is Ellipsis]
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    if used > ndim or len(dots) > 1:
        raise IndexError(f"Cannot index an array of rank {ndim} by {used} indices and {len(dots)} ellipses.")
    at = dots[0] if dots else len(items)
    return (*items[:at], *[slice(None)] * (ndim - used), *items[at + 1 :])


def _as_integers(i: Any) -> Any:
    if isinstance(i, list):
        i = np.asarray(i)
    if isinstance(i, bool | np.bool_) or (_is_array(i) and i.dtype == bool):
        if isinstance(i, jax.core.Tracer) or np.ndim(i) != 1:
            raise ValueError("Unsupported indexing: a mask must be concrete and of rank 1.")
        return np.flatnonzero(np.asarray(i))
    if i is None or i is Ellipsis or isinstance(i, slice) or _is_array(i):
        return i
    return operator.index(i)


def _one(i: Any, axis: int, size: int, entries: int, *, only_array: bool) -> Any:
    """The index into an axis with `entries` entries for `size` values."""
    if isinstance(i, int):
        if not -size <= i < size:
            raise IndexError(f"Index {i} is out of range for axis {axis} of size {size}.")
        return i % size * entries // size
    if entries == size:
        return i
    if _is_array(i):
        if entries == 1:
            return slice(None) if only_array and i.ndim == 1 else i * 0
        return jnp.where(i < 0, i + size, i) // (size // entries)
    if not isinstance(i, slice):
        raise ValueError(f"Unsupported indexing of axis {axis} by {type(i).__name__}.")
    return slice(None) if entries == 1 else _aligned(i, axis, size, size // entries)


def _aligned(i: slice, axis: int, size: int, tile: int) -> slice:
    start, stop, step = i.indices(size)
    if (start, stop, step) == (0, size, 1):
        return slice(None)
    inside = start // tile == (stop - 1) // tile
    if step == 1 and (inside or (start % tile == 0 and stop % tile == 0)) and start < stop:
        return slice(start // tile, -(-stop // tile), 1)
    low, high = start // tile * tile, -(-stop // tile) * tile
    raise ValueError(
        f"Unsupported indexing: {start}:{stop}:{step} on axis {axis} of size {size} cuts tiles of {tile}. "
        f"Aligned bounds are multiples of {tile} with step 1, such as {low}:{high}; or dequantize first."
    )
