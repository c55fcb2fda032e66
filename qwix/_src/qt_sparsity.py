"""N:M sparsity in training: when weights are pruned, and which.

With a curriculum (a start step, or masks that are renewed every so many steps) an op has a state: the steps
so far and its mask. Without, the mask is a function of the weight and there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from qwix._src.core import qarray
from qwix._src.core.sparsity import SparsityRule, get_sparsity_mask
from qwix._src.op_states import Key, OpStates


class Keeper(Protocol):
    """Who has the states of the call: the executor."""

    states: OpStates
    emitted: dict[Any, Any]


def has_curriculum(rule: SparsityRule | None) -> bool:
    """Whether pruning depends on the step."""
    if rule is None or not rule.weight_sparsity_m:
        return False
    return rule.weight_sparsity_start_step > 0 or rule.weight_sparsity_update_step != 1 or rule.eval_mode


def prune_activation(x: jax.Array, rule: SparsityRule) -> jax.Array:
    """Zeroes what the rule's activation pattern prunes."""
    names = ("n", "m", "order", "block_size", "offset")
    fields = {f"weight_sparsity_{name}": getattr(rule, f"activation_sparsity_{name}") for name in names}
    return qarray.sparsify(x, SparsityRule(**fields)) if rule.activation_sparsity_m else x


def prune_weight(
    x: jax.Array, rule: SparsityRule, key: Key, layer: Sequence[Any] | None, keeper: Keeper
) -> jax.Array:
    """Zeroes what the rule's weight pattern prunes at this step. Pruned weights get no gradient.

    Before the start step nothing is pruned; from it on, the mask is renewed every update step, and not at all
    in eval mode. Where no state is kept the weight is pruned by its values.
    """
    if not rule.weight_sparsity_m:
        return x
    if not has_curriculum(rule) or layer is None:
        return qarray.sparsify(x, rule)
    mask_now = lambda: _mask(x, rule)

    def update(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
        since = state["step"] - rule.weight_sparsity_start_step
        due = (since >= 0) & (since % rule.weight_sparsity_update_step == 0) & (not rule.eval_mode)
        return {"step": state["step"] + 1, "mask": jax.lax.cond(due, mask_now, lambda: state["mask"])}

    init = lambda: {"step": jnp.zeros([], jnp.int32), "mask": jnp.ones(x.shape, bool)}
    state, was_stored = keeper.states.step(key, layer, init, update, keeper.emitted)
    mask = state["mask"] if was_stored or keeper.states.creates else mask_now()
    return jnp.where(mask, x, 0)


def _mask(x: jax.Array, rule: SparsityRule) -> jax.Array:
    fields = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    names = ("n", "m", "order", "block_size", "offset")
    return get_sparsity_mask(jax.lax.stop_gradient(x), *(fields[f"weight_sparsity_{name}"] for name in names))
