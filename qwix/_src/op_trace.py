"""Seeing every op of a model, and which of them eat weights, without patching a single JAX function.

While a model runs under `OpTrace`, the primitives that it binds come here first. A weight travels through the
model as a `WeightTracer`: to the model's code it's an ordinary float array, so `x @ w`, `w.T`, `jnp.take(w,
i)` or a library's helper all work; to this module it's a payload (a QArray, or a float array) and the
`view` that leads from the stored param to it. Ops that only move a weight (transpose, reshape, cast, slice)
stay a weight, ops that contract or look it up go to the handler, and any other op gets the float value.

Invariants
- Programs inside the model (jit, scan, cond, while, remat) are traced by JAX as float programs and then
  evaluated here op by op. So JAX's caches only ever hold float programs, and a quantized run can't poison a
  float one.
- Values that aren't weights are those of the parent trace. Flax therefore sees one trace level, and eager
  code still gets concrete arrays.
- Kernels (`pallas_call`, `pl.kernel`) and `shard_map` are one op each: what's inside them isn't looked at. So
  are functions with custom derivatives, unless they compute with a weight: then their body is evaluated op
  by op, and has the derivative of what it does; a handler that trains keeps the derivative they define.
- What ops leave behind for after the call (statistics) is returned by the bodies they are in, as any other
  value is: stacked by scans, once by remat. So it crosses JAX's transformations without side effects.
- Op counters start again for each evaluation of one program, so an op has one name however often JAX traces
  it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import core as jcore
from jax._src import linear_util as lu
from jax._src import source_info_util
from jax._src.interpreters import partial_eval as pe

from qwix._src import op_search, weight_view
from qwix._src.adapter import Adapter, CutChange
from qwix._src.weight import (
    WeightInfo,
    WeightTracer,
    float_type,
    materialize,
    tag_p,
    tagged_content,
    typed,
)

# Where an op is: the indices of the scans over layers around it. None: in a loop or a branch, whose ops run
# any number of times.
Layer = tuple[Any, ...] | None


class Handler(Protocol):
    """What happens to the ops that matter. `args` hold WeightTracers where an operand is a weight.

    Attributes:
      by_layer: ops are told which layer of a scan they are in.
      unrolls: scans over layers are evaluated one layer after the other, and remat isn't done.
      counts_loops: ops are told the step of every scan they are in.
      trains: derivatives matter: functions that define their own keep them.
      emitted: {key: arrays} that ops leave for after the call; scans over layers stack them.
      params: {id: (array, whose it is)}: arrays that are weights wherever they turn up.
    """

    by_layer: bool
    unrolls: bool
    counts_loops: bool
    trains: bool
    emitted: dict[Any, Any]
    params: dict[int, tuple[Any, WeightInfo]]

    def bookmark(self) -> Callable[[], None]:
        """Returns what sets the op counters back to where they are now."""
        ...

    def tagged(self, trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> Any:
        """A stored weight enters the model: returns what the model's code sees of it."""
        ...

    def contraction(self, trace: OpTrace, primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> Any:
        """A dot, a convolution or a ragged dot, with or without weights."""
        ...

    def lookup(self, trace: OpTrace, primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> Any:
        """A gather of whole rows of a weight."""
        ...

    def opaque(self, name: str, args: Sequence[Any]) -> None:
        """An op with contractions in it that stays as it is. `args`: weights may be among them."""
        ...


class OpTrace(jcore.Trace):
    """The trace that a model runs under. `parent` is the one that was current outside."""

    __slots__ = ("handler", "layer", "loops", "parent")

    def __init__(self, parent: jcore.Trace, handler: Handler, layer: Layer = (), loops: tuple[Any, ...] = ()):
        super().__init__()
        self.parent = parent
        self.handler = handler
        self.layer = layer
        self.loops = loops  # the step of each scan around the op, if the handler counts them
        # Flax compares these references to forbid mutation across trace levels, and this isn't a level of
        # its own.
        self._weakref: Any = parent._weakref
        self.requires_low = parent.requires_low

    def stage_value(self, val: Any) -> Any:
        return self.parent.stage_value(val)

    def process_primitive(self, primitive: Any, args: Sequence[Any], params: dict[str, Any], /) -> Any:
        args = self._recognized(args)
        if primitive is tag_p:
            return self.handler.tagged(self, args, params)
        if primitive.name in op_search.CONTRACTIONS:
            return self.handler.contraction(self, primitive, args, params)
        has_weight = any(isinstance(a, WeightTracer) for a in args)
        if has_weight and weight_view.is_lookup(primitive, args, params):
            return self.handler.lookup(self, primitive, args, params)
        if has_weight:
            moved = weight_view.move(self, primitive, args, params)
            if moved is not None:
                return [moved] if primitive.multiple_results else moved
        if rule := _CALLS.get(primitive.name):
            jaxprs = list(jcore.jaxprs_in_params(params))
            if has_weight or any(op_search.is_interesting(j) for j in jaxprs):
                return rule(self, args, params)
        return self.bind(primitive, args, params)

    def _recognized(self, args: Sequence[Any]) -> Sequence[Any]:
        """The args, with known arrays as the weights they are."""
        known = self.handler.params
        if not any(id(a) in known for a in args):
            return args
        return [new_weight(self, *known[id(a)]) if id(a) in known else a for a in args]

    def process_custom_jvp_call(self, primitive, fun, jvp, args, /, *, symbolic_zeros):
        params = {"subfuns": (fun, jvp), "symbolic_zeros": symbolic_zeros}
        return self._custom(primitive, fun, args, params)

    def process_custom_vjp_call(self, primitive, fun, fwd, bwd, args, /, *, out_trees, symbolic_zeros):
        params = {"subfuns": (fun, fwd, bwd), "out_trees": out_trees, "symbolic_zeros": symbolic_zeros}
        return self._custom(primitive, fun, args, params)

    def process_shard_map(self, primitive: Any, fun: Any, args: Sequence[Any], /, **params: Any) -> Any:
        inside = _Inside(self.handler)
        args = self._recognized(args)

        def body(*args: Any) -> Any:
            return run(inside, lambda _: fun(*args).map(materialize))

        out = self.bind(primitive, args, params | {"subfuns": (body,)})
        if inside.contracts:
            self.handler.opaque(primitive.name, [*args, *inside.weights])
        return out

    def _with_own_vjp(self, primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
        """A function with its own backward pass, which it keeps; its forward pass is evaluated op by op."""
        fun, fwd, bwd = params["subfuns"]
        restart = self.handler.bookmark()

        def evaluated(plain: Any, stride: int) -> Any:
            def call(*new: Any) -> list[Any]:
                def body(trace: OpTrace) -> list[Any]:
                    inside = list(new)
                    for i, arg in enumerate(args):
                        if isinstance(arg, WeightTracer):
                            inside[i * stride] = arg.moved_to(trace).with_content((new[i * stride], None))
                    return list(plain.f_transformed(*inside))

                restart()
                return run(self.handler, body, None, self.loops)

            call_info = (plain.transforms, plain.stores, plain.params, plain.in_type, plain.debug_info)
            return lu.WrappedFun(plain.f, call, *call_info)

        subfuns = evaluated(fun, 1), evaluated(fwd, 2), bwd  # fwd's args have a flag each
        return self.bind(primitive, args, params | {"subfuns": subfuns})

    def _custom(self, primitive: Any, fun: Any, args: Sequence[Any], params: dict[str, Any]) -> Any:
        """A function with custom derivatives: evaluated op by op if it computes with a weight.

        An elementwise function of weights and activations (a norm) stays as it is.
        """
        args = self._recognized(args)
        with jcore.set_current_trace(self.parent):
            jaxpr, _, consts = pe.trace_to_jaxpr_dynamic(fun, [jcore.typeof(a) for a in args])
        weights = [isinstance(x, WeightTracer) for x in (*consts, *args)]
        contracts = op_search.is_interesting(jaxpr)
        computes = contracts and (any(weights) or op_search.has_tag(jaxpr))
        keeps = self.handler.trains and (primitive.name == "custom_vjp_call" or not contracts)
        if computes and keeps:
            _reset(fun)
            return self._with_own_vjp(primitive, args, params)
        if computes or (weights and all(weights) and not keeps):
            with jcore.set_current_trace(self):
                return list(jcore.eval_jaxpr(jaxpr, consts, *args))
        if contracts:
            self.handler.opaque(primitive.name, args)
        _reset(fun)
        return self.bind(primitive, args, params)

    def bind(self, primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> Any:
        """The op itself, on float values, in the parent trace."""
        with jcore.set_current_trace(self.parent):
            return primitive.bind(*map(materialize, args), **params)

    def outside(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a JAX function on the parent's values: what it does isn't seen by the handler."""
        with jcore.set_current_trace(self.parent):
            return fn(*args, **kwargs)


class _Inside:
    """The handler of what stays as it is: weights from outside are floats there."""

    by_layer = unrolls = counts_loops = trains = False

    def __init__(self, outer: Handler):
        self.bookmark = outer.bookmark
        self.emitted: dict[Any, Any] = {}
        self.params = outer.params
        self.contracts = False
        self.weights: list[WeightTracer] = []

    def tagged(self, trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> Any:
        return tagged_weight(trace, args, params)

    def contraction(self, trace: OpTrace, primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> Any:
        self.contracts = True
        self.weights += [a for a in args if isinstance(a, WeightTracer)]
        return trace.bind(primitive, args, params)

    lookup = contraction

    def opaque(self, name: str, args: Sequence[Any]) -> None:
        self.contracts = True


def _reset(fun: Any) -> None:
    """`fun` has been called, and will be again."""
    for store in fun.stores:
        if store is not None:
            store.reset()


def run(
    handler: Handler, fn: Callable[[OpTrace], Any], layer: Layer = (), loops: tuple[Any, ...] = ()
) -> Any:
    """Calls `fn` under a new OpTrace; weights among the leaves of its result come back as float arrays."""
    with jcore.take_current_trace() as parent:
        trace = OpTrace(parent, handler, layer, loops)
        with jcore.set_current_trace(trace):
            out = fn(trace)
            if any(isinstance(x, WeightTracer) for x in jax.tree.leaves(out)):
                out = jax.tree.map(materialize, out)
            return out


def new_weight(
    trace: OpTrace, payload: Any, info: WeightInfo, adapter: Adapter | CutChange | None = None
) -> WeightTracer:
    """A weight as the stored param is."""
    shape, dtype = float_type(payload)
    return WeightTracer(trace, typed(shape, dtype, (payload, adapter)), payload, info, adapter=adapter)


def tagged_weight(trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> WeightTracer:
    """What `tag` gives under this trace. A weight that's tagged again stays the weight it is."""
    if isinstance(args[0], WeightTracer):
        info = params["info"]
        return args[0].as_mapped(info.vmapped) if info.mapped else args[0]
    payload, adapter = tagged_content(args, params["treedef"])
    return new_weight(trace, payload, params["info"], adapter)


def scope_names() -> str:
    """The names of the `jax.named_scope`s around the op that is being processed."""
    return str(source_info_util.current_name_stack())


def _evaluate(jaxpr: jcore.Jaxpr, args: Sequence[Any]) -> list[Any]:
    return list(jcore.eval_jaxpr(jaxpr, jaxpr.consts, *args))


def _body(trace: OpTrace, jaxpr: jcore.Jaxpr) -> Callable[..., tuple[list[Any], dict[Any, Any]]]:
    """What evaluates a body inside another JAX transformation, which has a trace of its own.

    Called with the args of the body, the layer it's in and the step of the loop; returns its results and what
    its ops emit.
    """
    handler, restart = trace.handler, trace.handler.bookmark()

    def evaluate(args: Sequence[Any], layer: Layer, *step: Any) -> tuple[list[Any], dict[Any, Any]]:
        def body(inner: OpTrace) -> list[Any]:
            moved = [a.moved_to(inner) if isinstance(a, WeightTracer) else a for a in args]
            return _evaluate(jaxpr, moved)

        restart()
        outer, handler.emitted = handler.emitted, {}
        try:
            return run(handler, body, layer, (*trace.loops, *step)), handler.emitted
        finally:
            handler.emitted = outer

    return evaluate


def _call(trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    jaxpr = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    with jcore.set_current_trace(trace):
        return _evaluate(jaxpr, args)


def _split(args: Sequence[Any]) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """The args that aren't weights, and how to put new ones between the weights again."""
    plain = [a for a in args if not isinstance(a, WeightTracer)]

    def join(new: Sequence[Any]) -> list[Any]:
        rest = iter(new)
        return [a if isinstance(a, WeightTracer) else next(rest) for a in args]

    return plain, join


def _remat(trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    if trace.handler.unrolls:
        return _call(trace, args, params)
    plain, join = _split(args)
    prevent_cse = params["prevent_cse"]
    if isinstance(prevent_cse, tuple):
        prevent_cse = any(prevent_cse)
    evaluate = _body(trace, params["jaxpr"])
    body = jax.checkpoint(
        lambda *new: evaluate(join(new), trace.layer), prevent_cse=prevent_cse, policy=params["policy"]
    )
    outs, emitted = trace.outside(body, *plain)
    trace.handler.emitted.update(emitted)
    return outs


def _scan(trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    consts, carry, xs = (list(group) for group in params["ft_in"].update(args).unpack())
    carry = [materialize(c) for c in carry]
    stacked = [x.scanned() if isinstance(x, WeightTracer) else x for x in xs]
    rows = [x.row() if isinstance(x, WeightTracer) else None for x in stacked]
    leaves = [x.content if isinstance(x, WeightTracer) else x for x in stacked]
    evaluate = _body(trace, params["jaxpr"])
    counted = trace.handler.counts_loops
    layered = trace.handler.by_layer and op_search.scans_weights(
        params["jaxpr"], len(consts) + len(carry), xs
    )

    def body(carry: list[Any], step: tuple[Any, list[Any]]) -> tuple[list[Any], Any]:
        index, leaves = step
        row = [leaf if r is None else r.with_content(leaf) for r, leaf in zip(rows, leaves, strict=True)]
        layer = (*trace.layer, index) if layered and trace.layer is not None else None
        outs, emitted = evaluate([*consts, *carry, *row], layer, *([index] if counted else []))
        return outs[: len(carry)], (outs[len(carry) :], emitted)

    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    if layered and trace.handler.unrolls and params["length"]:
        carry, (ys, emitted) = trace.outside(_unrolled, body, carry, leaves, **options)
    else:
        indices = np.arange(params["length"], dtype=np.int32) if layered or counted else None
        carry, (ys, emitted) = trace.outside(lax.scan, body, carry, (indices, leaves), **options)
    trace.handler.emitted.update(emitted)
    return [*carry, *ys]


def _unrolled(
    body: Callable[..., Any], carry: Any, leaves: Any, *, length: int, reverse: bool, unroll: Any
) -> tuple[Any, Any]:
    """`lax.scan`, one step after the other, where every step knows its number."""
    del unroll
    ys: list[Any] = [None] * length
    for i in reversed(range(length)) if reverse else range(length):
        carry, ys[i] = body(carry, (i, jax.tree.map(lambda leaf, i=i: leaf[i], leaves)))
    return carry, jax.tree.map(lambda *rows: jnp.stack(rows), *ys)


def _cond(trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    plain, join = _split(args[1:])
    bodies = [_body(trace, jaxpr) for jaxpr in params["branches"]]
    branches = [lambda *new, evaluate=evaluate: evaluate(join(new), None)[0] for evaluate in bodies]
    return trace.outside(lax.switch, materialize(args[0]), branches, *plain)


def _while(trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, init = args[:first], args[first:second], args[second:]
    condition, body = _body(trace, params["cond_jaxpr"]), _body(trace, params["body_jaxpr"])
    return trace.outside(
        lax.while_loop,
        lambda c: condition([*cond_consts, *c], None)[0][0],
        lambda c: body([*body_consts, *c], None)[0],
        [materialize(c) for c in init],
    )


_CALLS = dict.fromkeys(op_search.JIT, _call) | {
    "remat2": _remat,
    "scan": _scan,
    "cond": _cond,
    "while": _while,
}
