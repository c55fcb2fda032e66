"""Shapes of scales: how an array and its per-run scales move together.

One rule underlies all of it, "generic broadcast": along every axis the scale's size s divides the array's
size n, and entry i covers the i-th run of n / s neighbours. Per-tensor (s = 1), per-channel (s = n) and tiled
scales are one case. Nothing here knows what the arrays mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix._src.core import explicit_mesh


def canonical_axis(axis: int, ndim: int) -> int:
    """The axis counted from the front. Raises ValueError when there's no such axis.

    >>> canonical_axis(-1, 3)
    2
    """
    if not -ndim <= axis < ndim:
        raise ValueError(f"Axis {axis} is out of range for an array of rank {ndim}: use {-ndim}..{ndim - 1}.")
    return axis % ndim


def canonical_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    """All axes counted from the front."""
    return tuple(canonical_axis(a, ndim) for a in axes)


def canonical_tiles(tiled_axes: Mapping[int, int | float], shape: Sequence[int]) -> dict[int, int]:
    """{axis from the front: elements per tile}, fractions resolved.

    A float size is the fraction of the axis that one tile covers: 1/8 means 8 tiles, 1.0 one tile.

    Raises:
      ValueError: a tile doesn't divide its axis; the message lists the sizes that do.

    >>> canonical_tiles({-1: 1 / 8, 0: 2}, (4, 32))
    {1: 4, 0: 2}
    """
    tiles = {}
    for axis, size in tiled_axes.items():
        axis = canonical_axis(axis, len(shape))
        dim = shape[axis]
        tile = round(dim * size) if isinstance(size, float) else size
        if axis in tiles:
            raise ValueError(f"Axis {axis} is tiled twice in {dict(tiled_axes)}.")
        if tile <= 0 and dim == 0:
            tile = 1
        if tile <= 0 or dim % tile:
            fits = ", ".join(str(d) for d in range(1, dim + 1) if dim % d == 0)
            raise ValueError(
                f"{tuple(shape)} cannot be tiled as {dict(tiled_axes)}: a tile of {size} doesn't divide "
                f"axis {axis} of size {dim}. Tile sizes that do: {fits}."
            )
        tiles[axis] = tile
    return tiles


def split_axis(x: jax.Array, tiled_axes: Mapping[int, int | float]) -> jax.Array:
    """Reshapes each listed axis to (count, tile).

    >>> split_axis(jnp.zeros((4, 6)), {1: 3}).shape
    (4, 2, 3)
    """
    tiles = canonical_tiles(tiled_axes, x.shape)
    shape: list[int] = []
    for axis, dim in enumerate(x.shape):
        shape += [dim // tiles[axis], tiles[axis]] if axis in tiles else [dim]
    return x.reshape(shape)


def transpose_array(x: jax.Array, transpose: Sequence[int | None]) -> jax.Array:
    """Transpose that can also insert axes (None) and drop axes of size 1 (those not named).

    A pure reshape when the axes longer than 1 stay in order, so that it costs nothing where it need not.

    >>> transpose_array(jnp.zeros((4, 1, 3)), (2, None, 0)).shape
    (3, 1, 4)
    """
    used = [a for a in transpose if a is not None]
    if any(d != 1 for a, d in enumerate(x.shape) if a not in used):
        raise ValueError(f"Cannot transpose {x.shape} as {tuple(transpose)}.")
    moving = [a for a in used if x.shape[a] != 1]
    target = [1 if a is None else x.shape[a] for a in transpose]
    if moving != sorted(moving):
        squeezed = explicit_mesh.reshape(x, [x.shape[a] for a in sorted(moving)])
        x = squeezed.transpose([sorted(moving).index(a) for a in moving])
    return explicit_mesh.reshape(x, target)


def call_with_generic_broadcast(op: Callable[..., Any], x: jax.Array, y: jax.Array) -> jax.Array:
    """op(x, y) where along each axis either side may be the one that stands for runs of the other.

    >>> call_with_generic_broadcast(jnp.multiply, jnp.ones(4), jnp.array([2.0, 3.0]))
    Array([2., 2., 3., 3.], dtype=float32)
    """
    if x.ndim != y.ndim:
        raise ValueError(f"Cannot broadcast between {x.shape} and {y.shape}: ranks differ.")
    x_shape: list[int] = []
    y_shape: list[int] = []
    for a, b in zip(x.shape, y.shape, strict=True):
        if a == b or a == 1 or b == 1:
            x_shape.append(a)
            y_shape.append(b)
        elif b and a % b == 0:
            x_shape += [b, a // b]
            y_shape += [b, 1]
        elif a and b % a == 0:
            x_shape += [a, 1]
            y_shape += [a, b // a]
        else:
            raise ValueError(f"Cannot broadcast between {x.shape} and {y.shape}.")
    out_shape = [b if a == 1 else a if b == 1 else max(a, b) for a, b in zip(x.shape, y.shape, strict=True)]
    return op(x.reshape(x_shape), y.reshape(y_shape)).reshape(out_shape)


def broadcast_array(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """`x` generically broadcast to exactly `shape`; axes are added in front.

    >>> broadcast_array(jnp.array([2.0, 3.0]), (4,))
    Array([2., 2., 3., 3.], dtype=float32)
    """
    if x.shape == tuple(shape):
        return x
    sizes = (1,) * (len(shape) - x.ndim) + x.shape
    if len(sizes) != len(shape) or any(n % s if s else n for s, n in zip(sizes, shape, strict=True)):
        raise ValueError(f"Cannot broadcast {x.shape} to {tuple(shape)}.")
    split = [d for s, n in zip(sizes, shape, strict=True) for d in (s, n // s if s else 1)]
    ones = [d for s in sizes for d in (s, 1)]
    return jnp.broadcast_to(x.reshape(ones), split).reshape(shape)


def covers_runs(scale_shape: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether each entry covers neighbours of the flattened array, all of them equally many.

    So it is exactly when the scale's sizes are full, ..., full, some divisor, 1, ..., 1.

    >>> covers_runs((4, 2, 1), (4, 8, 3)), covers_runs((1, 2), (4, 8))
    (True, False)
    """
    whole = True
    for s, n in zip(scale_shape, shape, strict=True):
        if not whole and s != 1:
            return False
        whole = whole and s == n
    return True


def reshape_shape(scale_shape: Sequence[int], old: Sequence[int], new: Sequence[int]) -> tuple[int, ...]:
    """The shape that a scale takes when its array is reshaped from `old` to `new`.

    Axes are put into the smallest groups of equal product; within a group the entries must cover runs of the
    flattened group both before and after.

    >>> reshape_shape((2, 1, 3), (2, 2, 6), (4, 1, 3, 2))
    (2, 1, 3, 1)
    """
    error = ValueError(f"Cannot reshape {tuple(old)} into {tuple(new)} for {tuple(scale_shape)}.")
    old_axes = [a for a, d in enumerate(old) if d != 1]
    new_axes = [a for a, d in enumerate(new) if d != 1]
    result = [1] * len(new)
    while old_axes or new_axes:
        group, target = _next_group(old, old_axes, new, new_axes, error)
        sizes = [scale_shape[a] for a in group]
        if not covers_runs(sizes, [old[a] for a in group]):
            raise error
        count = math.prod(sizes)
        for a in target:
            if count and new[a] and count % new[a] == 0:
                result[a], count = new[a], count // new[a]
            elif count and new[a] % count == 0:
                result[a], count = count, 1
            elif new[a] == 0:
                result[a] = 0 if count == 0 else 1
            else:
                raise error
    return tuple(result)


def _next_group(
    old: Sequence[int], old_axes: list[int], new: Sequence[int], new_axes: list[int], error: ValueError
) -> tuple[list[int], list[int]]:
    """Takes the smallest leading groups of equal product off both lists."""
    if not old_axes or not new_axes:
        raise error
    group, target = [old_axes.pop(0)], [new_axes.pop(0)]
    while (p := math.prod(old[a] for a in group)) != (q := math.prod(new[a] for a in target)):
        taken, axes = (group, old_axes) if p < q else (target, new_axes)
        if not axes:
            raise error
        taken.append(axes.pop(0))
    return group, target
