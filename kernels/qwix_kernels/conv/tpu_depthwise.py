"""Depthwise convolution on a TPU's vector unit: each feature with its own kernel, by one Pallas kernel.

A block is a whole image. It is staged in float32, a row after the other with zeros between them, in an array
of its own for each register of lanes: there a load may start at any row and skip some, so that a tap is one
load, one product and one sum. Products of 8-bit integers and their sums are exact in float32.

The ladder: static microseconds for 8 x 28 x 28 x 192, 3 x 3, int8 images.

                                            v5e     v6e
    XLA's convolution of bfloat16          25.0    19.3   22 cycles for 1024 results
    this kernel                             see `python -m bench.price --suite conv`
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwix_kernels.chips import Chip
from qwix_kernels.conv import cost, tpu_epilogue
from qwix_kernels.conv.problem import ConvExtras, ConvProblem, Window, is_stored_integer
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.elementwise import row_scale
from qwix_kernels.matmul.tpu_config import LANES, pl_cdiv
from qwix_kernels.matmul.tpu_plan import VMEM_SHARE
from qwix_kernels.problem import Tensor, dtype_bits

_EXACT_PRODUCTS = 1 << 10  # of 8-bit integers, in float32
_AT_A_TIME = 64  # places
# Cycles, read from the compiler's bundles: of a tap for 1024 results, of staging 1024 values, of what
# follows the sums, of a step of the grid.
_TAP, _STAGE, _END, _STEP = 0.62, 2.0, 2.0, 500


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of a problem with two spatial axes."""

    problem: ConvProblem

    @property
    def windows(self) -> tuple[Window, Window]:
        return self.problem.windows  # type: ignore[return-value]

    @property
    def lanes(self) -> tuple[slice, ...]:
        size = self.problem.features
        return tuple(slice(lo, min(lo + LANES, size)) for lo in range(0, size, LANES))

    @property
    def pitch(self) -> int:
        """Rows of the staged array for a row of the image: its width and the zeros that taps read."""
        w = self.windows[1]
        reach = (w.out - 1) * w.stride + (w.kernel - 1) * w.rhs_dilation - w.low - (w.size - 1)
        return pl_cdiv(w.size + max(0, w.low, reach), 8) * 8

    @property
    def columns(self) -> int:
        """Of the result's block."""
        return pl_cdiv(self.windows[1].out, 8) * 8

    @property
    def rows(self) -> int:
        """Rows of the result that are computed at a time."""
        return max(1, min(self.windows[0].out, _AT_A_TIME // self.columns))

    @property
    def lead(self) -> int:
        """Zeros in front of the image."""
        h, w = self.windows
        return pl_cdiv(max(0, h.low) * self.pitch + max(0, w.low), 8) * 8

    @property
    def length(self) -> int:
        """Of the staged array: what any tap reads lies inside."""
        h, w = self.windows
        last = pl_cdiv(h.out, self.rows) * self.rows - 1
        row = last * h.stride + (h.kernel - 1) * h.rhs_dilation - h.low
        column = (self.columns - 1) * w.stride + (w.kernel - 1) * w.rhs_dilation - w.low
        end = self.lead + max(row * self.pitch + column + 1, h.size * self.pitch)
        return pl_cdiv(end, 8) * 8

    @property
    def finds_scale(self) -> bool:
        q = self.problem.quantize_lhs
        return q is not None and not q.static


def refusal(problem: ConvProblem, chip: Chip) -> str:
    """What keeps the kernel from running a depthwise problem; empty for nothing."""
    p = problem
    if p.out_features != p.features:
        return f"has one output feature for each input feature, not {p.out_features} for {p.features}"
    integers = is_stored_integer(p.lhs, p.quantize_lhs) and is_stored_integer(p.rhs)
    if p.out_dtype == "int32" and not (integers and p.taps <= _EXACT_PRODUCTS):
        return f"adds up {_EXACT_PRODUCTS} products exactly, not {p.taps}"
    if (used := _vmem_bytes(Plan(p))) > VMEM_SHARE * chip.vmem_bytes:
        return f"keeps whole images in VMEM, and these take {used >> 20} MiB"
    return ""


def _vmem_bytes(plan: Plan) -> int:
    p, (h, w) = plan.problem, plan.windows
    lanes = len(plan.lanes) * LANES
    image = h.size * pl_cdiv(w.size, 16) * 16 * lanes * p.lhs.bits // 8
    out = h.out * pl_cdiv(plan.columns, 16) * 16 * lanes * dtype_bits(p.out_dtype) // 8
    return 2 * (image + out) + plan.length * lanes * 4


def estimate(problem: ConvProblem, chip: Chip) -> Estimate:
    """Static cost on one core."""
    p, plan = problem, Plan(problem)
    groups, (h, w) = len(plan.lanes), plan.windows
    places = pl_cdiv(h.out, plan.rows) * plan.rows * plan.columns * groups / 8
    staged = h.size * plan.pitch * groups / 8
    cycles = places * (_TAP * p.taps + _END) + staged * _STAGE * (1 + (p.quantize_lhs is not None))
    compute = p.batch * (cycles + _STEP) / (chip.ghz * 1e3)
    up = lambda size: pl_cdiv(size, 8) * 8 / size
    moved = cost.lhs_bytes(p) * up(w.size) + cost.rhs_bytes(p) + cost.result_bytes(p) * up(w.out)
    memory = moved / (chip.hbm_gbps * 1e3)
    note = f"on the vector unit, {plan.rows} rows of {plan.columns} at a time"
    return Estimate(compute, memory, max(compute, memory), max(cost.floor(p, chip)), note)


def run(
    problem: ConvProblem, lhs: Tensor, rhs: Tensor, extras: ConvExtras, *, chip: Chip, interpret: Any = False
) -> jax.Array:
    """[N, *out, C]."""
    p, plan = problem, Plan(problem)
    (h, w), features = plan.windows, p.features
    image = pl.BlockSpec((1, h.size, plan.pitch, features), lambda b: (b, 0, 0, 0))
    arrays = {"lhs": (lhs.values.reshape(p.batch, h.size, w.size, features), image)}
    weights = rhs.values.reshape(p.taps, features)
    whole = lambda x: (x, pl.BlockSpec(x.shape, lambda b: (0,) * x.ndim))
    arrays["rhs"] = whole(weights.astype(jnp.float32))
    small = tpu_epilogue.operands(p, lhs, rhs, extras)
    arrays |= {name: whole(x) for name, x in small.items() if name != "lhs_scale"}
    if "lhs_scale" in small:
        arrays["lhs_scale"] = small["lhs_scale"], pl.BlockSpec((1, 1, LANES), lambda b: (b, 0, 0))
    scratch = {"flat": pltpu.VMEM((len(plan.lanes), plan.length, min(features, LANES)), jnp.float32)}
    out = jax.ShapeDtypeStruct((p.batch, h.out, w.out, features), jnp.dtype(p.out_dtype))
    rows = pl_cdiv(h.out, plan.rows) * plan.rows
    return pl.pallas_call(
        functools.partial(_kernel, plan, (*arrays, "out", *scratch)),
        grid=(p.batch,),
        in_specs=[spec for _, spec in arrays.values()],
        out_specs=pl.BlockSpec((1, rows, plan.columns, features), lambda b: (b, 0, 0, 0)),
        out_shape=out,
        scratch_shapes=tuple(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=int(0.95 * chip.vmem_bytes)
        ),
        interpret=interpret,
        name=f"qwix_{p.scheme.replace(' ', '_')}",
    )(*[x for x, _ in arrays.values()])


def _kernel(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    """One image."""
    r, p = dict(zip(names, refs, strict=True)), plan.problem
    scale = None
    if plan.finds_scale:
        assert p.quantize_lhs is not None
        top = tpu_epilogue.absmax(r["lhs"], 0, plan.windows[0].size, plan.windows[1].size, packed=False)
        scale = row_scale(top, p.quantize_lhs)
    elif "lhs_scale" in r:
        scale = r["lhs_scale"][0, :1, :1]
    _stage(plan, r, scale)

    @pl.loop(0, pl_cdiv(plan.windows[0].out, plan.rows))
    def _(i):
        for group, lanes in enumerate(plan.lanes):
            for row in range(plan.rows):
                z = _sums(plan, r, group, lanes, i * plan.rows + row)
                z = tpu_epilogue.finish(p, r, z, scale, lanes)
                r["out"][0, i * plan.rows + row, :, lanes] = z


def _stage(plan: Plan, r: dict[str, Any], scale: jax.Array | None) -> None:
    """The image in float32, quantized where the plan says so, with zeros round it."""
    p, (h, w) = plan.problem, plan.windows
    flat, end = r["flat"], plan.lead + h.size * plan.pitch
    for group in range(len(plan.lanes)):
        for lo, hi in ((0, plan.lead), (end, plan.length)):
            if hi > lo:
                flat[group, lo:hi, :] = jnp.zeros((hi - lo, flat.shape[2]), jnp.float32)
    inverse = None if scale is None or p.quantize_lhs is None else values.inverse(scale, p.quantize_lhs)

    @pl.loop(0, h.size)
    def _(row):
        for group, lanes in enumerate(plan.lanes):
            v = values.widen(r["lhs"][0, row, :, lanes], None)
            if inverse is not None and p.quantize_lhs is not None:
                v = values.quantize(v * inverse, p.quantize_lhs).astype(jnp.float32)
            if plan.pitch > w.size:
                column = lax.broadcasted_iota(jnp.int32, v.shape, 0)
                v = jnp.where(column < w.size, v, 0.0)
            at = plan.lead + pl.multiple_of(row * plan.pitch, 8)
            flat[group, pl.ds(at, plan.pitch), : v.shape[1]] = v


def _sums(plan: Plan, r: dict[str, Any], group: int, lanes: slice, row: Any) -> jax.Array:
    """One row of the result, [columns, lanes] in float32."""
    h, w = plan.windows
    width = lanes.stop - lanes.start
    total: Any = None
    for dh in range(h.kernel):
        at = plan.lead + (row * h.stride + dh * h.rhs_dilation - h.low) * plan.pitch
        for dw in range(w.kernel):
            start = at + dw * w.rhs_dilation - w.low
            stride = None if w.stride == 1 else w.stride
            x = r["flat"][group, pl.ds(start, plan.columns, stride=stride), :width]
            part = x * r["rhs"][dh * w.kernel + dw : dh * w.kernel + dw + 1, lanes]
            total = part if total is None else total + part
    return total
