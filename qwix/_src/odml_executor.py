"""Computing a recorded model as its plan says.

A contraction takes what is fused into it along: the factors of a batch norm go into its weight before that is
quantized, what is added becomes its bias, and the activation function comes last. That is what LiteRT's
converter makes one integer op of.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax._src import core as jcore

from qwix._src import odml_contraction, odml_forms, odml_graph, odml_patterns, odml_quantizers, odml_records
from qwix._src.odml_graph import Act, GraphTrace, Node, Value
from qwix._src.odml_inner import NodeInner
from qwix._src.odml_place import Place
from qwix._src.odml_plan import Plan, Request, Step
from qwix._src.odml_quantizers import Scale
from qwix._src.op_states import OpStates


@dataclasses.dataclass
class Call:
    """One call of a model.

    Attributes:
      provider: whose rules.
      states: the statistics.
      make_quantizer: (states, layer, emitted) -> Quantizer.
      converts: scales are numbers, scans are unrolled, floats are float32.
      known: {id of an array: (array, what to take in its place)}.
      emitted: {(module path, name): statistics to store}.
    """

    provider: Any
    states: OpStates
    make_quantizer: Callable[..., Any]
    converts: bool
    known: Mapping[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    emitted: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def run(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Any],
        *,
        output_op: str | None = None,
        around: Place | None = None,
        avals: Sequence[Any] | None = None,
        layer: tuple[Any, ...] = (),
        leaked: Callable[[], tuple[list[Any], Callable[[list[Any]], None]]] | None = None,
    ) -> Any:
        """fn(*inputs), whose leaves are arrays that everything depends on.

        Args:
          output_op: what rules call its outputs, where these are the model's.
          around: the place of a program in a model.
          avals: what the program takes its inputs for, which are arrays then.
          layer: the step of each scan around it.
          leaked: called after fn: values that it left elsewhere, and what puts computed ones there.
        """
        is_call = self.provider.is_call
        with jcore.take_current_trace() as parent:
            trace = GraphTrace(parent, is_call, around, self.known, wide=self.converts)
            with jcore.set_current_trace(trace):
                out = fn(*_inputs(trace, inputs, avals))
            left, put = leaked() if leaked else ([], lambda values: None)
            leaves, tree = jax.tree.flatten(out)
            folding = jax.ensure_compile_time_eval() if self.converts else contextlib.nullcontext()
            with jcore.set_current_trace(parent), folding:
                values = self._compute(trace, leaves, left, output_op, around, layer)
                put(values[len(leaves) :])
                return jax.tree.unflatten(tree, values[: len(leaves)])

    def _compute(
        self,
        trace: GraphTrace,
        leaves: list[Any],
        left: list[Any],
        output_op: str | None,
        around: Place | None,
        layer: tuple[Any, ...],
    ) -> list[Any]:
        leaves, left = odml_patterns.rewrite(trace, leaves, left)
        needed = set(odml_graph.reachable([*leaves, *left]))
        nodes = [node for node in trace.nodes if node in needed]
        inputs = [node for node in needed if node.op == "input"]
        plan = Plan(self.provider, [*inputs, *nodes], leaves, left, output_op, around.path if around else "")
        odml_records.note(self.provider, plan)
        quantizer = self.make_quantizer(self.states, layer, self.emitted)
        values = Values(self, plan, quantizer, layer)
        outs = [values.read(o, r) for o, r in zip(leaves, plan.output_reads, strict=True)]
        return [*outs, *(values.read(o, None) for o in left)]


def _inputs(trace: GraphTrace, inputs: Sequence[Any], avals: Sequence[Any] | None) -> list[Any]:
    if avals is not None:
        return [trace.input(x, aval) for x, aval in zip(inputs, avals, strict=True)]
    mark = lambda x: trace.input(x, of_model=True) if is_array(x) else x
    return jax.tree.map(mark, list(inputs), is_leaf=lambda x: is_array(x) or isinstance(x, nnx.Pytree))


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)


class Values:
    """The values of one graph, each computed once."""

    def __init__(self, call: Call, plan: Plan, quantizer: Any, layer: tuple[Any, ...]):
        self.call, self.plan, self.quantizer, self.layer = call, plan, quantizer, layer
        self.results: dict[Node, list[Any]] = {}
        self.quantized: dict[tuple[Value, Request], Any] = {}
        self.scales: dict[Request, Scale] = {}

    def read(self, x: Any, request: Request | None) -> Any:
        """An arg of an op, as it is or quantized."""
        if not isinstance(x, Act):
            return odml_graph.widened(x) if self.call.converts else x
        if request is None:
            return self.result(x.key)
        return self.fake_quant(x.key, request)

    def result(self, value: Value) -> Any:
        """A value as its op makes it."""
        node, index = value
        if node not in self.results:
            for before in self._pending(node):
                self.results[before] = self._run(before)
        return self.results[node][index]

    def _pending(self, node: Node) -> list[Node]:
        """What must be computed first, and the node: Python's stack is not deep enough for a deep model."""
        done: dict[Node, None] = {}
        stack = [(node, iter(self._needs(node)))]
        while stack:
            top, rest = stack[-1]
            following = next((n for n in rest if n not in self.results and n not in done), None)
            if following is None:
                done[top] = None
                stack.pop()
            else:
                stack.append((following, iter(self._needs(following))))
        return list(done)

    def _needs(self, node: Node) -> list[Node]:
        """The nodes whose own results this one reads."""
        step = self.plan.steps.get(node)
        if step is None:
            return []
        head = step.chain[0] if step.chain else node
        reads = self.plan.steps[head].reads
        found: list[Node] = []
        for arg, request in zip(head.args, reads, strict=True):
            if isinstance(arg, Act):
                found += [arg.node] if request is None else self._sources(arg.key, request)
        return found

    def _sources(self, value: Value, request: Request) -> list[Node]:
        """The nodes whose results a quantized value is made of."""
        found, stack = [request.value[0]], [value]
        while stack:
            node, _ = stack.pop()
            if not self._hands_on((node, 0), request):
                found.append(node)
                continue
            moved = self.plan.steps[node].spec.operands_of(node)
            for i, arg in enumerate(node.args):
                if isinstance(arg, Act) and i in moved and odml_graph.is_float(arg):
                    stack.append(arg.key)
                elif isinstance(arg, Act):
                    found.append(arg.node)
        return found

    def _hands_on(self, value: Value, request: Request) -> bool:
        """Whether a value is quantized by quantizing what its op moves."""
        node = value[0]
        step = self.plan.steps.get(node)
        if step is None or step.spec.kind != "moves":
            return False
        return node is not request.value[0] or len(self.plan.moved(node)) > 1

    def _run(self, node: Node) -> list[Any]:
        step = self.plan.steps.get(node)
        if step is None:
            return list(node.compute())
        if step.chain:
            return [self._chain(step)]
        if step.spec.kind == "nested":
            args = [self.read(a, r) for a, r in zip(node.args, step.reads, strict=True)]
            return odml_contraction.nested(self.call, node, args, self.layer)
        quantizes = any(read is not None for read in step.reads)
        args = [self._operand(node, i, quantizes) for i in range(len(node.args))]
        return self.form(node, args) if quantizes else list(node.compute(*args))

    def form(self, node: Node, args: Sequence[Any]) -> list[Any]:
        """An op that a rule quantizes, of what it reads, as LiteRT computes it."""
        step = self.plan.steps[node]
        if step.spec.form is None:
            return list(node.compute(*args))
        return list(step.spec.form(NodeInner(self, node, step), node.compute, node.params, *args))

    def moved(self, x: Any, step: Step, side: int) -> Any:
        """What is made of an arg by moving its values: in a converted program it says its scale again."""
        request = step.reads[side]
        if request is None or not self.call.converts:
            return x
        return self.quantizer.apply(x, self.scale(request))

    def _operand(self, node: Node, i: int, quantizes: bool) -> Any:
        """An arg of an op other than a contraction: constants beside quantized values are quantized too."""
        step, x = self.plan.steps[node], node.args[i]
        if (
            isinstance(x, Act)
            or not quantizes
            or step.spec.form is not None  # which quantizes its constants itself
            or i not in step.spec.operands_of(node)
            or not odml_graph.is_float(x)
        ):
            return self.read(x, step.reads[i])
        rule: Any = step.rule
        x = jnp.asarray(self.read(x, None), node.outs[0].dtype if not self.call.converts else None)
        scale = self.quantizer.of_weight(x, rule.act_qtype, rule.act_calibration_method, None)
        return self.quantizer.apply(x, scale)

    def _chain(self, step: Step) -> Any:
        head, *rest = step.chain
        first = self.plan.steps[head]
        args = [self.read(a, r) for a, r in zip(head.args, first.reads, strict=True)]
        return odml_contraction.fused(head, first, args, rest, self)

    def fake_quant(self, value: Value, request: Request) -> Any:
        """A value, quantized; of what only moves values, what it moves."""
        key = value, request
        if key not in self.quantized:
            self.quantized[key] = self._fake_quant(value, request)
        return self.quantized[key]

    def _fake_quant(self, value: Value, request: Request) -> Any:
        node, index = value
        if not self._hands_on(value, request):
            x = self.result(value)
            if request.before is not None:
                self.scale(request)
                x = self.fake_quant(value, request.before)
                return self._requantized(x, self.scale(request.before), self.scale(request))
            return self.quantizer.apply(x, self.scale(request))
        step = self.plan.steps[node]
        moved = step.spec.operands_of(node)
        scale = self.scale(request)
        args = []
        for i, arg in enumerate(node.args):
            if i not in moved or not odml_graph.is_float(arg):
                args.append(self.read(arg, None))
            elif isinstance(arg, Act) and len(moved) > 1 and (own := self._own(arg, request)) is not None:
                args.append(self._requantized(self.fake_quant(arg.key, own), self.scale(own), scale))
            elif isinstance(arg, Act):
                args.append(self.fake_quant(arg.key, request))
            else:
                args.append(arg if step.spec.form else self.quantizer.apply(arg, scale))
        if step.spec.form is None:
            out = node.compute(*args)[index]
        else:
            inner = NodeInner(self, node, step, scale, request.rule)
            out = step.spec.form(inner, node.compute, node.params, *args)[index]
        return self.quantizer.apply(out, scale) if self.call.converts or step.spec.rounds else out

    def _requantized(self, x: Any, before: Scale, scale: Scale) -> Any:
        """What is on one grid, on another. LiteRT's converter forgets the first where nothing is between."""
        if not self.call.converts:
            return self.quantizer.apply(x, scale)
        flat = jnp.reshape(x, (1, -1) if x.ndim == 1 else (-1,))
        flat = self.quantizer.apply(self.quantizer.apply(flat, before), scale)
        return self.quantizer.apply(jnp.reshape(flat, x.shape), scale)

    def _own(self, arg: Act, request: Request) -> Request | None:
        """The request of a value that has another than this one."""
        own = self.plan.requests.get(self.plan.source(arg.key))
        return own[0] if own and request not in own else None

    def scale(self, request: Request) -> Scale:
        if request not in self.scales:
            self.scales[request] = self.quantizer.of_request(request, lambda: self._measured(request))
        return self.scales[request]

    def _measured(self, request: Request) -> Any:
        """What a request's statistics are taken of."""
        node, index = request.value
        if node.op != "select_n":
            return self.result(request.value)
        constants = frozenset(i for i, a in enumerate(node.args) if not isinstance(a, Act))
        args = [self.read(a, None) for a in node.args]
        qtype = odml_quantizers.qtype_name(request.rule.act_qtype)
        return odml_forms.select_range(qtype, node.compute, constants, *args)[index]
