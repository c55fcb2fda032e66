"""Ops that JAX writes as several primitives: found in the graph, and one node put in their place.

A mean is a sum and a division, a norm a dozen ops. LiteRT has kernels for the whole, or a form of the whole
keeps what its parts would lose in 8 bits. What others read of the parts stays beside the new node.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from qwix._src import odml_norms
from qwix._src.odml_graph import Act, Node, inner


def rewrite(trace: Any, leaves: list[Any], left: list[Any]) -> tuple[list[Any], list[Any]]:
    """Rewrites the trace's nodes in place; the outputs, and what is left elsewhere, are those they were."""
    for find in (_mean, _pool, _softmax, _gelu, _silu):
        _replace(trace, find)
    odml_norms.rewrite(trace, (*leaves, *left))
    return leaves, left


def _replace(trace: Any, find: Callable[[Node], tuple[str, list[Any], dict[str, Any], Any] | None]) -> None:
    """Turns each node that is the last of a pattern into the whole."""
    for node in trace.nodes:
        found = find(node)
        if found is not None:
            node.op, node.args, node.params, compute = found
            node.compute = lambda *args, compute=compute: [compute(*args)]


def _number(x: Any) -> float | None:
    """The number that a constant is everywhere; None for anything else."""
    if isinstance(x, jax.core.Tracer):
        return None
    array = np.asarray(x)
    return (
        float(array.flat[0]) if array.size and (array.size == 1 or (array == array.flat[0]).all()) else None
    )


def _shaped(fn: Callable[..., Any], shape: tuple[int, ...]) -> Callable[..., Any]:
    return lambda *args: fn(*args).reshape(shape)


def _mean(node: Node) -> Any:
    """sum / n."""
    if node.op not in ("div", "mul") or not isinstance(node.args[0], Act):
        return None
    total, n = inner(node.args[0], ("broadcast_in_dim", "reshape")), _number(node.args[1])
    if total.node.op != "reduce_sum" or n is None or total.size != math.prod(node.outs[0].shape):
        return None
    (x,), axes = total.node.args, tuple(total.node.params["axes"])
    count = math.prod(x.shape[a] for a in axes)
    if not math.isclose(n if node.op == "div" else 1 / n if n else 0, count, rel_tol=1e-6):
        return None
    params = {"axes": axes, "shape": tuple(node.outs[0].shape)}
    return "mean", [x], params, _shaped(functools.partial(jnp.mean, axis=axes), params["shape"])


def _pool(node: Node) -> Any:
    """The sum over a window / its size."""
    if node.op != "div" or not isinstance(node.args[0], Act) or isinstance(node.args[1], Act):
        return None
    total = node.args[0].node
    if total.op != "reduce_window_sum":
        return None
    by = node.args[1]
    inside = _number(by) != math.prod(total.params["window_dimensions"])
    params = {**total.params, "inside": inside}
    return "avg_pool", [total.args[0]], params, lambda x: total.compute(x)[0] / by


def _softmax(node: Node) -> Any:
    """exp(x - c) / its sum along an axis, c being the same along it: the maximum, moved about or not."""
    if node.op != "div" or not all(isinstance(a, Act) for a in node.args):
        return None
    powers, sums = node.args
    total = inner(sums, ("broadcast_in_dim", "reshape"))
    if powers.node.op != "exp" or total.node.op != "reduce_sum" or len(total.node.params["axes"]) != 1:
        return None
    axis = total.node.params["axes"][0]
    alone = lambda y: np.shape(y) == (*powers.shape[:axis], 1, *powers.shape[axis + 1 :])
    if total.node.args[0].key != powers.key or not alone(sums) or not _keeps_order(sums):
        return None
    (x,) = powers.node.args
    if x.node.op == "sub" and isinstance(x.node.args[0], Act) and alone(x.node.args[1]):
        x = x.node.args[0]
    return "softmax", [x], {"axis": axis}, functools.partial(jax.nn.softmax, axis=axis)


def _keeps_order(x: Act) -> bool:
    """Whether the axes of what is broadcast, if it is, stay in their order."""
    axes = x.node.params["broadcast_dimensions"] if x.node.op == "broadcast_in_dim" else ()
    return list(axes) == sorted(axes)


def _gelu(node: Node) -> Any:
    if node.op != "mul":
        return None
    for approximate in (True, False):
        fn = functools.partial(jax.nn.gelu, approximate=approximate)
        if (found := _matched(node, "gelu", fn, {"approximate": approximate})) is not None:
            return found
    return None


def _silu(node: Node) -> Any:
    return _matched(node, "silu", jax.nn.silu, {}) if node.op == "mul" else None


def _matched(node: Node, name: str, fn: Callable[[Any], Any], params: dict[str, Any]) -> Any:
    """What replaces the node if it computes fn of one array of its own shape."""
    out = node.outs[0]
    jaxpr = _template(name, tuple(params.items()), fn, tuple(out.shape), out.dtype)
    bound: dict[Any, Any] = {}
    *_, last = (eqn for eqn in jaxpr.eqns if eqn.primitive.name != "copy")  # JAX ends one GELU by a copy
    if last.primitive.name != node.op or not _same(last, node, {e.outvars[0]: e for e in jaxpr.eqns}, bound):
        return None
    return name, [bound[jaxpr.invars[0]]], params, fn


_TEMPLATES: dict[Any, Any] = {}


def _template(name: str, key: Any, fn: Callable[[Any], Any], shape: tuple[int, ...], dtype: Any) -> Any:
    """The ops of fn, jitted functions in it unfolded."""
    key = name, key, shape, str(dtype)
    if key not in _TEMPLATES:
        with jax.disable_jit():
            _TEMPLATES[key] = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct(shape, dtype)).jaxpr
    return _TEMPLATES[key]


def _same(eqn: Any, node: Node, makers: dict[Any, Any], bound: dict[Any, Any]) -> bool:
    """Whether a node does what an equation of a template does, of the same."""
    if eqn.primitive.name != node.op or len(eqn.invars) != len(node.args):
        return False
    if any(node.params.get(key) != value for key, value in eqn.params.items() if key in _COMPARED):
        return False
    for variable, arg in zip(eqn.invars, node.args, strict=True):
        if isinstance(variable, Literal):
            number = _number(arg)
            same = number is not None and math.isclose(number, float(np.asarray(variable.val)), rel_tol=1e-6)
        elif variable in makers:
            same = isinstance(arg, Act) and _same(makers[variable], arg.node, makers, bound)
        else:
            known = bound.setdefault(variable, arg)
            same = isinstance(arg, Act) and known.key == arg.key
        if not same:
            return False
    return True


_COMPARED = (
    "axes",
    "y",
    "broadcast_dimensions",
    "shape",
    "new_sizes",
    "permutation",
    "new_dtype",
    "dimensions",
)
