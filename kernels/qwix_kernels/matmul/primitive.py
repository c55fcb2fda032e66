"""The primitive under `matmul`: its types, its batching, and its lowering for each platform.

The operands are bound in the one form that kernels see: every array of rank 3, a scale with the batch of its
values, and a batch that shares its rhs folded into M (a weight is then one matrix however many batch axes the
activations had). `vmap` adds a batch axis; it never becomes a loop.

Under a mesh with explicit axes the result is laid out as the operands are: batch and M as in lhs, N as in
rhs. Under automatic sharding the portable path is partitioned by the compiler; a kernel cannot be, so a
kernel needs `shard_map` there, and dispatch says so.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qwix_kernels import chips, dispatch, tuning
from qwix_kernels.chips import Chip
from qwix_kernels.matmul import cost, xla
from qwix_kernels.problem import MatmulProblem, Operand, Tensor


@dataclasses.dataclass(frozen=True)
class How:
    """What a caller asks of dispatch. Part of the primitive's parameters, so of every cache's key."""

    implementation: tuple[str, ...] | None = None
    config: Any = None
    ambient_config: Any = None  # that of `tuning.use` when the op was traced


def _tpu(name: str):
    """A function of tpu.py, which is loaded only when a TPU is asked about."""

    def call(*args, **kwargs):
        return getattr(importlib.import_module("qwix_kernels.matmul.tpu"), name)(*args, **kwargs)

    return call


def _run_xla(problem: MatmulProblem, lhs: Tensor, rhs: Tensor, *, config: Any, chip: Chip) -> jax.Array:
    quantized = problem.quantize_lhs and jnp.issubdtype(problem.quantize_lhs.dtype, jnp.integer)
    integers = problem.rhs.is_integer and (problem.lhs.is_integer or bool(quantized))
    return xla.run(problem, lhs, rhs, one_by_one=chip.platform == "cpu" and integers)


dispatch.register(
    MatmulProblem,
    (
        dispatch.Implementation(
            name="mosaic_tpu",
            platforms=("tpu",),
            check=_tpu("check"),
            estimate=_tpu("estimate"),
            run=_tpu("run"),
            heuristic_config=_tpu("heuristic_config"),
            config_type=lambda: importlib.import_module("qwix_kernels.matmul.tpu").Config,
        ),
        dispatch.Implementation(
            name="xla",
            platforms=(),
            check=lambda problem, chip: None,
            estimate=lambda problem, chip, config: cost.xla_estimate(problem, chip),
            run=_run_xla,
        ),
    ),
)


def check_names(problem: MatmulProblem, how: How) -> None:
    """Raises ValueError for a name of no implementation, when called and not only when lowered."""
    dispatch.named(problem, how.implementation)


def bind(problem: MatmulProblem, how: How, lhs: Tensor, rhs: Tensor) -> jax.Array:
    """[batch, M, N] of operands that `problem` describes."""
    if not all((problem.batch, problem.m, problem.n, problem.k)) or 0 in lhs.shape + rhs.shape:
        return jnp.zeros((_batch(lhs, rhs), problem.m, problem.n), problem.out_dtype)
    lhs, rhs = _with_own_batch(lhs), _with_own_batch(rhs)
    batch = problem.batch
    fold = problem.rhs.batch == 1 and batch > 1 and not _explicit_axes()
    if fold:
        lhs = jax.tree.map(lambda a: a.reshape(1, -1, a.shape[2]), lhs)
        left = dataclasses.replace(problem.lhs, batch=1, free=batch * problem.m)
        problem = dataclasses.replace(problem, m=batch * problem.m, lhs=left)
    if how.ambient_config is None:
        how = dataclasses.replace(how, ambient_config=tuning.ambient())
    out = matmul_p.bind(*jax.tree.leaves((lhs, rhs)), problem=problem, how=how)
    return out.reshape(batch, -1, problem.n) if fold else out


def vary_alike(operands: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Inside shard_map: marks all arrays as varying over the axes that any of them varies over."""
    varying = [jax.typeof(a).mat.varying for a in jax.tree.leaves(operands)]
    union = frozenset().union(*varying)
    if all(v == union for v in varying):
        return operands

    def cast(a):
        missing = tuple(sorted(union - jax.typeof(a).mat.varying))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, operands)


def _batch(lhs: Tensor, rhs: Tensor) -> int:
    return rhs.shape[0] if lhs.shape[0] == 1 else lhs.shape[0]


def _with_own_batch(x: Tensor) -> Tensor:
    """The same tensor with one scale for each batch of its values."""
    if x.scale is None or x.scale.shape[0] == x.shape[0]:
        return x
    repeat = lambda a: None if a is None else jnp.repeat(a, x.shape[0] // a.shape[0], axis=0)
    return dataclasses.replace(x, scale=repeat(x.scale), zero_point=repeat(x.zero_point))


def _explicit_axes() -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit)


def _unflatten(problem: MatmulProblem, arrays: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The operands from what was bound: of each side values, scale and zero point, where there are any."""
    left = [arrays[i] for i in range(1 + problem.lhs.is_quantized + problem.lhs.zero_point)]
    right = list(arrays[len(left) :])
    return _tensor(left, problem.lhs), _tensor(right, problem.rhs)


def _tensor(arrays: list[Any], x: Operand) -> Tensor:
    values, scale, zero_point = arrays + [None] * (3 - len(arrays))
    return Tensor(values, scale, zero_point, x.codebook)


# --- types


def _abstract(*avals, problem: MatmulProblem, how: How):
    values: Any = [x.values for x in _unflatten(problem, avals)]
    lhs, rhs = values
    out = lhs.update(shape=(problem.batch, problem.m, problem.n), dtype=jnp.dtype(problem.out_dtype))
    mesh = next((a.sharding.mesh for a in avals if not a.sharding.mesh.empty), None)
    if mesh is None:
        return out
    left, right = lhs.sharding.spec, rhs.sharding.spec
    batch = left[0] if problem.lhs.batch == problem.batch else right[0]
    spec = PartitionSpec(batch, left[1], right[1 if problem.rhs_transposed else 2])
    return out.update(sharding=NamedSharding(mesh, spec))


# --- batching


def _batch_rule(args, axes, *, problem: MatmulProblem, how: How):
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    count = 1 + problem.lhs.is_quantized + problem.lhs.zero_point
    left = _front(args[:count], axes[:count], size)
    right = _front(args[count:], axes[count:], size)
    left_batch, right_batch = problem.lhs.batch, problem.rhs.batch
    if left is not None and right is None and right_batch > 1:
        return _batch_into_rows(left, args[count:], problem, how, size), 1
    # Both sides need the new axis, except one that has a single matrix for all.
    if left is None and left_batch > 1:
        left = [jnp.broadcast_to(a, (size, *a.shape)) for a in args[:count]]
    if left is not None and right is not None and left_batch != right_batch:
        left, right = (_spread(x, b, problem.batch) for x, b in ((left, left_batch), (right, right_batch)))
    lhs, rhs = (
        [a.reshape(-1, *a.shape[2:]) for a in x] if x is not None else list(old)
        for x, old in ((left, args[:count]), (right, args[count:]))
    )
    new = dataclasses.replace(
        problem,
        lhs=dataclasses.replace(problem.lhs, batch=lhs[0].shape[0]),
        rhs=dataclasses.replace(problem.rhs, batch=rhs[0].shape[0]),
    )
    out = bind(new, how, *_unflatten(new, lhs + rhs))
    return out.reshape(size, problem.batch, problem.m, problem.n), 0


def _front(arrays, axes, size: int) -> list[jax.Array] | None:
    """The arrays with the mapped axis first, or None where none of them is mapped."""
    if all(axis is None for axis in axes):
        return None
    return [
        jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(arrays, axes, strict=True)
    ]


def _spread(arrays: list[jax.Array], batch: int, wanted: int) -> list[jax.Array]:
    """[size, batch, ...] with a shared batch of 1 written out."""
    if batch == wanted:
        return arrays
    return [jnp.broadcast_to(a, (a.shape[0], wanted, *a.shape[2:])) for a in arrays]


def _batch_into_rows(left: list[jax.Array], right, problem: MatmulProblem, how: How, size: int) -> jax.Array:
    """Many lhs against each of several rhs: more rows, so that no rhs is copied. -> [batch, size, M, N]"""
    rows = [jnp.moveaxis(a, 0, 1) for a in left]
    rows = [a.reshape(a.shape[0], -1, a.shape[3]) for a in rows]
    new = dataclasses.replace(
        problem, m=size * problem.m, lhs=dataclasses.replace(problem.lhs, free=size * problem.m)
    )
    out = bind(new, how, *_unflatten(new, [*rows, *right]))
    return out.reshape(problem.batch, size, problem.m, problem.n)


# --- lowering


def _lower(ctx, *args, problem: MatmulProblem, how: How, platform: str | None):
    axis_context = ctx.module_context.axis_context
    devices = getattr(axis_context, "device_assignment", None)
    mesh = getattr(axis_context, "abstract_mesh", None) or getattr(axis_context, "mesh", None)
    device = devices[0] if devices else getattr(mesh, "abstract_device", None)
    # Platforms without a rule of their own share one lowering; all implementations they may get are portable.
    for name in (platform,) if platform else ctx.platforms or ctx.module_context.platforms:
        chip = chips.chip_for_lowering(name, device)
        impl, config = _decide(problem, how, chip, getattr(axis_context, "num_devices", 1))
    out = ctx.avals_out[0].sharding

    def fun(*arrays):
        run: Any = functools.partial(impl.run, problem, config=config, chip=chip)
        if impl.name == "xla" and _explicit_axes():
            run = jax.sharding.auto_axes(run, out_sharding=out)
        return run(*_unflatten(problem, arrays))

    return mlir.lower_fun(fun, multiple_results=False)(ctx, *args)


def _decide(problem: MatmulProblem, how: How, chip: Chip, devices: int):
    """(implementation, config) for a program that the compiler partitions over `devices`."""
    refusal = None
    if devices > 1:
        refusal = (
            f"the compiler cannot partition a kernel over {devices} devices; call matmul inside jax.shard_map"
        )
    sizes = (problem.m, problem.lhs.batch, problem.rhs.batch)
    if not all(isinstance(s, int) for s in sizes):
        refusal = "a kernel needs sizes that are known when it is compiled, not symbolic ones"
        problem = dataclasses.replace(problem, m=_NOMINAL, lhs=_sized(problem.lhs), rhs=_sized(problem.rhs))
    with tuning.use(how.ambient_config):
        impl, explanation = dispatch.choose(problem, chip, how.implementation, how.config, refusal)
    quantized = problem.lhs.is_quantized or problem.rhs.is_quantized or problem.quantize_lhs
    if how.implementation is None and quantized:
        dispatch.warn_of_fallback(explanation, chip)
    return impl, explanation.config


def _sized(x: Operand) -> Operand:
    """With stand-ins for symbolic sizes, so that it can be priced."""
    fixed: dict[str, Any] = {
        f: v if isinstance(v := getattr(x, f), int) else _NOMINAL for f in ("batch", "free", "tile_free")
    }
    return dataclasses.replace(x, **fixed)


_NOMINAL = 256

matmul_p = Primitive("qwix_matmul")
matmul_p.def_abstract_eval(_abstract)
matmul_p.def_impl(lambda *args, **params: _jitted(**params)(*args))
batching.primitive_batchers[matmul_p] = _batch_rule
mlir.register_lowering(matmul_p, functools.partial(_lower, platform=None))
mlir.register_lowering(matmul_p, functools.partial(_lower, platform="tpu"), platform="tpu")


@functools.lru_cache(maxsize=4096)
def _jitted(problem: MatmulProblem, how: How):
    return jax.jit(functools.partial(matmul_p.bind, problem=problem, how=how))
