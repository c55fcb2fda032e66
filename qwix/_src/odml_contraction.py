"""Contractions with what is fused into them, and programs inside a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import core as jcore

from qwix._src import odml_quantizers, qconfig
from qwix._src.odml_graph import Act, Node
from qwix._src.odml_plan import Step, feature_axes, weight_side


def fused(head: Node, step: Step, args: Sequence[Any], rest: Sequence[Node], values: Any) -> Any:
    """The contraction `head` of args, its activations quantized already, and the ops `rest` after it."""
    side = weight_side(head)
    weight = jnp.asarray(args[side])
    axes, ndim = feature_axes(head), len(head.outs[0].shape)
    factor, bias = _folded(rest, ndim, values)
    if values.call.converts and bias is not None:
        along = [n if a in axes else 1 for a, n in enumerate(head.outs[0].shape)]
        bias = _with_two_numbers(jnp.broadcast_to(bias, np.broadcast_shapes(jnp.shape(bias), along)))
    if factor is not None:
        weight = weight * _on_weight(head, factor, axes, weight).astype(weight.dtype)
    x = args[1 - side]
    if step.dynamic:
        contract = _contracted(head, 1 - side)
        x = values.quantizer.dynamic(x, step.rule, [a for a in range(x.ndim) if a not in contract])
    out = _contract(head, step, x, weight, bias, values)
    for node in rest:
        if values.plan.steps[node].spec.is_activation:
            given = [out if isinstance(a, Act) else values.read(a, None) for a in node.args]
            (out,) = values.form(node, given)
    return out


def _with_two_numbers(bias: Any) -> Any:
    """LiteRT's converter 0.5.0 gives a bias of one number in all channels the scale of the first channel.

    The last of them gets its neighbour among floats, which is the same integer.
    """
    if bias is None or isinstance(bias, jax.core.Tracer):
        return bias
    array = np.array(bias)
    if array.size > 1 and array.flat[0] != 0 and (array == array.flat[0]).all():
        array.flat[-1] = np.nextafter(array.flat[-1], np.zeros_like(array.flat[-1]))
    return jnp.asarray(array)


def _folded(rest: Sequence[Node], ndim: int, values: Any) -> tuple[Any, Any]:
    """The factor and the bias, of the result's rank, that the arithmetic among `rest` is; or None."""
    factor = bias = None
    for node in rest:
        if values.plan.steps[node].spec.is_activation:
            break
        which = next(i for i, a in enumerate(node.args) if isinstance(a, Act))
        c = jnp.asarray(values.read(node.args[1 - which], None))
        c = c if c.ndim == ndim else c.reshape((1,) * ndim)
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
    return factor, bias


def _contracted(head: Node, side: int) -> Sequence[int]:
    """The axes of an activation that share a range: those that are summed over."""
    if head.op == "conv_general_dilated":
        return range(1, np.ndim(head.args[side]))
    return head.params["dimension_numbers"][0][side]


def _free_axes(head: Node, weight: Any) -> list[int]:
    """The axes of the weight that are features of the result."""
    if head.op == "conv_general_dilated":
        return [head.params["dimension_numbers"].rhs_spec[0]]
    side = weight_side(head)
    contract, batch = head.params["dimension_numbers"]
    return [a for a in range(weight.ndim) if a not in (*contract[side], *batch[side])]


def _on_weight(head: Node, factor: Any, axes: Sequence[int], weight: Any) -> Any:
    """A factor for each feature of the result, shaped to multiply the weight."""
    shape = [1] * weight.ndim
    for axis, at in zip(axes, _free_axes(head, weight), strict=True):
        shape[at] = factor.shape[axis]
    return jnp.reshape(factor, shape)


def _contract(head: Node, step: Step, x: Any, weight: Any, bias: Any, values: Any) -> Any:
    if head.op == "dot_general" and not any(head.params["dimension_numbers"][1]):
        return _dense(head, step, x, weight, bias, values)
    if head.op == "conv_general_dilated":
        weight = quantized_weight(weight, step.rule, _free_axes(head, weight)[0], values)
        out = _convolution(head, step, x, weight, values)
    else:
        weight = _as_activation(weight, step.rule, values)
        out = head.compute(*((x, weight) if weight_side(head) else (weight, x)))[0]
    return out if bias is None else out + bias.astype(out.dtype)


def quantized_weight(weight: Any, rule: Any, axis: int | None, values: Any) -> Any:
    """A weight as its rule says, with a scale for each index of an axis."""
    if rule.weight_qtype is None:
        return weight
    axis = None if values.call.provider.disable_per_channel_weights else axis
    scale = values.quantizer.of_weight(weight, rule.weight_qtype, rule.weight_calibration_method, axis)
    return values.quantizer.apply(weight, scale)


def _as_activation(weight: Any, rule: Any, values: Any) -> Any:
    """A stack of weights: LiteRT multiplies batches of matrices of one type, each of one scale."""
    if rule.act_qtype is None or rule.weight_qtype is None:
        return quantized_weight(weight, rule, None, values)
    name = odml_quantizers.qtype_name(rule.act_qtype)
    scale = values.quantizer.of_weight(weight, name, "absmax" if name == "int16" else "minmax", None)
    return values.quantizer.apply(weight, scale)


def _dense(head: Node, step: Step, x: Any, weight: Any, bias: Any, values: Any) -> Any:
    """A product with a matrix, which LiteRT has: [.., contracted] by [contracted, features]."""
    side, (contract, _) = weight_side(head), head.params["dimension_numbers"]
    free = _free_axes(head, weight)
    of_x = [a for a in range(x.ndim) if a not in contract[1 - side]]
    k = math.prod(weight.shape[a] for a in contract[side])
    sizes, rows = [weight.shape[a] for a in free], [x.shape[a] for a in of_x]
    matrix = weight.transpose((*contract[side], *free)).reshape((k, math.prod(sizes)))
    x = values.moved(x.transpose((*of_x, *contract[1 - side])), step, 1 - side)
    x = values.moved(x.reshape((*(rows or [1]), k)), step, 1 - side)
    matrix = quantized_weight(matrix, step.rule, 1, values)
    options = {key: head.params[key] for key in ("precision", "preferred_element_type")}
    if values.call.converts:
        options["preferred_element_type"] = None
    out = lax.dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())), **options)
    if bias is not None:
        out = out + bias.reshape((1,) * (out.ndim - 1) + (-1,)).astype(out.dtype)
    out = out if rows and len(free) == 1 else out.reshape((*rows, *sizes))
    n = len(rows)
    return out if side == 1 or not n else out.transpose((*range(n, out.ndim), *range(n)))


def _convolution(head: Node, step: Step, x: Any, weight: Any, values: Any) -> Any:
    """LiteRT's transposed convolutions have one padding only: zeros between the inputs are for all."""
    dilation, spec = head.params["lhs_dilation"], head.params["dimension_numbers"].lhs_spec
    if all(d == 1 for d in dilation):
        return head.compute(x, weight)[0]
    edges = [(0, 0, 0)] * x.ndim
    for axis, d in zip(spec[2:], dilation, strict=True):
        edges[axis] = (0, 0, d - 1)
    for axis, edge in enumerate(edges):
        if edge[2]:
            x = _spread(x, axis, edge[2], step, values)
    params = {**head.params, "lhs_dilation": (1,) * len(dilation)}
    if values.call.converts:
        params["preferred_element_type"] = None
    return lax.conv_general_dilated_p.bind(x, weight, **params)


def _spread(x: Any, axis: int, zeros: int, step: Step, values: Any) -> Any:
    """x with zeros between its elements along an axis: an edge of another axis, in a reshape."""
    shape, n = x.shape, x.shape[axis]
    x = values.moved(x.reshape((*shape[: axis + 1], 1, *shape[axis + 1 :])), step, 0)
    wide = [(0, zeros if a == axis + 1 else 0, 0) for a in range(x.ndim)]
    x = values.moved(lax.pad(x, jnp.zeros((), x.dtype), wide), step, 0)
    x = values.moved(x.reshape((*shape[:axis], n * (zeros + 1), *shape[axis + 1 :])), step, 0)
    return values.moved(lax.slice_in_dim(x, 0, n * (zeros + 1) - zeros, axis=axis), step, 0)


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
            avals = [t for t, flag in zip(jaxpr.in_avals, flags, strict=True) if flag]
            inputs = [value for value, flag in zip(values, flags, strict=True) if flag]
            outs = call.run(evaluate, inputs, around=node.place, avals=avals, layer=layer)
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
