"""Block specs for the parts of a QArray, derived from the one spec that its values have.

A scale covers runs of neighbours ("tiles") of its values, so along each axis the block of scales that belongs
to a block of values follows from three numbers: the values' size, the scale's size and the block's size. A
block may hold whole tiles, or lie inside one; a block that cuts a tile would need a part of a scale, and is
refused. Zero points have the scale's shape, hence its spec.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import pallas as pl

from qwix._src.core import qarray

_REFUSED = "Blocked (an int), Squeezed (None) and Element block dimensions follow a tiled axis"


def update_block_specs_for_qarray(block_specs: Any, args: Any, grid: Sequence[Any] | None = None) -> Any:
    """The specs, with the spec of a QArray replaced by a QArray of them: for values, scale and zero point.

    Args:
      block_specs: pytree of `pl.BlockSpec` (or `pl.no_block_spec`), one for each array or QArray of `args`.
      args: the arguments, or their `jax.ShapeDtypeStruct`s.
      grid: needed for `pl.Element` dimensions along a tiled axis, whose starts are checked for every grid
        point.

    Raises:
      ValueError: for a block that cuts a tile; the message names the sizes that do not.

    >>> qa = qarray.QArray(np.zeros((1024, 1024), np.int8), np.ones((32, 8), np.float32))
    >>> spec = update_block_specs_for_qarray(pl.BlockSpec((256, 256), lambda i, j: (i, j)), qa)
    >>> spec.scale.block_shape
    (8, 2)
    """
    return jax.tree.map(
        lambda spec, arg: _for_argument(spec, arg, grid), block_specs, args, is_leaf=lambda x: _is_spec(x)
    )


def _is_spec(x: Any) -> bool:
    return isinstance(x, pl.BlockSpec) or x is pl.no_block_spec


def _for_argument(spec: Any, arg: Any, grid: Sequence[Any] | None) -> Any:
    if not isinstance(arg, qarray.QArray):
        return spec
    if spec is pl.no_block_spec or spec.block_shape is None:
        scale = spec if spec is pl.no_block_spec else _plain(spec, None, None)
    else:
        scale = _for_scale(spec, tuple(arg.qvalue.shape), tuple(arg.scale.shape), grid)
    parts: dict[str, Any] = {"qvalue": spec, "scale": scale}
    if arg.zero_point is not None:
        parts["zero_point"] = scale
    return qarray.QArray(**parts, qtype=arg.qtype)


def _plain(spec: Any, block_shape: Any, index_map: Callable[..., Any] | None) -> pl.BlockSpec:
    """The spec with another block; without the GPU layout transforms, which are made for the values."""
    changes: dict[str, Any] = {"block_shape": block_shape, "index_map": index_map}
    if getattr(spec, "transforms", ()):
        changes["transforms"] = ()
    return dataclasses.replace(spec, **changes)


def _for_scale(
    spec: Any, shape: tuple[int, ...], scale_shape: tuple[int, ...], grid: Sequence[Any] | None
) -> pl.BlockSpec:
    if len(spec.block_shape) != len(shape):
        raise ValueError(
            f"The block shape {spec.block_shape} must have as many dimensions as the QArray's values, "
            f"{shape=}."
        )
    if len(scale_shape) != len(shape) or any(
        s == 0 or v % s for v, s in zip(shape, scale_shape, strict=True)
    ):
        raise ValueError(f"A scale of shape {scale_shape} does not tile values of {shape=}.")
    _check_element_starts(spec, shape, scale_shape, grid)
    axes = [
        _axis(axis, *sizes)
        for axis, sizes in enumerate(zip(spec.block_shape, shape, scale_shape, strict=True))
    ]
    block_shape = tuple(dim for dim, _ in axes)
    if spec.index_map is None:
        return _plain(spec, block_shape, None)
    values_map, maps = spec.index_map, [index for _, index in axes]

    def index_map(*grid_indices):
        indices = values_map(*grid_indices)
        indices = tuple(indices) if isinstance(indices, tuple | list) else (indices,)
        return tuple(index(i) for index, i in zip(maps, indices, strict=True))

    return _plain(spec, block_shape, index_map)


def _axis(axis: int, dim: Any, size: int, scale_size: int) -> tuple[Any, Callable[[Any], Any]]:
    """(block dimension, index of the values' block -> index of the scale's block) along one axis."""
    if scale_size == size and scale_size != 1:
        return dim, lambda i: i
    if scale_size == 1:
        return _single(dim), lambda i: 0
    tile = size // scale_size
    if isinstance(dim, pl.Squeezed) or dim is None:
        return dim, lambda i: i // tile
    if isinstance(dim, pl.Element):
        if dim.block_size % tile or any(p % tile for p in dim.padding):
            raise ValueError(_cuts_message(axis, dim, size, tile, divisors=False))
        before, after = dim.padding
        return pl.Element(dim.block_size // tile, (before // tile, after // tile)), lambda i: i // tile
    if isinstance(dim, pl.Blocked | int | np.integer):
        block = dim.block_size if isinstance(dim, pl.Blocked) else int(dim)
        if block % tile == 0:
            return _like(dim, block // tile), lambda i: i
        if tile % block == 0:
            return _like(dim, 1), lambda i: i // (tile // block)
        raise ValueError(_cuts_message(axis, dim, size, tile, divisors=True))
    raise ValueError(f"Axis {axis} of the block is {dim}, but only {_REFUSED}, here in tiles of {tile}.")


def _like(dim: Any, size: int) -> Any:
    return pl.Blocked(size) if isinstance(dim, pl.Blocked) else size


def _single(dim: Any) -> Any:
    """A dimension of the same kind around the only scale there is, so that kinds need not mix in a block."""
    if isinstance(dim, pl.Squeezed) or dim is None:
        return dim
    return pl.Element(1) if isinstance(dim, pl.Element) else _like(dim, 1)


def _cuts_message(axis: int, dim: Any, size: int, tile: int, *, divisors: bool) -> str:
    multiples = ", ".join(str(tile * i) for i in range(1, min(4, size // tile) + 1))
    sizes = f"multiples of {tile} ({multiples}, ...)"
    if divisors:
        sizes += f" and its divisors ({', '.join(str(i) for i in range(1, tile) if tile % i == 0)})"
    return (
        f"A block of {dim} along axis {axis} cuts tiles of {tile} values that share a scale (axis size "
        f"{size}). "
        f"Workable sizes are {sizes}."
    )


def _check_element_starts(
    spec: Any, shape: tuple[int, ...], scale_shape: tuple[int, ...], grid: Sequence[Any] | None
) -> None:
    """`pl.Element` blocks start anywhere; along a tiled axis they must start where a tile does."""
    tiles = [v // s if 1 < s < v else 1 for v, s in zip(shape, scale_shape, strict=True)]
    axes = [i for i, dim in enumerate(spec.block_shape) if isinstance(dim, pl.Element) and tiles[i] > 1]
    if not axes or spec.index_map is None:
        return
    if grid is None or not all(isinstance(size, int) for size in grid):
        raise ValueError(
            f"pl.Element along the tiled axes {axes} needs a static grid without scalar prefetch, so that "
            "the "
            f"starts can be checked; got {grid=}. Use blocks counted in block sizes (plain ints) there."
        )
    starts = spec.index_map(*np.indices(tuple(grid)).reshape(len(grid), -1))
    for axis in axes:
        if np.any(np.asarray(starts[axis]) % tiles[axis]):
            raise ValueError(
                f"pl.Element blocks along axis {axis} must start at multiples of the tile, {tiles[axis]}; "
                "this "
                "index_map also gives other starts."
            )
