"""N:M sparsity: which weights of every group of M to keep.

A mask is True where a value is kept: the N largest magnitudes of every M, the lower index first on a tie.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityRule:
    """What to prune. Nothing, by default.

    Attributes:
      weight_sparsity_n, weight_sparsity_m: keep n of every m weights; m = 0 keeps all.
      weight_sparsity_order: 'R' groups along the last axis, 'C' along the one before it.
      weight_sparsity_block_size: above 1, blocks of that many neighbours are kept or pruned as one.
      weight_sparsity_offset: above 0, members of a group lie that far apart.
      weight_sparsity_start_step, weight_sparsity_update_step, eval_mode, activation_sparsity_*: for training.
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
