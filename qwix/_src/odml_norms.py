"""Norms (layer, group, instance, RMS; Flax's or a model's own), found by the root that they divide by.

(x - mean) * rsqrt(variance + epsilon) * scale + bias, where the variance may be written as the mean of
squares less the square of the mean, whose difference 8 bits could not hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix._src.odml_graph import Act, Node, inner

_MOVES = (
    "broadcast_in_dim",
    "reshape",
    "squeeze",
    "convert_element_type",
    "stop_gradient",
    "gather",
    "expand_dims",
)


def rewrite(trace: Any, outputs: Sequence[Any]) -> None:
    """Turns the last node of each norm into the whole, an op "norm" of x."""
    readers = Counter(a.key for n in trace.nodes for a in n.args if isinstance(a, Act))
    readers.update(o.key for o in outputs if isinstance(o, Act))
    users: dict[Any, list[Node]] = {}
    for node in trace.nodes:
        for a in node.args:
            if isinstance(a, Act):
                users.setdefault(a.key, []).append(node)
    for node in list(trace.nodes):
        facts = _found(node) if node.op in ("mul", "div") else None
        if facts is None:
            continue
        scale, bias, last = _affine(node, facts["scale"], readers, users)
        x = facts.pop("x")
        last.params = facts | {"scale": scale, "bias": bias, "shape": tuple(last.outs[0].shape)}
        last.op, last.args = "norm", [x]
        last.compute = lambda x, params=last.params: [norm(x, **params)]


def norm(
    x: Any,
    *,
    stats_shape: Any,
    axes: Any,
    epsilon: float,
    centered: bool,
    total: bool,
    scale: Any,
    bias: Any,
    shape: Any,
) -> jax.Array:
    """The norm of x, with statistics of it in `stats_shape` over `axes`; `total`: sums, not means."""
    dtype = x.dtype
    grouped = x.reshape(stats_shape).astype(jnp.float32)
    if centered:
        grouped = grouped - grouped.mean(axes, keepdims=True)
    squares = jnp.square(grouped)
    power = squares.sum(axes, keepdims=True) if total else squares.mean(axes, keepdims=True)
    out = (grouped * jax.lax.rsqrt(power + epsilon)).reshape(shape)
    out = out if scale is None else out * scale
    return (out if bias is None else out + bias).astype(dtype)


def _found(node: Node) -> dict[str, Any] | None:
    """The facts of the norm that a product, or a quotient, is."""
    pairs = [(0, 1), (1, 0)] if node.op == "mul" else [(0, 1)]
    for a, b in pairs:
        left, right = node.args[a], node.args[b]
        if not (isinstance(left, Act) and isinstance(right, Act)):
            continue
        scale = None
        root = inner(right, _MOVES)
        if root.node.op == "mul" and node.op == "mul":
            root, scale = _split(root.node)
        if root is None or root.node.op != ("rsqrt" if node.op == "mul" else "sqrt"):
            continue
        power = _power(root.node.args[0])
        if power is not None and (x := _numerator(left, power)) is not None:
            return power | {"x": x, "scale": scale}
    return None


def _split(node: Node) -> tuple[Any, Any]:
    """(what depends on the inputs, the constant) of a product; (None, None) where it isn't one of those."""
    acts = [a for a in node.args if isinstance(a, Act)]
    rest = [a for a in node.args if not isinstance(a, Act)]
    return (inner(acts[0], _MOVES), rest[0]) if len(acts) == len(rest) == 1 else (None, None)


def _constant(node: Node) -> tuple[Any, Any]:
    found, constant = _split(node)
    if found is None or isinstance(constant, jax.core.Tracer) or np.size(constant) != 1:
        return None, None
    return found, float(np.asarray(constant).reshape(()))


def _power(x: Any) -> dict[str, Any] | None:
    """The facts of variance + epsilon, or of a mean or sum of squares + epsilon."""
    x, epsilon = inner(x, _MOVES), 0.0
    if not isinstance(x, Act):
        return None
    if x.node.op == "add":
        x, epsilon = _constant(x.node)
    if x is not None and x.node.op == "max":
        x, _ = _constant(x.node)
    if x is None:
        return None
    if x.node.op == "sub":  # mean of squares less square of mean
        first, second = (inner(a, _MOVES) for a in x.node.args)
        facts = _mean_square(first) if isinstance(first, Act) else None
        base = _square_of(second) if isinstance(second, Act) else None
        mean = inner(base, _MOVES) if base is not None else None
        if facts is None or mean is None or mean.node.op != "mean":
            return None
        same = inner(mean.node.args[0], _MOVES).key == inner(facts["base"], _MOVES).key
        return facts | {"epsilon": epsilon, "centered": True} if same else None
    facts = _mean_square(x)
    if facts is None:
        return None
    base = inner(facts["base"], _MOVES)
    centered = _centered(base)
    if centered is not None:
        return facts | {"base": centered, "epsilon": epsilon, "centered": True}
    return facts | {"epsilon": epsilon, "centered": False}


def _square_of(x: Any) -> Any:
    """What x is the square of; None if it's none."""
    node = x.node
    if node.op == "square" or (node.op == "integer_pow" and node.params["y"] == 2):
        return node.args[0]
    both = node.op == "mul" and all(isinstance(a, Act) for a in node.args)
    return node.args[0] if both and node.args[0].key == node.args[1].key else None


def _mean_square(x: Any) -> dict[str, Any] | None:
    if x.node.op not in ("mean", "reduce_sum"):
        return None
    squares = inner(x.node.args[0], ("convert_element_type",))
    base = _square_of(squares) if isinstance(squares, Act) else None
    if not isinstance(base, Act):
        return None
    axes = tuple(x.node.params["axes"])
    return {
        "base": base,
        "stats_shape": tuple(squares.shape),
        "axes": axes,
        "total": x.node.op == "reduce_sum",
    }


def _centered(x: Any) -> Any:
    """What x is less the mean of; None if it isn't such a difference."""
    if x.node.op != "sub" or not all(isinstance(a, Act) for a in x.node.args):
        return None
    given, mean = x.node.args[0], inner(x.node.args[1], _MOVES)
    if mean.node.op != "mean":
        return None
    same = inner(mean.node.args[0], _MOVES).key == inner(given, _MOVES).key
    return given if same else None


def _numerator(left: Any, power: dict[str, Any]) -> Any:
    """x of the norm, if `left` is what its root divides."""
    wanted = inner(power.pop("base"), _MOVES).key
    given = inner(left, _MOVES)
    if not power["centered"] and given.node.op == "sub":  # Flax subtracts a mean of 0
        given, zero = _split(given.node)
        if given is None or isinstance(zero, jax.core.Tracer) or np.any(np.asarray(zero)):
            return None
    if power["centered"]:
        given = _centered(given)
        if given is None:
            return None
    found = inner(given, _MOVES)
    if found.key != wanted or np.size(found) != np.prod(power["stats_shape"]):
        return None
    return inner(given, ("convert_element_type",))


def _affine(node: Node, scale: Any, readers: Counter[Any], users: Any) -> tuple[Any, Any, Node]:
    """The factor and the sum that follow, which belong to the norm, and its last node."""
    bias, last = None, node
    while readers[last, 0] == 1 and len(users.get((last, 0), ())) == 1:
        (following,) = users[last, 0]
        rest = [a for a in following.args if not isinstance(a, Act)]
        fits = len(rest) == 1 and following.outs[0].shape == last.outs[0].shape
        if following.op == "mul" and fits and bias is None:
            scale = rest[0] if scale is None else scale * rest[0]
        elif following.op == "add" and fits and bias is None:
            bias = rest[0]
        elif following.op != "convert_element_type" or following.outs[0].dtype == jnp.int32:
            break
        last = following
    return scale, bias, last
