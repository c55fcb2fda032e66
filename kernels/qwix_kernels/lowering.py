"""What the primitives of all ops share: how they are registered, and what a program is lowered with.

The implementation is decided when a program is lowered, for the platform and the chip that it is lowered for,
and never when it is traced. So one jitted function runs here, compiles for a chip that is not here, and
exports for several platforms.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, PartitionSpec

from qwix_kernels import chips, dispatch, partitioning_routes, tuning
from qwix_kernels.chips import Chip
from qwix_kernels.dispatch import Estimate, Implementation

SIZES_UNKNOWN = "a kernel needs sizes that are known when it is compiled, not symbolic ones"


@dataclasses.dataclass(frozen=True)
class How:
    """What a caller asks of dispatch. Part of a primitive's parameters, so of every cache's key."""

    implementation: tuple[str, ...] | None = None
    config: Any = None
    ambient_config: Any = None  # that of `tuning.use` when the op was traced
    out: PartitionSpec | None = None  # how the (first) result is to be laid out over explicit axes

    def traced(self) -> How:
        """The same, with the config that is in use now."""
        if self.ambient_config is not None:
            return self
        return dataclasses.replace(self, ambient_config=tuning.ambient())


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a program is lowered with: for one platform, or for several that share one lowering.

    `devices`: over how many the compiler partitions it; None where that is not said, as inside shard_map.
    """

    impl: Implementation
    config: Any
    chip: Chip
    platforms: tuple[str, ...]
    devices: int | None


def kernels_or_xla(
    tpu: str,
    run_xla: Callable[..., Any],
    estimate_xla: Callable[[Any, Chip], Estimate],
    *,
    gpu: str | None = None,
    on_request: Sequence[str] = (),
    configurable: bool = True,
) -> tuple[Implementation, ...]:
    """The implementations of an op: a kernel for each platform, and what runs everywhere and refuses nothing.

    Args:
      tpu, gpu: where `check`, `estimate` and `run` of a platform's kernel are, and if it is `configurable`
        `heuristic_config` and `Config`. Imported only when such a chip is asked about.
      on_request: GPUs on which the kernel has never run; it runs there only where a caller names it.
      run_xla: (problem, *operands, config=, chip=).
      estimate_xla: (problem, chip).
    """
    fallback = Implementation(
        name="xla",
        platforms=(),
        check=lambda problem, chip: None,
        estimate=lambda problem, chip, config: estimate_xla(problem, chip),
        run=run_xla,
    )
    kernels = [_kernel("mosaic_tpu", "tpu", tpu, configurable)]
    if gpu is not None:
        kernel = _kernel("mosaic_gpu", "cuda", gpu, configurable)
        kernels.append(dataclasses.replace(kernel, on_request=frozenset(on_request)))
    return *kernels, fallback


def _kernel(name: str, platform: str, module: str, configurable: bool) -> Implementation:
    def of(function: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: getattr(importlib.import_module(module), function)(*args, **kwargs)

    return Implementation(
        name=name,
        platforms=(platform,),
        check=of("check"),
        estimate=of("estimate"),
        run=of("run"),
        heuristic_config=of("heuristic_config") if configurable else None,
        config_type=(lambda: importlib.import_module(module).Config) if configurable else None,
    )


def decide(
    ctx: mlir.LoweringRuleContext,
    platform: str | None,
    problem: Any,
    how: How,
    *,
    sizes_known: bool = True,
    warns: Callable[[Any], bool] = lambda problem: True,
) -> Decision:
    """Chooses for the program that `ctx` belongs to.

    Args:
      platform: of this lowering rule. Platforms without a rule of their own share one (None); all
        implementations that they may get are portable.
      problem: with stand-ins for sizes that are not known (`sizes_known=False`), so that it can be priced.
      warns: whether an accelerator that runs the portable path should say so.
    """
    axis_context = ctx.module_context.axis_context
    assigned = getattr(axis_context, "device_assignment", None)
    mesh = getattr(axis_context, "abstract_mesh", None) or getattr(axis_context, "mesh", None)
    device = assigned[0] if assigned else getattr(mesh, "abstract_device", None)
    devices = getattr(axis_context, "num_devices", None)
    refusal, left = None, _left_to_the_compiler(axis_context)
    if (devices or 1) > 1:
        refusal = (
            f"the compiler cannot partition a kernel over {devices} devices; call the op inside jax.shard_map"
        )
    elif left:
        refusal = (
            f"this shard_map leaves the mesh axes {left} to the compiler, which cannot partition a kernel; "
            "name them in its axis_names"
        )
    refusal = refusal if sizes_known else SIZES_UNKNOWN
    platforms = (platform,) if platform else tuple(ctx.platforms or ctx.module_context.platforms)
    decided = []
    for name in platforms:
        chip = chips.chip_for_lowering(name, device)
        with tuning.use(how.ambient_config):
            impl, explanation = dispatch.choose(problem, chip, how.implementation, how.config, refusal)
        if how.implementation is None and warns(problem):
            dispatch.warn_of_fallback(explanation, chip)
            dispatch.warn_of_untuned(explanation, chip)
        decided.append(Decision(impl, explanation.config, chip, platforms, devices))
    return decided[-1]


def _left_to_the_compiler(axis_context: Any) -> dict[str, int]:
    """The mesh axes, with their sizes, over which the compiler cuts what is inside of a shard_map."""
    manual, mesh = getattr(axis_context, "manual_axes", None), getattr(axis_context, "mesh", None)
    if not manual or mesh is None:
        return {}
    return {name: size for name, size in mesh.shape.items() if name not in manual}


def spec_of(out_sharding: Any) -> PartitionSpec:
    """A `PartitionSpec`, which may be given as a `NamedSharding`, too."""
    return out_sharding if isinstance(out_sharding, PartitionSpec) else out_sharding.spec


def explicit_axes() -> tuple[str, ...]:
    """Names of the axes of the current mesh whose shardings are part of types."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit)


def primitive(
    name: str,
    abstract: Callable[..., Any],
    batch_rule: Callable[..., Any],
    lower: Callable[..., Any],
    *,
    multiple_results: bool = True,
) -> Primitive:
    """A primitive with the parameters `problem` and `how`. `lower` takes `platform` besides: see `decide`."""
    made = Primitive(name)
    made.multiple_results = multiple_results
    made.def_abstract_eval(abstract)

    @functools.lru_cache(maxsize=4096)
    def jitted(problem: Any, how: How):
        return jax.jit(functools.partial(made.bind, problem=problem, how=how))

    made.def_impl(lambda *args, **params: jitted(**params)(*args))
    batching.primitive_batchers[made] = batch_rule
    mlir.register_lowering(made, functools.partial(lower, platform=None))
    partitioning_routes.register(made)
    for platform in ("tpu", "cuda"):
        mlir.register_lowering(made, functools.partial(lower, platform=platform), platform=platform)
    return made
