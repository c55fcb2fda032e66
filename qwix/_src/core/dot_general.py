"""`dot_general` and `dot` of arrays, QArrays and TransposedQArrays.

Both operands are laid out as [batch, free, K] and go to one kernel op, `qwix_kernels.matmul`; dot_plan.py
says when something else runs. The result is the same within the documented bound whichever it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.typing import DTypeLike
from qwix_kernels import matmul as matmul_kernel
from qwix_kernels.problem import Extras, MatmulProblem, RowQuantize, Tensor

from qwix._src.core import dot_plan, explicit_mesh, layout, mxfp_dot, numerics, qarray
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.dot_plan import Plan
from qwix._src.core.loop_dot_general import loop_dot_general
from qwix._src.core.qarray import QArray
from qwix._src.core.transposed_qarray import (
    DotDimensionNumbers,
    Layout,
    Side,
    TransposedQArray,
    layout_of,
)

__all__ = ["dot", "dot_general", "get_how_to_quantize", "loop_dot_general", "matmul_problem"]

Operand = jax.Array | QArray | TransposedQArray


def get_how_to_quantize(
    *,
    dimension_numbers: DotDimensionNumbers,
    ndims: tuple[int, int],
    for_lhs: bool,
    tile_size: int | float | Mapping[int, int | float] | None,
    **kwargs: Any,
) -> HowToQuantize:
    """How to quantize one operand of a dot: a scale per index of every axis that isn't contracting.

    Args:
      dimension_numbers: of the dot.
      ndims: ranks of lhs and rhs.
      for_lhs: which operand it is for.
      tile_size: elements per scale along the last contracting axis (a float is a fraction of it), or a
        mapping {axis: size} which is taken as it is. None or 0: one scale for all of it.
      **kwargs: the other fields of `HowToQuantize`.

    >>> dense = (((1,), (0,)), ((), ()))
    >>> get_how_to_quantize(dimension_numbers=dense, ndims=(2, 2), for_lhs=False, tile_size=32, qtype="int8")
    HowToQuantize(qtype=dtype('int8'), channelwise_axes=(1,), tiled_axes={0: 32}, ...)
    """
    side = 0 if for_lhs else 1
    ndim = ndims[side]
    contracting = layout.canonical_axes(tuple(dimension_numbers[0][side]), ndim)
    if isinstance(tile_size, Mapping):
        tiled_axes = {layout.canonical_axis(axis, ndim): size for axis, size in tile_size.items()}
    else:
        tiled_axes = {contracting[-1]: tile_size} if tile_size and contracting else {}
    channelwise = tuple(a for a in range(ndim) if a not in contracting and a not in tiled_axes)
    return HowToQuantize(channelwise_axes=channelwise, tiled_axes=tiled_axes, **kwargs)


def dot_general(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    act_how: HowToQuantize | None = None,
    act_columns: jax.Array | None = None,
    implementation: str | Sequence[str] | None = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` where either operand may be quantized.

    Args:
      lhs, rhs: arrays, QArrays or TransposedQArrays. Tiles, zero points and formats may differ between them.
      dimension_numbers: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)); negative axes count
        from the back.
      precision: of products of floats.
      preferred_element_type: dtype of the result; by default what the represented values promote to, int32
        for integers without scales.
      act_how: quantize a float lhs on the way, inside the kernel where it can (absmax per row).
      act_columns: beside act_how, what lhs is multiplied with before: a float array of lhs' rank, of size 1
        along its free axes.
      implementation: name of a kernel implementation, or names in order; None takes the best that runs.
      out_sharding: as in `jax.lax.dot_general`, for meshes with explicit axes.

    Returns:
      Array of the batch axes, the free axes of lhs, the free axes of rhs.

    Raises:
      ValueError: operands, scales or axes that disagree.
      NotImplementedError: a named implementation can't run this.

    >>> import qwix
    >>> x, w = jnp.ones((2, 8)), qwix.quantize(jnp.ones((8, 4)), "int8", channelwise_axes=(1,))
    >>> dot_general(x, w, (((1,), (0,)), ((), ()))).shape
    (2, 4)
    """
    lhs, rhs, numbers = _operands(lhs, rhs, dimension_numbers, act_how)
    options: Any = {
        "precision": precision,
        "preferred_element_type": preferred_element_type,
        "act_how": act_how,
    }
    plan = dot_plan.make_plan(lhs, rhs, numbers, **options)
    if plan.kind == "float":
        return jax.lax.dot_general(
            lhs, rhs, numbers, precision, preferred_element_type, out_sharding=out_sharding
        )
    if out_sharding is not None and not _keeps_layout(lhs, rhs, plan, act_how, act_columns, out_sharding):
        dot = lambda lhs, rhs: dot_general(lhs, rhs, numbers, implementation=implementation, **options)
        return explicit_mesh.laid_out(dot, out_sharding)(lhs, rhs)
    if implementation is not None and plan.kind != "kernel":
        if plan.kind == "dequantize":
            raise NotImplementedError(f"{implementation!r} can't run this dot: {plan.reason}.")
        plan = dataclasses.replace(plan, kind="kernel")
    rows, extras = (None, None) if act_how is None else _rows(lhs, act_how, act_columns, plan)
    if act_how is not None and rows is None:
        lhs = qarray.quantize(lhs if act_columns is None else _scaled(lhs, act_columns), act_how)
    if plan.kind == "scaled_matmul":
        out = mxfp_dot.mxfp_dot_general(lhs, rhs, numbers, preferred_element_type)
        if out is not None:
            return out
    if plan.kind == "dequantize":
        return _dequantized(lhs, rhs, numbers, plan, precision)
    plan = dataclasses.replace(plan, rows=rows)
    return _kernel(lhs, rhs, plan, precision, implementation, extras, out_sharding)


def _keeps_layout(
    lhs: Operand, rhs: Operand, plan: Plan, act_how: HowToQuantize | None, columns: Any, out_sharding: Any
) -> bool:
    """Whether operands and result merge to matrices as they are laid out: the op then lays out itself."""
    plain = act_how is None or (plan.rows is not None and act_how.noise_fn is None and columns is None)
    if plan.kind != "kernel" or not plain:
        return False
    mesh = next((s.mesh for x in (lhs, rhs) if (s := explicit_mesh.sharding_of(_values(x)))), None)
    if mesh is None:
        return False
    for x, of in ((lhs, plan.lhs), (rhs, plan.rhs)):
        groups = [(0,), (1,), (2,)] if isinstance(x, TransposedQArray) else of.groups
        values = jax.typeof(_values(x))
        if AxisType.Explicit in values.sharding.mesh.axis_types and not explicit_mesh.leads(values, groups):
            return False
    counts = len(plan.lhs.batch), len(plan.lhs.free), len(plan.rhs.free)
    ends = [sum(counts[: i + 1]) for i in range(3)]
    groups = [range(end - n, end) for end, n in zip(ends, counts, strict=True)]
    spec = getattr(out_sharding, "spec", out_sharding)
    result = jax.ShapeDtypeStruct(plan.out_shape, plan.result, sharding=NamedSharding(mesh, spec))
    return explicit_mesh.leads(result, groups)


def _values(x: Operand) -> jax.Array:
    return x if isinstance(x, jax.Array) else x.qvalue


def _scaled(x: jax.Array, columns: jax.Array) -> jax.Array:
    wide = numerics.compute_dtype(x.dtype)
    product = layout.call_with_generic_broadcast(jnp.multiply, x.astype(wide), columns.astype(wide))
    return product.astype(x.dtype)


def _rows(
    lhs: jax.Array, how: HowToQuantize, columns: jax.Array | None, plan: Plan
) -> tuple[RowQuantize | None, Extras | None]:
    """How a kernel quantizes the rows of `lhs`, with the arrays that this takes; None where it does not.

    Noise that is the same along a row is made here and added there.
    """
    if plan.kind != "kernel":
        return None, None
    rows = dot_plan.row_quantize(dataclasses.replace(how, noise_fn=None), plan.lhs)
    if rows is None:
        return None, None
    noise = None if how.noise_fn is None else how.noise_fn(lhs.shape)
    if noise is not None:
        by_row = all(noise.shape[a] == 1 for a in plan.lhs.contracting)
        if not by_row or not jnp.issubdtype(rows.dtype, jnp.integer):
            return None, None
        merged = plan.lhs.merge(noise)
        noise = jnp.repeat(merged, math.prod(lhs.shape[a] for a in plan.lhs.free) // merged.shape[1], axis=1)
    if columns is not None:
        merged = plan.lhs.merge(columns)
        k = math.prod(lhs.shape[a] for a in plan.lhs.contracting)
        columns = jnp.repeat(merged, k // merged.shape[2], axis=2)
    rows = dataclasses.replace(rows, columns=columns is not None, noise=noise is not None)
    return rows, Extras(lhs_columns=columns, lhs_noise=noise)


def _operands(
    lhs: Any, rhs: Any, dimension_numbers: Any, act_how: HowToQuantize | None
) -> tuple[Any, Any, DotDimensionNumbers]:
    """Checked operands and axes. A TransposedQArray that was made for another dot is undone."""
    lhs, rhs = _check(lhs, "lhs"), _check(rhs, "rhs")
    if act_how is not None and not (isinstance(lhs, jax.Array) and numerics.should_quantize(lhs.dtype)):
        raise ValueError(f"act_how quantizes a float lhs, but lhs is {lhs!r}. Leave act_how out.")
    numbers = dot_plan.canonical_numbers(dimension_numbers, lhs.shape, rhs.shape)
    return _repack(lhs, numbers, "lhs"), _repack(rhs, numbers, "rhs"), numbers


def _check(x: Any, name: str) -> Any:
    if isinstance(x, TransposedQArray):
        return x
    if isinstance(x, QArray):
        x = jax.tree.map(lambda v: jnp.asarray(v) if isinstance(v, np.ndarray) else v, x)
        qarray.validate_qarray(x)
        return x
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, np.ndarray | np.generic | float | int):
        return jnp.asarray(x)
    raise TypeError(f"{name} must be an array, a QArray or a TransposedQArray, got {type(x).__name__}.")


def _repack(x: Any, numbers: DotDimensionNumbers, side: Side) -> Any:
    if not isinstance(x, TransposedQArray):
        return x
    return x if x.side == side and x.layout == layout_of(x, numbers, side) else x.to_qarray()


def _kernel(
    lhs: Operand,
    rhs: Operand,
    plan: Plan,
    precision: Any,
    implementation: str | Sequence[str] | None,
    extras: Extras | None,
    out_sharding: Any = None,
) -> jax.Array:
    left, right = _tensor(lhs, plan.lhs, "lhs"), _tensor(rhs, plan.rhs, "rhs")
    out = matmul_kernel.matmul(
        left,
        right,
        extras,
        quantize_lhs=plan.rows,
        rhs_transposed=plan.rhs.k_last,
        out_dtype=_kernel_dtype(left, right, plan),
        precision=precision,
        implementation=implementation,
        out_sharding=_merged(out_sharding, plan),
    )
    out = explicit_mesh.reshape(out, plan.out_shape).astype(plan.result)
    return out if out_sharding is None else jax.sharding.reshard(out, out_sharding)


def _merged(out_sharding: Any, plan: Plan) -> Any:
    """How the kernel's result, [batch, M, N], is laid out for a dot's that is to be `out_sharding`."""
    if out_sharding is None:
        return None
    of = NamedSharding(jax.sharding.get_abstract_mesh(), getattr(out_sharding, "spec", out_sharding))
    n = math.prod(plan.rhs.shape[a] for a in plan.rhs.free)
    batch = math.prod(plan.lhs.shape[a] for a in plan.lhs.batch)
    m = math.prod(plan.lhs.shape[a] for a in plan.lhs.free)
    return explicit_mesh.reshaped(of, plan.out_shape, (batch, m, n)).spec


def _kernel_dtype(left: Tensor, right: Tensor, plan: Plan) -> np.dtype:
    """What the kernel returns: int32 for exact integers, else the result's dtype if that is a float."""
    if left.scale is None and right.scale is None and all(map(_is_integer, (left, right))):
        return jnp.dtype(jnp.int32)
    return plan.result if jnp.issubdtype(plan.result, jnp.floating) else jnp.dtype(jnp.float32)


def _is_integer(x: Tensor) -> bool:
    return jnp.issubdtype(x.values.dtype, jnp.integer)


def _tensor(x: Operand, arrangement: Layout, side: Side) -> Tensor:
    if isinstance(x, TransposedQArray):
        return x.tensor() if x.layout == arrangement else _tensor(x.to_qarray(), arrangement, side)
    if isinstance(x, QArray):
        return TransposedQArray.of(x, arrangement, side).tensor()
    return Tensor(arrangement.merge(x.astype(jnp.int8) if x.dtype == jnp.bool_ else x))


def _dequantized(
    lhs: Operand, rhs: Operand, numbers: DotDimensionNumbers, plan: Plan, precision: Any
) -> jax.Array:
    """Both sides as arrays of one dtype, then XLA's dot."""
    lhs, rhs = (x if isinstance(x, jax.Array) else x.dequantize() for x in (lhs, rhs))
    both = jnp.promote_types(lhs.dtype, rhs.dtype)
    if all(numerics.is_integer(x.dtype) or x.dtype == jnp.bool_ for x in (lhs, rhs)):
        both = jnp.promote_types(both, jnp.int8)
    return jax.lax.dot_general(lhs.astype(both), rhs.astype(both), numbers, precision, plan.result)


def matmul_problem(
    lhs: Any,
    rhs: Any,
    dimension_numbers: DotDimensionNumbers,
    *,
    act_how: HowToQuantize | None = None,
    act_qtype: DTypeLike | str | None = None,
    act_tile_size: int | float | None = None,
    act_calibration_method: str = "absmax",
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> MatmulProblem | None:
    """The kernel's problem that `dot_general` would solve, without running anything.

    Args:
      lhs, rhs: arrays, QArrays, TransposedQArrays or the same of `jax.ShapeDtypeStruct`s.
      dimension_numbers, precision, preferred_element_type: as for `dot_general`.
      act_how: as for `dot_general`; or act_qtype, act_tile_size and act_calibration_method, to make it of.

    Returns:
      None where `dot_general` uses no kernel (both float, one block format, symbolic sizes, ...).

    >>> x, w = jax.ShapeDtypeStruct((16, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 32), jnp.int4)
    >>> scale = jax.ShapeDtypeStruct((2, 32), jnp.bfloat16)
    >>> matmul_problem(x, QArray(w, scale), (((1,), (0,)), ((), ())), act_qtype="int8").scheme
    'w4a8_g32'
    """
    numbers = dot_plan.canonical_numbers(dimension_numbers, lhs.shape, rhs.shape)
    if act_how is None and act_qtype is not None:
        act_how = get_how_to_quantize(
            dimension_numbers=numbers,
            ndims=(len(lhs.shape), len(rhs.shape)),
            for_lhs=True,
            tile_size=act_tile_size,
            qtype=act_qtype,
            calibration_method=act_calibration_method,
        )
    plan = dot_plan.make_plan(
        lhs,
        rhs,
        numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        act_how=act_how,
    )
    if plan.kind != "kernel":
        return None

    def tensors(x: Any, w: Any) -> tuple[Tensor, Tensor]:
        x, w = _repack(x, numbers, "lhs"), _repack(w, numbers, "rhs")
        x = qarray.quantize(x, act_how) if act_how is not None and plan.rows is None else x
        return _tensor(x, plan.lhs, "lhs"), _tensor(w, plan.rhs, "rhs")

    left, right = jax.eval_shape(tensors, lhs, rhs)
    return matmul_kernel.problem_of(
        left,
        right,
        quantize_lhs=plan.rows,
        rhs_transposed=plan.rhs.k_last,
        out_dtype=_kernel_dtype(left, right, plan),
        precision=precision,
    )


def dot(
    a: Operand,
    b: Operand,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
    *,
    _qwix_dot_general: Any = dot_general,
    **kwargs: Any,
) -> jax.Array:
    """`jax.numpy.dot` where either operand may be quantized: the last axis of a with the last but one of b.

    Args: as for `dot_general`, which also takes the other keywords (`act_how`, `implementation`).

    >>> import qwix
    >>> dot(jnp.ones((2, 3, 8)), qwix.quantize(jnp.ones((8, 4)), "int8")).shape
    (2, 3, 4)
    """
    ndim = lambda x: len(np.shape(x)) if not hasattr(x, "shape") else len(x.shape)
    a_ndim, b_ndim = ndim(a), ndim(b)
    contracting = ((), ()) if 0 in (a_ndim, b_ndim) else ((a_ndim - 1,), (max(b_ndim - 2, 0),))
    if out_sharding is not None:
        kwargs["out_sharding"] = out_sharding
    return _qwix_dot_general(a, b, (contracting, ((), ())), precision, preferred_element_type, **kwargs)
