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
  by op, and has the derivative of what it does.
- Op counters start again for each evaluation of one program, so an op has one name however often JAX traces
  it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import core as jcore
from jax._src import source_info_util
from jax._src.interpreters import partial_eval as pe

from qwix._src import weight_view
from qwix._src.weight import WeightInfo, WeightTracer, float_type, materialize, tag_p

# The ops a handler decides about.
CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
_JIT = ("jit", "pjit", "closed_call", "core_call")
_CUSTOM = ("custom_jvp_call", "custom_vjp_call")

# Where an op is: the indices of the scans over layers around it. None: in a loop or a branch, whose ops run
# any number of times.
Layer = tuple[Any, ...] | None


class Handler(Protocol):
    """What happens to the ops that matter. `args` hold WeightTracers where an operand is a weight.

    Attributes:
      by_layer: ops are told which layer of a scan they are in.
      unrolls: scans over layers are evaluated one layer after the other, and remat isn't done.
    """

    by_layer: bool
    unrolls: bool

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

    __slots__ = ("handler", "layer", "parent")

    def __init__(self, parent: jcore.Trace, handler: Handler, layer: Layer = ()):
        super().__init__()
        self.parent = parent
        self.handler = handler
        self.layer = layer
        # Flax compares these references to forbid mutation across trace levels, and this isn't a level of
        # its own.
        self._weakref: Any = parent._weakref
        self.requires_low = parent.requires_low

    def stage_value(self, val: Any) -> Any:
        return self.parent.stage_value(val)

    def process_primitive(self, primitive: Any, args: Sequence[Any], params: dict[str, Any], /) -> Any:
        if primitive is tag_p:
            return self.handler.tagged(self, args, params)
        if primitive.name in CONTRACTIONS:
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
            if has_weight or any(_is_interesting(j) for j in jaxprs):
                return rule(self, args, params)
        return self.bind(primitive, args, params)

    def process_custom_jvp_call(self, primitive, fun, jvp, args, /, *, symbolic_zeros):
        params = {"subfuns": (fun, jvp), "symbolic_zeros": symbolic_zeros}
        return self._custom(primitive, fun, args, params)

    def process_custom_vjp_call(self, primitive, fun, fwd, bwd, args, /, *, out_trees, symbolic_zeros):
        params = {"subfuns": (fun, fwd, bwd), "out_trees": out_trees, "symbolic_zeros": symbolic_zeros}
        return self._custom(primitive, fun, args, params)

    def process_shard_map(self, primitive: Any, fun: Any, args: Sequence[Any], /, **params: Any) -> Any:
        inside = _Inside(self.handler)

        def body(*args: Any) -> Any:
            return run(inside, lambda _: fun(*args).map(materialize))

        out = self.bind(primitive, args, params | {"subfuns": (body,)})
        if inside.contracts:
            self.handler.opaque(primitive.name, [*args, *inside.weights])
        return out

    def _custom(self, primitive: Any, fun: Any, args: Sequence[Any], params: dict[str, Any]) -> Any:
        """A function with custom derivatives: evaluated op by op if it computes with a weight.

        An elementwise function of weights and activations (a norm) stays as it is.
        """
        with jcore.set_current_trace(self.parent):
            jaxpr, _, consts = pe.trace_to_jaxpr_dynamic(fun, [jcore.typeof(a) for a in args])
        weights = [isinstance(x, WeightTracer) for x in (*consts, *args)]
        contracts = _is_interesting(jaxpr)
        if (contracts and (any(weights) or _has_tag(jaxpr))) or (weights and all(weights)):
            with jcore.set_current_trace(self):
                return list(jcore.eval_jaxpr(jaxpr, consts, *args))
        if contracts:
            self.handler.opaque(primitive.name, args)
        for store in fun.stores:  # `fun` has been called, and will be again
            if store is not None:
                store.reset()
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

    by_layer = unrolls = False

    def __init__(self, outer: Handler):
        self.bookmark = outer.bookmark
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


def run(handler: Handler, fn: Callable[[OpTrace], Any], layer: Layer = ()) -> Any:
    """Calls `fn` under a new OpTrace; weights among the leaves of its result come back as float arrays."""
    with jcore.take_current_trace() as parent:
        trace = OpTrace(parent, handler, layer)
        with jcore.set_current_trace(trace):
            out = fn(trace)
            if any(isinstance(x, WeightTracer) for x in jax.tree.leaves(out)):
                out = jax.tree.map(materialize, out)
            return out


def new_weight(trace: OpTrace, payload: Any, info: WeightInfo) -> WeightTracer:
    """A weight as the stored param is."""
    shape, dtype = float_type(payload)
    return WeightTracer(trace, jcore.ShapedArray(shape, dtype), payload, info)


def tagged_weight(trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> WeightTracer:
    """What `tag` gives under this trace. A weight that's tagged again stays the weight it is."""
    if isinstance(args[0], WeightTracer):
        return args[0]
    return new_weight(trace, jax.tree.unflatten(params["treedef"], args), params["info"])


def scope_names() -> str:
    """The names of the `jax.named_scope`s around the op that is being processed."""
    return str(source_info_util.current_name_stack())


def _evaluate(jaxpr: jcore.Jaxpr, args: Sequence[Any]) -> list[Any]:
    return list(jcore.eval_jaxpr(jaxpr, jaxpr.consts, *args))


def _body(trace: OpTrace, jaxpr: jcore.Jaxpr) -> Callable[..., list[Any]]:
    """What evaluates a body inside another JAX transformation, which has a trace of its own.

    Called with the args of the body and the layer it's in.
    """
    handler, restart = trace.handler, trace.handler.bookmark()

    def evaluate(args: Sequence[Any], layer: Layer) -> list[Any]:
        def body(inner: OpTrace) -> list[Any]:
            moved = [a.moved_to(inner) if isinstance(a, WeightTracer) else a for a in args]
            return _evaluate(jaxpr, moved)

        restart()
        return run(handler, body, layer)

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
    return trace.outside(body, *plain)


def _scan(trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    consts, carry, xs = (list(group) for group in params["ft_in"].update(args).unpack())
    carry = [materialize(c) for c in carry]
    stacked = [x.scanned() if isinstance(x, WeightTracer) else x for x in xs]
    rows = [x.row() if isinstance(x, WeightTracer) else None for x in stacked]
    leaves = [x.payload if isinstance(x, WeightTracer) else x for x in stacked]
    evaluate = _body(trace, params["jaxpr"])
    layered = trace.handler.by_layer and _scans_weights(params["jaxpr"], len(consts) + len(carry), xs)

    def body(carry: list[Any], step: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
        index, leaves = step
        row = [leaf if r is None else r.with_payload(leaf) for r, leaf in zip(rows, leaves, strict=True)]
        layer = (*trace.layer, index) if layered and trace.layer is not None else None
        outs = evaluate([*consts, *carry, *row], layer)
        return outs[: len(carry)], outs[len(carry) :]

    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    if layered and trace.handler.unrolls and params["length"]:
        carry, ys = trace.outside(_unrolled, body, carry, leaves, **options)
    else:
        indices = np.arange(params["length"], dtype=np.int32) if layered else None
        carry, ys = trace.outside(lax.scan, body, carry, (indices, leaves), **options)
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
    branches = [lambda *new, evaluate=evaluate: evaluate(join(new), None) for evaluate in bodies]
    return trace.outside(lax.switch, materialize(args[0]), branches, *plain)


def _while(trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, init = args[:first], args[first:second], args[second:]
    condition, body = _body(trace, params["cond_jaxpr"]), _body(trace, params["body_jaxpr"])
    return trace.outside(
        lax.while_loop,
        lambda c: condition([*cond_consts, *c], None)[0],
        lambda c: body([*body_consts, *c], None),
        [materialize(c) for c in init],
    )


_CALLS = dict.fromkeys(_JIT, _call) | {"remat2": _remat, "scan": _scan, "cond": _cond, "while": _while}
_INSIDE = (*_CALLS, *_CUSTOM, "shard_map")
_INTERESTING: weakref.WeakKeyDictionary[jcore.Jaxpr, bool] = weakref.WeakKeyDictionary()


def _is_interesting(jaxpr: jcore.Jaxpr) -> bool:
    """Whether a handler would want to see inside. Kernels and the like count as empty."""
    found = _INTERESTING.get(jaxpr)
    if found is None:
        found = any(
            eqn.primitive is tag_p
            or eqn.primitive.name in CONTRACTIONS
            or (eqn.primitive.name in _INSIDE and any(map(_is_interesting, _jaxprs(eqn))))
            for eqn in jaxpr.eqns
        )
        _INTERESTING[jaxpr] = found
    return found


def _jaxprs(eqn: jcore.JaxprEqn) -> list[jcore.Jaxpr]:
    return list(jcore.jaxprs_in_params(eqn.params))


def _has_tag(jaxpr: jcore.Jaxpr) -> bool:
    return any(eqn.primitive is tag_p or any(map(_has_tag, _jaxprs(eqn))) for eqn in jaxpr.eqns)


def _scans_weights(jaxpr: jcore.Jaxpr, start: int, xs: Sequence[Any]) -> bool:
    """Whether a scan's body gets weights from the xs, which are its args from `start` on."""
    if any(isinstance(x, WeightTracer) for x in xs):
        return True
    return _tags(jaxpr, [i >= start for i in range(len(jaxpr.invars))])


def _tags(jaxpr: jcore.Jaxpr, given: Sequence[bool]) -> bool:
    """Whether something made of the given inputs is marked as a weight."""
    known = {v for v, g in zip(jaxpr.invars, given, strict=True) if g}
    for eqn in jaxpr.eqns:
        flags = [not isinstance(v, jcore.Literal) and v in known for v in eqn.invars]
        if not any(flags):
            continue
        if eqn.primitive is tag_p:
            return True
        for inner in _jaxprs(eqn) if eqn.primitive.name in _INSIDE else ():
            if _tags(inner, flags[len(flags) - len(inner.invars) :]):
                return True
        known.update(eqn.outvars)
    return False
