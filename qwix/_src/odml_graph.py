"""A model as a graph of ops, recorded while it runs, with the module that each op is in.

For an integer program it matters what becomes of a value: whether its only reader can be fused into the op
that makes it, and who asks first for the quantized value. So ops that depend on the model's inputs are not
carried out as they come. They are recorded here; odml_plan.py decides, and odml_executor.py computes.

Invariants
- What does not depend on the model's inputs (weights, constants) is computed at once, as an ordinary array
  of the trace around the model.
- A value that does is an `Act`: to the model's code an array under a trace, without values.
- Jitted functions are recorded op by op, except those that the table of ops knows by their names. Scans over
  layers and remat are one node, whose body is recorded when it is computed. Loops, branches, kernels and
  functions with a backward pass of their own are one node that stays as it is.
- Nothing outlives the call, and nothing is shared between calls or threads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax._src import core as jcore
from jax._src.interpreters import partial_eval as pe

from qwix._src import odml_place, op_search, op_trace
from qwix._src.odml_place import Place

NESTED = ("scan", "remat2")


@dataclasses.dataclass(eq=False)
class Node:
    """One op.

    Attributes:
      op: its name: a primitive's, or that of a function.
      args: what it reads: Acts, and arrays that do not depend on the model's inputs.
      params: the primitive's.
      outs: types of its results.
      compute: (*values of args) -> its results, in the trace that is current then.
      place: where in the model it is.
    """

    op: str
    args: list[Any]
    params: Mapping[str, Any]
    outs: list[Any]
    compute: Callable[..., list[Any]]
    place: Place

    def act(self, trace: Any, index: int = 0) -> Act:
        return Act(trace, self.outs[index], self, index)

    def __repr__(self) -> str:
        return f"<{self.op} in {self.place.path!r}>"


class Act(jcore.Tracer):
    """A result of a node."""

    __slots__ = ("index", "node")
    aval: Any

    def __init__(self, trace: Any, aval: Any, node: Node, index: int):
        super().__init__(trace, aval)
        self.node = node
        self.index = index

    @property
    def key(self) -> tuple[Node, int]:
        return self.node, self.index


Value = tuple[Node, int]


def inner(x: Any, through: Sequence[str]) -> Any:
    """What an Act is before ops of these names, each of one arg."""
    while isinstance(x, Act) and x.node.op in through and isinstance(x.node.args[0], Act):
        x = x.node.args[0]
    return x


def is_float(x: Any) -> bool:
    """Whether this is an array, or the type of one, of floats."""
    return jnp.issubdtype(getattr(x, "dtype", jnp.int32), jnp.floating)


class GraphTrace(op_trace.OpTrace):
    """The trace that records. `known` maps ids of arrays to (array, what to take in its place)."""

    __slots__ = ("around", "is_call", "known", "nodes", "wide")

    def __init__(
        self,
        parent: jcore.Trace,
        is_call: Callable[[str, Any], bool],
        around: Place | None,
        known: Mapping[int, tuple[Any, Any]],
        *,
        wide: bool,
    ):
        super().__init__(parent, None)  # type: ignore[arg-type]  # what it does it does itself
        self.nodes: list[Node] = []
        self.is_call = is_call
        self.around = around  # None: the model itself is running, and its frames say where we are
        self.known = known
        self.wide = wide  # halves are computed as float32

    def input(self, x: Any, aval: Any = None, **params: Any) -> Act:
        """An array as one that the graph depends on. `aval`: what the model's code takes it for."""
        value = widened(x) if self.wide else x
        node = Node("input", [], params, [aval or jcore.typeof(x)], lambda: [value], Place("", "", ""))
        return node.act(self)

    def process_primitive(self, primitive: Any, args: Sequence[Any], params: dict[str, Any], /) -> Any:
        args = [self.known[id(a)][1] if id(a) in self.known else a for a in args]
        if not any(isinstance(a, Act) for a in args):
            return self._static(primitive, args, params)
        if primitive.name in op_search.JIT:
            return self._jit(primitive, args, params)
        if primitive.name == "select_n" and (chosen := _chosen(args)) is not None:
            return chosen
        outs, _ = primitive.abstract_eval(*map(jcore.typeof, args), **params)
        bind = self._binder(primitive, params)
        acts = self._record(primitive.name, args, params, outs, bind, several=primitive.multiple_results)
        return acts if primitive.multiple_results else acts[0]

    def process_custom_jvp_call(self, primitive, fun, jvp, args, /, *, symbolic_zeros):
        """The function's ops; their derivatives are those of what they do."""
        jaxpr, consts = self._traced(fun, args)
        with jcore.set_current_trace(self):
            return list(jcore.eval_jaxpr(jaxpr, consts, *args))

    def process_custom_vjp_call(self, primitive, fun, fwd, bwd, args, /, *, out_trees, symbolic_zeros):
        """One node, which keeps its backward pass."""
        params = {"subfuns": (fun, fwd, bwd), "out_trees": out_trees, "symbolic_zeros": symbolic_zeros}
        if not any(isinstance(a, Act) for a in args):
            return self.bind(primitive, args, params)
        jaxpr, _ = self._traced(fun, args)
        op_trace._reset(fun)
        return self._record(primitive.name, args, params, jaxpr.out_avals, self._binder(primitive, params))

    def process_shard_map(self, primitive: Any, fun: Any, args: Sequence[Any], /, **params: Any) -> Any:
        if not any(isinstance(a, Act) for a in args):
            return self.bind(primitive, args, params | {"subfuns": (fun,)})
        raise NotImplementedError(
            "shard_map inside of a model for ODML: LiteRT runs on one device. Leave it out."
        )

    def _binder(self, primitive: Any, params: Mapping[str, Any]) -> Callable[..., list[Any]]:
        if not self.wide:
            return functools.partial(_bind, primitive, dict(params))
        if any(True for _ in jcore.jaxprs_in_params(params)) or "subfuns" in params:
            return functools.partial(_bind_narrow, primitive, dict(params))
        wide = {k: jnp.dtype(jnp.float32) if _is_half(v) else v for k, v in params.items()}
        return lambda *values: _bind(primitive, wide, *map(widened, values))

    def _traced(self, fun: Any, args: Sequence[Any]) -> tuple[jcore.Jaxpr, Sequence[Any]]:
        with jcore.set_current_trace(self.parent):
            jaxpr, _, consts = pe.trace_to_jaxpr_dynamic(fun, [jcore.typeof(a) for a in args])
        return jaxpr, consts

    def _jit(self, primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
        jaxpr = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
        if self.is_call(params.get("name", ""), jaxpr):
            return self._record(
                params["name"], args, params, jaxpr.out_avals, self._binder(primitive, params)
            )
        with jcore.set_current_trace(self):
            return list(jcore.eval_jaxpr(jaxpr, jaxpr.consts, *args))

    def _static(self, primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> Any:
        if not any(isinstance(a, jcore.Tracer) for a in args):
            with jcore.eval_context():
                return primitive.bind(*args, **params)
        return self.bind(primitive, args, params)

    def _record(
        self,
        op: str,
        args: Sequence[Any],
        params: Mapping[str, Any],
        outs: Any,
        compute: Callable[..., list[Any]],
        *,
        several: bool = True,
    ) -> list[Act]:
        place = odml_place.current(self.around)
        node = Node(op, list(args), params, list(outs) if several else [outs], compute, place)
        self.nodes.append(node)
        return [node.act(self, i) for i in range(len(node.outs))]


def _chosen(args: Sequence[Any]) -> Any:
    """The case of a select that a constant picks; None if it isn't known."""
    which = args[0]
    if isinstance(which, jcore.Tracer) or jnp.ndim(which) != 0:
        return None
    chosen = args[1 + int(which)]
    return chosen if isinstance(chosen, Act) else None


def _bind(primitive: Any, params: dict[str, Any], *values: Any) -> list[Any]:
    out = primitive.bind(*values, **params)
    return list(out) if primitive.multiple_results else [out]


def _bind_narrow(primitive: Any, params: dict[str, Any], *values: Any) -> list[Any]:
    """A program, which has types of its own: a jitted function is computed wide, op by op; others stay."""
    if primitive.name in op_search.JIT:
        return _evaluate_wide(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], values)
    types: list[Any] = [a for jaxpr in list(jcore.jaxprs_in_params(params))[:1] for a in jaxpr.in_avals][
        -len(values) :
    ]
    if len(types) == len(values):
        values = tuple(jnp.asarray(v, t.dtype) for v, t in zip(values, types, strict=True))
    return [widened(out) for out in _bind(primitive, params, *values)]


def _evaluate_wide(jaxpr: jcore.Jaxpr, values: Sequence[Any]) -> list[Any]:
    known: dict[Any, Any] = dict(zip(jaxpr.invars, values, strict=True))
    known |= dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
    read = lambda v: widened(v.val if isinstance(v, jcore.Literal) else known[v])
    for eqn in jaxpr.eqns:
        inside = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
        if inside is not None and eqn.primitive.name in (*op_search.JIT, "custom_jvp_call"):
            outs = _evaluate_wide(inside, [read(v) for v in eqn.invars])
        else:
            wide = {k: jnp.dtype(jnp.float32) if _is_half(v) else v for k, v in eqn.params.items()}
            outs = _bind(eqn.primitive, wide, *(read(v) for v in eqn.invars))
        known |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _is_half(x: Any) -> bool:
    return not isinstance(x, str | tuple) and x in (jnp.bfloat16, jnp.float16)


def widened(x: Any) -> Any:
    """Halves as float32."""
    return x.astype(jnp.float32) if _is_half(getattr(x, "dtype", None)) else x


def reachable(outputs: Sequence[Any]) -> list[Node]:
    """The nodes that these depend on, in an order in which they can be computed."""
    done: dict[Node, None] = {}
    stack: list[tuple[Node, Iterator[Node]]] = []
    inputs = lambda node: iter([a.node for a in node.args if isinstance(a, Act)])
    for out in outputs:
        if isinstance(out, Act) and out.node not in done:
            stack.append((out.node, inputs(out.node)))
        while stack:
            node, rest = stack[-1]
            following = next((n for n in rest if n not in done), None)
            if following is None:
                done[node] = None
                stack.pop()
            else:
                stack.append((following, inputs(following)))
    return list(done)
