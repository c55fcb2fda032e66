"""Who quantizes what in a recorded model: decided from static facts, the same in training and conversion.

A value is quantized where it is first asked for, by an op that a rule quantizes; until then a bias, the
constants of a batch norm and an activation function can be fused into the contraction that makes it. The
rule of the op that makes a value decides how, else that of the op that reads it. Whoever moves a value
without computing (a reshape, a max-pool) hands the wish on to what it moves, so both share one scale.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwix._src import odml_graph, qconfig
from qwix._src.core import numerics
from qwix._src.odml_graph import Act, Node, Value
from qwix._src.odml_ops import OpSpec

Range = tuple[float, float]


@dataclasses.dataclass(eq=False)
class Request:
    """One quantization of a value, which all share that want it so.

    Attributes:
      value: of which statistics are taken.
      path, name: of these statistics: the module of who asked first, and its op.
      rule: says how.
      fixed: the range, if that is not for statistics to find.
    """

    value: Value
    path: str
    name: str
    rule: qconfig.QuantizationRule
    fixed: Range | None
    before: Request | None = None  # another one of the same value, whose result this one reads


@dataclasses.dataclass(eq=False)
class Step:
    """What happens to one node.

    Attributes:
      spec: what kind of op it is.
      rule: that matched; None: no rule quantizes the op.
      op_id: its name in the module.
      reads: for each arg how it's read: by a request, or (None) as it is.
      reason: why it stays float; None if it doesn't.
      chain: what is fused into a contraction, from it to this node.
      dynamic: the activation is quantized by the range of each input.
    """

    spec: OpSpec
    rule: qconfig.QuantizationRule | None
    op_id: str
    reads: list[Request | None]
    reason: str | None = None
    chain: tuple[Node, ...] = ()
    dynamic: bool = False


@dataclasses.dataclass
class Facts:
    """What is known of a value: the rule of its maker, its range, and what can still be fused into it."""

    rule: qconfig.QuantizationRule | None = None
    fixed: Range | None = None
    chain: tuple[Node, ...] = ()  # a contraction and what is fused into it; empty: nothing can be
    closed: bool = False  # only moves may follow
    trains: bool = False  # in a batch norm that takes statistics, or fused into one: computed as it is


class Plan:
    """The decisions about one graph.

    Args:
      provider: whose rules.
      nodes: those that the outputs need, in order.
      outputs: Acts, and other arrays.
      output_op: what rules call the outputs, if those are the model's.
      ranges: of the model's inputs and outputs, if these are fixed.
      inputs: the nodes that are inputs of the model.
    """

    def __init__(
        self,
        provider: Any,
        nodes: Sequence[Node],
        outputs: Sequence[Any],
        left: Sequence[Any],
        output_op: str | None,
        path: str,
    ):
        self.provider = provider
        self.nodes = nodes
        self.steps: dict[Node, Step] = {}
        self.facts: dict[Value, Facts] = {}
        self.requests: dict[Value, list[Request]] = {}
        self.path = path
        self.readers = Counter(a.key for n in nodes for a in n.args if isinstance(a, Act))
        self.readers.update(o.key for o in (*outputs, *left) if isinstance(o, Act))
        for node in nodes:
            self._add(node)
        self.output_reads = [self._output(o, i, output_op) for i, o in enumerate(outputs)]

    def _add(self, node: Node) -> None:
        if node.op == "input":
            fixed = self.provider.fixed_range_for_inputs if node.params.get("of_model") else None
            self.facts[node, 0] = Facts(fixed=fixed)
            return
        spec = self.provider.spec_of(node)
        floats = any(odml_graph.is_float(a) for a in (*node.args, *node.outs))
        if spec.kind == "ignore" or not floats:
            self.steps[node] = Step(spec, None, "", [None] * len(node.args))
            for i in range(len(node.outs)):
                self.facts[node, i] = Facts()
            return
        rule, op_id = self.provider._get_current_rule_and_op_id(spec.name, path=node.place.path)
        quantizes = rule is not None and (rule.act_qtype is not None or rule.weight_qtype is not None)
        step = Step(spec, rule if quantizes else None, str(op_id), [None] * len(node.args))
        self.steps[node] = step
        if self._is_statistics(node):
            self._inside(node, step)
            return
        refused = spec.kind in ("compute", "fuses") and spec.refusal(step.rule) is not None
        getattr(self, "_float" if refused else f"_{spec.kind}")(node, step)

    def _is_statistics(self, node: Node) -> bool:
        """Whether it is a part of a batch norm that takes statistics of its own input, or what follows."""
        if node.place.layer != "BatchNorm":
            return False
        acts = [a for a in node.args if isinstance(a, Act)]
        alone = len(acts) == 1 and self.readers[acts[0].key] == 1 and node.op in _AFFINE
        return not alone or any(self.facts[a.key].trains for a in acts)

    def _inside(self, node: Node, step: Step) -> None:
        """It stays float, as it's a bias and a factor when the model is converted."""
        given = [self.facts[a.key] for a in node.args if isinstance(a, Act) and odml_graph.is_float(a)]
        first = next((f for f in given if f.chain), given[0] if given else Facts())
        for i in range(len(node.outs)):
            self.facts[node, i] = Facts(first.rule, None, first.chain, trains=True)

    # Each kind of op: fills in the step, and the facts of what it makes.

    def _contraction(self, node: Node, step: Step) -> None:
        if step.rule is not None and (reason := _no_kernel(node)) is not None:
            step.rule, step.reason = None, reason
            self.provider.note_break(node.place.path, step.spec.name, step.op_id, reason)
        rule = step.rule
        acts = [i for i in (0, 1) if isinstance(node.args[i], Act)]
        if rule is not None and rule.act_qtype is not None and rule.act_static_scale:
            for i in acts:
                step.reads[i] = self._ask(node.args[i], rule, node, f"{step.op_id}_{_SIDES[i]}")
        if rule is None:
            step.reason = step.reason or "no rule quantizes it"
        elif len(acts) == 1 and rule.weight_qtype is None:
            step.reason = "its rule has no weight_qtype"
        elif rule.act_qtype is not None and not rule.act_static_scale:
            step.dynamic = len(acts) == 1
            step.reason = None if step.dynamic else "dynamic ranges are for activations times weights"
        elif rule.act_qtype is None and len(acts) == 2:
            step.reason = "its rule has no act_qtype"
        out = Facts(rule=_wish(rule))
        if rule is not None and len(acts) == 1:
            out.chain = step.chain = (node,)
        self.facts[node, 0] = out

    def _fuses(self, node: Node, step: Step) -> None:
        """Into the contraction before it, or an op of its own."""
        which = [i for i, a in enumerate(node.args) if isinstance(a, Act)]
        given = self.facts[node.args[which[0]].key]
        whole = jnp.shape(node.args[which[0]]) == tuple(node.outs[0].shape)
        alone = len(which) == 1 and self.readers[node.args[which[0]].key] == 1
        if not (given.chain and alone and whole and not given.closed and self._fits(node, given, which[0])):
            return self._compute(node, step)
        chain = (*given.chain, node)
        step.chain = () if given.trains else chain
        self.facts[node, 0] = Facts(given.rule, None, chain, step.spec.is_activation, given.trains)

    def _fits(self, node: Node, given: Facts, which: int) -> bool:
        """Whether a constant has one number for each feature."""
        if node.op == "div" and which != 0:
            return False
        others = [a for i, a in enumerate(node.args) if i != which]
        if self.steps[node].spec.is_activation:
            return True
        axis = feature_axes(given.chain[0])
        return all(per_feature(other, len(node.outs[0].shape), axis) for other in others)

    def _compute(self, node: Node, step: Step) -> None:
        rule: Any = step.rule
        spec = step.spec
        static = rule is not None and rule.act_qtype is not None and rule.act_static_scale
        operands = [i for i in spec.operands_of(node) if odml_graph.is_float(node.args[i])]
        if not static:
            step.reason = "no rule quantizes it" if rule is None else "its rule has no static range"
        several = len(operands) > 1 and not spec.is_activation
        for at, i in enumerate(operands):
            if static and isinstance(node.args[i], Act):
                name = f"{step.op_id}_{_SIDES[at]}" if several and at < 2 else step.op_id
                name = name if at < 2 else f"{step.op_id}_input{at}"
                step.reads[i] = self._ask(node.args[i], rule, node, name)
        for i in range(len(node.outs)):
            self.facts[node, i] = Facts(rule=_wish(rule), fixed=spec.fixed_range(rule))

    def _moves(self, node: Node, step: Step) -> None:
        given = [
            self.facts[node.args[i].key] for i in step.spec.operands_of(node) if isinstance(node.args[i], Act)
        ]
        wishes = [g.rule for g in given if g.rule is not None]
        self._put_together(node, step)
        if not given and (wish := _wish(step.rule)) is not None:
            wishes = [wish]  # a lookup in a table
        ranges = {g.fixed for g in given}
        for i in range(len(node.outs)):
            fixed = given[0].fixed if len(ranges) == 1 else None
            self.facts[node, i] = Facts(rule=wishes[0] if wishes else None, fixed=fixed)

    def _put_together(self, node: Node, step: Step) -> None:
        """Of values that become one, those that others read too are quantized by themselves before."""
        rule, acts = step.rule, [a for a in self.moved(node) if isinstance(a, Act)]
        for i, act in enumerate(acts if len(self.moved(node)) > 1 else ()):
            if rule is not None and self.readers[self.source(act.key)] > 1:
                self._ask(act, rule, node, f"{step.op_id}_input{i}")

    def _float(self, node: Node, step: Step) -> None:
        step.reason = step.spec.refusal(step.rule) or "LiteRT has no integer form of it"
        if step.rule is not None and step.rule.act_qtype is not None and step.rule.act_static_scale:
            self.provider.note_break(node.place.path, step.spec.name, step.op_id, step.reason)
        for i in range(len(node.outs)):
            self.facts[node, i] = Facts()

    def _nested(self, node: Node, step: Step) -> None:
        """A scan or remat: what is in it decides for itself."""
        step.reads = [self._earlier(a) for a in node.args]
        for i in range(len(node.outs)):
            self.facts[node, i] = Facts()

    def _earlier(self, arg: Any) -> Request | None:
        requests = self.requests.get(self.source(arg.key)) if isinstance(arg, Act) else None
        return requests[0] if requests else None

    def _output(self, out: Any, n: int, op: str | None) -> Request | None:
        if op is None or not isinstance(out, Act) or not odml_graph.is_float(out):
            return None
        rule = self.provider.find_rule(self.path, op)
        fixed = self.provider.fixed_range_for_outputs
        return self._request(out, rule, self.path, f"{op}{n}", fixed)

    def _ask(self, value: Act, rule: qconfig.QuantizationRule, node: Node, name: str) -> Request | None:
        return self._request(value, rule, node.place.path, name, None)

    def _request(
        self, act: Act, rule: qconfig.QuantizationRule | None, path: str, name: str, fixed: Range | None
    ) -> Request | None:
        if not odml_graph.is_float(act) or rule is None or rule.act_qtype is None:
            return None
        facts = self.facts[act.key]
        rule = facts.rule or rule
        if not rule.act_static_scale:
            return None
        source = self.source(act.key)
        known = self.requests.setdefault(source, [])
        for request in known:
            if signature(request.rule) == signature(rule) and fixed in (None, request.fixed):
                return request
        fixed = fixed or self.facts[source].fixed
        known.append(Request(source, path, name, rule, fixed, known[0] if known else None))
        return known[-1]

    def source(self, value: Value) -> Value:
        """What is quantized when this is asked for: what was moved, or what was put together."""
        node, _ = value
        while node in self.steps and self.steps[node].spec.kind == "moves":
            acts = [a for a in self.moved(node) if isinstance(a, Act)]
            if len(acts) != 1 or len(self.moved(node)) != 1:
                break
            value = acts[0].key
            node = value[0]
        return value

    def moved(self, node: Node) -> list[Any]:
        """The args whose values a move hands on."""
        args = [node.args[i] for i in self.steps[node].spec.operands_of(node)]
        return [a for a in args if odml_graph.is_float(a)]


_SIDES = ("lhs", "rhs")
_AFFINE = ("add", "add_any", "sub", "mul", "div", "convert_element_type")


def _no_kernel(node: Node) -> str | None:
    """Why LiteRT has no integer kernel for a contraction; None if it has."""
    if node.op == "ragged_dot_general":
        return "LiteRT has no ragged products"
    if node.op == "conv_general_dilated":
        if isinstance(node.args[0], Act) == isinstance(node.args[1], Act):
            return "LiteRT's convolutions have constant kernels"
        if not isinstance(node.args[0], Act):
            return "the input of the convolution is a constant"
        if node.params["batch_group_count"] != 1:
            return "LiteRT has no batch groups"
        if len(node.outs[0].shape) > 4:
            return "LiteRT convolves three axes in floats only"
    return None


def _wish(rule: qconfig.QuantizationRule | None) -> qconfig.QuantizationRule | None:
    return rule if rule is not None and rule.act_qtype is not None and rule.act_static_scale else None


def signature(rule: qconfig.QuantizationRule) -> tuple[Any, ...]:
    """What must be equal for two ops to share a quantized value."""
    return numerics.canonical_qtype(rule.act_qtype), rule.act_calibration_method, rule.act_batch_axes


def weight_side(head: Node) -> int:
    """Which arg of a contraction does not depend on the inputs."""
    return 1 if isinstance(head.args[0], Act) else 0


def feature_axes(head: Node) -> tuple[int, ...]:
    """The axes of a contraction's result that come from its weight."""
    ndim = len(head.outs[0].shape)
    if head.op == "conv_general_dilated":
        return (head.params["dimension_numbers"].out_spec[1],)
    side = weight_side(head)
    contract, batch = head.params["dimension_numbers"]
    free = np.ndim(head.args[side]) - len(contract[side]) - len(batch[side])
    start = ndim - free if side == 1 else len(batch[0])
    return tuple(range(start, start + free))


def per_feature(c: Any, ndim: int, axes: Sequence[int]) -> bool:
    """Whether a constant varies along these axes of a result only."""
    shape = np.shape(c)
    return not shape or (len(shape) == ndim and all(n == 1 or a in axes for a, n in enumerate(shape)))
