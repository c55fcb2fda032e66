"""`quantize`: one array to a narrow dtype, by the best implementation for the chip it is lowered for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir
from jax.sharding import NamedSharding

from qwix_kernels import dispatch, lowering
from qwix_kernels import partitioning_routes as routes
from qwix_kernels.lowering import How
from qwix_kernels.quantize import partition, xla
from qwix_kernels.quantize.problem import Axis, QuantizeProblem

X_DTYPES = ("bfloat16", "float16", "float32")
DTYPES = ("int8", "int4", "float8_e4m3fn", "float8_e5m2")


def problem_of(x: Any, dtype: str, bound: float, scale_of: Axis) -> QuantizeProblem:
    """Describes `quantize` of the same arguments. `x` may be anything that has a shape and a dtype."""
    if x.ndim != 3 or scale_of not in ("rows", "columns"):
        raise ValueError(
            f"x is [batch, rows, columns] and scale_of 'rows' or 'columns', got {x.shape} and {scale_of!r}."
        )
    if jnp.dtype(x.dtype).name not in X_DTYPES:
        raise ValueError(f"x is {', '.join(X_DTYPES)}, got {x.dtype}; convert it first.")
    if jnp.dtype(dtype).name not in DTYPES:
        raise ValueError(f"dtype is {', '.join(DTYPES)}, got {dtype}.")
    if not 0 < bound < float("inf"):
        raise ValueError(f"bound is what the greatest magnitude maps to, above 0, got {bound}.")
    batch, rows, columns = x.shape
    names = jnp.dtype(x.dtype).name, jnp.dtype(dtype).name
    return QuantizeProblem(batch, rows, columns, *names, float(bound), scale_of)


def quantize(
    x: jax.Array,
    dtype: str,
    bound: float,
    scale_of: Axis,
    *,
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Symmetric quantization with the greatest magnitude of each column, or row, at `bound`.

    Args:
      x: [batch, rows, columns], bfloat16, float16 or float32.
      dtype: of the values, one of `DTYPES`.
      bound: what the greatest magnitude maps to; 127.5 for int8, since rounding brings the half step back.
      scale_of: "columns" or "rows": what has a scale of its own.
      implementation: "mosaic_tpu", "xla" or names in order; None takes the best that runs and never fails.

    Returns:
      (values, scale): as x, in `dtype`; [batch, 1, columns] or [batch, rows, 1], in the dtype of x. They have
      no derivative.

    Raises:
      ValueError: x of another rank or dtype, a bound or a dtype that is none, an unknown name.
      NotImplementedError: a named implementation cannot run this.

    >>> values, scale = quantize(jnp.array([[[1.0, -8.0], [2.0, 4.0]]]), "int8", 127.5, "columns")
    >>> values.tolist()
    [[[64, -127], [127, 64]]]
    """
    problem = problem_of(x, dtype, bound, scale_of)
    names = (implementation,) if isinstance(implementation, str) else implementation
    dispatch.named(problem, names)
    if not x.size:
        return x.astype(dtype), jnp.ones(problem.scale_shape, x.dtype)
    how = How(None if names is None else tuple(names)).traced()
    values, scale = quantize_p.bind(x, problem=problem, how=how)
    return values, scale


dispatch.register(
    QuantizeProblem,
    lowering.kernels_or_xla(
        "qwix_kernels.quantize.tpu", xla.run, xla.estimate, gpu="qwix_kernels.quantize.gpu"
    ),
)


def _abstract(x, *, problem: QuantizeProblem, how: How):
    mesh = routes.explicit_mesh([x])
    if mesh is None:
        return [x.update(dtype=jnp.dtype(problem.dtype)), x.update(shape=problem.scale_shape)]
    plan = routes.plan_of_types(partition.layout_of(problem), [x], how.out)
    values, scale = (NamedSharding(mesh, spec) for spec in plan.results)
    return [
        x.update(dtype=jnp.dtype(problem.dtype), sharding=values),
        x.update(shape=problem.scale_shape, sharding=scale),
    ]


def _batch_rule(args, axes, *, problem: QuantizeProblem, how: How):
    """One more batch axis, folded into the one there is."""
    (x,), (axis,) = args, axes
    x = jnp.moveaxis(x, axis, 0)
    more = dataclasses.replace(problem, batch=x.shape[0] * problem.batch)
    outs = quantize_p.bind(x.reshape(-1, *x.shape[2:]), problem=more, how=how)
    return [out.reshape(*x.shape[:2], *out.shape[1:]) for out in outs], [0, 0]


def _lower(ctx, x, *, problem: QuantizeProblem, how: How, platform: str | None):
    known = all(isinstance(n, int) for n in ctx.avals_in[0].shape)
    outs = routes.lower(ctx, [x], functools.partial(_op, problem, how)) if known else None
    if outs is not None:
        return outs
    described = problem if known else dataclasses.replace(problem, batch=1, rows=_NOMINAL, columns=_NOMINAL)
    # Arrays that stay on the chip are XLA's: nothing to warn of.
    decision = lowering.decide(ctx, platform, described, how, sizes_known=known, warns=lambda problem: False)
    run: Any = functools.partial(decision.impl.run, problem, config=decision.config, chip=decision.chip)
    if decision.impl.name == "xla" and routes.has_explicit_axes(ctx.avals_in):
        run = jax.sharding.auto_axes(run, out_sharding=tuple(aval.sharding for aval in ctx.avals_out))

    def fun(x):
        with routes.traced_plainly([x]):
            return list(run(x))

    return mlir.lower_fun(fun, multiple_results=True)(ctx, x)


def _op(problem: QuantizeProblem, how: How) -> routes.Op:
    """What cuts it over a mesh."""
    shard = functools.partial(partition.run, problem, how, quantize_p.bind)
    whole = functools.partial(quantize_p.bind, problem=problem, how=how)
    return routes.Op(partition.layout_of(problem), shard, whole, how.out)


_NOMINAL = 256
quantize_p = lowering.primitive("qwix_quantize", _abstract, _batch_rule, _lower)
