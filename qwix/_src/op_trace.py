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
- Kernels (`pallas_call`, `pl.kernel`), `shard_map` and functions with custom derivatives are one op each:
  what's inside them isn't looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax import lax
from jax._src import core as jcore
from jax._src import source_info_util

from qwix._src import weight_view
from qwix._src.weight import WeightInfo, WeightTracer, float_type, materialize, tag_p

# The ops a handler decides about.
CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
_JIT = ("jit", "pjit", "closed_call", "core_call")


class Handler(Protocol):
    """What happens to the ops that matter. `args` hold WeightTracers where an operand is a weight."""

    def tagged(self, trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> Any:
        """A stored weight enters the model: returns what the model's code sees of it."""
        ...

    def contraction(self, trace: OpTrace, primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> Any:
        """A dot, a convolution or a ragged dot, with or without weights."""
        ...

    def lookup(self, trace: OpTrace, primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> Any:
        """A gather of whole rows of a weight."""
        ...


class OpTrace(jcore.Trace):
    """The trace that a model runs under. `parent` is the one that was current outside."""

    __slots__ = ("handler", "parent")

    def __init__(self, parent: jcore.Trace, handler: Handler):
        super().__init__()
        self.parent = parent
        self.handler = handler
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
        return self.bind(primitive, args, {"subfuns": (fun, jvp), "symbolic_zeros": symbolic_zeros})

    def process_custom_vjp_call(self, primitive, fun, fwd, bwd, args, /, *, out_trees, symbolic_zeros):
        params = {"subfuns": (fun, fwd, bwd), "out_trees": out_trees, "symbolic_zeros": symbolic_zeros}
        return self.bind(primitive, args, params)

    def bind(self, primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> Any:
        """The op itself, on float values, in the parent trace."""
        with jcore.set_current_trace(self.parent):
            return primitive.bind(*map(materialize, args), **params)

    def outside(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a JAX function on the parent's values: what it does isn't seen by the handler."""
        with jcore.set_current_trace(self.parent):
            return fn(*args, **kwargs)


def run(handler: Handler, fn: Callable[[OpTrace], Any]) -> Any:
    """Calls `fn` under a new OpTrace; weights among the leaves of its result come back as float arrays."""
    with jcore.take_current_trace() as parent:
        trace = OpTrace(parent, handler)
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


def _evaluate_in(handler: Handler, jaxpr: jcore.Jaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluates a body inside another JAX transformation, which has a trace of its own."""

    def body(trace: OpTrace) -> list[Any]:
        return _evaluate(jaxpr, [a.moved_to(trace) if isinstance(a, WeightTracer) else a for a in args])

    return run(handler, body)


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
    plain, join = _split(args)
    prevent_cse = params["prevent_cse"]
    if isinstance(prevent_cse, tuple):
        prevent_cse = any(prevent_cse)
    body = jax.checkpoint(
        lambda *new: _evaluate_in(trace.handler, params["jaxpr"], join(new)),
        prevent_cse=prevent_cse,
        policy=params["policy"],
    )
    return trace.outside(body, *plain)


def _scan(trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    consts, carry, xs = (list(group) for group in params["ft_in"].update(args).unpack())
    carry = [materialize(c) for c in carry]
    stacked = [x.scanned() if isinstance(x, WeightTracer) else x for x in xs]
    rows = [x.row() if isinstance(x, WeightTracer) else None for x in stacked]
    leaves = [x.payload if isinstance(x, WeightTracer) else x for x in stacked]

    def body(carry: list[Any], leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        row = [leaf if r is None else r.with_payload(leaf) for r, leaf in zip(rows, leaves, strict=True)]
        outs = _evaluate_in(trace.handler, params["jaxpr"], [*consts, *carry, *row])
        return outs[: len(carry)], outs[len(carry) :]

    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    carry, ys = trace.outside(lax.scan, body, carry, leaves, **options)
    return [*carry, *ys]


def _cond(trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    plain, join = _split(args[1:])
    branches = [
        lambda *new, jaxpr=jaxpr: _evaluate_in(trace.handler, jaxpr, join(new))
        for jaxpr in params["branches"]
    ]
    return trace.outside(lax.switch, materialize(args[0]), branches, *plain)


def _while(trace: OpTrace, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, init = args[:first], args[first:second], args[second:]
    return trace.outside(
        lax.while_loop,
        lambda c: _evaluate_in(trace.handler, params["cond_jaxpr"], [*cond_consts, *c])[0],
        lambda c: _evaluate_in(trace.handler, params["body_jaxpr"], [*body_consts, *c]),
        [materialize(c) for c in init],
    )


_CALLS = dict.fromkeys(_JIT, _call) | {"remat2": _remat, "scan": _scan, "cond": _cond, "while": _while}
_INTERESTING: weakref.WeakKeyDictionary[jcore.Jaxpr, bool] = weakref.WeakKeyDictionary()


def _is_interesting(jaxpr: jcore.Jaxpr) -> bool:
    """Whether a handler would want to see inside. Kernels and the like count as empty."""
    found = _INTERESTING.get(jaxpr)
    if found is None:
        found = any(
            eqn.primitive is tag_p
            or eqn.primitive.name in CONTRACTIONS
            or (
                eqn.primitive.name in _CALLS and any(map(_is_interesting, jcore.jaxprs_in_params(eqn.params)))
            )
            for eqn in jaxpr.eqns
        )
        _INTERESTING[jaxpr] = found
    return found
