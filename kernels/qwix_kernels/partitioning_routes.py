"""Lowers an op in shards, where the program that it's part of is cut over a mesh.

    explicit axes     types say how arrays are laid out: a shard_map over these axes, planned from them
    the compiler's    (GSPMD, Shardy) a call that the partitioner asks back about, with a rule by which
                      layouts propagate, planned from the layouts that it has found
    inside shard_map  nothing to do: each shard's program has the op on its own arrays

In either case a shard binds the same primitive again, on the arrays that it holds, so which implementation
runs is decided for the shard's sizes. What can't be cut here is left to the compiler, as a program of XLA's:
a mesh with explicit and automatic axes, an export, a program for devices that are not attached (its client
does not ask back), sizes that aren't known.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax._src import config as jax_config
from jax._src import dispatch as jax_dispatch
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qwix_kernels.partitioning import Layout, Plan, make_plan, sharding_rule

Arrays = Sequence[jax.Array]


@dataclasses.dataclass(frozen=True)
class Op:
    """What is to be known of an op to cut it.

    layout: its arrays.
    shard: (plan, *arrays of one shard) gives the shard's results. Runs inside of shard_map.
    whole: (*arrays) gives the results of the op itself.
    wanted: how the first result is to be laid out, where the caller has said so.
    """

    layout: Layout
    shard: Callable[..., Sequence[jax.Array]]
    whole: Callable[..., Sequence[jax.Array]]
    wanted: PartitionSpec | None = None


def register(primitive: Primitive) -> None:
    """Makes the devices known where this primitive is lowered: a partitioner's call is for them."""
    jax_dispatch.prim_requires_devices_during_lowering.add(primitive)


def explicit_mesh(avals: Sequence[Any]) -> Any:
    """The mesh whose explicit axes the types of these arrays are laid out over; None without such axes."""
    mesh = next((a.sharding.mesh for a in avals if not a.sharding.mesh.empty), None)
    return mesh if mesh is not None and _sizes(mesh, AxisType.Explicit) else None


def has_explicit_axes(avals: Sequence[Any]) -> bool:
    """Whether types of arrays say how they are laid out, if only over axes of size 1."""
    return any(AxisType.Explicit in a.sharding.mesh.axis_types for a in avals)


@contextlib.contextmanager
def traced_plainly(arrays: Sequence[Any]) -> Iterator[None]:
    """What is inside is traced without what JAX checks of programs over meshes.

    A partitioner asks back while the program around it is compiled, perhaps under a mesh with explicit axes
    of which these arrays know nothing. And inside of a shard_map that checks what varies over which axes, a
    kernel would have to say it of its results; the op's primitive has.
    """
    nowhere = all(jax.typeof(x).sharding.mesh.empty for x in arrays)
    mesh = jax.sharding.AbstractMesh((), ())
    with (
        jax.sharding.use_abstract_mesh(mesh) if nowhere else contextlib.nullcontext(),
        jax_config._check_vma(False),
    ):
        yield


def is_explicit(avals: Sequence[Any]) -> bool:
    """Whether an op of these arrays runs in shards of explicit axes, and of no others."""
    mesh = explicit_mesh(avals)
    return mesh is not None and not _sizes(mesh, AxisType.Auto)


def _sizes(mesh: Any, kind: AxisType) -> dict[str, int]:
    """The axes of a mesh of this kind that cut something."""
    named = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, its in named if its == kind and size > 1}


def plan_of_types(layout: Layout, avals: Sequence[Any], wanted: PartitionSpec | None) -> Plan:
    """The plan for arrays on a mesh with explicit axes."""
    mesh = explicit_mesh(avals)
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    results = None if wanted is None else [wanted]
    return make_plan(layout, sizes, [a.sharding.spec for a in avals], results, strict=True)


def layout_of(x: jax.Array) -> PartitionSpec | None:
    """How an array is laid out, where its type says it; a gradient of it is laid out alike."""
    aval = jax.typeof(x)
    return None if explicit_mesh([aval]) is None else aval.sharding.spec


def placed(x: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    """The array laid out so, where types say how arrays are laid out."""
    mesh = explicit_mesh([jax.typeof(x)])
    if spec is None or mesh is None or jax.typeof(x).sharding.spec == spec:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def laid_out_alike(gradients: Any, of: Any) -> Any:
    """Gradients laid out as what they are of. Either is a tree of dataclasses, with None for no array."""
    if gradients is None or of is None:
        return gradients
    if isinstance(of, tuple | list):
        return type(of)(laid_out_alike(d, x) for d, x in zip(gradients, of, strict=True))
    if dataclasses.is_dataclass(of):
        fields = {f.name: getattr(gradients, f.name) for f in dataclasses.fields(gradients)}
        new = {name: laid_out_alike(d, getattr(of, name)) for name, d in fields.items()}
        return dataclasses.replace(gradients, **new)
    return placed(gradients, layout_of(of)) if isinstance(of, jax.Array) else gradients


def lower(ctx: mlir.LoweringRuleContext, args: Sequence[Any], make: Callable[[], Op]) -> Any:
    """The op in shards; None where the program isn't cut, or can't be here."""
    if is_explicit(ctx.avals_in):
        op = make()
        run = _in_shard_map(op, plan_of_types(op.layout, ctx.avals_in, op.wanted), ctx.avals_in)
    elif is_asked_back(ctx):
        run = _asked_back(make())
    else:
        return None
    return mlir.lower_fun(lambda *arrays: tuple(run(*arrays)), multiple_results=True)(ctx, *args)


def _in_shard_map(op: Op, plan: Plan, avals: Sequence[Any]) -> Callable[..., Sequence[jax.Array]]:
    mesh = explicit_mesh(avals)
    # Axes of size 1, too: a kernel must find none that's left to the compiler.
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    shard = jax.shard_map(
        lambda *arrays: tuple(op.shard(plan, *arrays)),
        mesh=mesh,
        in_specs=plan.operands,
        out_specs=plan.results,
        axis_names=axes,
        check_vma=False,
    )

    def run(*arrays: jax.Array) -> Sequence[jax.Array]:
        placed = [
            x if aval.sharding.spec == spec else jax.sharding.reshard(x, NamedSharding(mesh, spec))
            for x, aval, spec in zip(arrays, avals, plan.operands, strict=True)
        ]
        return shard(*placed)

    return run


def is_asked_back(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether the partitioner that cuts this program can be told how to cut an op."""
    context = ctx.module_context.axis_context
    devices = getattr(context, "device_assignment", None)
    mesh = getattr(context, "abstract_mesh", None)
    if not devices or len(devices) == 1 or mesh is None or mesh.empty:
        return False
    if ctx.module_context.lowering_parameters.for_export:  # what is asked back can't be stored
        return False
    return not explicit_mesh(ctx.avals_in) and _is_attached(devices[0])


def _is_attached(device: jax.Device) -> bool:
    """Whether a device can run programs. The client of one that is only described asks nobody back."""
    return type(device.client).__name__ != "CompileOnlyPyClient"


def _asked_back(op: Op) -> Callable[..., Sequence[jax.Array]]:
    layout = op.layout

    def partition(mesh: Any, given: Sequence[Any], wanted: Sequence[Any]):
        spec = lambda x: PartitionSpec() if x.sharding is None else x.sharding.spec
        plan = make_plan(layout, dict(mesh.shape), [spec(x) for x in given], [spec(x) for x in wanted])
        named = lambda specs: tuple(NamedSharding(mesh, s) for s in specs)

        def shard(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            with traced_plainly(arrays):
                return tuple(op.shard(plan, *arrays))

        return mesh, shard, named(plan.results), named(plan.operands)

    call = custom_partitioning(lambda *arrays: tuple(op.whole(*arrays)))
    call.def_partition(partition, sharding_rule=sharding_rule(layout))
    return call
