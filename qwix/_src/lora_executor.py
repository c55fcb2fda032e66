"""Carrying out the ops of a model with adapters: base and low-rank path together.

A weight with an adapter is W + scaling * A B to every op. An op that contracts the axes of A (or those of B,
as the tied head of a language model does) computes x W + scaling * (x A) B; any other op gets the sum as an
array.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from qwix._src import lora_ops, op_plan, op_trace, qconfig, weight_steps
from qwix._src.adapter import Adapter
from qwix._src.core import dot_general
from qwix._src.core.low_rank import LowRank, dot_general_low_rank, low_rank_delta
from qwix._src.dot_sides import Arranged, result_dtype, swap_back
from qwix._src.lora_ops import Use
from qwix._src.lora_rows import Selected
from qwix._src.op_plan import OpPlan
from qwix._src.providers.boxed_param import Executor, once
from qwix._src.static_range import StaticScales
from qwix._src.weight import WeightTracer

if TYPE_CHECKING:
    from qwix._src.providers.lora import LoraProvider


class LoraExecutor(Executor):
    """The handler of one call.

    Args:
      provider: whose rules.
      scales: static scales of activations.
      strict: a float weight where a quantized one belongs is an error.
      dropout_key: what masks are made of; None: no dropout.
      selected: which adapter each row of the batch uses, where several are stacked.
    """

    def __init__(
        self,
        provider: LoraProvider,
        scales: StaticScales,
        *,
        strict: bool,
        dropout_key: jax.Array | None = None,
        selected: Selected | None = None,
    ):
        super().__init__(provider, scales, strict=strict)
        self.lora, self.dropout_key, self.selected = provider, dropout_key, selected
        self.counts_loops = dropout_key is not None

    def carry_out(
        self,
        trace: op_trace.OpTrace,
        plan: OpPlan,
        primitive: Any,
        args: Sequence[Any],
        params: dict[str, Any],
    ) -> Any:
        if all(not isinstance(a, WeightTracer) or a.adapter is None for a in args[:2]):
            return super().carry_out(trace, plan, primitive, args, params)
        use = trace.outside(self._use, plan, args, params)
        if use is None:
            return trace.bind(primitive, args, params)
        run = _OPS.get(plan.op, LoraExecutor._adapted_dot)
        return trace.outside(run, self, use, trace)

    def lookup(
        self, trace: op_trace.OpTrace, primitive: Any, args: Sequence[Any], params: dict[str, Any]
    ) -> Any:
        weight, indices = args
        if weight.adapter is None:
            return super().lookup(trace, primitive, args, params)
        (row_axis,) = params["dimension_numbers"].start_index_map
        restart = qconfig.bookmark()
        plan = op_plan.plan_lookup(self.provider, weight, row_axis)
        use = trace.outside(self._use, plan, args, params)
        restart()
        rows = super().lookup(trace, primitive, [weight.with_adapter(None), indices], params)
        if use is None or use.spec.dora:
            return trace.bind(primitive, args, params)
        mask = lambda low, batch: self._masked(use, low, batch)
        delta = trace.outside(lora_ops.take_delta, use, indices, mask)
        return trace.outside(lambda: (rows.astype(jnp.float32) + delta).astype(rows.dtype))

    def _use(self, plan: OpPlan, args: Sequence[Any], params: dict[str, Any]) -> Use | None:
        """How this op uses its weight's adapter; None: it needs the sum as an array."""
        side = plan.weight_side
        if side is None or (plan.op != "take" and all(isinstance(a, WeightTracer) for a in args[:2])):
            return None
        weight: WeightTracer = args[side]
        adapter = weight.adapter
        if not isinstance(adapter, Adapter):
            return None
        spec, inner = adapter.spec, weight_steps.of_layer(weight.steps)
        _check_shapes(weight, adapter)
        if inner[: len(spec.steps)] != spec.steps:
            return None
        inner = inner[len(spec.steps) :]
        axes = weight_steps.axis_map(inner, len(spec.home))
        if axes is None or any(step.kind == "slice" for step in inner):
            return None
        cast = lambda x: x.astype(weight.aval.dtype)
        adapter = dataclasses.replace(adapter, a=cast(adapter.a), b=cast(adapter.b))
        use = Use(plan, weight.with_adapter(None), adapter, axes, args, params)
        return use if lora_ops.fits(use) else None

    def _adapted_dot(self, use: Use, trace: op_trace.OpTrace) -> jax.Array:
        """base + low-rank path, in one op where core has one for it."""
        base = self._arranged(use.plan, use.base_args, use.params, trace.layer or ())
        x, side = self._dropped(use, trace), use.plan.weight_side
        update = self._update(use)
        if update is None:
            return self._shared_dot(use, base, x)
        gain = lora_ops.gain(use, update)
        dtype = result_dtype(use.args, use.params)
        options = base.options | {"preferred_element_type": jnp.promote_types(dtype, jnp.float32)}
        exchanged = side == 0 and base.back is None  # it isn't, for the sake of its out_sharding
        seen = base.operands[1 if exchanged else 0]
        plain = self.provider._dot_general_fn is dot_general.dot_general
        if x is use.x is seen and plain and not exchanged:
            arrays = {"lhs": x, "rhs": base.operands[1], "low_rank": update}
            if gain is None:
                options["preferred_element_type"] = dtype
            out = once(dot_general_low_rank, arrays, options)
        else:
            out = self._compute(base.operands, options)
            out = out + self._delta(use, x, update, base.options, exchanged)
        if gain is not None:
            out = out * _placed_gain(use, gain, out.ndim, exchanged)
        return base.turned_back(out).astype(dtype)

    def _delta(
        self, use: Use, x: jax.Array, update: LowRank, options: dict[str, Any], exchanged: bool
    ) -> jax.Array:
        """What the adapter adds, laid out as the result. `exchanged`: the weight stands on the left."""
        sharding, back = options.get("out_sharding"), None
        if exchanged and sharding is not None:
            back = swap_back(use.params["dimension_numbers"], use.args)
            spec = (*sharding.spec, *(None,) * (len(back) - len(sharding.spec)))
            swapped = (spec[back.index(axis)] for axis in range(len(back)))
            sharding = sharding.update(spec=jax.sharding.PartitionSpec(*swapped))
        delta = low_rank_delta(x, update, use.numbers, precision=options["precision"], out_sharding=sharding)
        return delta if back is None else delta.transpose(back)

    def _shared_dot(self, use: Use, base: Arranged, x: jax.Array) -> jax.Array:
        """The same for several weights that share x."""
        out = self._compute(base.operands, base.options | {"preferred_element_type": jnp.float32})
        delta = lora_ops.shared_delta(use, x, lambda low, rows: self._masked(use, low, rows))
        return base.turned_back(out + delta).astype(result_dtype(use.args, use.params))

    def _update(self, use: Use) -> LowRank | None:
        """A and B as the dot wants them; None if several weights share x."""
        update = use.low_rank()
        choice = self._choice(use)
        if update is not None and choice is not None:
            shape, rows = lora_ops.shape_of_low(use)
            update = dataclasses.replace(update, row_mask=choice.mask(use.spec, shape, rows))
        return update

    def _adapted_convolution(self, use: Use, trace: op_trace.OpTrace) -> jax.Array:
        params = use.params | {"preferred_element_type": jnp.float32}
        out = self._convolution(use.plan, use.base_args, params, trace.layer or ())
        batch = use.params["dimension_numbers"].out_spec[0]
        mask = lambda low, out_axis: self._masked(use, low, batch - (batch > out_axis), groups=True)
        out = out + lora_ops.conv_delta(use, self._dropped(use, trace), mask)
        gain = lora_ops.gain_of_conv(use)
        if gain is not None:
            shape = [1] * out.ndim
            shape[use.params["dimension_numbers"].out_spec[1]] = -1
            out = out * gain.reshape(shape)
        return out.astype(result_dtype(use.args, use.params))

    def _adapted_ragged(self, use: Use, trace: op_trace.OpTrace) -> jax.Array:
        params = use.params | {"preferred_element_type": jnp.float32}
        out = self._ragged(use.plan, use.base_args, params, trace.layer or ())
        delta = lora_ops.ragged_delta(use, self._dropped(use, trace), lambda low: self._masked(use, low, 0))
        return (out + delta).astype(result_dtype(use.args, use.params))

    def _choice(self, use: Use) -> Selected | None:
        """What the call chose of this weight's adapters; None: there is only one."""
        if not use.spec.members:
            return None
        if self.selected is None:
            names = [name for name, _ in use.spec.members]
            raise ValueError(
                f"The model has several adapters, {names}: say which with model(..., adapter=name), or one "
                "name or number per row of the batch; adapter=None is the base model."
            )
        return self.selected

    def _masked(self, use: Use, low: jax.Array, rows: int | None, *, groups: bool = False) -> jax.Array:
        """x A, with those ranks that are of the row's own adapter."""
        choice = self._choice(use)
        if choice is None:
            return low
        shape = (*low.shape[:-2], low.shape[-1]) if groups else low.shape
        mask = choice.mask(use.spec, shape, rows)
        return low * (mask[..., None, :] if groups else mask)

    def _dropped(self, use: Use, trace: op_trace.OpTrace) -> jax.Array:
        """The activation as the adapter sees it."""
        rate = use.spec.dropout
        if self.dropout_key is None or not rate:
            return use.x
        key = jax.random.fold_in(
            self.dropout_key, zlib.crc32(f"{use.plan.path}/{use.plan.op_id}/dropout".encode())
        )
        for index in trace.loops:
            key = jax.random.fold_in(key, index)
        kept = jax.random.bernoulli(key, 1 - rate, use.x.shape)
        return jnp.where(kept, use.x / (1 - rate), 0).astype(use.x.dtype)


def _check_shapes(weight: WeightTracer, adapter: Adapter) -> None:
    """Raises ValueError for arrays that aren't of this adapter."""
    spec = adapter.spec
    given = {"a": tuple(adapter.a.shape), "b": tuple(adapter.b.shape)}
    wanted = {"a": spec.a_shape, "b": spec.b_shape}
    if given != wanted:
        raise ValueError(
            f"The adapter of {weight.info.full_path!r} has A of shape {given['a']} and B of {given['b']}, "
            f"but the model's rule gives {wanted['a']} and {wanted['b']}. Are they those of another model or "
            "rule?"
        )


def _placed_gain(use: Use, gain: jax.Array, ndim: int, exchanged: bool) -> jax.Array:
    """[*batch, *kept axes of the weight] ready for the result."""
    _, (_, batch) = use.numbers
    n, free = len(batch), ndim - gain.ndim
    middle = gain.shape[n:] + (1,) * free if exchanged else (1,) * free + gain.shape[n:]
    return gain.reshape(*gain.shape[:n], *middle)


_OPS = {
    "conv_general_dilated": LoraExecutor._adapted_convolution,
    "ragged_dot": LoraExecutor._adapted_ragged,
}
