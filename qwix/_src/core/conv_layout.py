"""Layouts of convolutions: from any `dimension_numbers` to the one form of qwix_kernels.conv, and back.

The form is lhs [N, *spatial, C], rhs [*kernel, C / groups, O], result [N, *out, O], without batch groups: a
convolution with batch groups is one with as many feature groups, of an lhs whose runs of images stand side by
side along its features. XLA folds the transposes into its convolutions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix._src.core import layout
from qwix._src.core.quantized_array import QArray

Pads = tuple[tuple[int, int], ...]
PADDINGS = ("SAME", "SAME_LOWER", "VALID")


def explicit_padding(
    padding: str | Sequence[tuple[int, int]],
    lhs: Sequence[int],
    rhs: Sequence[int],
    strides: Sequence[int],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
) -> Pads:
    """(low, high) along each spatial axis, given the spatial shapes of both sides.

    >>> explicit_padding("SAME", (8,), (3,), (2,), (1,), (1,))
    ((0, 1),)
    """
    if not isinstance(padding, str):
        return tuple((int(low), int(high)) for low, high in padding)
    if padding.upper() not in PADDINGS:
        raise ValueError(f"padding is {', '.join(PADDINGS)}, or (low, high) for each axis; got {padding!r}.")
    if tuple(lhs_dilation) != (1,) * len(lhs_dilation):
        raise ValueError(f"{padding=} with {lhs_dilation=}: give the pads of each axis, as (low, high).")
    kernel = [dilated(size, by) for size, by in zip(rhs, rhs_dilation, strict=True)]
    pads = jax.lax.padtype_to_pads(lhs, kernel, strides, padding)
    return tuple((int(low), int(high)) for low, high in pads)


def dilated(size: int, by: int) -> int:
    """Length of `size` elements with `by` - 1 holes between neighbours."""
    return 0 if size == 0 else (size - 1) * by + 1


def canonical_lhs(x: Any, spec: Sequence[int], batch_groups: int) -> Any:
    """An array or a QArray [N, *spatial, C], batch groups moved into C."""
    image, feature, *spatial = spec
    return transpose(regroup(x, image, feature, batch_groups), (image, *spatial, feature))


def canonical_rhs(x: Any, spec: Sequence[int]) -> Any:
    """An array or a QArray [*kernel, C / groups, O]."""
    output, inputs, *spatial = spec
    return transpose(x, (*spatial, inputs, output))


def from_canonical(out: jax.Array, spec: Sequence[int]) -> jax.Array:
    """[N, *out, O] as the result's spec has it."""
    order = (spec[0], *spec[2:], spec[1])
    return transpose(out, [order.index(axis) for axis in range(out.ndim)])


def transpose(x: Any, order: Sequence[int]) -> Any:
    """Transposes an array, or every child of a QArray."""
    if tuple(order) == tuple(range(len(order))):
        return x
    return jax.tree.map(lambda v: jnp.transpose(v, order), x)


def regroup(x: Any, source: int, target: int, groups: int) -> Any:
    """Moves the `groups` runs of one axis to the front of another: (groups * n, m) -> (n, groups * m)."""
    if groups == 1:
        return x
    if isinstance(x, QArray):
        shape = list(x.scale.shape)
        if shape[source] != 1 or shape[target] != 1:
            runs = shape[source]
            shape[source] = groups if runs == 1 else runs if runs % groups == 0 else x.shape[source]
            spread: Any = lambda v: None if v is None else layout.broadcast_array(v, shape)
            x = dataclasses.replace(x, scale=spread(x.scale), zero_point=spread(x.zero_point))
        one = lambda v: v.shape[source] == v.shape[target] == 1
        return jax.tree.map(lambda v: v if one(v) else regroup(v, source, target, groups), x)
    n = x.shape[source] // groups
    split = x.reshape(*x.shape[:source], groups, n, *x.shape[source + 1 :])
    # Without the axis of groups, `target` stands where it did; put the groups just before it.
    moved = jnp.moveaxis(split, source, target)
    merged = [*x.shape]
    merged[source], merged[target] = n, groups * x.shape[target]
    return moved.reshape(merged)
