"""Exchanging the sides of a dot, so that a weight stands on the right, where kernels want it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Arranged:
    """A dot as core computes it."""

    operands: list[Any]
    options: dict[str, Any]
    back: tuple[int, ...] | None  # the transpose of its result, where the sides were exchanged

    def turned_back(self, out: jax.Array) -> jax.Array:
        return out if self.back is None else out.transpose(self.back)


def swapped(dnums: Any) -> Any:
    """The dimension numbers of the same dot with its sides exchanged."""
    (lc, rc), (lb, rb) = dnums
    return (tuple(rc), tuple(lc)), (tuple(rb), tuple(lb))


def swapped_precision(precision: Any) -> Any:
    """The precision of the same dot with its sides exchanged."""
    return precision[::-1] if isinstance(precision, tuple) else precision


def swap_back(dnums: Any, args: Sequence[Any]) -> tuple[int, ...]:
    """The transpose of the exchanged dot's result that puts the free axes of the left operand in front again.

    `dnums` and `args` are those of the dot before the exchange.
    """
    (left, right), (batch, _) = dnums
    free_left = args[0].ndim - len(left) - len(batch)
    free_right = args[1].ndim - len(right) - len(batch)
    start = len(batch)
    lefts = range(start + free_right, start + free_right + free_left)
    return (*range(start), *lefts, *range(start, start + free_right))


def result_dtype(args: Sequence[Any], params: Mapping[str, Any]) -> Any:
    """What the float op would return."""
    preferred = params["preferred_element_type"]
    return jnp.result_type(*(a.dtype for a in args[:2])) if preferred is None else preferred
