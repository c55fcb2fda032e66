"""Blocks that a TPU can take, or takes badly: other shapes of the same data, and the way back inside the
kernel.

A TPU moves blocks whose last two dimensions are multiples of (8, 128) or whole; anything narrower is padded
to that in VMEM. The scales of a QArray are often neither: one column of a (M, 1) scale fills 1/128 of each
tile. Three rewrites help, done to the array outside the kernel and undone to the loaded block inside it; the
first legal one is taken:

1. transpose the axes into ascending block sizes;
2. lay each block out as one row, (*number of blocks, 1, block elements), where it fits into one row of lanes:
   the compiler cannot reshape longer ones back;
3. transpose, and give the axes that are still illegal a separate axis that counts blocks.

All copy the array on every call, which is cheap for scales. Values are rewritten only when their block is
illegal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwix._src.core import layout

_SUBLANES, _LANES = 8, 128
Restore = Callable[[Any], Any]  # what the kernel was given -> what it would have been given


def transform_block_specs_for_tpu(block_specs: Any, args: Any) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Rewrites every spec whose block a TPU cannot take or would pad.

    Args:
      block_specs: pytree of `pl.BlockSpec`.
      args: pytree of arrays of the same structure.

    Returns:
      (specs, args, restore): `restore` is for the kernel's refs, a pytree of the same structure. Those of
      rewritten arrays come back loaded, as arrays of the original block; the others as they are.

    >>> spec = pl.BlockSpec((128, 1), lambda i, j: (i, j))
    >>> spec, arg, _ = transform_block_specs_for_tpu(spec, jnp.ones((256, 1)))
    >>> spec.block_shape, arg.shape
    ((1, 128), (1, 256))
    """
    specs, treedef = jax.tree.flatten(block_specs)
    done = [rewrite(spec, arg) for spec, arg in zip(specs, treedef.flatten_up_to(args), strict=True)]
    new_specs, new_args, restores = zip(*done, strict=True) if done else ((), (), ())

    def restore(refs):
        leaves = treedef.flatten_up_to(refs)
        return treedef.unflatten(
            [ref if back is None else back(ref) for back, ref in zip(restores, leaves, strict=True)]
        )

    return treedef.unflatten(new_specs), treedef.unflatten(new_args), restore


def rewrite(
    spec: Any, arg: jax.Array, *, only_illegal: bool = False
) -> tuple[Any, jax.Array, Restore | None]:
    """(spec, array, way back) of one array; the way back is None for what stays as it is.

    Args:
      spec: its block spec.
      arg: the array, of any rank from 1.
      only_illegal: keep a legal block even where it is padded.
    """
    if not _is_rewritable(spec, arg):
        return spec, arg, None
    sizes = _sizes(spec.block_shape)
    fits = _can_fit_tpu_requirements(sizes, arg.shape)
    if fits and (only_illegal or list(sizes) == sorted(sizes) or _is_aligned(sizes)):
        return spec, arg, None
    order = sorted(range(arg.ndim), key=sizes.__getitem__)
    if _can_fit_tpu_requirements([sizes[i] for i in order], [arg.shape[i] for i in order]):
        return _transposed(spec, arg, order)
    if any(isinstance(dim, pl.Element) for dim in spec.block_shape):
        return spec, arg, None  # a block that starts anywhere belongs to no grid of blocks
    arg = _padded(arg, sizes)
    if arg.ndim == 1 or math.prod(sizes) <= _LANES:
        return _as_rows(spec, arg, sizes)
    return _counted(spec, arg, sizes, order)


def _is_rewritable(spec: Any, arg: jax.Array) -> bool:
    """Whether the spec cuts blocks for the vector memory; whole arrays always fit."""
    if (
        not isinstance(spec, pl.BlockSpec)
        or spec.block_shape is None
        or spec.index_map is None
        or arg.ndim == 0
    ):
        return False
    known = all(
        dim is None or isinstance(dim, int | pl.Blocked | pl.Squeezed | pl.Element)
        for dim in spec.block_shape
    )
    return known and spec.memory_space in (None, pltpu.VMEM)


def _sizes(block_shape: Sequence[Any]) -> tuple[int, ...]:
    return tuple(1 if _is_squeezed(dim) else getattr(dim, "block_size", dim) for dim in block_shape)


def _is_aligned(sizes: Sequence[int]) -> bool:
    """Whether nothing is padded."""
    return sizes[-1] % _LANES == 0 and (len(sizes) < 2 or sizes[-2] % _SUBLANES == 0)


def _can_fit_tpu_requirements(block_shape: Sequence[int | None], arg_shape: Sequence[int]) -> bool:
    """The rule of Pallas for TPU: the last two dimensions are multiples of (8, 128) or whole.

    A block of rank 1 is whole, or a multiple of 1024; powers of two from 512, which suits every dtype, do
    too.
    """
    sizes = [1 if size is None else size for size in block_shape]
    if len(sizes) == 1:
        power_of_two = sizes[0] >= 4 * _LANES and sizes[0] & (sizes[0] - 1) == 0
        return sizes[0] == arg_shape[0] or sizes[0] % (_SUBLANES * _LANES) == 0 or power_of_two
    lanes = sizes[-1] == arg_shape[-1] or sizes[-1] % _LANES == 0
    return lanes and (sizes[-2] == arg_shape[-2] or sizes[-2] % _SUBLANES == 0)


def _transposed(spec: Any, arg: jax.Array, order: Sequence[int]) -> tuple[Any, jax.Array, Restore]:
    index_map: Any = spec.index_map

    def moved(*grid_indices):
        indices = index_map(*grid_indices)
        return tuple(indices[i] for i in order)

    new = dataclasses.replace(spec, block_shape=tuple(spec.block_shape[i] for i in order), index_map=moved)
    # Squeezed dimensions never reach the kernel: the way back counts the others only.
    kept = [i for i in order if not _is_squeezed(spec.block_shape[i])]
    back = [kept.index(i) for i in sorted(kept)]
    return new, jnp.transpose(arg, order), lambda ref: layout.transpose_array(ref[...], back)


def _as_rows(spec: Any, arg: jax.Array, sizes: tuple[int, ...]) -> tuple[Any, jax.Array, Restore]:
    counts = tuple(n // size for n, size in zip(arg.shape, sizes, strict=True))
    split = arg.reshape([x for pair in zip(counts, sizes, strict=True) for x in pair])
    rows = split.transpose([*range(0, 2 * arg.ndim, 2), *range(1, 2 * arg.ndim, 2)])
    rows = rows.reshape(*counts, 1, math.prod(sizes))
    index_map: Any = spec.index_map
    outer = tuple(dim if _is_squeezed(dim) else 1 for dim in spec.block_shape)
    new = dataclasses.replace(
        spec,
        block_shape=(*outer, 1, math.prod(sizes)),
        index_map=lambda *grid_indices: (*index_map(*grid_indices), 0, 0),
    )
    shape = tuple(size for size, dim in zip(sizes, spec.block_shape, strict=True) if not _is_squeezed(dim))
    return new, rows, lambda ref: ref[...].reshape(shape)


def _counted(
    spec: Any, arg: jax.Array, sizes: tuple[int, ...], order: list[int]
) -> tuple[Any, jax.Array, Restore]:
    """Transposed by `order`; of the last two axes the illegal ones become (number of blocks, block)."""
    spec, arg, back = _transposed(spec, arg, order)
    sizes = tuple(sizes[i] for i in order)
    last = arg.ndim - 1
    legal = {last: sizes[last] % _LANES == 0, last - 1: sizes[last - 1] % _SUBLANES == 0}
    split = [i for i, fits in legal.items() if not fits and sizes[i] != arg.shape[i]]
    shape: list[int] = []
    for i, n in enumerate(arg.shape):
        shape += [n // sizes[i], sizes[i]] if i in split else [n]
    starts = [i + sum(j < i for j in split) for i in split]  # of the counting axes, after the reshape
    counted = jnp.moveaxis(arg.reshape(shape), starts, range(len(split)))
    index_map: Any = spec.index_map

    def moved(*grid_indices):
        indices = index_map(*grid_indices)
        return (
            *(indices[i] for i in split),
            *(0 if i in split else index for i, index in enumerate(indices)),
        )

    block_shape = (*(None for _ in split), *spec.block_shape)
    return dataclasses.replace(spec, block_shape=block_shape, index_map=moved), counted, back


def _padded(arg: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Filled up to whole blocks. The tail of a last block then holds zeros; in Pallas it may hold
    anything."""
    missing = [(0, -n % size) for n, size in zip(arg.shape, sizes, strict=True)]
    return jnp.pad(arg, missing) if any(after for _, after in missing) else arg


def _is_squeezed(dim: Any) -> bool:
    return dim is None or isinstance(dim, pl.Squeezed)
