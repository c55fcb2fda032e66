"""A ragged dot as the grouped matmul of `qwix_kernels.ragged_matmul`, where it is one.

Two of the three modes are: rows of lhs with the matrix of their group (gmm), and a product for each group's
run of the contracted axis (tgmm). Axes are merged as for a dot, so the layouts that are right already cost
nothing; the axis of groups is one more batch axis of rhs. Batch axes are mapped over, which the kernel makes
more groups of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import RaggedDotDimensionNumbers
from jax.typing import DTypeLike
from qwix_kernels import ragged_matmul
from qwix_kernels.problem import Extras, Tensor
from qwix_kernels.ragged_matmul import GmmProblem, TgmmProblem

from qwix._src.core import dot_general as _dot
from qwix._src.core import dot_plan, fused_dot, numerics, qarray
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.qarray import QArray
from qwix._src.core.ragged_plan import BASIC_DIMENSION_NUMBERS, Ragged, describe
from qwix._src.core.transposed_qarray import Layout, make_layout

Operand = jax.Array | QArray


class RaggedFused(TypedDict, total=False):
    """What can be fused round a ragged dot, all of it optional.

    bias: added to the rows of each group: [groups, N], or [N] for all of them; N are the free axes of rhs.
    activation: "relu", "relu6", "gelu", "gelu_tanh" or "silu", of the result (of the gate, if there is one).
    w_gate: a second rhs: the result is activation(lhs . w_gate + gate_bias) * (lhs . rhs + bias).
    gate_bias: as bias, for the gate.
    act_scale: a static scale for `act_qtype` instead of a dynamic one: a scalar, or one per tile.
    act_scale_dtype: "float8_e8m0fnu" makes dynamic scales powers of two (OCP MX).
    """

    bias: jax.Array | None
    activation: str | None
    w_gate: Any
    gate_bias: jax.Array | None
    act_scale: Any
    act_scale_dtype: str | None


@dataclasses.dataclass(frozen=True)
class Call:
    """A grouped matmul: the arrays of one batch each, and what is static."""

    left: Tensor  # [batch, M, K]
    right: Tensor  # [batch, G, K, N] or transposed; in a tgmm [batch, M, N]
    sizes: jax.Array  # [batch, P]
    extras: Extras
    options: dict[str, Any]
    batch: tuple[int, ...]


def refusal(lhs: Operand, rhs: Operand, ragged: Ragged, precision: Any, act_how: HowToQuantize | None) -> str:
    """Why these operands are no grouped matmul; empty if they are."""
    if act_how is None and not any(map(_is_stored, (lhs, rhs))):
        return "neither operand is quantized"
    if reason := dot_plan.no_kernel(lhs, rhs, precision):
        return reason
    if ragged.mode == "batch":
        return "the ragged axis is a batch axis"
    if ragged.prefix != ragged.numbers[1][0]:
        return f"free axes come before the ragged axis {ragged.axis} of lhs"
    if ragged.mode == "contracting":
        if len(ragged.numbers[0][0]) > 1:
            return "more than the ragged axis is contracted"
        for x, axis in ((lhs, ragged.axis), (rhs, ragged.rhs_axis)):
            if isinstance(x, QArray) and x.scale.shape[axis] != 1:
                return "scales change along the ragged axis, which is summed over"
    return ""


def _is_stored(x: Any) -> bool:
    return isinstance(x, QArray) or jnp.dtype(x.dtype).itemsize == 1


# --- rows of lhs with the matrix of their group


def free(call: Call, group_offset: Any, implementation: str | Sequence[str] | None) -> jax.Array:
    """[*batch, M, N]: the gmm of a call."""

    def one(left: Tensor, right: Tensor, sizes: jax.Array) -> jax.Array:
        return ragged_matmul.gmm(
            left,
            right,
            sizes,
            call.extras,
            group_offset=group_offset,
            implementation=implementation,
            **call.options,
        )

    return _over_batch(one, call)


def free_call(
    lhs: Operand,
    rhs: Operand,
    sizes: jax.Array,
    ragged: Ragged,
    precision: Any,
    dtype: Any,
    act_how: HowToQuantize | None,
    fused: RaggedFused,
) -> tuple[Call, tuple[int, ...]]:
    """The gmm, and the shape of the result."""
    layout_l = make_layout(lhs.shape, ragged.numbers, "lhs")
    right_batch = (*ragged.numbers[1][1], ragged.group)
    layout_r = make_layout(rhs.shape, (ragged.numbers[0], (ragged.numbers[1][0], right_batch)), "rhs")
    plan = dot_plan.Plan("kernel", "", None, layout_l, layout_r, jnp.dtype(dtype))
    static = {name: fused.get(name) for name in ("act_scale", "act_scale_dtype")}
    rows = None if act_how is None else fused_dot.rows_of(static, act_how, plan)  # type: ignore[arg-type]
    if act_how is not None and rows is None and not isinstance(lhs, QArray):
        lhs = qarray.quantize(lhs, act_how)
    left, right = _dot._tensor(lhs, layout_l, "lhs"), _dot._tensor(rhs, layout_r, "rhs")
    batch = tuple(lhs.shape[a] for a in ragged.numbers[1][0])
    groups, rest = rhs.shape[ragged.group], math.prod(lhs.shape[a] for a in layout_l.free[1:])
    gate = fused.get("w_gate")
    extras = Extras(
        lhs_scale=fused_dot.static_scale("act_scale", fused.get("act_scale"), rows),
        bias=_by_group("bias", fused.get("bias"), groups, layout_r),
        gate=None if gate is None else _dot._tensor(gate, layout_r, "rhs"),
        gate_bias=_by_group("gate_bias", fused.get("gate_bias"), groups, layout_r),
    )
    if batch and extras != Extras():
        raise ValueError(f"A ragged dot with batch axes, {ragged.numbers[1]}, takes nothing that is fused.")
    activation = fused.get("activation") or ("silu" if gate is not None else None)
    options = {
        "quantize_lhs": rows,
        "rhs_transposed": layout_r.k_last,
        "out_dtype": _dot._kernel_dtype(left, right, plan)
        if extras == Extras() and not activation
        else _float(dtype),
        "precision": precision,
        "activation": activation,
    }
    count = math.prod(batch)
    split = lambda a: _repeated(a, 0, count * groups).reshape(count, groups, *a.shape[1:])
    shared = jax.tree.map(lambda a: a if count == 1 else split(a), right)
    right = jax.tree.map(lambda a: a[None], right) if count == 1 else shared
    left = jax.tree.map(lambda a: _repeated(a, 0, count), left)
    sizes = jnp.broadcast_to(sizes, (*batch, sizes.shape[-1])).reshape(count, -1) * rest
    return Call(left, right, sizes, extras, options, batch), plan.out_shape


def _float(dtype: Any) -> np.dtype:
    return jnp.dtype(dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(jnp.float32)


def _by_group(name: str, x: Any, groups: int, right: Layout) -> jax.Array | None:
    """[groups or 1, 1, N] of one vector for each group, or one for all."""
    if x is None:
        return None
    columns = tuple(right.shape[a] for a in right.free)
    if tuple(x.shape) not in (columns, (groups, *columns)):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be {(groups, *columns)}, or {columns} for all."
        )
    return jnp.asarray(x).reshape(-1 if x.ndim > len(columns) else 1, 1, math.prod(columns))


# --- a product for each group


def contracting(
    call: Call, group_offset: Any, matrices: int | None, implementation: str | Sequence[str] | None
) -> jax.Array:
    """[*batch, groups, K, N]: the tgmm of a call."""

    def one(left: Tensor, right: Tensor, sizes: jax.Array) -> jax.Array:
        return ragged_matmul.tgmm(
            left,
            right,
            sizes,
            group_offset=group_offset,
            matrices=matrices,
            implementation=implementation,
            **call.options,
        )

    return _over_batch(one, call)


def contracting_call(
    lhs: Operand, rhs: Operand, sizes: jax.Array, ragged: Ragged, precision: Any, dtype: Any
) -> tuple[Call, tuple[int, ...]]:
    """The tgmm, and the shape of one group's result without batch axes."""
    tensors, columns, layouts = [], [], []
    for side, (x, axis) in enumerate(((lhs, ragged.axis), (rhs, ragged.rhs_axis))):
        others = tuple(ragged.free_axes(side))
        layouts.append(Layout(tuple(x.shape), tuple(ragged.numbers[1][side]), (axis,), others, True))
        tensors.append(_dot._tensor(x, layouts[-1], "lhs"))
        columns += [x.shape[a] for a in others]
    batch = tuple(lhs.shape[a] for a in ragged.numbers[1][0])
    count = math.prod(batch)
    first, second = tensors
    plan = dot_plan.Plan("kernel", "", None, layouts[0], layouts[1], jnp.dtype(dtype))
    options = {"out_dtype": _dot._kernel_dtype(first, second, plan), "precision": precision}
    left, right = (jax.tree.map(lambda a: _repeated(a, 0, count), x) for x in tensors)
    sizes = jnp.broadcast_to(sizes, (*batch, sizes.shape[-1])).reshape(count, -1)
    return Call(left, right, sizes, Extras(), options, batch), tuple(columns)


# --- both


def quantizes_rows(lhs: jax.Array, rhs: Operand, how: HowToQuantize, precision: Any) -> bool:
    """Whether `ragged_dot` of a float lhs quantizes its rows itself, as `RowQuantize` documents."""
    sizes = jax.ShapeDtypeStruct((rhs.shape[0],), jnp.int32)
    ragged = describe(lhs, rhs, sizes, BASIC_DIMENSION_NUMBERS, False)
    if refusal(lhs, rhs, ragged, precision, how):
        return False
    return dot_plan.row_quantize(how, make_layout(lhs.shape, ragged.numbers, "lhs")) is not None


def ragged_problem(
    lhs: Any,
    rhs: Any,
    dimension_numbers: RaggedDotDimensionNumbers = BASIC_DIMENSION_NUMBERS,
    *,
    groups: int | None = None,
    act_how: HowToQuantize | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **fused: Unpack[RaggedFused],
) -> GmmProblem | TgmmProblem | None:
    """The kernel's problem that `ragged_dot_general` would solve (for one batch), without running anything.

    Args:
      lhs, rhs: arrays, QArrays or the same of `jax.ShapeDtypeStruct`s.
      groups: how many groups there are; those of rhs by default.
      dimension_numbers, ..., **fused: as for `ragged_dot_general`.

    Returns:
      None where it is no grouped matmul.
    """
    group_axes = dimension_numbers.rhs_group_dimensions
    count = groups or (rhs.shape[group_axes[0]] if group_axes else 1)
    sizes = jax.ShapeDtypeStruct((count,), jnp.int32)
    ragged = describe(lhs, rhs, sizes, dimension_numbers, has_offset=groups is not None)
    check_options(lhs, ragged, act_how, fused)
    _, dtype = qarray.get_accumulator_and_result_type(lhs, rhs, preferred_element_type=preferred_element_type)
    if refusal(lhs, rhs, ragged, precision, act_how):
        return None
    found: list[GmmProblem | TgmmProblem] = []
    arrays, tree = jax.tree.flatten((lhs, rhs, sizes, fused))

    def make(given: dict[int, Any]) -> None:
        lhs, rhs, sizes, fused = jax.tree.unflatten(tree, [given.get(i, x) for i, x in enumerate(arrays)])
        if ragged.mode == "free":
            call, _ = free_call(lhs, rhs, sizes, ragged, precision, dtype, act_how, fused)
        else:
            call, _ = contracting_call(lhs, rhs, sizes, ragged, precision, dtype)
        found.append(_described(call, ragged.mode))

    jax.eval_shape(make, {i: x for i, x in enumerate(arrays) if hasattr(x, "shape")})
    return found[0]


def check_options(lhs: Any, ragged: Ragged, act_how: HowToQuantize | None, fused: RaggedFused) -> None:
    if act_how is not None and (isinstance(lhs, QArray) or not numerics.should_quantize(lhs.dtype)):
        raise ValueError(f"act_how quantizes a float lhs, but lhs is {lhs!r}. Leave act_how out.")
    unknown = set(fused) - RaggedFused.__optional_keys__
    if unknown:
        known = ", ".join(sorted(RaggedFused.__optional_keys__))
        raise TypeError(f"Unknown keyword {', '.join(sorted(unknown))}; what can be fused: {known}.")
    if fused and ragged.mode != "free":
        raise ValueError(f"Nothing is fused where the ragged axis is a {ragged.mode} axis; got {[*fused]}.")


def _described(call: Call, mode: str) -> GmmProblem | TgmmProblem:
    """What dispatch is asked about, for one batch."""
    left, right, sizes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (call.left, call.right, call.sizes)
    )
    if mode == "contracting":
        return ragged_matmul.tgmm_problem_of(left, right, sizes, **call.options)
    offset = 0 if sizes.shape[0] != right.shape[0] else None
    return ragged_matmul.gmm_problem_of(left, right, sizes, call.extras, group_offset=offset, **call.options)


def _over_batch(one: Callable[..., jax.Array], call: Call) -> jax.Array:
    if not call.batch:
        return one(*jax.tree.map(lambda a: a[0], (call.left, call.right, call.sizes)))
    out = jax.vmap(one)(call.left, call.right, call.sizes)
    return out.reshape(*call.batch, *out.shape[1:])


def _repeated(a: jax.Array, axis: int, size: int) -> jax.Array:
    return a if a.shape[axis] == size else jnp.repeat(a, size // a.shape[axis], axis=axis)
