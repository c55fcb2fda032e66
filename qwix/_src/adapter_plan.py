"""Which adapter a weight gets: decided by the first op that eats it, from static facts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwix._src import weight_steps, weight_view
from qwix._src.adapter import AdapterSpec
from qwix._src.lora_rule import LoraRule
from qwix._src.weight import WeightTracer


def plan_adapter(
    op: str, weight: WeightTracer, side: int, args: Sequence[Any], params: Mapping[str, Any], rule: LoraRule
) -> AdapterSpec:
    """The adapter of a weight that `op` eats on this side.

    Raises:
      ValueError: the weight has no axes that A and B could have, or too few values for the rank; the message
        names it.
    """
    steps, whole = weight_steps.of_layer(weight.steps), tuple(weight.shape)
    lifted_axes = weight_view.lifted(weight.steps)
    stored = weight.steps[0].old if weight.steps else whole
    name = f"The weight {weight.info.full_path!r} of shape {tuple(stored)}"
    if lifted_axes != tuple(range(len(lifted_axes))) or weight_view.is_stacked(steps):
        raise ValueError(
            f"{name} can't have an adapter: its layers are stacked along another axis than the first. Stack "
            "them along axis 0, or leave the module out of the rule's module_path."
        )
    home = weight_steps.layer_shape(weight.steps, whole)
    axes = weight_steps.axis_map(steps, len(home))
    if axes is not None:
        steps = ()
    elif weight.info.vmapped or any(step.kind == "slice" for step in steps):
        what = "layers under vmap, reshaped" if weight.info.vmapped else "a part of it, reshaped"
        raise ValueError(
            f"{name} can't have an adapter: {op} gets {what}. Reshape the activations or the result "
            "instead, or leave the module out of the rule's module_path."
        )
    else:
        home, axes = whole, tuple(range(len(whole)))
    batch, ins = _roles(op, side, args, params)
    own = [i for i, a in enumerate(axes) if a < weight.info.vmapped and i not in batch and i not in ins]
    batch = (*batch, *own)
    kept = [a for a in range(len(axes)) if a not in batch and a not in ins]
    spec = AdapterSpec(
        home=home,
        steps=steps,
        batch=tuple(axes[a] for a in batch),
        ins=_in_order(op, [axes[a] for a in ins]),
        outs=_in_order(op, [axes[a] for a in kept]),
        rank=rule.rank,
        alpha=float(rule.alpha),
        use_rslora=rule.use_rslora,
        flat=op in ("dot_general", "ragged_dot"),
        conv=op == "conv_general_dilated",
        groups=params.get("feature_group_count", 1),
        dropout=float(rule.dropout),
        dora=rule.use_dora,
        lifted=tuple(stored[a] for a in lifted_axes),
    )
    _check_rank(spec, name, op)
    return spec


def _in_order(op: str, axes: Sequence[int]) -> tuple[int, ...]:
    """Axes that are one in the adapter stay in the op's order, others in the weight's."""
    return tuple(axes) if op in ("dot_general", "ragged_dot") else tuple(sorted(axes))


def _roles(
    op: str, side: int, args: Sequence[Any], params: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of the weight in the op along which it's several weights, and those that A has."""
    if op == "take":
        return (), tuple(params["dimension_numbers"].start_index_map)
    if op == "conv_general_dilated":
        out = params["dimension_numbers"].rhs_spec[0]
        return (), tuple(a for a in range(args[1].ndim) if a != out)
    ragged = params.get("ragged_dot_dimension_numbers")
    contracting, batch = params["dimension_numbers"] if ragged is None else ragged.dot_dimension_numbers
    groups = () if ragged is None or side == 0 else tuple(ragged.rhs_group_dimensions)
    return (*batch[side], *groups), tuple(contracting[side])


def _check_rank(spec: AdapterSpec, name: str, op: str) -> None:
    groups = spec.groups if spec.conv else 1
    many_in = math.prod(spec.sizes(spec.ins))
    many_out = math.prod(spec.sizes(spec.outs)) // groups
    if spec.rank > min(many_in, many_out):
        where = f"{op}, of {groups} groups," if groups > 1 else op
        raise ValueError(
            f"rank={spec.rank} is too large for an adapter of {name[0].lower()}{name[1:]}: in {where} it's a "
            f"matrix of {many_in} by {many_out}, whose rank is at most {min(many_in, many_out)}. Use a "
            "smaller rank, or leave the module out of the rule's module_path."
        )
