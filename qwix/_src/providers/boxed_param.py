"""The base of the providers that hold quantized weights: ops get the stored QArrays, and activations are
quantized on the way.

An op is decided about in op_plan; here it's carried out. Float results of an op have the dtype that the
float op would have.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from qwix_kernels import tuning

from qwix._src import (
    op_plan,
    op_trace,
    qconfig,
    ragged_rows,
    turned,
    weight_view,
)
from qwix._src.adapter import Adapter
from qwix._src.core import conv_general, dot_general, qarray, ragged_dot
from qwix._src.dot_sides import Arranged, result_dtype, swap_back, swapped, swapped_precision
from qwix._src.model_weights import Discovery, make_record, named_einsum, note_opaque, op_name
from qwix._src.op_plan import OpPlan
from qwix._src.prepack import Prepack, checked
from qwix._src.static_range import StaticScales, calibrated_act
from qwix._src.weight import WeightTracer, dense, materialize
from qwix._src.weight_param import create_quantized_param
from qwix._src.with_aux import WithAux

__all__ = ["BoxedParamProvider", "WithAux", "create_quantized_param", "quantize_act"]


_SIDES = ("lhs", "rhs")


class BoxedParamProvider(qconfig.QuantizationProvider):
    """Quantizes weights once and activations at run time, by rules.

    Args:
      rules: in order; the first that matches an op's module path and name decides about it.
      disable_jit: run the model under `jax.disable_jit()`.
      prepack: True: store weights of more than two axes as kernels read them, which saves a copy in every
        call. "k_major": store those of all dots, einsums and ragged dots with the summed axes last, which is
        how the matrix units of NVIDIA GPUs read int8, fp8 and 4-bit weights. `WithAux.array` is then a
        `TransposedQArray`, `WithAux.unboxed` the QArray all the same.

    Raises:
      ValueError: another `prepack`.
    """

    def __init__(
        self,
        rules: Sequence[qconfig.QuantizationRule] | qconfig.QuantizationRule,
        *,
        disable_jit: bool = False,
        prepack: Prepack = False,
        _qarray_module: types.ModuleType = qarray,
        _dot_general_fn: Callable[..., jax.Array] = dot_general.dot_general,
        _conv_general_dilated_fn: Callable[..., jax.Array] = conv_general.conv_general_dilated,
    ):
        super().__init__(rules, disable_jit=disable_jit)
        self.prepack = checked(prepack)
        self._qarray = _qarray_module
        self._dot_general_fn = _dot_general_fn
        self._conv_general_dilated_fn = _conv_general_dilated_fn

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_qarray": self._qarray.__name__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_qarray": importlib.import_module(state["_qarray"])})

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        """Einsums are named; all else is seen by its primitives."""
        return {"jax.numpy.einsum": named_einsum}

    def finish(self) -> None:
        super().finish()
        self._warn_if_nothing()

    def op_handler(self, scales: StaticScales, *, strict: bool) -> Executor:
        """What carries out the ops of one call. `strict`: a float weight where a quantized one belongs is
        an error.
        """
        return Executor(self, scales, strict=strict)

    def take_options(
        self,
        method: Callable[..., Any],
        kwargs: Mapping[str, Any],
        key: Callable[[str], jax.Array | None],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what the method gets, what `op_handler` gets besides) of the keyword arguments of a call.

        `key` gives a fresh key of the model's stream of that name, or None if it has none.
        """
        del method, key
        return dict(kwargs), {}

    def needs_discovery(self, params: Any) -> bool:
        """Whether the params of a Linen module hold what only a look at the module's ops explains."""
        del params
        return False

    def learn(self, seen: Discovery, params: Any = None) -> None:
        """Takes note of what a look at a module's ops has found. `params`: what has to be explained by it."""
        del seen, params

    def complete_nnx(self, model: nnx.Module, seen: Discovery, rngs: nnx.Rngs | None) -> None:
        """Adds what the provider holds besides quantized weights."""

    def complete_linen(self, params: Any, seen: Discovery, key: Callable[[], jax.Array]) -> None:
        """The same for the params of a Linen module."""

    def class_attributes(self, module: nnx.Module) -> Mapping[str, Any]:
        """What the class of an NNX module has besides its methods."""
        del module
        return {}


class Executor:
    """The handler of a quantized model's call."""

    counts_loops = trains = False

    def __init__(self, provider: BoxedParamProvider, scales: StaticScales, *, strict: bool):
        self.provider = provider
        self.emitted: dict[Any, Any] = {}
        self.params: dict[int, Any] = {}
        self.scales = scales
        self.strict = strict
        self.by_layer = any(rule.act_static_scale for rule in provider._rules)
        self.unrolls = self.by_layer and scales.write is not None

    def bookmark(self) -> Callable[[], None]:
        return qconfig.bookmark()

    def opaque(self, name: str, args: Sequence[Any]) -> None:
        note_opaque(self.provider, name, args)

    def tagged(self, trace: op_trace.OpTrace, args: Sequence[Any], params: dict[str, Any]) -> Any:
        return op_trace.tagged_weight(trace, args, params)

    def contraction(
        self, trace: op_trace.OpTrace, primitive: Any, args: Sequence[Any], params: dict[str, Any]
    ) -> Any:
        plan = op_plan.plan_contraction(self.provider, op_name(primitive), args, params)
        plan = self._settled(plan, args)
        weight = None if plan.weight_side is None else args[plan.weight_side]
        mapped = weight is not None and weight.info.mapped
        plan = op_plan.placed(plan, self.provider, in_layer=trace.layer is not None, mapped=mapped)
        self._record(plan, args, params)
        return self.carry_out(trace, plan, primitive, args, params)

    def carry_out(
        self,
        trace: op_trace.OpTrace,
        plan: OpPlan,
        primitive: Any,
        args: Sequence[Any],
        params: dict[str, Any],
    ) -> Any:
        """A contraction, as planned."""
        if plan.reason is not None:
            return trace.bind(primitive, args, params)
        ops = {"conv_general_dilated": self._convolution, "ragged_dot": self._ragged}
        return trace.outside(ops.get(plan.op, self._dot), plan, args, params, trace.layer or ())

    def lookup(
        self, trace: op_trace.OpTrace, primitive: Any, args: Sequence[Any], params: dict[str, Any]
    ) -> Any:
        (row_axis,) = params["dimension_numbers"].start_index_map
        plan = self._settled(op_plan.plan_lookup(self.provider, args[0], row_axis), args)
        self._record(plan, args, params)
        weight, indices = args
        if not weight.is_quantized:
            return trace.bind(primitive, args, params)
        rows = trace.outside(weight_view.look_up, weight.payload, indices, params)
        return trace.outside(dense, rows, weight.dtype)

    def _settled(self, plan: OpPlan, args: Sequence[Any]) -> OpPlan:
        """The plan, given what the weight really holds."""
        if plan.weight_side is None or plan.reason is not None:
            return plan
        weight: WeightTracer = args[plan.weight_side]
        if weight.is_quantized:
            return plan
        if self.strict:
            raise ValueError(
                "It seems you're feeding an unquantized param to a quantized model: "
                f"{weight.info.full_path!r} is {weight.payload.dtype}{list(weight.payload.shape)}. Quantize "
                "the params first: qwix.quantize_params(params, "
                "jax.eval_shape(quantized_model.init, rng, *inputs)['params'])."
            )
        return plan.keep_float("the weight was not found at conversion; give quantize_model sample inputs")

    def _record(self, plan: OpPlan, args: Sequence[Any], params: dict[str, Any]) -> None:
        key = plan.path, plan.op_id
        known = self.provider.records.get(key)
        if known is None or (known.is_quantized and known.dynamic_because != plan.dynamic_because):
            how = None if plan.weight_side is None else plan.weight_how
            adapter = None if plan.weight_side is None else args[plan.weight_side].adapter
            spec = adapter.spec if isinstance(adapter, Adapter) else None
            record = make_record(plan, args, params, how, adapter=spec)
            quality = None if known is None else known.sqnr_db
            self.provider.records[key] = dataclasses.replace(record, sqnr_db=quality)

    def _operands(
        self,
        plan: OpPlan,
        args: Sequence[Any],
        params: dict[str, Any],
        layer: Sequence[Any],
    ) -> tuple[list[Any], qarray.HowToQuantize | None]:
        """Both sides as the op gets them (a weight as it lies), and how the kernel must quantize the
        activation, if it's left to it.
        """
        operands: list[Any] = [a.stored if isinstance(a, WeightTracer) else a for a in args[:2]]
        act_how = None
        for side, how in enumerate(plan.act_hows):
            if how is None:
                continue
            live = ragged_rows.live(args, params, side) if plan.op == "ragged_dot" else None
            if plan.rule is not None and plan.is_static:
                where = plan.path, f"{plan.op_id}_{_SIDES[side]}"
                operands[side] = self._static(operands[side], how, plan.rule, where, layer, live)
            elif op_plan.on_the_way(plan, params):
                act_how = how
            else:
                x = ragged_rows.without_dead(operands[side], live)
                operands[side] = self.provider._qarray.quantize(x, how)
        return operands, act_how

    def _dot(
        self, plan: OpPlan, args: Sequence[Any], params: dict[str, Any], layer: Sequence[Any]
    ) -> jax.Array:
        """A dot in the parent trace."""
        dot = self._arranged(plan, args, params, layer)
        return dot.turned_back(self._compute(dot.operands, dot.options))

    def _compute(self, operands: Sequence[Any], options: dict[str, Any]) -> jax.Array:
        """A dot as it was arranged."""
        if "out_sharding" in options or self.provider._dot_general_fn is not dot_general.dot_general:
            return self.provider._dot_general_fn(*operands, **options)
        return once(dot_general.dot_general, dict(zip(_SIDES, operands, strict=True)), options)

    def _arranged(
        self, plan: OpPlan, args: Sequence[Any], params: dict[str, Any], layer: Sequence[Any]
    ) -> Arranged:
        """A weight goes to the right side, which is the one that kernels want it on."""
        operands, act_how = self._operands(plan, args, params, layer)
        dnums, sharding, back = params["dimension_numbers"], params.get("out_sharding"), None
        if plan.weight_side == 0 and sharding is None:
            back = swap_back(dnums, args)
            operands, dnums = operands[::-1], swapped(dnums)
        elif plan.weight_side == 0 and act_how is not None:
            operands[1], act_how = self.provider._qarray.quantize(operands[1], act_how), None
        if isinstance(operands[1], turned.Turned):
            operands[1], dnums = turned.dot_rhs(operands[1], dnums)
        operands = [*map(turned.canonical, operands)]
        options = {
            "dimension_numbers": dnums,
            "precision": swapped_precision(params["precision"]) if back else params["precision"],
            "preferred_element_type": result_dtype(args, params),
        }
        if act_how is not None:
            options["act_how"] = act_how
        if sharding is not None:
            options["out_sharding"] = sharding
        return Arranged(operands, options, back)

    def _convolution(
        self, plan: OpPlan, args: Sequence[Any], params: dict[str, Any], layer: Sequence[Any]
    ) -> jax.Array:
        """A convolution in the parent trace."""
        operands, act_how = self._operands(plan, args, params, layer)
        options = params | {"preferred_element_type": result_dtype(args, params)}
        if act_how is not None:
            options["act_how"] = act_how
        operands, conv = [*map(turned.canonical, operands)], self.provider._conv_general_dilated_fn
        if params["out_sharding"] is not None or conv is not conv_general.conv_general_dilated:
            return conv(*operands, **options)
        return once(conv, dict(zip(_SIDES, operands, strict=True)), options)

    def _ragged(
        self, plan: OpPlan, args: Sequence[Any], params: dict[str, Any], layer: Sequence[Any]
    ) -> jax.Array:
        """A ragged dot in the parent trace."""
        operands, act_how = self._operands(plan, args, params, layer)
        numbers = params["ragged_dot_dimension_numbers"]
        if isinstance(operands[1], turned.Turned):
            operands[1], numbers = turned.ragged_rhs(operands[1], numbers)
        operands = [*map(turned.canonical, operands)]
        groups = {"group_sizes": args[2], "group_offset": params["group_offset"]}
        options = {
            "dimension_numbers": numbers,
            "precision": params["precision"],
            "preferred_element_type": result_dtype(args, params),
            "act_how": act_how,
        }
        arrays = dict(zip(_SIDES, operands, strict=True)) | groups
        return once(ragged_dot.ragged_dot_general, arrays, options)

    def _static(
        self,
        x: jax.Array,
        how: qarray.HowToQuantize,
        rule: qconfig.QuantizationRule,
        where: tuple[str, str],
        layer: Sequence[Any],
        live: jax.Array | None,
    ) -> qarray.QArray:
        scale, zero_point = self.scales.get(*where, lambda: calibrated_act(x, how, rule, live), how, layer)
        return self.provider._qarray.quantize_with_scale_zero_point(x, how.qtype, scale, zero_point)


def once(op: Callable[..., jax.Array], arrays: dict[str, Any], options: dict[str, Any]) -> jax.Array:
    """`op`, traced once for all layers of one shape."""
    return _traced(op, arrays, tuple(options.items()), tuning.ambient())


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _traced(
    op: Callable[..., jax.Array], arrays: dict[str, Any], options: tuple[tuple[str, Any], ...], config: Any
) -> jax.Array:
    """`config` is part of what is traced for."""
    with tuning.use(config):
        return op(**arrays, **dict(options))


def quantize_act(
    array: jax.Array,
    how: qarray.HowToQuantize,
    rule: qconfig.QuantizationRule,
    act_name: str,
    *,
    _qarray_module: Any = qarray,
) -> qarray.QArray:
    """An activation, quantized with a scale for this very input. `act_name` is for errors.

    Raises:
      ValueError: the rule wants a static scale, which belongs to a model: it's found by `quantize_model`.
    """
    if rule.act_static_scale:
        raise ValueError(f"{act_name!r} has a static scale, which only a call of a quantized model knows.")
    return _qarray_module.quantize(materialize(array), how)
