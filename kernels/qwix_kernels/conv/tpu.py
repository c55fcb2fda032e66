"""Quantized convolution on a TPU: what the kernels take, with which blocks, and the calls themselves.

    1 x 1       a matmul of the pixels, by the matmul kernel, where reshaping moves nothing and one scale
                serves all images
    depthwise   the vector unit (tpu_depthwise.py)
    the rest    one kernel (tpu_kernel.py) under a plan (tpu_plan.py)

Both read images and kernels as they lie in HBM; only scales, which are small, are laid out anew outside.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwix_kernels.chips import Chip
from qwix_kernels.conv import tpu_depthwise, tpu_epilogue, tpu_estimate, tpu_kernel, tpu_pointwise, tpu_stage
from qwix_kernels.conv.problem import NO_EXTRAS, ConvExtras, ConvProblem, Window
from qwix_kernels.conv.tpu_blocks import fitting, make_plan
from qwix_kernels.conv.tpu_config import Config as Config
from qwix_kernels.conv.tpu_plan import Plan
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul.tpu_config import LANES, pl_cdiv
from qwix_kernels.problem import Tensor, dtype_bits

_LHS = ("bfloat16", "float32", "int8", "int4", "float8_e4m3fn", "float8_e5m2")
_RHS = ("bfloat16", "int8", "int4", "float8_e4m3fn", "float8_e5m2")
_OUT = ("bfloat16", "float32", "int32")
_LEAST_FEATURES = 24


def check(problem: ConvProblem, chip: Chip) -> None:
    """Raises NotImplementedError, naming the constraint and the shapes, for what no kernel runs."""
    p = problem

    def refuse(reason: str) -> None:
        shapes = f"lhs [{p.batch}, {', '.join(map(str, p.spatial))}, {p.features}] {p.lhs.dtype}, rhs "
        shapes += f"[{', '.join(map(str, p.kernel))}, {p.inputs}, {p.out_features}] {p.rhs.dtype}"
        raise NotImplementedError(f"the TPU kernel {reason}; got {shapes} on {chip.name}")

    if chip.platform != "tpu":
        refuse("runs on TPUs")
    if len(p.windows) not in (1, 2):
        refuse("has one or two spatial axes")
    if 0 in (*p.out_shape, p.k):
        refuse("has no empty operands")
    if p.groups > 1 and not p.is_depthwise:
        refuse(f"has one feature group or depthwise ones, not {p.groups}")
    if any(w.lhs_dilation > 1 for w in p.windows):
        refuse("has no holes in the lhs (lhs_dilation)")
    for name, x, taken in (("lhs", p.lhs, _LHS), ("rhs", p.rhs, _RHS)):
        if x.dtype not in taken or x.codebook:
            refuse(f"takes {', '.join(taken)} as {name}")
        if x.zero_point:
            refuse("has no zero points")
    if p.lhs_tile or p.rhs_tile:
        refuse(
            f"has scales of images and output features, not of runs of {p.lhs_tile or p.rhs_tile} features"
        )
    if p.quantize_lhs and p.quantize_lhs.dtype not in ("int8", "int4", "float8_e4m3fn", "float8_e5m2"):
        refuse(f"quantizes images to int8, int4 and float8, not {p.quantize_lhs.dtype}")
    if p.quantize_lhs and p.quantize_lhs.scale_dtype != "float32":
        refuse("finds float32 scales")
    if not p.quantize_lhs and not (p.lhs.is_quantized or p.rhs.is_quantized) and p.out_dtype != "int32":
        refuse("needs a quantized operand")
    e = p.epilogue
    if e and e.quantize and (not e.quantize.static or e.quantize.dtype not in ("int8", "float8_e4m3fn")):
        refuse("quantizes its result by a static scale, to int8 or float8_e4m3fn")
    if p.out_dtype not in _OUT and not (e and e.quantize):
        refuse(f"gives {', '.join(_OUT)}, not {p.out_dtype}")
    floats = [x for x in (p.lhs, p.rhs) if x.dtype in ("bfloat16", "float32")]
    if p.precision not in (None, "default") and floats and not p.quantize_lhs:
        refuse(f"multiplies floats in bfloat16, not with precision {p.precision!r}")
    if p.is_depthwise and (reason := tpu_depthwise.refusal(_planar(p), chip)):
        refuse(reason)
    if p.is_depthwise or tpu_pointwise.takes(p, chip):
        return
    if p.features < _LEAST_FEATURES:
        refuse(f"takes at least {_LEAST_FEATURES} input features")
    if not any(True for _ in fitting(_planar(p), chip)):
        refuse("finds no blocks that its VMEM holds: it keeps whole images there")


@functools.lru_cache(maxsize=4096)
def heuristic_config(problem: ConvProblem, chip: Chip) -> Config:
    """The kernel and the blocks with the least static time."""
    if problem.is_depthwise:
        return Config("depthwise")
    if is_matmul(problem, chip):
        return Config("matmul")
    return config_of(best(_planar(problem), chip))


def configs(problem: ConvProblem, chip: Chip) -> Iterator[Config]:
    """All that may be tried: both kernels where there are two, and their blocks."""
    if problem.is_depthwise:
        yield Config("depthwise")
        return
    if tpu_pointwise.takes(problem, chip):
        yield Config("matmul")
    if problem.features >= _LEAST_FEATURES:
        yield from map(config_of, fitting(_planar(problem), chip))


def config_of(plan: Plan) -> Config:
    """What `plan_of` makes this plan of."""
    p = plan
    return Config("blocks", p.pitch, p.images, p.chunk_rows, p.block_n, p.turns, p.bands)


def plan_of(problem: ConvProblem, chip: Chip, config: Config) -> Plan:
    """The plan with these blocks. Raises NotImplementedError where they do not fit the problem or VMEM."""
    c, p = config, _planar(problem)
    if problem.is_depthwise or c.kernel != "blocks":
        raise NotImplementedError(f"{c.kernel!r} has no plan for {problem.scheme}")
    wide = max(p.out[1], pl_cdiv(p.windows[1].size, p.windows[1].stride))
    if c.pitch % 8 or c.pitch < wide or c.block_n > p.out_features:
        raise NotImplementedError(
            f"{c} does not fit images whose rows have {wide} places, and {p.out_features} features"
        )
    return make_plan(p, chip, c.pitch, c.images, c.chunk_rows, c.block_n, c.turns, c.bands)


def estimate(problem: ConvProblem, chip: Chip, config: Config) -> Estimate:
    """Static cost on one core. Raises NotImplementedError where `config` does not fit."""
    if problem.is_depthwise and config.kernel == "depthwise":
        return tpu_depthwise.estimate(_planar(problem), chip)
    if config.kernel == "matmul" and tpu_pointwise.takes(problem, chip):
        return tpu_pointwise.estimate(problem, chip)
    return tpu_estimate.estimate(plan_of(problem, chip, config), chip)


@functools.lru_cache(maxsize=4096)
def is_matmul(problem: ConvProblem, chip: Chip) -> bool:
    """Whether the matmul kernel runs it, as the only one that can or the faster one by static estimate."""
    if not tpu_pointwise.takes(problem, chip):
        return False
    if problem.features < _LEAST_FEATURES or not any(True for _ in fitting(_planar(problem), chip)):
        return True
    ours = tpu_estimate.estimate(best(_planar(problem), chip), chip)
    return tpu_pointwise.estimate(problem, chip).static_us <= ours.static_us


@functools.lru_cache(maxsize=4096)
def best(problem: ConvProblem, chip: Chip) -> Plan:
    """The plan with the least static time, of a problem with two spatial axes."""

    def cost(plan: Plan) -> tuple[float, float]:
        found = tpu_estimate.estimate(plan, chip)
        return found.static_us, found.compute_us

    return min(fitting(problem, chip), key=cost)


def _planar(p: ConvProblem) -> ConvProblem:
    """With two spatial axes."""
    return p if len(p.windows) == 2 else dataclasses.replace(p, windows=(Window(1, 1), *p.windows))


def run(
    problem: ConvProblem,
    lhs: Tensor,
    rhs: Tensor,
    extras: ConvExtras = NO_EXTRAS,
    *,
    config: Config,
    chip: Chip,
    interpret: Any = False,
) -> jax.Array | Tensor:
    """[N, *out, O] in `problem.out_dtype`; a `Tensor` where the result is quantized.

    Args:
      problem: describes the operands; `check(problem, chip)` must have passed.
      lhs, rhs, extras: see problem.py.
      config: as `heuristic_config` gives, or a tuned one.
      chip: the chip to compile for.
      interpret: a `pltpu.InterpretParams` runs the kernel on the CPU.
    """
    if config.kernel == "depthwise":
        out = tpu_depthwise.run(_planar(problem), lhs, rhs, extras, chip=chip, interpret=interpret)
    elif config.kernel == "matmul":
        out = tpu_pointwise.run(problem, lhs, rhs, extras, chip=chip, interpret=interpret)
    else:
        out = _run(plan_of(problem, chip, config), lhs, rhs, extras, chip, interpret)
    out = out.reshape(problem.out_shape)
    return Tensor(out, extras.out_scale) if problem.epilogue and problem.epilogue.quantize else out


def _run(plan: Plan, lhs: Tensor, rhs: Tensor, extras: ConvExtras, chip: Chip, interpret: Any) -> jax.Array:
    p = plan.problem
    names, arrays, specs = zip(*_operands(plan, lhs, rhs, extras), strict=True)
    scratch = _scratch(plan)
    h, w = plan.windows
    shape = (p.batch, h.out, plan.bands, w.out, p.out_features)
    out = jax.ShapeDtypeStruct(shape, jnp.dtype(p.out_dtype))
    block = pl.BlockSpec(
        (plan.block_images, plan.out_rows, plan.bands, plan.pitch, plan.block_n), lambda b, j: (b, 0, 0, 0, j)
    )
    moved = sum(a.size * dtype_bits(a.dtype.name) // 8 for a in (*arrays, out))
    flops = 2 * out.size * p.k
    return pl.pallas_call(
        functools.partial(tpu_kernel.kernel, plan, bool(interpret), (*names, "out", *scratch)),
        grid=plan.grid,
        in_specs=specs,
        out_specs=block,
        out_shape=out,
        scratch_shapes=tuple(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=int(0.95 * chip.vmem_bytes),
        ),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
        name=f"qwix_{p.scheme.replace(' ', '_')}",
    )(*arrays)


def _operands(
    plan: Plan, lhs: Tensor, rhs: Tensor, extras: ConvExtras
) -> list[tuple[str, jax.Array, pl.BlockSpec]]:
    """(name in the kernel, array, block) of everything the kernel reads."""
    p, n = plan.problem, plan.problem.batch
    images, columns = plan.block_images, plan.block_n
    x = lhs.values.reshape(n, *p.spatial, p.features)
    block = (images, plan.block_rows, plan.block_columns, p.features)
    out = [("lhs", x, pl.BlockSpec(block, lambda b, j: (b, 0, 0, 0)))]
    weights = rhs.values.reshape(p.k, p.out_features)
    of_weights = pl.BlockSpec((p.k, columns), lambda b, j: (0, j))
    if plan.turned:
        weights, of_weights = weights.T, pl.BlockSpec((columns, p.k), lambda b, j: (j, 0))
    out.append(("rhs", weights, of_weights))
    across = pl.BlockSpec((1, columns), lambda b, j: (0, j))
    of_image = pl.BlockSpec((images, 1, LANES), lambda b, j: (b, 0, 0))
    small = tpu_epilogue.operands(p, lhs, rhs, extras)
    one = pl.BlockSpec((1, 1), lambda b, j: (0, 0))
    blocks = {"lhs_scale": of_image, "one_scale": one, "out_scale": one}
    out += [(name, v, blocks.get(name, across)) for name, v in small.items()]
    masks = tpu_stage.mask_array(plan)
    if masks is not None:
        out.append(("masks", jnp.asarray(masks), pl.BlockSpec(masks.shape, lambda b, j: (0, 0, 0))))
    return out


def _scratch(plan: Plan) -> dict[str, Any]:
    p = plan.problem
    sets = range(2 if plan.turns > 1 else 1)
    names = [tpu_stage.flat_name(phase, which) for phase in plan.phases for which in sets]
    names += [tpu_stage.name_of(plan, copy, which) for copy in plan.copies for which in sets]
    out: dict[str, Any] = {
        name: pltpu.VMEM(
            (plan.lane_groups, plan.length // plan.per_word, LANES if plan.pads else min(p.features, LANES)),
            jnp.int32,
        )
        for name in names
    }
    if plan.widens_rhs:
        out["rhs_ready"] = pltpu.VMEM((plan.depth, plan.columns), jnp.dtype(plan.rhs_dot))
    if plan.finds_scale:
        out["tops"] = out["found"] = pltpu.VMEM((plan.block_images, 1, LANES), jnp.float32)
    if plan.images > 1 and (plan.finds_scale or p.lhs.is_quantized or plan.quantizes):
        for which in sets:
            out[f"row_scale{which}"] = pltpu.VMEM((plan.body, LANES), jnp.float32)
    if plan.splits_words:
        lanes = min(p.features, LANES)
        out["line"] = pltpu.VMEM((plan.stage_rows, plan.pitch // 2, lanes), jnp.int32)
    elif plan.splits:
        wide = jnp.int32 if jnp.issubdtype(p.lhs.dtype, jnp.integer) else jnp.float32
        out["line"] = pltpu.VMEM((plan.stage_rows, plan.block_columns, min(p.features, LANES)), wide)
    return out
