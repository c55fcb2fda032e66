"""The primitive under `conv`: its types, its batching, and its lowering for each platform.

As for `matmul`, the implementation is decided when a program is lowered, for the platform and the chip that
it is lowered for. `vmap` over images makes more images; over kernels, XLA's own rule for its convolution
applies.
"""

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
from qwix_kernels.chips import Chip
from qwix_kernels.conv import cost, partition, xla
from qwix_kernels.conv.problem import ConvExtras, ConvProblem
from qwix_kernels.lowering import How
from qwix_kernels.problem import Epilogue, Operand, Tensor

Operands = tuple[Tensor, Tensor, ConvExtras]


def _run_xla(problem: ConvProblem, lhs: Tensor, rhs: Tensor, extras: ConvExtras, *, config: Any, chip: Chip):
    return xla.run(problem, lhs, rhs, extras, on_cpu=chip.platform == "cpu")


dispatch.register(
    ConvProblem,
    lowering.kernels_or_xla("qwix_kernels.conv.tpu", _run_xla, cost.xla_estimate),
)


def bind(problem: ConvProblem, how: How, lhs: Tensor, rhs: Tensor, extras: ConvExtras) -> list[jax.Array]:
    """[N, *out, O] of operands that `problem` describes; and the scales, where they are quantized."""
    return conv_p.bind(*jax.tree.leaves((lhs, rhs, extras)), problem=problem, how=how.traced())


def _unflatten(problem: ConvProblem, leaves: Sequence[Any]) -> Operands:
    return jax.tree.unflatten(_structure(problem), leaves)


@functools.lru_cache(maxsize=4096)
def _structure(problem: ConvProblem) -> Any:
    """The tree of the operands: which arrays a problem has."""

    def some(there: Any) -> Any:
        return 0 if there else None

    def tensor(x: Operand) -> Tensor:
        return Tensor(some(True), some(x.is_quantized), some(x.zero_point), x.codebook)  # type: ignore[arg-type]

    q, e = problem.quantize_lhs, problem.epilogue or Epilogue()
    extras = ConvExtras(some(q and q.static), some(e.bias), some(e.quantize and e.quantize.static))
    return jax.tree.structure((tensor(problem.lhs), tensor(problem.rhs), extras))


def _abstract(*avals, problem: ConvProblem, how: How):
    lhs = avals[0]
    shapes = [(problem.out_shape, jnp.dtype(problem.out_dtype))]
    if problem.epilogue and problem.epilogue.scales_out:
        shapes.append(((problem.batch, *(1,) * len(problem.out), 1), jnp.dtype("float32")))
    mesh = routes.explicit_mesh(avals)
    if mesh is None:
        return [lhs.update(shape=shape, dtype=dtype) for shape, dtype in shapes]
    plan = routes.plan_of_types(partition.layout_of(problem, _unflatten(problem, avals)), avals, how.out)
    return [
        lhs.update(shape=shape, dtype=dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(shapes, plan.results, strict=True)
    ]


def _batch_rule(args, axes, *, problem: ConvProblem, how: How):
    """More images where only what belongs to images is mapped; XLA's rules for everything else."""
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    mapped: Any = _unflatten(problem, [axis is not None for axis in axes])
    if any(jax.tree.leaves(mapped[1])) or mapped[2].bias or mapped[2].out_scale:
        run = lambda *leaves: _leaves(xla.run(problem, *_unflatten(problem, leaves)))
        return jax.vmap(run, in_axes=tuple(axes), axis_size=size)(*args), _zeros(problem)
    n = problem.batch
    lhs, rhs, extras = _unflatten(problem, args)
    at: Any = _unflatten(problem, [-1 if axis is None else axis for axis in axes])

    def more(x: jax.Array, axis: int, count: Any) -> jax.Array:
        """[size * n, ...]; what serves all images stays as it is."""
        if axis < 0 and x.shape[0] == 1 and count != 1:
            return x
        x = jnp.broadcast_to(x, (size, *x.shape)) if axis < 0 else jnp.moveaxis(x, axis, 0)
        rows = x.shape[1] if count == x.shape[1] else count
        return jnp.broadcast_to(x, (size, rows, *x.shape[2:])).reshape(size * rows, *x.shape[2:])

    scales = lambda x, axis: None if x is None else more(_per_image(x, axis, n), axis, n)
    values = more(lhs.values, at[0].values, n)
    images = Tensor(
        values, scales(lhs.scale, at[0].scale), scales(lhs.zero_point, at[0].zero_point), lhs.codebook
    )
    small = ConvExtras(
        scales(extras.lhs_scale, at[2].lhs_scale), extras.bias, scales(extras.out_scale, at[2].out_scale)
    )
    operand = dataclasses.replace(problem.lhs, free=size * n)
    if problem.lhs.is_quantized:
        operand = dataclasses.replace(operand, tile_free=size * n // images.scale.shape[0])  # type: ignore[union-attr]
    new = dataclasses.replace(problem, lhs=operand)
    outs = bind(new, how, images, rhs, small)
    return [out.reshape(size, n, *out.shape[1:]) for out in outs], [0] * len(outs)


def _per_image(x: jax.Array, axis: int, n: int) -> jax.Array:
    """An entry for each image, unless one serves all; the mapped axis stays where it is."""
    images = 0 if axis < 0 or axis > 0 else 1
    if x.shape[images] in (1, n) and not (x.shape[images] == 1 and axis >= 0):
        return x
    return jnp.repeat(x, n // x.shape[images], axis=images)


def _zeros(problem: ConvProblem) -> list[int]:
    return [0] * (2 if problem.epilogue and problem.epilogue.scales_out else 1)


def _leaves(out: Any) -> list[jax.Array]:
    return jax.tree.leaves(out)


def _lower(ctx, *args, problem: ConvProblem, how: How, platform: str | None):
    known, described = has_sizes(problem), problem
    outs = routes.lower(ctx, args, functools.partial(_op, problem, how, ctx.avals_in)) if known else None
    if outs is not None:
        return outs
    if not known:
        described = dataclasses.replace(problem, lhs=dataclasses.replace(problem.lhs, free=1, tile_free=1))
    decision = lowering.decide(ctx, platform, described, how, sizes_known=known)
    count, shardings = len(ctx.avals_out), tuple(aval.sharding for aval in ctx.avals_out)
    explicit = routes.has_explicit_axes(ctx.avals_in)

    def fun(*arrays):
        def run_here(*operands):
            out = decision.impl.run(problem, *operands, config=decision.config, chip=decision.chip)
            return tuple(jax.tree.leaves(out))[:count]

        run: Any = run_here
        if decision.impl.name == "xla" and explicit:
            run = jax.sharding.auto_axes(run, out_sharding=shardings)
        with routes.traced_plainly(arrays):
            return run(*_unflatten(problem, arrays))

    return mlir.lower_fun(fun, multiple_results=True)(ctx, *args)


def _op(problem: ConvProblem, how: How, avals: Sequence[Any]) -> routes.Op:
    """What cuts it over a mesh."""

    def shard(plan, *arrays):
        return partition.run(problem, how, bind, plan, *_unflatten(problem, plan.local(arrays)))

    whole = functools.partial(conv_p.bind, problem=problem, how=how)
    return routes.Op(partition.layout_of(problem, _unflatten(problem, avals)), shard, whole, how.out)


def has_sizes(problem: ConvProblem) -> bool:
    """Whether the number of images is known: `jax.export` has symbolic ones."""
    return isinstance(problem.batch, int)


conv_p = lowering.primitive("qwix_conv", _abstract, _batch_rule, _lower)
