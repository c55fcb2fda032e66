"""Contractions with what is fused into them, and programs inside a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import core as jcore

from qwix._src import qconfig
from qwix._src.odml_graph import Act, Node
from qwix._src.odml_plan import Plan, Step, feature_axes


def fused(
    head: Node, step: Step, args: Sequence[Any], rest: Sequence[Node], plan: Plan, quantizer: Any
) -> Any:
    """The contraction `head` of args, its activations quantized already, and the ops `rest` after it."""
    side = weight_side(head)
    x, weight, rule = args[1 - side], args[side], step.rule
    ndim = len(head.outs[0].shape)
    axes = feature_axes(head)
    factor, bias, last = None, None, []
    for node in rest:
        if plan.steps[node].spec.is_activation:
            last.append(node)
            continue
        which = next(i for i, a in enumerate(node.args) if isinstance(a, Act))
        c = _rank(node.args[1 - which], ndim)
        if node.op in ("mul", "div"):
            c = 1 / c if node.op == "div" else c
            factor = c if factor is None else factor * c
            bias = None if bias is None else bias * c
        elif node.op == "sub" and which == 1:  # c - x
            factor = -jnp.ones_like(c) if factor is None else -factor
            bias = c if bias is None else c - bias
        else:
            c = -c if node.op == "sub" else c
            bias = c if bias is None else bias + c
    if factor is not None:
        weight = weight * on_weight(head, factor, axes, weight).astype(weight.dtype)
    out = _contract(head, step, x, weight, rule, side, quantizer)
    if bias is not None:
        out = out + bias.astype(out.dtype)
    for node in last:
        given = [out if isinstance(a, Act) else a for a in node.args]
        (out,) = node.compute(*given)
    return out


def _rank(c: Any, ndim: int) -> Any:
    return c if jnp.ndim(c) == ndim else jnp.reshape(c, (1,) * ndim)


def weight_side(head: Node) -> int:
    return 1 if isinstance(head.args[0], Act) else 0


def on_weight(head: Node, factor: Any, axes: Sequence[int], weight: Any) -> Any:
    """A factor for each feature of the result, shaped to multiply the weight."""
    side = weight_side(head)
    if head.op == "conv_general_dilated":
        where = [head.params["dimension_numbers"].rhs_spec[0]]
    else:
        (contract, batch) = head.params["dimension_numbers"]
        where = [a for a in range(weight.ndim) if a not in (*contract[side], *batch[side])]
    shape = [1] * weight.ndim
    for axis, at in zip(axes, where, strict=True):
        shape[at] = factor.shape[axis]
    return jnp.reshape(factor, shape)


def _contract(head: Node, step: Step, x: Any, weight: Any, rule: Any, side: int, quantizer: Any) -> Any:
    qtype = rule.weight_qtype
    axis = None
    if qtype is not None:
        if head.op == "conv_general_dilated":
            axis = head.params["dimension_numbers"].rhs_spec[0]
        else:
            (contract, batch) = head.params["dimension_numbers"]
            where = [a for a in range(weight.ndim) if a not in (*contract[side], *batch[side])]
            axis = where[0] if len(where) == 1 else None
        scale = quantizer.of_weight(weight, qtype, rule.weight_calibration_method, axis)
        weight = quantizer.apply(weight, scale)
    args = [x, weight] if side == 1 else [weight, x]
    return head.compute(*args)[0]


def nested(call: Any, node: Node, args: Sequence[Any], layer: tuple[Any, ...]) -> list[Any]:
    """A scan or remat: its body is a graph of its own. Each step of a scan has statistics of its own."""
    jaxpr = node.params["jaxpr"]
    restart = qconfig.bookmark()
    dynamic = [isinstance(a, Act) for a in node.args]

    def body(values: Sequence[Any], flags: Sequence[bool], layer: tuple[Any, ...]) -> tuple[list[Any], Any]:
        def evaluate(*given: Any) -> list[Any]:
            rest = iter(given)
            inside = [next(rest) if flag else value for value, flag in zip(values, flags, strict=True)]
            return list(jcore.eval_jaxpr(jaxpr, jaxpr.consts, *inside))

        restart()
        outer, call.emitted = call.emitted, {}
        try:
            inputs = [value for value, flag in zip(values, flags, strict=True) if flag]
            outs = call.run(evaluate, inputs, around=node.place, layer=layer)
            return outs, call.emitted
        finally:
            call.emitted = outer

    if node.op == "remat2":
        if call.converts:
            return body(args, dynamic, layer)[0]
        keep = [a for a, d in zip(args, dynamic, strict=True) if not d]
        plain = jax.checkpoint(
            lambda acts: body(_merge(acts, keep, dynamic), dynamic, layer), policy=node.params["policy"]
        )
        outs, emitted = plain([a for a, d in zip(args, dynamic, strict=True) if d])
    else:
        outs, emitted = _scan(call, node, args, dynamic, layer, body)
    call.emitted.update(emitted)
    return outs


def _merge(acts: Sequence[Any], rest: Sequence[Any], dynamic: Sequence[bool]) -> list[Any]:
    first, second = iter(acts), iter(rest)
    return [next(first) if d else next(second) for d in dynamic]


def _scan(
    call: Any, node: Node, args: Sequence[Any], dynamic: Sequence[bool], layer: tuple[Any, ...], body: Any
) -> tuple[list[Any], Any]:
    params = node.params
    consts, carry, xs = (list(group) for group in params["ft_in"].update(args).unpack())
    start = len(consts) + len(carry)
    flags = [*dynamic[: len(consts)], *[True] * len(carry), *dynamic[start:]]
    length = params["length"]

    def step(carry: list[Any], at: tuple[Any, list[Any]]) -> tuple[list[Any], Any]:
        index, rows = at
        outs, emitted = body([*consts, *carry, *rows], flags, (*layer, index))
        return outs[: len(carry)], (outs[len(carry) :], emitted)

    if not call.converts:
        options = {k: params[k] for k in ("length", "reverse", "unroll")}
        indices = np.arange(length, dtype=np.int32)
        carry, (ys, emitted) = lax.scan(step, carry, (indices, xs), **options)
        return [*carry, *ys], emitted
    rows_of: list[Any] = [None] * length
    for i in reversed(range(length)) if params["reverse"] else range(length):
        carry, (rows_of[i], _) = step(carry, (i, [lax.index_in_dim(x, i, keepdims=False) for x in xs]))
    ys = [jnp.stack(rows) for rows in zip(*rows_of, strict=True)]
    return [*carry, *ys], {}
