"""What is computed in place of activation functions. See odml_forms.py.

LiteRT looks GELU and hard swish of int8 up in a table; of int16 they are their definitions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwix._src.odml_forms import Compute, Inner, Params, number

UNIT = (0.0, 255 / 256)


def _plus(inner: Inner, x: Any, value: float) -> Any:
    """LiteRT adds int16 of equal shapes only; subtraction broadcasts."""
    return x - number(inner, -value, x) if inner.qtype == "int16" else x + number(inner, value, x)


def relu6(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """Of int16 the two ends."""
    if inner.qtype != "int16":
        return compute(x)
    return [jnp.minimum(jnp.maximum(x, number(inner, 0, x)), number(inner, 6, x))]


def silu(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """x sigmoid(x)."""
    return [x * inner("sigmoid", jax.nn.sigmoid(x), fixed=UNIT)]


def gelu(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """LiteRT's own for int8; for int16 by a tanh, or by the sigmoid of 1.702 x where it's exact."""
    if inner.qtype != "int16":
        return [_table_gelu(x, params["approximate"])]
    square = inner("square", x * x)
    scaled = inner("factor", _plus(inner, inner("scaled", square * number(inner, 0.044715, x)), 1.0))
    cube = inner("cubic", x * scaled)
    bent = inner(
        "tanh", jnp.tanh(inner("argument", cube * number(inner, 0.7978845608, x))), fixed=(-1.0, 127 / 128)
    )
    half = inner("half", x * number(inner, 0.5, x))
    return [half * inner("sum", _plus(inner, bent, 1.0))]


def _table_gelu(x: Any, approximate: bool) -> Any:
    """A composite that LiteRT's converter knows; JAX has no derivatives of composites."""

    @jax.custom_jvp
    def table(x: Any) -> Any:
        body = lambda x, **_: jax.nn.gelu(x, approximate=approximate)
        kind = "tanh" if approximate else "none"
        return jax.lax.composite(body, name="aten.gelu.default")(x, approximate=kind)

    @table.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        plain = lambda x: jax.nn.gelu(x, approximate=approximate)
        return table(*primals), jax.jvp(plain, primals, tangents)[1]

    return table(x)


def hard_sigmoid(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """relu6(x + 3) / 6."""
    (clipped,) = relu6(inner, lambda x: [jnp.clip(x, 0, 6)], params, inner("sum", _plus(inner, x, 3.0)))
    clipped = inner("relu6", clipped, fixed=(0.0, 6.0))
    return [clipped * number(inner, 1 / 6, x)]


def hard_swish(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """LiteRT's own for int8."""
    if inner.qtype != "int16":
        return [x * (jax.nn.relu6(x + 3.0) / 6.0)]
    return [x * inner("gate", *hard_sigmoid(inner, compute, params, x))]


def hard_tanh(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """Its ends, which LiteRT takes for an op that has no int16."""
    ends = (-1, 1) if inner.qtype != "int16" else (number(inner, -1, x), number(inner, 1, x))
    return [jnp.minimum(jnp.maximum(x, ends[0]), ends[1])]


def elu(inner: Inner, compute: Compute, params: Params, x: Any, alpha: Any = 1.0) -> list[Any]:
    """relu(x) + alpha (exp(min(x, 0)) - 1)."""
    below = inner("exp", jnp.exp(inner("below", jnp.minimum(x, 0))), fixed=(0.0, 1.0))
    less = inner("less", _plus(inner, below, -1.0))
    bent = inner("scaled", less * inner.constant(jnp.asarray(alpha, x.dtype)))
    return [inner("relu", jax.nn.relu(x)) + bent]


def softplus(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """relu(x) + log(1 + exp(-|x|))."""
    below = inner("minus", inner("abs", jnp.abs(x)) * number(inner, -1.0, x))
    more = inner("more", _plus(inner, inner("exp", jnp.exp(below), fixed=(0.0, 1.0)), 1.0))
    return [inner("relu", jax.nn.relu(x)) + inner("log", jnp.log(more))]


def log_softmax(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """x less its maximum, less the log of the sum of its exponentials."""
    less = inner("shifted", x - inner("max", jnp.max(x, -1, keepdims=True)))
    total = inner("sum", jnp.sum(inner("exp", jnp.exp(less), fixed=(0.0, 1.0)), -1, keepdims=True))
    return [less - inner("log", jnp.log(total))]
