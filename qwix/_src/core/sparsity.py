"""N:M sparsity: which weights of every group of M to keep.

A mask is True where a value is kept: the N largest magnitudes of every M, the lower index first on a tie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

SparsityState = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityRule:
    """What to prune. Nothing, by default.

    Attributes:
      weight_sparsity_n, weight_sparsity_m: keep n of every m weights; m = 0 keeps all.
      weight_sparsity_order: 'R' groups along the last axis, 'C' along the one before it.
      weight_sparsity_block_size: above 1, blocks of that many neighbours are kept or pruned as one.
      weight_sparsity_offset: above 0, members of a group lie that far apart.
      weight_sparsity_start_step: the training step from which weights are pruned (see `update_state`).
      weight_sparsity_update_step: every how many steps what is kept is decided anew.
      eval_mode: use the mask that training left, and leave it.
      activation_sparsity_*: the same pattern for activations, decided for every input.
    """

    weight_sparsity_n: int = 0
    weight_sparsity_m: int = 0
    weight_sparsity_order: str = "R"
    weight_sparsity_block_size: int = 0
    weight_sparsity_offset: int = 0
    weight_sparsity_start_step: int = 0
    weight_sparsity_update_step: int = 1
    eval_mode: bool = False
    activation_sparsity_n: int = 0
    activation_sparsity_m: int = 0
    activation_sparsity_order: str = "R"
    activation_sparsity_block_size: int = 0
    activation_sparsity_offset: int = 0


def init_state(shape: tuple[int, ...]) -> SparsityState:
    """The state of one weight's pruning before the first step: everything is kept."""
    return {"step": jnp.zeros((), jnp.int32), "mask": jnp.ones(shape, bool)}


def update_state(state: Mapping[str, jax.Array], weight: jax.Array, rule: SparsityRule) -> SparsityState:
    """The state for this training step; prune with its mask: `jnp.where(state["mask"], weight, 0)`.

    The mask is found from the weight at the rule's start step and every update step after it, and kept in
    between, so that weights settle. Before that everything is kept.

    >>> rule = SparsityRule(weight_sparsity_n=1, weight_sparsity_m=2, weight_sparsity_start_step=1)
    >>> state = update_state(init_state((2,)), jnp.array([1.0, 2.0]), rule)
    >>> state["mask"].tolist(), update_state(state, jnp.array([1.0, 2.0]), rule)["mask"].tolist()
    ([True, True], [False, True])
    """
    if rule.weight_sparsity_update_step < 1 or rule.weight_sparsity_start_step < 0:
        raise ValueError(f"The start step must not be negative, the update step 1 at least: {rule}.")
    if rule.eval_mode or not rule.weight_sparsity_m:
        return dict(state)
    since = state["step"] - rule.weight_sparsity_start_step
    due = (since >= 0) & (since % rule.weight_sparsity_update_step == 0)
    mask = jax.lax.cond(due, lambda: get_rule_mask(weight, rule), lambda: state["mask"])
    return {"step": state["step"] + 1, "mask": mask}


def get_rule_mask(
    array: jax.Array, rule: SparsityRule, of: Literal["weight", "activation"] = "weight"
) -> jax.Array:
    """True for what the rule's pattern for weights, or for activations, keeps."""
    fields = ("n", "m", "order", "block_size", "offset")
    return get_sparsity_mask(array, *(getattr(rule, f"{of}_sparsity_{field}") for field in fields))


def get_sparsity_mask(
    inputs: jax.Array,
    n_sparsity: int = 0,
    m_sparsity: int = 0,
    order: str = "R",
    block_size: int = 0,
    offset: int = 0,
) -> jax.Array:
    """True for the n values of largest magnitude in every m; all True when m is 0.

    The flattened array is grouped where the axis isn't divisible by m (times the offset).

    Raises:
      ValueError: n > m, an order other than 'R' and 'C', a negative offset, a size not divisible by m (or m
      * offset),
        'C' on an array of rank below 2.

    >>> get_sparsity_mask(jnp.array([1.0, -3.0, 2.0, 0.0]), 2, 4)
    Array([False,  True,  True, False], dtype=bool)
    """
    if m_sparsity == 0 and n_sparsity == 0:
        return jnp.ones(inputs.shape, bool)
    _check(inputs, n_sparsity, m_sparsity, order, offset)
    scores = jnp.abs(inputs)
    if order == "C":
        scores = scores.swapaxes(-1, -2)
    shape = scores.shape
    if block_size > 1:
        if shape[-1] % block_size:
            raise ValueError(f"Blocks of {block_size} don't divide {shape[-1]} values of {inputs.shape}.")
        scores = scores.reshape(*shape[:-1], shape[-1] // block_size, block_size).sum(-1)
    if scores.size % (m_sparsity * max(offset, 1)):
        raise ValueError(
            f"{scores.size} groups or values must be divisible by m={m_sparsity} (times {offset=}). "
            f"Inputs: {inputs.shape}."
        )
    mask = _largest(scores, n_sparsity, m_sparsity, max(offset, 1))
    if block_size > 1:
        mask = jnp.repeat(mask, block_size, axis=-1)
    return mask.swapaxes(-1, -2) if order == "C" else mask


def _check(inputs: jax.Array, n: int, m: int, order: str, offset: int) -> None:
    if not 0 <= n <= m:
        raise ValueError(f"Keep at most m of every m values: n={n}, m={m}.")
    if order not in ("C", "R"):
        raise ValueError(f"Index order {order!r} not supported: 'R' (last axis) or 'C' (the one before).")
    if offset < 0:
        raise ValueError(f"Offset must not be negative: {offset=}.")
    if order == "C" and inputs.ndim < 2:
        raise ValueError(f"Order 'C' needs two axes at least, but got shape {inputs.shape}. Use 'R'.")
    if inputs.size % m or (offset and inputs.size % (m * offset)):
        raise ValueError(f"Size of {inputs.shape} must be divisible by m={m} (times {offset=}).")


def _largest(scores: jax.Array, n: int, m: int, offset: int) -> jax.Array:
    """Groups neighbours `offset` apart and marks the n largest of each group."""
    groups = scores.reshape(-1, m, offset).swapaxes(-1, -2)
    rank = jnp.argsort(jnp.argsort(groups, axis=-1, descending=True, stable=True), axis=-1, stable=True)
    return (rank < n).swapaxes(-1, -2).reshape(scores.shape)
