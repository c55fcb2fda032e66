"""What to do with one op of a model: decided once from static facts, the same way when a model is converted
and when it runs. No arrays are touched here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from qwix._src import qconfig
from qwix._src.core import dot_general, numerics, qarray
from qwix._src.utils import flax_util
from qwix._src.weight import WeightTracer

# Contractions of activations shorter than this stay float: outer products and rotations gain nothing.
MIN_ACTIVATION_K = 8
NO_KERNEL = "the kernel of the convolution is no weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpPlan:
    """One op: the rule that decides, the side that is a weight, and how each side is quantized."""

    op: str
    path: str
    op_id: str
    rule: qconfig.QuantizationRule | None
    weight_side: int | None = None  # 0 or 1; None: no operand is a weight
    weight_how: qarray.HowToQuantize | None = None  # in the layout in which the op gets the weight
    act_hows: tuple[qarray.HowToQuantize | None, qarray.HowToQuantize | None] = (None, None)
    reason: str | None = None  # why it stays float; None: it's quantized
    dynamic_because: str | None = None  # why activations have no static scale, against the rule's wish

    @property
    def is_static(self) -> bool:
        """Whether the activations of this op have static scales."""
        return self.rule is not None and bool(self.rule.act_static_scale) and self.dynamic_because is None

    def keep_float(self, reason: str) -> OpPlan:
        return dataclasses.replace(self, weight_how=None, act_hows=(None, None), reason=reason)


def on_the_way(plan: OpPlan, params: Mapping[str, Any]) -> bool:
    """Whether the op quantizes its activation itself: where a weight is on the other side, and scales are
    dynamic. Of a ragged dot those of rows, which others don't share.
    """
    if plan.weight_side is None or plan.is_static:
        return False
    if plan.op != "ragged_dot":
        return True
    (ragged,), how = params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions, plan.act_hows[0]
    return how is not None and ragged in how.channelwise_axes


def placed(plan: OpPlan, provider: qconfig.QuantizationProvider, *, in_layer: bool, mapped: bool) -> OpPlan:
    """The plan, given where the op is: there may be no place for its static scales, which warns once.

    Args:
      plan: of an op.
      provider: whose rule asks for static scales.
      in_layer: whether the op runs once per layer, scanned or not.
      mapped: whether its weight is several: layers under vmap, or stacked on another axis than the first.
    """
    if plan.reason is not None or not plan.is_static or plan.act_hows == (None, None):
        return plan
    if in_layer and not mapped:
        return plan
    where = (
        "on layers under vmap or stacked along another axis than the first"
        if mapped
        else "in a loop or a branch that isn't a scan over layers"
    )
    provider._warn_once(
        f"Activations of {plan.op_id} in {plan.path!r} are quantized dynamically, against their rule's "
        f"act_static_scale: the op is {where}."
    )
    return dataclasses.replace(plan, dynamic_because=where)


def plan_contraction(
    provider: qconfig.QuantizationProvider, op: str, args: Sequence[Any], params: Mapping[str, Any]
) -> OpPlan:
    """The plan for a dot, a convolution or a ragged dot of `args[0]` and `args[1]`.

    Raises:
      ValueError: the rule can't be carried out on this weight; the message names it.
    """
    sides = [i for i, a in enumerate(args[:2]) if isinstance(a, WeightTracer)]
    path = module_path(args[sides[-1]] if sides else None)
    rule, op_id = provider._get_current_rule_and_op_id(op, path=path)
    plan = OpPlan(op=op, path=path, op_id=str(op_id), rule=rule, weight_side=sides[-1] if sides else None)
    if rule is None:
        return plan.keep_float("no rule matches")
    if len(sides) == 2:
        return plan.keep_float("both operands are weights")
    if any(not numerics.should_quantize(a.dtype) for a in args[:2]):
        return plan.keep_float(f"operands are {args[0].dtype} and {args[1].dtype}, not both float")
    if op == "conv_general_dilated" and sides != [1]:
        return plan.keep_float(NO_KERNEL)
    hows = [op_axes(op, args, params, side, rule) for side in (0, 1)]
    if sides:
        return _plan_weight(plan, rule, args, sides[0], hows)
    return _plan_activations(plan, rule, args, params, hows)


def module_path(weight: WeightTracer | None) -> str:
    """Where an op belongs: to the module that owns its weight, else to the one that is running."""
    path = None if weight is None else weight.info.module_path
    return "/".join(map(str, flax_util.get_current_module_path())) if path is None else path


def _plan_weight(
    plan: OpPlan, rule: qconfig.QuantizationRule, args: Sequence[Any], side: int, hows: Sequence[Any]
) -> OpPlan:
    if rule.weight_qtype is None:
        why = "act_qtype without weight_qtype: an op with a float weight gains nothing from that"
        return plan.keep_float(why if rule.act_qtype is not None else "the rule has no qtype")
    weight = args[side]
    how = _checked(weight, hows[side], rule.weight_qtype, rule.weight_calibration_method, weight.shape)
    acts: list[Any] = [None, None]
    if rule.act_qtype is not None:
        method = rule.act_calibration_method or "absmax"
        acts[1 - side] = _checked(weight, hows[1 - side], rule.act_qtype, method, None)
    return dataclasses.replace(plan, weight_how=how, act_hows=tuple(acts))


def _plan_activations(
    plan: OpPlan,
    rule: qconfig.QuantizationRule,
    args: Sequence[Any],
    params: Mapping[str, Any],
    hows: Sequence[Any],
) -> OpPlan:
    if rule.act_qtype is None:
        return plan.keep_float("no operand is a weight, and the rule has no act_qtype")
    if (reason := too_short(args, params)) is not None:
        return plan.keep_float(reason)
    acts = []
    for arg, kwargs in zip(args, hows, strict=False):
        try:
            how = qarray.HowToQuantize(
                qtype=rule.act_qtype, calibration_method=rule.act_calibration_method or "absmax", **kwargs
            )
            qarray.get_scale_shape(tuple(arg.shape), how)
        except ValueError as error:
            return plan.keep_float(f"activations only, and {error}")
        acts.append(how)
    return dataclasses.replace(plan, act_hows=(acts[0], acts[1]))


def too_short(args: Sequence[Any], params: Mapping[str, Any]) -> str | None:
    """Why a dot of activations isn't worth it, or None."""
    (contracted, _), _ = _dot_numbers(params)
    length = math.prod(args[0].shape[a] for a in contracted)
    short = length < MIN_ACTIVATION_K
    return f"an activation-only contraction of {length} < {MIN_ACTIVATION_K} values" if short else None


def plan_lookup(provider: qconfig.QuantizationProvider, weight: WeightTracer, row_axis: int) -> OpPlan:
    """The plan for taking rows of a table."""
    path = module_path(weight)
    rule, op_id = provider._get_current_rule_and_op_id("take", path=path)
    plan = OpPlan(op="take", path=path, op_id=str(op_id), rule=rule, weight_side=0)
    if rule is None:
        return plan.keep_float("no rule matches")
    if rule.weight_qtype is None:
        return plan.keep_float("a lookup has no activations, and the rule has no weight_qtype")
    if not numerics.should_quantize(weight.dtype):
        return plan.keep_float(f"the table is {weight.dtype}, not float")
    columns = [a for a in range(weight.ndim) if a != row_axis]
    tiles = rule.tile_size if isinstance(rule.tile_size, Mapping) else {}
    if rule.tile_size and not tiles and columns:
        tiles = {columns[-1]: rule.tile_size}
    kwargs = {"channelwise_axes": () if row_axis in tiles else (row_axis,), "tiled_axes": tiles}
    how = _checked(weight, kwargs, rule.weight_qtype, rule.weight_calibration_method, weight.shape)
    return dataclasses.replace(plan, weight_how=how)


def op_axes(
    op: str, args: Sequence[Any], params: Mapping[str, Any], side: int, rule: qconfig.QuantizationRule
) -> dict[str, Any]:
    """Which axes of one side have scales of their own, as arguments of HowToQuantize.

    Of a dot, ragged or not, those that it doesn't sum over, the groups' included; of a convolution the images
    and the output channels.
    """
    tile = tile_size_of(op, args, params, rule)
    if op == "conv_general_dilated":
        spec = params["dimension_numbers"][side]
        tiles = dict(tile) if isinstance(tile, Mapping) else {spec[1]: tile} if tile else {}
        channelwise: Collection[int] = [a for a in spec[:1] if a not in tiles]
    else:
        how = dot_general.get_how_to_quantize(
            dimension_numbers=_dot_numbers(params),
            ndims=(args[0].ndim, args[1].ndim),
            for_lhs=side == 0,
            tile_size=tile,
            qtype="int8",
        )
        channelwise, tiles = how.channelwise_axes, how.tiled_axes
    return {"channelwise_axes": () if is_per_tensor(rule) else channelwise, "tiled_axes": tiles}


def tile_size_of(
    op: str, args: Sequence[Any], params: Mapping[str, Any], rule: qconfig.QuantizationRule
) -> qconfig.TileSize | None:
    """The rule's tile size, as it is for this op.

    A convolution's tiles are of the input channels of one group. Where a group has no more channels than a
    tile (one in a depthwise convolution, the three of an image), they share one scale.
    """
    tile = rule.tile_size
    if op != "conv_general_dilated" or tile is None or isinstance(tile, Mapping):
        return tile
    channels = args[1].shape[params["dimension_numbers"].rhs_spec[1]]
    size = max(1, round(tile * channels)) if isinstance(tile, float) else tile
    return size if size < channels else None


def _dot_numbers(params: Mapping[str, Any]) -> Any:
    """The dimension numbers of a dot, or of the dot that a ragged one is for each group."""
    ragged = params.get("ragged_dot_dimension_numbers")
    return params["dimension_numbers"] if ragged is None else ragged.dot_dimension_numbers


def is_per_tensor(rule: qconfig.QuantizationRule) -> bool:
    """Whether channels share scales: a model that was trained by such a rule keeps to it afterwards."""
    return bool(getattr(rule, "disable_channelwise_axes", False))


def _checked(
    weight: WeightTracer, kwargs: Mapping[str, Any], qtype: Any, method: str, shape: Sequence[int] | None
) -> qarray.HowToQuantize:
    """The how, if it fits this weight's op. Raises ValueError that names the weight."""
    try:
        how = qarray.HowToQuantize(qtype=qtype, calibration_method=method, **kwargs)
        if shape is not None:
            qarray.get_scale_shape(tuple(shape), how)
    except ValueError as error:
        raise ValueError(
            f"The weight {weight.info.full_path!r} of shape {tuple(weight.shape)} can't be quantized as its "
            f"rule says: {error}"
        ) from error
    return how


def quantized_shape(shape: Sequence[int], dtype: Any, how: qarray.HowToQuantize) -> qarray.QArray:
    """The QArray of an array of this shape, without arrays."""
    return _quantized_shape(tuple(shape), jax.numpy.dtype(dtype), how)


# The layers of a model have few shapes between them, and a trace of `quantize` takes milliseconds.
@functools.lru_cache(maxsize=1024)
def _quantized_shape(shape: tuple[int, ...], dtype: Any, how: qarray.HowToQuantize) -> qarray.QArray:
    return jax.eval_shape(lambda x: qarray.quantize(x, how), jax.ShapeDtypeStruct(shape, dtype))
