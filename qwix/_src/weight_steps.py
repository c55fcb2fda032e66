"""The moves between a stored weight and the op that eats it, said of plain arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jax import lax


@dataclasses.dataclass(frozen=True)
class Step:
    """One move of a weight, from an array of shape `old` to one of shape `new`.

    kind 'transpose' (args: the permutation), 'reshape', 'index' (args: the axis that is gone), or 'slice'
    (args: the starts).
    """

    kind: str
    old: tuple[int, ...]
    new: tuple[int, ...]
    args: tuple[int, ...] = ()


def of_layer(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps without those of the scans over layers, with which they begin."""
    count = 0
    while count < len(steps) and steps[count].kind == "index":
        count += 1
    return tuple(steps[count:])


def layer_shape(steps: Sequence[Step], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one layer's weight, given that of the weight after the steps."""
    inner = of_layer(steps)
    return tuple(inner[0].old if inner else shape)


def apply(steps: Sequence[Step], x: jax.Array) -> jax.Array:
    """x after the steps, none of which is an index.

    >>> import jax.numpy as jnp
    >>> apply((Step("transpose", (2, 3), (3, 2), (1, 0)),), jnp.ones((2, 3))).shape
    (3, 2)
    """
    for step in steps:
        if step.kind == "transpose":
            x = x.transpose(step.args)
        elif step.kind == "reshape":
            x = x.reshape(step.new)
        else:
            x = lax.slice(x, step.args, [s + n for s, n in zip(step.args, step.new, strict=True)])
    return x


def undo(steps: Sequence[Step], x: jax.Array) -> jax.Array:
    """The array that `apply` makes x of. None of the steps is an index or a slice."""
    for step in reversed(steps):
        if step.kind == "transpose":
            x = x.transpose(sorted(range(x.ndim), key=lambda a, perm=step.args: perm[a]))
        else:
            x = x.reshape(step.old)
    return x


def axis_map(steps: Sequence[Step], ndim: int) -> tuple[int, ...] | None:
    """For each axis after the steps, which of the `ndim` axes before them it was; None if a reshape hides
    that. A sliced axis is still that axis.
    """
    axes = tuple(range(ndim))
    for step in steps:
        if step.kind == "transpose":
            axes = tuple(axes[p] for p in step.args)
        elif step.kind != "slice":
            return None
    return axes
