"""Carrying out the ops of a model in training: each contraction becomes one op of core's *_qt modules.

Those have custom derivatives and are called in the trace around the model, so whatever transforms the model
(grad, scan, remat, vmap, jit) transforms them, too.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from qwix._src import (
    averaging,
    op_plan,
    op_trace,
    qconfig,
    qt_plan,
    qt_ragged,
    qt_sparsity,
    ragged_rows,
    static_range,
)
from qwix._src.core import qarray, stochastic_rounding
from qwix._src.core.conv_general_qt import conv_general_qt
from qwix._src.core.dot_general_qt import dot_general_qt
from qwix._src.dot_sides import result_dtype, swap_back, swapped, swapped_precision
from qwix._src.model_weights import make_record, note_opaque, op_name
from qwix._src.op_plan import OpPlan
from qwix._src.op_states import OpStates
from qwix._src.qt_rule import QtRule
from qwix._src.weight import WeightInfo, WeightTracer, materialize

if TYPE_CHECKING:
    from qwix._src.providers.qt import QtProvider

_SIDES = ("lhs", "rhs")
# What is computed under this name is left alone: ops that a provider defines itself.
FLOAT_SCOPE = "qwix_float"


class TrainingExecutor:
    """The handler of one call of a model in training.

    Args:
      provider: whose rules.
      states: of the ops.
      params: {id: (array, whose it is)} of the model's params.
      noise_key: what keys of stochastic rounding are made of; None if there's no such stream.
    """

    unrolls = False
    trains = True

    def __init__(
        self,
        provider: QtProvider,
        states: OpStates,
        params: dict[int, tuple[Any, WeightInfo]],
        noise_key: jax.Array | None,
    ):
        self.provider, self.states, self.params, self.noise_key = provider, states, params, noise_key
        self.by_layer = provider.keeps_states
        self.counts_loops = noise_key is not None
        self.emitted: dict[Any, Any] = {}

    def bookmark(self) -> Callable[[], None]:
        return qconfig.bookmark()

    def opaque(self, name: str, args: Sequence[Any]) -> None:
        note_opaque(self.provider, name, args)

    def tagged(self, trace: op_trace.OpTrace, args: Sequence[Any], params: dict[str, Any]) -> Any:
        return op_trace.tagged_weight(trace, args, params)

    def contraction(
        self, trace: op_trace.OpTrace, primitive: Any, args: Sequence[Any], params: dict[str, Any]
    ) -> Any:
        if FLOAT_SCOPE in op_trace.scope_names():
            return trace.bind(primitive, args, params)
        plan = qt_plan.plan_contraction(self.provider, op_name(primitive), args, params)
        mapped = qt_plan.is_mapped(_weight(plan, args))
        plan = op_plan.placed(plan, self.provider, in_layer=trace.layer is not None, mapped=mapped)
        self._record(plan, args, params)
        if plan.reason is not None:
            self._warn_of(plan, args)
            return trace.bind(primitive, args, params)
        return trace.outside(self._run, plan, args, params, trace)

    def lookup(
        self, trace: op_trace.OpTrace, primitive: Any, args: Sequence[Any], params: dict[str, Any]
    ) -> Any:
        """Rows of a table, rounded as those of the quantized table, with a straight-through gradient."""
        (row_axis,) = params["dimension_numbers"].start_index_map
        plan = op_plan.plan_lookup(self.provider, args[0], row_axis)
        self._record(plan, args, params)
        rows = trace.bind(primitive, args, params)
        if plan.weight_how is None:
            return rows
        return trace.outside(_rounded, rows, _how_of_rows(plan.weight_how, row_axis, rows.ndim, params))

    def _warn_of(self, plan: OpPlan, args: Sequence[Any]) -> None:
        """Warns of a weight that stays float against its rule, where the model can be written otherwise."""
        weight = _weight(plan, args)
        if weight is not None and (plan.reason or "").startswith(qt_plan.OTHER_RAGGED):
            self.provider._warn_once(
                f"The weight {weight.info.full_path!r} stays float in {plan.op_id}, against its rule: "
                f"{plan.reason}. Call jax.lax.ragged_dot, on transposed operands if need be."
            )

    def _record(self, plan: OpPlan, args: Sequence[Any], params: dict[str, Any]) -> None:
        key = plan.path, plan.op_id
        known = self.provider.records.get(key)
        if known is None or known.dynamic_because != plan.dynamic_because:
            self.provider.records[key] = make_record(plan, args, params, plan.weight_how, trains=True)

    def _run(
        self, plan: OpPlan, args: Sequence[Any], params: dict[str, Any], trace: op_trace.OpTrace
    ) -> jax.Array:
        """The op, in the trace around the model."""
        rule: Any = plan.rule
        operands = [materialize(a) for a in args]
        if rule.sparsity_rule is not None:
            layer = None if qt_plan.is_mapped(_weight(plan, args)) else trace.layer
            key = plan.path, f"{plan.op_id}_sparsity"
            for side in (0, 1):
                if side == plan.weight_side:
                    prune = qt_sparsity.prune_weight
                    operands[side] = prune(operands[side], rule.sparsity_rule, key, layer, self)
                else:
                    operands[side] = qt_sparsity.prune_activation(operands[side], rule.sparsity_rule)
        collect = [self._collect(plan, side, operands, params, trace) for side in (0, 1)]
        noise = self._noise(plan, rule, args, params, trace)
        tile_size = op_plan.tile_size_of(plan.op, args, params, rule)
        config = qt_plan.make_config(plan, rule, noise, collect, tile_size)
        return _OPS[plan.op](plan, operands, params, config)

    def _collect(
        self,
        plan: OpPlan,
        side: int,
        operands: Sequence[Any],
        params: dict[str, Any],
        trace: op_trace.OpTrace,
    ) -> qt_plan.Collect | None:
        """What gives the static calibration of one side."""
        how, rule, layer = plan.act_hows[side], plan.rule, trace.layer
        if how is None or not plan.is_static or not isinstance(rule, QtRule) or layer is None:
            return None
        x = jax.lax.stop_gradient(operands[side])
        live = ragged_rows.live(operands, params, side) if plan.op == "ragged_dot" else None
        statistics = static_range.act_statistics(x, how, rule, live)
        average = averaging.parse_averaging(rule.act_averaging, rule.act_bootstrap_steps)
        state, _ = self.states.step(
            (plan.path, f"{plan.op_id}_{_SIDES[side]}"),
            layer,
            lambda: average.init(statistics),
            lambda state: average.update(state, statistics),
            self.emitted,
        )
        now = {key: value.astype(jnp.float32) for key, value in statistics.items()}
        averaged = average.get_calibration(state, default=now)
        return lambda _: averaged

    def _noise(
        self,
        plan: OpPlan,
        rule: QtRule,
        args: Sequence[Any],
        params: dict[str, Any],
        trace: op_trace.OpTrace,
    ) -> Any:
        """The noise of this op in this layer, for both of its gradients."""
        if rule.bwd_stochastic_rounding is None:
            return None
        if self.noise_key is None:
            return MissingNoise()
        key = jax.random.fold_in(self.noise_key, zlib.crc32(f"{plan.path}/{plan.op_id}".encode()))
        for index in trace.loops:
            key = jax.random.fold_in(key, index)
        axes = rule.channelwise_noise_axes
        if _is_exchanged(plan, params):
            back = swap_back(params["dimension_numbers"], args)
            axes = tuple(back[a] for a in axes)
        return stochastic_rounding.get_noise_fn(rule.bwd_stochastic_rounding, key, axes)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MissingNoise:
    """Stands for noise that nobody gave a key for. A model that computes no gradients doesn't need it."""

    def __call__(self, shape: Sequence[int]) -> jax.Array:
        raise ValueError(
            "bwd_stochastic_rounding needs a random key to compute gradients. Linen: apply(..., "
            "rngs={'stochastic_rounding': key}). NNX: model.set_attributes(qwix_rngs=nnx.Rngs("
            "stochastic_rounding=seed))."
        )


def _how_of_rows(
    how: qarray.HowToQuantize, row_axis: int, ndim: int, params: dict[str, Any]
) -> qarray.HowToQuantize:
    """How rows are quantized, said of the gathered array: each for itself, whatever the table says.

    `row_axis` and `how` are of the table.
    """
    offsets = params["dimension_numbers"].offset_dims
    columns = [a for a in range(len(offsets) + 1) if a != row_axis]
    tiled = {out: how.tiled_axes[a] for a, out in zip(columns, offsets, strict=True) if a in how.tiled_axes}
    each = tuple(a for a in range(ndim) if a not in offsets)
    kept = tuple(out for a, out in zip(columns, offsets, strict=True) if a in how.channelwise_axes)
    return dataclasses.replace(how, channelwise_axes=(*each, *kept), tiled_axes=tiled)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rounded(x: jax.Array, how: qarray.HowToQuantize) -> jax.Array:
    return qarray.dequantize(qarray.quantize(x, how)).astype(x.dtype)


_rounded.defvjp(lambda x, how: (_rounded(x, how), None), lambda how, _, g: (g,))


def _weight(plan: OpPlan, args: Sequence[Any]) -> WeightTracer | None:
    return None if plan.weight_side is None else args[plan.weight_side]


def _is_exchanged(plan: OpPlan, params: dict[str, Any]) -> bool:
    is_dot = plan.op in ("dot_general", "einsum")
    return is_dot and plan.weight_side == 0 and params.get("out_sharding") is None


def _dot(plan: OpPlan, operands: list[Any], params: dict[str, Any], config: Any) -> jax.Array:
    """A weight goes to the right side, as after post-training quantization."""
    dnums, precision, back = params["dimension_numbers"], params["precision"], None
    dtype = result_dtype(operands, params)
    if _is_exchanged(plan, params):
        back = swap_back(dnums, operands)
        operands, dnums, precision = operands[::-1], swapped(dnums), swapped_precision(precision)
        config = qt_plan.exchanged(config)
    lhs, rhs = operands
    out = dot_general_qt(
        lhs,
        rhs,
        dnums,
        config,
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=params.get("out_sharding"),
    )
    return out if back is None else out.transpose(back)


def _convolution(plan: OpPlan, operands: list[Any], params: dict[str, Any], config: Any) -> jax.Array:
    del plan
    options = params | {"preferred_element_type": result_dtype(operands, params)}
    lhs, rhs = operands
    return conv_general_qt(lhs, rhs, config, **options)


def _ragged(plan: OpPlan, operands: list[Any], params: dict[str, Any], config: Any) -> jax.Array:
    del plan
    return qt_ragged.ragged_dot_of_any(operands, params, config, result_dtype(operands, params))


_OPS = {"dot_general": _dot, "einsum": _dot, "conv_general_dilated": _convolution, "ragged_dot": _ragged}
