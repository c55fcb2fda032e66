"""What is computed in an op's place, so that LiteRT's converter finds an integer op: arithmetic and moves.

A form is a function (inner, compute, params, *args) -> [results]. Its args are quantized already, except
constants, which it quantizes where LiteRT wants that: `inner.constant(x)`. Tensors inside are quantized by
`inner(name, x)`, which takes statistics of them in training. `compute(*args)` is the op itself, `params` are
its own.

Invariants
- A form has the op's float result, up to rounding. What is masked (a constant of -10000 or less that is added
  or selected) is the one exception: it comes 8 (int16: 16) below what else there is, so that the rest keeps
  its scale.
- Training and conversion take the same forms, so that they have the same tensors and statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import lax

Compute = Callable[..., list[Any]]
Params = Mapping[str, Any]
_MASKED = -1e4
BELOW = {"int8": 8.0, "int16": 16.0}  # exp(-8) is less than half a step of a softmax of int8


class Inner(Protocol):
    """What a form quantizes with.

    Attributes:
      qtype: of the op's tensors: "int8" or "int16".
      constants: indices of the args that are constants, not quantized yet.
      moved: whether the first arg was made by a reshape.
    """

    qtype: str
    constants: frozenset[int]
    moved: bool

    def __call__(
        self,
        name: str,
        x: Any,
        *,
        fixed: tuple[float, float] | None = None,
        qtype: str | None = None,
        positive: bool = False,
    ) -> Any:
        """A tensor inside of the form, quantized; the op's name and this one are the statistics' name.

        `fixed`: its range in int8; in int16 -1 to 1, times its end. `positive`: what is 0 becomes a step.
        """
        ...

    def constant(self, x: Any, qtype: str | None = None) -> Any:
        """A constant, quantized by its own range."""
        ...

    def ends(self, i: int) -> tuple[Any, Any]:
        """The quantized range of an arg."""
        ...

    def wide(self, name: str, x: Any) -> Any:
        """A tensor of int16 that what follows may quantize to int8."""
        ...

    def widened(self, name: str, x: Any, i: int = 0) -> Any:
        """What arg i is, in int16; with a reshape before it, as the converter takes two types for one."""
        ...

    def again(self, x: Any) -> Any:
        """What a move makes, on the scale of what it moves."""
        ...


def as_it_is(inner: Inner, compute: Compute, params: Params, *args: Any) -> list[Any]:
    """Constants stay floats: LiteRT's converter takes them into the op."""
    return compute(*args)


def _quantized(inner: Inner, args: Sequence[Any]) -> list[Any]:
    return [inner.constant(a) if i in inner.constants else a for i, a in enumerate(args)]


def add(inner: Inner, compute: Compute, params: Params, x: Any, y: Any) -> list[Any]:
    """LiteRT adds int16 of equal shapes only; subtraction broadcasts."""
    if 0 in inner.constants:
        x, y, act, known = y, x, 1, True
    else:
        act, known = 0, 1 in inner.constants
    if known:
        low, high = inner.ends(act)
        y = jnp.where(y <= _MASKED, jnp.asarray(low - high - BELOW[inner.qtype], y.dtype), y)
        return [x - inner.constant(-y) if inner.qtype == "int16" else x + inner.constant(y)]
    if inner.qtype != "int16" or jnp.shape(x) == jnp.shape(y):
        return [x + y]
    if x.size < y.size:
        x, y = y, x
    return [x - inner("negated", y * number(inner, -1, y))]


def subtract(inner: Inner, compute: Compute, params: Params, x: Any, y: Any) -> list[Any]:
    """x - y."""
    x, y = _quantized(inner, (x, y))
    return [x - y]


def multiply(inner: Inner, compute: Compute, params: Params, x: Any, y: Any) -> list[Any]:
    """x y."""
    x, y = _quantized(inner, (x, y))
    return [x * y]


def divide(inner: Inner, compute: Compute, params: Params, x: Any, y: Any) -> list[Any]:
    """x / y; by a constant a product, since LiteRT's kernels multiply faster."""
    if 1 in inner.constants:
        return [x * inner.constant(1 / y)]
    x, y = _quantized(inner, (x, y))
    return [x / y]


def number(inner: Inner, value: float, x: Any) -> Any:
    """A quantized number of x's dtype."""
    return inner.constant(jnp.asarray(value, x.dtype))


def maximum(inner: Inner, compute: Compute, params: Params, x: Any, y: Any) -> list[Any]:
    """The converter takes a float constant into the op, but int16's -1 to 1 for an op that LiteRT lacks."""
    x, y = _quantized(inner, (x, y)) if inner.qtype == "int16" else (x, y)
    return [jnp.maximum(x, y)]


def minimum(inner: Inner, compute: Compute, params: Params, x: Any, y: Any) -> list[Any]:
    """As `maximum`."""
    x, y = _quantized(inner, (x, y)) if inner.qtype == "int16" else (x, y)
    return [jnp.minimum(x, y)]


def clip(inner: Inner, compute: Compute, params: Params, x: Any, *ends: Any) -> list[Any]:
    """jnp.clip's function; as `maximum`."""
    if inner.qtype != "int16" or len(ends) != 2 or not {1, 2} <= inner.constants:
        return compute(x, *ends)
    low, high = (inner.constant(jnp.asarray(end, x.dtype)) for end in ends)
    return [jnp.minimum(jnp.maximum(x, low), high)]


def clamp(inner: Inner, compute: Compute, params: Params, low: Any, x: Any, high: Any) -> list[Any]:
    """lax.clamp; as `maximum`."""
    if inner.qtype != "int16" or not {0, 2} <= inner.constants:
        return compute(low, x, high)
    return [jnp.minimum(jnp.maximum(x, inner.constant(low)), inner.constant(high))]


def negative(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """LiteRT negates floats only."""
    return [x * number(inner, -1, x)]


def select(inner: Inner, compute: Compute, params: Params, which: Any, *cases: Any) -> list[Any]:
    """All cases on one scale, whose lowest value stands for what is masked."""
    low, _ = inner.ends(1)
    least = lambda case: jnp.where(case <= _MASKED, jnp.asarray(low, case.dtype), case)
    return compute(
        which, *(inner.again(least(c)) if i + 1 in inner.constants else c for i, c in enumerate(cases))
    )


def select_range(
    qtype: str, compute: Compute, constants: frozenset[int], which: Any, *cases: Any
) -> list[Any]:
    """What statistics are taken of: what is masked comes as far below the rest as a softmax needs."""
    rest = [jnp.min(c) for i, c in enumerate(cases) if i + 1 not in constants]
    low = jnp.min(jnp.stack(rest)) - BELOW[qtype]
    least = lambda case: jnp.where(case <= _MASKED, jnp.asarray(low, case.dtype), case)
    return compute(which, *(least(c) if i + 1 in constants else c for i, c in enumerate(cases)))


def rsqrt(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """LiteRT's table for int16 is coarse where the function is steep."""
    if inner.qtype != "int16":
        return compute(x)
    one = number(inner, 1, x)
    return [one / inner("sqrt", jnp.sqrt(x))]


def exp2(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """exp(x log 2)."""
    return [jnp.exp(inner("scaled", x * number(inner, 0.6931471805599453, x)))]


def expm1(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """exp(x) - 1."""
    return [inner("exp", jnp.exp(x)) - number(inner, 1, x)]


def log1p(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """log(1 + x)."""
    return [jnp.log(inner("sum", x + number(inner, 1, x)))]


def square(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """x x; of what was reshaped |x| |x|: the converter moves the reshape behind a product of one tensor."""
    x = inner("abs", jnp.abs(x)) if inner.moved else x
    return [x * x]


def integer_pow(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """Squares and products, from the left of the exponent's binary form; negative ones divide 1."""
    y = params["y"]
    if y == 0:
        return compute(x)
    x = inner("abs", jnp.abs(x)) if inner.moved and y % 2 == 0 else x
    out = x
    doing = "".join("s*" if bit == "1" else "s" for bit in bin(abs(y))[3:])
    for i, step in enumerate(doing):
        out = inner(f"power{i}", out) if i else out
        out = out * (out if step == "s" else x)
    if y > 0:
        return [out]
    out = inner("power", out, positive=y % 2 == 0) if doing else out
    return [number(inner, 1, x) / out]


def power(inner: Inner, compute: Compute, params: Params, x: Any, y: Any) -> list[Any]:
    """Roots, and exp(y log x) of what is positive; LiteRT raises floats only."""
    if 1 in inner.constants and np.all(np.asarray(y) == 0.5):
        return [jnp.sqrt(x)]
    if 1 in inner.constants and np.all(np.asarray(y) == -0.5):
        return rsqrt(inner, lambda x: [lax.rsqrt(x)], params, x)
    x, y = _quantized(inner, (x, y))
    log = inner("log", jnp.log(jnp.maximum(x, jnp.finfo(jnp.float32).tiny)))
    return [jnp.exp(inner("product", log * y))]


def cumsum(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """A product with a triangle of ones."""
    axis, n = params["axis"], x.shape[params["axis"]]
    ones = jnp.tril(jnp.ones((n, n), x.dtype)) if params["reverse"] else jnp.triu(jnp.ones((n, n), x.dtype))
    out = jnp.moveaxis(x, axis, -1) @ inner.constant(ones)
    return [jnp.moveaxis(out, -1, axis)]


def broadcast(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """LiteRT's converter repeats integers where a reshape follows, else floats."""
    (out,) = compute(x)
    if out.size == x.size:
        return [out]
    return [jnp.reshape(inner.again(jnp.reshape(out, (-1,))), out.shape)]


def pad(inner: Inner, compute: Compute, params: Params, x: Any, value: Any) -> list[Any]:
    """LiteRT has no space between elements: a reshape makes it an edge."""
    config = params["padding_config"]
    if not any(inside for _, _, inside in config):
        return compute(x, value)
    edges = []
    for axis, (low, high, inside) in enumerate(config):
        n = x.shape[axis]
        edges.append((low, high - inside if n else high, 0))
        if inside and n:
            split = jnp.reshape(x, (*x.shape[: axis + 1], 1, *x.shape[axis + 1 :]))
            spread = lax.pad(
                split, value, [(0, inside if a == axis + 1 else 0, 0) for a in range(split.ndim)]
            )
            x = jnp.reshape(spread, (*x.shape[:axis], n * (inside + 1), *x.shape[axis + 1 :]))
    return [lax.pad(x, value, edges)]


def concatenate(inner: Inner, compute: Compute, params: Params, *args: Any) -> list[Any]:
    """LiteRT's converter has no concatenation of int16: a sum of what is padded by zeros."""
    if inner.qtype != "int16":
        return compute(*args)
    axis, at = params["dimension"], 0
    total = sum(a.shape[axis] for a in args)
    out = None
    for arg in args:
        edges = [(at, total - at - arg.shape[axis], 0) if a == axis else (0, 0, 0) for a in range(arg.ndim)]
        part = lax.pad(arg, jnp.zeros((), arg.dtype), edges)
        out = part if out is None else inner.again(inner.again(out) + inner.again(part))
        at += arg.shape[axis]
    return [out]
