"""What training does with one op: decided from static facts, once for the forward and both backward ops.

The forward side is that of op_plan, so that a model computes in training what it will compute after
post-training quantization; what differs is that weights stay float params, and that more kinds of ops and of
rules are taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwix._src import op_plan, qconfig, qt_ragged, weight_view
from qwix._src.core import numerics, qarray
from qwix._src.core.qt_config import QtConfig
from qwix._src.op_plan import OpPlan
from qwix._src.qt_rule import QtRule
from qwix._src.weight import WeightTracer

Collect = Callable[[Mapping[str, Any]], dict[str, Any]]
_SIDES = ("lhs", "rhs")
OTHER_RAGGED = "this kind of ragged dot isn't trained quantized: "
# Fields that name a side of the forward op, in both spellings.
_EXCHANGE = {"lhs": "rhs", "rhs": "lhs", "dlhs": "drhs", "drhs": "dlhs"}


def plan_contraction(
    provider: qconfig.QuantizationProvider, op: str, args: Sequence[Any], params: Mapping[str, Any]
) -> OpPlan:
    """The plan for a dot, a convolution or a ragged dot of `args[0]` and `args[1]`.

    Raises:
      ValueError: the rule can't be carried out on this weight; the message names it.
    """
    sides = [i for i, a in enumerate(args[:2]) if isinstance(a, WeightTracer)]
    path = op_plan.module_path(args[sides[-1]] if sides else None)
    rule, op_id = provider._get_current_rule_and_op_id(op, path=path)
    plan = OpPlan(op=op, path=path, op_id=str(op_id), rule=rule, weight_side=sides[-1] if sides else None)
    if rule is None:
        return plan.keep_float("no rule matches")
    assert isinstance(rule, QtRule)
    reason = _reason(rule, op, args, params, sides)
    if reason is not None:
        return plan.keep_float(reason)
    return _with_hows(plan, rule, args, params)


def _reason(
    rule: QtRule, op: str, args: Sequence[Any], params: Mapping[str, Any], sides: Sequence[int]
) -> str | None:
    """Why an op stays float; None if it doesn't."""
    if not rule.quantizes_forward:
        return "the rule has no qtype"
    if len(sides) == 2:
        return "both operands are weights"
    if any(not numerics.should_quantize(a.dtype) for a in args[:2]):
        return f"operands are {args[0].dtype} and {args[1].dtype}, not both float"
    if op == "conv_general_dilated" and list(sides) != [1]:
        return op_plan.NO_KERNEL
    if op == "ragged_dot" and (reason := qt_ragged.refusal(args, params, rule.tile_size)) is not None:
        return OTHER_RAGGED + reason
    if not sides:
        if rule.act_qtype is None and not rule.extra:
            return "no operand is a weight, and the rule has no act_qtype"
        return op_plan.too_short(args, params)
    return None


def _with_hows(plan: OpPlan, rule: QtRule, args: Sequence[Any], params: Mapping[str, Any]) -> OpPlan:
    hows: list[Any] = [None, None]
    for side, name in enumerate(_SIDES):
        is_weight = side == plan.weight_side
        qtype = rule.extra.get(f"{name}_qtype", rule.weight_qtype if is_weight else rule.act_qtype)
        if qtype is None:
            continue
        method = rule.weight_calibration_method if is_weight else rule.act_calibration_method or "absmax"
        method = rule.extra.get(f"{name}_calibration_method", method)
        axes = op_plan.op_axes(plan.op, args, params, side, rule)
        try:
            hows[side] = qarray.HowToQuantize(qtype=qtype, calibration_method=method, **axes)
            qarray.get_scale_shape(tuple(args[side].shape), hows[side])
        except ValueError as error:
            if plan.weight_side is None:
                return plan.keep_float(f"activations only, and {error}")
            raise ValueError(
                f"The weight {args[plan.weight_side].info.full_path!r} of shape "
                f"{tuple(args[plan.weight_side].shape)} can't be trained as its rule says ({name} of shape "
                f"{tuple(args[side].shape)}): {error}"
            ) from error
    weight_how = None if plan.weight_side is None else hows[plan.weight_side]
    if plan.weight_side is not None:
        hows[plan.weight_side] = None
    if weight_how is None and hows == [None, None]:
        return plan.keep_float("the rule has no qtype for its operands")
    return dataclasses.replace(plan, weight_how=weight_how, act_hows=tuple(hows))


def is_mapped(weight: WeightTracer | None) -> bool:
    """Whether a weight is several: of layers under vmap, or stacked along another axis than the first."""
    if weight is None:
        return False
    steps = weight.steps
    return weight.info.mapped or (not weight_view.lifted(steps) and weight_view.is_stacked(steps))


def make_config(
    plan: OpPlan,
    rule: QtRule,
    noise_fn: Any,
    collect: Sequence[Collect | None],
    tile_size: qconfig.TileSize | None,
) -> QtConfig:
    """The config of the op as the model calls it, without sparsity, which is done beforehand.

    Args:
      noise_fn: what rounds gradients at random, or None.
      collect: for each side, what makes its static calibration, or None.
      tile_size: of the op; see `op_plan.tile_size_of`.
    """
    fields: dict[str, Any] = {
        "tile_size": tile_size,
        "use_original_residuals": rule.bwd_qtype is None,
    }
    for side, name in enumerate(_SIDES):
        is_weight = side == plan.weight_side
        method = rule.weight_calibration_method if is_weight else rule.act_calibration_method or "absmax"
        fields |= {
            f"{name}_qtype": rule.weight_qtype if is_weight else rule.act_qtype,
            f"{name}_calibration_method": method,
            f"{name}_collect_quant_stat": collect[side],
            f"{name}_disable_channelwise_axes": rule.disable_channelwise_axes,
            f"d{name}_grad_qtype": rule.bwd_qtype,
            f"d{name}_grad_calibration_method": rule.bwd_calibration_method,
            f"d{name}_grad_disable_channelwise_axes": rule.disable_channelwise_axes,
            f"d{name}_tile_size": rule.bwd_weight_grad_tile_size if is_weight else None,
            f"d{name}_stochastic_rounding_noise_fn": noise_fn,
        }
    fields |= {**rule.extra, "sparsity_rule": None}
    return QtConfig(**fields)


def exchanged(config: QtConfig) -> QtConfig:
    """The config of the same op with its sides exchanged."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        side, _, rest = field.name.partition("_")
        name = f"{_EXCHANGE[side]}_{rest}" if side in _EXCHANGE else field.name
        fields[name] = getattr(config, field.name)
    return QtConfig(**fields)
