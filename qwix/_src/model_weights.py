"""Finding the weights of a model: every param that an op eats, and how it must be quantized for that op.

The model runs once, abstractly (nothing is computed), with its params as tracers that remember where
they come from. No array is made or copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from qwix_kernels.problem import LowRank, MatmulProblem
from qwix_kernels.ragged_matmul import GmmProblem

from qwix._src import double_scale, op_plan, op_trace, prepack, qconfig, weight_steps, weight_view
from qwix._src.adapter import AdapterSpec
from qwix._src.core import conv_general, dot_general, qarray, ragged_kernel
from qwix._src.dot_sides import swapped
from qwix._src.op_plan import OpPlan
from qwix._src.report_records import OpRecord, device_bytes
from qwix._src.turned import Turned
from qwix._src.weight import WeightInfo, WeightTracer
from qwix._src.with_aux import WithAux

OP_NAMES = {"ragged_dot_general": "ragged_dot"}
EINSUM_SCOPE = "qwix_einsum"

Key = tuple[str | int, ...]  # path of the module, then the param's name


@dataclasses.dataclass
class Found:
    """A param that will be quantized."""

    info: WeightInfo
    how: qarray.HowToQuantize  # in the param's layout
    records: list[tuple[str, str]]  # keys of the records of the ops that eat it
    lifted: tuple[int, ...] = ()  # axes of the param that a scan cuts: each entry needs its own scales
    op: str = "dot_general"  # the first that eats it, which decides how it may be stored
    cut: tuple[int, ...] = ()  # axes that scans and vmaps cut, or may cut


def op_name(primitive: Any) -> str:
    """The name by which rules know the op that is being processed."""
    if primitive.name == "dot_general" and EINSUM_SCOPE in op_trace.scope_names():
        return "einsum"
    return OP_NAMES.get(primitive.name, primitive.name)


def named_einsum(*args: Any, **kwargs: Any) -> Any:
    """`jax.numpy.einsum`, whose dots `op_name` recognizes."""
    with jax.named_scope(EINSUM_SCOPE):
        return jnp.einsum(*args, **kwargs)


class Discovery:
    """The handler of the abstract run. Its results: the weights to quantize are `found`, and `adapters` has
    those that weights get, quantized or not.
    """

    by_layer = unrolls = counts_loops = trains = False

    def __init__(self, provider: qconfig.QuantizationProvider):
        self.provider = provider
        self.emitted: dict[Any, Any] = {}
        self.params: dict[int, Any] = {}
        self.found: dict[Key, Found] = {}
        self.adapters: dict[Key, tuple[WeightInfo, AdapterSpec]] = {}

    def bookmark(self) -> Callable[[], None]:
        return qconfig.bookmark()

    def tagged(self, trace: op_trace.OpTrace, args: Sequence[Any], params: dict[str, Any]) -> Any:
        return op_trace.tagged_weight(trace, args, params)

    def contraction(
        self, trace: op_trace.OpTrace, primitive: Any, args: Sequence[Any], params: dict[str, Any]
    ) -> Any:
        plan = op_plan.plan_contraction(self.provider, op_name(primitive), args, params)
        self._note(plan, args, params)
        return trace.bind(primitive, args, params)

    def lookup(
        self, trace: op_trace.OpTrace, primitive: Any, args: Sequence[Any], params: dict[str, Any]
    ) -> Any:
        (row_axis,) = params["dimension_numbers"].start_index_map
        self._note(op_plan.plan_lookup(self.provider, args[0], row_axis), args, params)
        return trace.bind(primitive, args, params)

    def opaque(self, name: str, args: Sequence[Any]) -> None:
        note_opaque(self.provider, name, args)

    def _note(self, plan: OpPlan, args: Sequence[Any], params: dict[str, Any]) -> None:
        weight = None if plan.weight_side is None else args[plan.weight_side]
        how = adapter = None
        if weight is not None:
            adapter = self._note_adapter(plan, weight, args, params)
        if weight is not None and plan.weight_how is not None:
            wanted = plan.weight_how
            plan, how = (plan, wanted) if weight.is_quantized else self._add(plan, weight, wanted)
        record = make_record(plan, args, params, how, adapter=adapter)
        self.provider.records.setdefault((plan.path, plan.op_id), record)

    def _note_adapter(
        self, plan: OpPlan, weight: WeightTracer, args: Sequence[Any], params: dict[str, Any]
    ) -> AdapterSpec | None:
        """The first op that eats a weight decides about its adapter."""
        key = (*(weight.info.path or ()), weight.info.name)
        if key not in self.adapters:
            spec = self.provider.adapter_of(plan, weight, args, params)
            if spec is not None:
                self.adapters[key] = dataclasses.replace(weight.info, rule=plan.rule), spec
        return self.adapters[key][1] if key in self.adapters else None

    def _add(
        self, plan: OpPlan, weight: WeightTracer, wanted: qarray.HowToQuantize
    ) -> tuple[OpPlan, qarray.HowToQuantize | None]:
        """Settles how the weight is quantized; the first op that eats it decides, and others must do with
        that.
        """
        shape = weight.steps[0].old if weight.steps else tuple(weight.shape)
        try:
            how = weight_view.to_param(wanted, weight.steps, weight.shape)
        except ValueError as error:
            return plan.keep_float(f"the weight's scales can't follow it here: {error}"), None
        key = (*(weight.info.path or ()), weight.info.name)
        found = self.found.get(key)
        if found is None:
            lifted = weight_view.lifted(weight.steps)
            stacked = weight.info.mapped or (not lifted and weight_view.is_stacked(weight.steps))
            info = dataclasses.replace(weight.info, rule=plan.rule, mapped=stacked, vmapped=0)
            found = self.found[key] = Found(info, how, [], lifted, plan.op, _cut(weight, how))
        elif weight_view.runs_of(found.how, shape) != weight_view.runs_of(how, shape):
            return self._conflict(plan, weight, "with scales that don't suit this one"), None
        elif found.how.qtype != how.qtype:
            return self._conflict(plan, weight, f"to {found.how.qtype}"), None
        found.records.append((plan.path, plan.op_id))
        return plan, found.how

    def _conflict(self, plan: OpPlan, weight: WeightTracer, what: str) -> OpPlan:
        self.provider._warn_once(
            f"The op {plan.op_id} in {plan.path!r} stays float: its weight {weight.info.full_path!r} is "
            f"quantized for another op, {what}. Give one of the ops a rule without weight_qtype, or each a "
            "param of its own."
        )
        return plan.keep_float(f"the weight is quantized for another op, {what}")


def make_record(
    plan: OpPlan,
    args: Sequence[Any],
    params: dict[str, Any],
    how: qarray.HowToQuantize | None,
    *,
    trains: bool = False,
    adapter: AdapterSpec | None = None,
) -> OpRecord:
    """What a report says of the op. `how` is the weight's, in the param's layout; `trains`: the param stays
    float; `adapter` is the weight's.
    """
    weight = None if plan.weight_side is None else args[plan.weight_side]
    facts = {} if weight is None else _weight_facts(weight, None if trains else how)
    if how is not None and not trains and weight is not None and getattr(plan.rule, "double_quantize", False):
        facts["device_bytes_after"] -= _saved(weight, how)
    quantized_act = next((h.qtype for h in plan.act_hows if h is not None), None)
    record = OpRecord(
        path=plan.path,
        op=plan.op,
        op_id=plan.op_id,
        lhs_shape=tuple(args[0].shape),
        rhs_shape=tuple(args[1].shape),
        rule=plan.rule,
        how=how if plan.reason is None else None,
        act_qtype=quantized_act,
        problem=_with_adapter(_problem(plan, args, params, fuses=not trains), adapter),
        bwd_qtype=getattr(plan.rule, "bwd_qtype", None) if trains and plan.reason is None else None,
        adapter_rank=None if adapter is None else adapter.rank,
        trains=trains,
        reason=plan.reason,
        dynamic_because=plan.dynamic_because,
        **facts,
    )
    return _k_major(record) if weight is not None and isinstance(weight.stored, Turned) else record


def note_stored(
    provider: qconfig.QuantizationProvider, keys: Sequence[tuple[str, str]], weight: WithAux[Any]
) -> None:
    """Says in the records of the ops that eat a weight that it's stored K-major, if it is."""
    for key in keys if prepack.is_k_major(weight.array) else ():
        provider.records[key] = _k_major(provider.records[key])


def _k_major(record: OpRecord) -> OpRecord:
    problem = record.problem
    if isinstance(problem, MatmulProblem):
        problem = dataclasses.replace(problem, rhs_transposed=True)
    elif isinstance(problem, GmmProblem):
        product = dataclasses.replace(problem.product, rhs_transposed=True)
        problem = dataclasses.replace(problem, product=product)
    return dataclasses.replace(record, problem=problem, k_major=record.is_quantized)


def _weight_facts(weight: WeightTracer, how: qarray.HowToQuantize | None) -> dict[str, Any]:
    shape = weight.steps[0].old if weight.steps else tuple(weight.shape)
    dtype = weight.stored.dtype
    before = after = device_bytes(jax.ShapeDtypeStruct(shape, dtype))
    if how is not None:
        after = device_bytes(op_plan.quantized_shape(shape, dtype, how))
    return {
        "weight": weight.info.name,
        "weight_shape": shape,
        "weight_dtype": str(dtype),
        "device_bytes_before": before,
        "device_bytes_after": after,
    }


def _cut(weight: WeightTracer, how: qarray.HowToQuantize) -> tuple[int, ...]:
    """The axes of a param that scans and vmaps cut, or may cut.

    Where layers are under vmap, ops may show that only as one feature axis more, so the first axis of three
    counts as theirs if it isn't summed over. Where moves hide it, it can be any that has a scale for each
    index.
    """
    steps, lifted = weight_steps.of_layer(weight.steps), weight_view.lifted(weight.steps)
    if weight_view.is_stacked(steps) or (weight.info.mapped and steps):
        return tuple(sorted({*lifted, *how.channelwise_axes}))
    stored = weight.steps[0].old if weight.steps else tuple(weight.shape)
    rest = [axis for axis in range(len(stored)) if axis not in lifted]
    first = rest[: max(weight.info.vmapped, len(rest) > 2)]
    return tuple(sorted({*lifted, *(axis for axis in first if axis in how.channelwise_axes)}))


def _saved(weight: WeightTracer, how: qarray.HowToQuantize) -> int:
    """Bytes less where the scales are quantized, too."""
    shape = weight.steps[0].old if weight.steps else tuple(weight.shape)
    scale = op_plan.quantized_shape(shape, weight.stored.dtype, how).scale
    return device_bytes(scale) - double_scale.scale_bytes(scale.shape, scale.dtype, _cut(weight, how))


def note_opaque(provider: qconfig.QuantizationProvider, name: str, args: Sequence[Any]) -> None:
    """Notes an op whose contractions nobody looks at, once per weight that it gets."""
    weights: list[Any] = [a for a in args if isinstance(a, WeightTracer)]
    for weight in weights or [None]:
        path = op_plan.module_path(weight)
        rule, op_id = provider._get_current_rule_and_op_id(name, path=path)
        facts = {} if weight is None else _weight_facts(weight, None)
        record = OpRecord(
            path=path,
            op=name,
            op_id=str(op_id),
            rule=rule,
            reason=f"what is inside {name} stays float",
            **facts,
        )
        provider.records.setdefault((path, str(op_id)), record)


def _problem(plan: OpPlan, args: Sequence[Any], params: dict[str, Any], *, fuses: bool) -> Any:
    """What a kernel will be given; None for what is no kernel's, or stays float.

    `fuses`: the kernel quantizes the activation, if its scale is dynamic.
    """
    if plan.reason is not None or plan.op == "take":
        return None
    sides: list[Any] = [jax.ShapeDtypeStruct(tuple(a.shape), a.dtype) for a in args[:2]]
    dynamic: dict[int, qarray.HowToQuantize] = {}
    for side, how in enumerate(plan.act_hows):
        if how is not None and fuses and op_plan.on_the_way(plan, params):
            dynamic[side] = how
        elif how is not None:
            sides[side] = op_plan.quantized_shape(sides[side].shape, sides[side].dtype, how)
    if plan.weight_how is not None and plan.weight_side is not None:
        weight = sides[plan.weight_side]
        sides[plan.weight_side] = op_plan.quantized_shape(weight.shape, weight.dtype, plan.weight_how)
    act_how = next(iter(dynamic.values()), None)
    if plan.op == "conv_general_dilated":
        options = {name: value for name, value in params.items() if name != "out_sharding"}
        return conv_general.conv_problem(*sides, **options, act_how=act_how)
    if plan.op == "ragged_dot":
        return _ragged_problem(sides, args, params, act_how)
    dnums = params["dimension_numbers"]
    if plan.weight_side == 0:
        sides, dnums = sides[::-1], swapped(dnums)
    return dot_general.matmul_problem(
        sides[0], sides[1], dnums, act_how=act_how, preferred_element_type=params["preferred_element_type"]
    )


def _with_adapter(problem: Any, adapter: AdapterSpec | None) -> Any:
    """The problem that a dot with an adapter is: the low-rank path is part of it."""
    if adapter is None or not isinstance(problem, MatmulProblem):
        return problem
    dtype = problem.lhs.dtype
    return dataclasses.replace(problem, low_rank=LowRank(adapter.rank, adapter.scaling, dtype, dtype))


def _ragged_problem(sides: Sequence[Any], args: Sequence[Any], params: dict[str, Any], act_how: Any) -> Any:
    numbers = params["ragged_dot_dimension_numbers"]
    counted = params["group_offset"] is not None or not numbers.rhs_group_dimensions
    lhs, rhs = sides
    return ragged_kernel.ragged_problem(
        lhs,
        rhs,
        numbers,
        groups=args[2].shape[-1] if counted else None,
        act_how=act_how,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
