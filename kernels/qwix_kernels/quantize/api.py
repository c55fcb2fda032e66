"""`quantize`: one array to a narrow dtype, by the best implementation for the chip it is lowered for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType

from qwix_kernels import chips, dispatch
from qwix_kernels.quantize import xla
from qwix_kernels.quantize.problem import Axis, QuantizeProblem


def problem_of(x: Any, dtype: str, bound: float, scale_of: Axis) -> QuantizeProblem:
    """Describes `quantize` of the same arguments. `x` may be anything that has a shape and a dtype."""
    if x.ndim != 3 or scale_of not in ("rows", "columns"):
        raise ValueError(
            f"x is [batch, rows, columns] and scale_of 'rows' or 'columns', got {x.shape} and {scale_of!r}."
        )
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
      dtype: of the values: int8, int4, or a float8.
      bound: what the greatest magnitude maps to; 127.5 for int8, since rounding brings the half step back.
      scale_of: "columns" or "rows": what has a scale of its own.
      implementation: "mosaic_tpu", "xla" or names in order; None takes the best that runs and never fails.

    Returns:
      (values, scale): as x, in `dtype`; [batch, 1, columns] or [batch, rows, 1], in the dtype of x. They have
      no derivative.

    Raises:
      ValueError: x of another rank, or an unknown name.
      NotImplementedError: a named implementation cannot run this.

    >>> values, scale = quantize(jnp.array([[[1.0, -8.0], [2.0, 4.0]]]), "int8", 127.5, "columns")
    >>> values.tolist()
    [[[64, -128], [127, 64]]]
    """
    problem = problem_of(x, dtype, bound, scale_of)
    names = (implementation,) if isinstance(implementation, str) else implementation
    dispatch.named(problem, names)
    if not x.size:
        return x.astype(dtype), jnp.ones(problem.scale_shape, x.dtype)
    if any(kind == AxisType.Explicit for kind in jax.sharding.get_abstract_mesh().axis_types):
        _check_alone(problem, names, "under a mesh with explicit axes it is XLA that lays out the results")
        return xla.run(problem, x)
    values, scale = quantize_p.bind(x, problem=problem, names=None if names is None else tuple(names))
    return values, scale


def _check_alone(problem: QuantizeProblem, names: Sequence[str] | None, reason: str) -> None:
    """Raises where XLA, which alone can run this, is not among the names that were given."""
    last = dispatch.implementations(problem)[-1].name
    if names is not None and last not in names:
        raise NotImplementedError(f"{tuple(names)!r} cannot run this: {reason}. implementation={last!r} can.")


def _tpu(name: str):
    """A function of tpu.py, which is loaded only when a TPU is asked about."""

    def call(*args, **kwargs):
        return getattr(importlib.import_module("qwix_kernels.quantize.tpu"), name)(*args, **kwargs)

    return call


dispatch.register(
    QuantizeProblem,
    (
        dispatch.Implementation(
            name="mosaic_tpu",
            platforms=("tpu",),
            check=_tpu("check"),
            estimate=_tpu("estimate"),
            run=_tpu("run"),
            heuristic_config=_tpu("heuristic_config"),
            config_type=lambda: importlib.import_module("qwix_kernels.quantize.tpu").Config,
        ),
        dispatch.Implementation(
            name="xla",
            platforms=(),
            check=lambda problem, chip: None,
            estimate=xla.estimate,
            run=xla.run,
        ),
    ),
)


def _abstract(x, *, problem: QuantizeProblem, names):
    del names
    shape = problem.scale_shape
    return [x.update(dtype=jnp.dtype(problem.dtype)), x.update(shape=shape)]


def _batch_rule(args, axes, *, problem: QuantizeProblem, names):
    """One more batch axis, folded into the one there is."""
    (x,), (axis,) = args, axes
    x = jnp.moveaxis(x, axis, 0)
    flat = x.reshape(-1, *x.shape[2:])
    outs = quantize(flat, problem.dtype, problem.bound, problem.scale_of, implementation=names)
    return [out.reshape(*x.shape[:2], *out.shape[1:]) for out in outs], [0, 0]


def _lower(ctx, x, *, problem: QuantizeProblem, names, platform: str | None):
    axis_context = ctx.module_context.axis_context
    devices = getattr(axis_context, "device_assignment", None)
    mesh = getattr(axis_context, "abstract_mesh", None) or getattr(axis_context, "mesh", None)
    device = devices[0] if devices else getattr(mesh, "abstract_device", None)
    chip = chips.chip_for_lowering(platform or ctx.module_context.platforms[-1], device)
    refusal = None
    if getattr(axis_context, "num_devices", 1) > 1:
        refusal = "the compiler cannot partition a kernel; call quantize inside jax.shard_map"
    if not all(isinstance(n, int) for n in ctx.avals_in[0].shape):
        _check_alone(problem, names, "a kernel needs sizes that are known when it is compiled")
        impl, config = dispatch.implementations(problem)[-1], None
    else:
        impl, explanation = dispatch.choose(problem, chip, names, None, refusal)
        config = explanation.config
    run = functools.partial(impl.run, problem, config=config, chip=chip)
    return mlir.lower_fun(lambda x: list(run(x)), multiple_results=True)(ctx, x)


quantize_p = Primitive("qwix_quantize")
quantize_p.multiple_results = True
quantize_p.def_abstract_eval(_abstract)
quantize_p.def_impl(lambda x, **params: _jitted(**params)(x))
batching.primitive_batchers[quantize_p] = _batch_rule
mlir.register_lowering(quantize_p, functools.partial(_lower, platform=None))
mlir.register_lowering(quantize_p, functools.partial(_lower, platform="tpu"), platform="tpu")


@functools.lru_cache(maxsize=1024)
def _jitted(problem: QuantizeProblem, names: tuple[str, ...] | None):
    return jax.jit(functools.partial(quantize_p.bind, problem=problem, names=names))
