"""A dot and what is fused round it, from axes as users give them to the one kernel op.

RMSNorm and static or power-of-two activation scales go before the product; bias, activation, gate, residual
and quantization of the result after it. `qwix_kernels.problem` has the formulas. Every fused dot goes through
`qwix_kernels.matmul`, which is portable; a dot with nothing fused stays with `dot_general`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from qwix_kernels import matmul as matmul_kernel
from qwix_kernels.matmul import elementwise
from qwix_kernels.problem import Extras, MatmulProblem, RMSNorm, RowQuantize

from qwix._src.core import dot_general as _dot
from qwix._src.core import dot_plan, numerics, qarray
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.transposed_qarray import DotDimensionNumbers


class FusedOptions(TypedDict, total=False):
    """What can be fused round a dot, all of it optional.

    bias: added to the result; of the shape of rhs' free axes.
    activation: "relu", "relu6", "gelu", "gelu_tanh" or "silu", of the result (of the gate, if there is one).
    residual: added after the activation; of the result's shape.
    norm_weight: RMSNorm of a float lhs before the product, by this vector, over its one contracting axis.
    norm_eps: of that; 1e-6.
    act_scale: a static scale for `act_qtype` instead of a dynamic one: a scalar, or one per tile.
    act_scale_dtype: "float8_e8m0fnu" makes dynamic scales powers of two (OCP MX).
    out_qtype: quantize the result, by row; it becomes a QArray.
    out_tile_size: columns of the result that share a scale; all of a row's by default.
    out_scale: a static scale for `out_qtype`: a scalar, or one per tile.
    """

    bias: jax.Array | None
    activation: str | None
    residual: jax.Array | None
    norm_weight: jax.Array | None
    norm_eps: float
    act_scale: Any
    act_scale_dtype: str | None
    out_qtype: DTypeLike | str | None
    out_tile_size: int | None
    out_scale: Any


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of the kernel's op, and the shape that its result is given."""

    lhs: Any
    rhs: Any
    extras: Extras
    options: dict[str, Any]
    plan: dot_plan.Plan


def fused_dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: DotDimensionNumbers,
    fused: FusedOptions,
    *,
    gate: Any = None,
    gate_bias: jax.Array | None = None,
    act_how: HowToQuantize | None = None,
    implementation: str | Sequence[str] | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array | qarray.QArray:
    """activation(lhs @ gate + gate_bias) * (lhs @ rhs + bias) + residual; without a gate activation(...) of
    the one product. Arguments as for `dot_general` and as `FusedOptions` says.

    Raises ValueError or TypeError for what does not fit together, before anything runs.
    """
    call = _call(
        lhs, rhs, dimension_numbers, fused, gate, gate_bias, act_how, precision, preferred_element_type
    )
    out = matmul_kernel.matmul(call.lhs, call.rhs, call.extras, implementation=implementation, **call.options)
    shape = call.plan.out_shape
    if call.options["quantize_out"] is None:
        return out.reshape(shape).astype(call.plan.result)
    free, static = len(call.plan.rhs.free), call.options["quantize_out"].static
    rows = (1,) * (len(shape) - free) if static else shape[: len(shape) - free]
    scale = out.scale.reshape((*rows, *(1,) * (free - 1), *((out.scale.shape[2],) if free else ())))
    return qarray.QArray(out.values.reshape(shape), scale.astype(jnp.float32))


def fused_problem(*args: Any, **kwargs: Any) -> MatmulProblem:
    """The kernel's problem that `fused_dot_general` would solve; arrays may be `jax.ShapeDtypeStruct`s."""
    found: list[MatmulProblem] = []

    def describe(arrays: Any) -> None:
        args, kwargs = jax.tree.unflatten(tree, [arrays.get(i, x) for i, x in enumerate(flat)])
        call = _call(*args, **kwargs)
        found.append(matmul_kernel.problem_of(call.lhs, call.rhs, call.extras, **call.options))

    flat, tree = jax.tree.flatten((args, kwargs))
    jax.eval_shape(describe, {i: x for i, x in enumerate(flat) if hasattr(x, "shape")})
    return found[0]


def _call(
    lhs: Any,
    rhs: Any,
    dimension_numbers: DotDimensionNumbers,
    fused: FusedOptions,
    gate: Any = None,
    gate_bias: jax.Array | None = None,
    act_how: HowToQuantize | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> _Call:
    check_names(fused)
    lhs, rhs, numbers = _dot._operands(lhs, rhs, dimension_numbers, act_how)
    plan = dot_plan.make_plan(
        lhs,
        rhs,
        numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        act_how=act_how,
    )
    norm_weight, eps = _norm_weight(fused, lhs, plan), fused.get("norm_eps", 1e-6)
    rows = rows_of(fused, act_how, plan)
    if act_how is not None and rows is None:
        if norm_weight is not None:
            lhs, norm_weight = elementwise.rms_norm(lhs, norm_weight, RMSNorm(eps)).astype(lhs.dtype), None
        lhs = qarray.quantize(lhs, act_how)
    if gate is not None:
        _, gate, _ = _dot._operands(lhs, gate, dimension_numbers, None)
        if tuple(gate.shape) != tuple(rhs.shape):
            raise ValueError(
                f"The weights of gate and rhs must have one shape, got {gate.shape}, {rhs.shape}."
            )
    columns = tuple(plan.rhs.shape[a] for a in plan.rhs.free)
    extras = Extras(
        lhs_scale=static_scale("act_scale", fused.get("act_scale"), rows),
        norm_weight=norm_weight,
        bias=_vector("bias", fused.get("bias"), columns),
        gate=None if gate is None else _dot._tensor(gate, plan.rhs, "rhs"),
        gate_bias=_vector("gate_bias", gate_bias, columns),
        residual=_residual(fused.get("residual"), plan),
        out_scale=static_scale("out_scale", fused.get("out_scale"), out := _out(fused, plan)),
    )
    left, right = _dot._tensor(lhs, plan.lhs, "lhs"), _dot._tensor(rhs, plan.rhs, "rhs")
    floating = jnp.issubdtype(plan.result, jnp.floating)
    options = {
        "quantize_lhs": rows,
        "rhs_transposed": plan.rhs.k_last,
        "out_dtype": None if out else plan.result if floating else jnp.float32,
        "precision": precision,
        "norm_eps": eps,
        "activation": fused.get("activation"),
        "quantize_out": out,
    }
    return _Call(left, right, extras, options, plan)


def check_names(fused: FusedOptions) -> None:
    """Raises TypeError for a keyword that is none of `FusedOptions`."""
    unknown = set(fused) - FusedOptions.__optional_keys__
    if unknown:
        known = ", ".join(sorted(FusedOptions.__optional_keys__))
        raise TypeError(f"Unknown keyword {', '.join(sorted(unknown))}; what can be fused: {known}.")


def rows_of(fused: FusedOptions, act_how: HowToQuantize | None, plan: dot_plan.Plan) -> RowQuantize | None:
    """How the kernel quantizes the rows of the lhs, if it does."""
    scale, scale_dtype = fused.get("act_scale"), fused.get("act_scale_dtype")
    if scale is None and scale_dtype is None:
        return plan.rows if act_how is None else dot_plan.row_quantize(act_how, plan.lhs)
    name = "act_scale" if scale is not None else "act_scale_dtype"
    rows = None if act_how is None else dot_plan.row_quantize(act_how, plan.lhs)
    if rows is None:
        raise ValueError(
            f"{name} needs act_qtype 'int8', 'int4' or a float8, with rows quantized by the calibration "
            f"method 'absmax', and a float lhs; got {act_how!r}."
        )
    if scale is not None:
        return dataclasses.replace(rows, static=True)
    return dataclasses.replace(rows, scale_dtype=jnp.dtype(scale_dtype).name)


def _out(fused: FusedOptions, plan: dot_plan.Plan) -> RowQuantize | None:
    """How the result is quantized, if it is."""
    qtype, tile = fused.get("out_qtype"), fused.get("out_tile_size")
    if qtype is None:
        for name in ("out_scale", "out_tile_size"):
            if fused.get(name) is not None:
                raise ValueError(f"{name} is given without out_qtype; give that as well.")
        return None
    dtype = numerics.canonical_qtype(qtype)
    if isinstance(dtype, str):
        raise ValueError(f"out_qtype is {qtype!r}; a result is quantized to an integer or a float8 type.")
    if tile and len(plan.rhs.free) != 1:
        raise ValueError(
            f"out_tile_size tiles the one free axis of rhs {plan.rhs.shape}, which has "
            f"{len(plan.rhs.free)}; leave it out."
        )
    static = fused.get("out_scale") is not None
    return RowQuantize(dtype.name, numerics.get_symmetric_bound(dtype), tile or 0, static=static)


def static_scale(name: str, scale: Any, rows: RowQuantize | None) -> jax.Array | None:
    """[1, 1, tiles] of a scalar or a vector."""
    if scale is None or rows is None:
        return None
    scale = jnp.asarray(scale)
    if scale.ndim > 1 or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"{name} must be a float: a scalar or one per tile; got {scale.dtype}{scale.shape}.")
    return scale.reshape(1, 1, -1)


def _vector(name: str, x: Any, columns: tuple[int, ...]) -> jax.Array | None:
    if x is None:
        return None
    if tuple(x.shape) != columns:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it is added to the free axes of rhs, {columns}."
        )
    return jnp.asarray(x).reshape(-1)


def _residual(x: Any, plan: dot_plan.Plan) -> jax.Array | None:
    if x is None:
        return None
    if tuple(x.shape) != plan.out_shape:
        raise ValueError(f"residual has shape {tuple(x.shape)}; the result has {plan.out_shape}.")
    sizes = [math.prod(plan.lhs.shape[a] for a in axes) for axes in (plan.lhs.batch, plan.lhs.free)]
    return jnp.asarray(x).reshape(*sizes, math.prod(plan.rhs.shape[a] for a in plan.rhs.free))


def _norm_weight(fused: FusedOptions, lhs: Any, plan: dot_plan.Plan) -> jax.Array | None:
    x = fused.get("norm_weight")
    if x is None:
        return None
    if not (isinstance(lhs, jax.Array) and numerics.should_quantize(lhs.dtype)):
        raise ValueError(f"norm_weight normalises a float lhs, got {lhs!r}. Normalise before quantizing.")
    if len(plan.lhs.contracting) != 1:
        raise ValueError(
            f"norm_weight needs one contracting axis, got {plan.lhs.contracting} of lhs {plan.lhs.shape}."
        )
    size = plan.lhs.shape[plan.lhs.contracting[0]]
    if tuple(x.shape) != (size,):
        raise ValueError(f"norm_weight has shape {tuple(x.shape)}; it must be ({size},).")
    return jnp.asarray(x)
