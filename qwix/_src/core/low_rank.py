"""A dot and a low-rank update of its weight: lhs @ rhs + scaling * (lhs @ a) @ b (LoRA, arXiv 2106.09685).

The update never becomes a matrix of the weight's shape. Both products are accumulated in float32, their sum
is rounded once, and the weight stays as it is stored. Where `dot_general` would use the kernel's op, that op
takes the update too, so that a kernel reads lhs once; anything else is two dots and a sum.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from qwix_kernels import matmul as matmul_kernel
from qwix_kernels.problem import Extras

from qwix._src.core import dot_general as _dot
from qwix._src.core import dot_plan, explicit_mesh, layout
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.dot_general import Operand
from qwix._src.core.transposed_qarray import DotDimensionNumbers


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["a", "b", "row_mask"], meta_fields=["scaling"]
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """An update of the rhs of one dot: scaling * a @ b.

    Attributes:
      a: [*batch, *contracting, rank], axes in the order of rhs' dimension numbers.
      b: [*batch, rank, *free axes of rhs in order].
      scaling: what the update is multiplied with, alpha / rank for example. Static.
      row_mask: multiplied with lhs @ a; broadcasts to [*batch, *free axes of lhs, rank]. Adapters that are
        concatenated along the rank are picked by it, row by row.

    >>> LowRank(jnp.ones((8, 2)), jnp.ones((2, 4)), 0.5).rank
    2
    """

    a: jax.Array
    b: jax.Array
    scaling: float
    row_mask: jax.Array | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


def low_rank_delta(
    lhs: jax.Array,
    low_rank: LowRank,
    dimension_numbers: DotDimensionNumbers,
    *,
    precision: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """scaling * (lhs @ a) @ b, accumulated and returned in float32 (in float64 if an operand is that).

    Args:
      lhs: floats.
      low_rank: the update.
      dimension_numbers: of the dot of lhs with the weight that is updated.
      precision: of both products, as in `jax.lax.dot_general`.
      out_sharding: of the result, for meshes with explicit axes.

    Returns: [*batch, *free axes of lhs, *free axes of rhs].

    Raises:
      ValueError: shapes that disagree.
      TypeError: an lhs or factors that aren't floats.

    >>> update = LowRank(jnp.ones((8, 2)), jnp.ones((2, 4)), 0.5)
    >>> low_rank_delta(jnp.ones((3, 8)), update, (((1,), (0,)), ((), ())))[0].tolist()
    [8.0, 8.0, 8.0, 8.0]
    """
    if out_sharding is not None:
        delta = lambda x, update: low_rank_delta(x, update, dimension_numbers, precision=precision)
        return explicit_mesh.laid_out(delta, out_sharding)(lhs, low_rank)
    (left, _), (left_batch, _) = _checked(lhs, low_rank, dimension_numbers)
    batch = tuple(range(len(left_batch)))
    contracting = tuple(range(len(batch), len(batch) + len(left)))
    wide = functools.reduce(jnp.promote_types, (lhs.dtype, low_rank.a.dtype, low_rank.b.dtype, jnp.float32))
    dot = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=wide)
    both = jnp.promote_types(lhs.dtype, low_rank.a.dtype)
    t = dot(lhs.astype(both), low_rank.a.astype(both), ((left, contracting), (left_batch, batch)))
    if low_rank.row_mask is not None:
        t = t * low_rank.row_mask.astype(wide)
    t = t * jnp.asarray(low_rank.scaling, wide)
    return dot(t, low_rank.b.astype(wide), (((t.ndim - 1,), (len(batch),)), (batch, batch)))


def dot_general_low_rank(
    lhs: jax.Array,
    rhs: Operand,
    low_rank: LowRank,
    dimension_numbers: DotDimensionNumbers,
    *,
    act_how: HowToQuantize | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`dot_general(lhs, rhs)` plus a low-rank update of rhs, rounded once.

    Args:
      lhs: floats.
      rhs: a QArray, a TransposedQArray or floats.
      low_rank: the update of rhs.
      dimension_numbers, precision, preferred_element_type, implementation, out_sharding: as for
        `dot_general`. The result must be a float.
      act_how: quantize lhs on the way, for its product with rhs only.

    Raises:
      ValueError: shapes that disagree.
      TypeError: an lhs, factors or a result that aren't floats.
      NotImplementedError: a named implementation can't run this.

    >>> import qwix
    >>> x, w = jnp.ones((2, 8)), qwix.quantize(jnp.ones((8, 4)), "int8", channelwise_axes=(1,))
    >>> update = LowRank(jnp.ones((8, 2)), jnp.ones((2, 4)), 0.5)
    >>> dot_general_low_rank(x, w, update, (((1,), (0,)), ((), ()))).shape
    (2, 4)
    """
    _checked(lhs, low_rank, dimension_numbers, tuple(rhs.shape))
    lhs, rhs, numbers = _dot._operands(lhs, rhs, dimension_numbers, act_how)
    options: Any = {
        "precision": precision,
        "preferred_element_type": preferred_element_type,
        "act_how": act_how,
    }
    if out_sharding is not None:
        run = lambda lhs, rhs, low_rank: dot_general_low_rank(
            lhs, rhs, low_rank, numbers, implementation=implementation, **options
        )
        return explicit_mesh.laid_out(run, out_sharding)(lhs, rhs, low_rank)
    plan = dot_plan.make_plan(lhs, rhs, numbers, **options)
    if not jnp.issubdtype(plan.result, jnp.floating):
        raise TypeError(
            f"A dot with a low-rank update gives floats; preferred_element_type is {plan.result}."
        )
    rows, extras = (None, None) if act_how is None else _dot._rows(lhs, act_how, None, plan)
    if plan.kind == "kernel" and (act_how is None or rows is not None):
        out = matmul_kernel.matmul(
            _dot._tensor(lhs, plan.lhs, "lhs"),
            _dot._tensor(rhs, plan.rhs, "rhs"),
            _extras(extras or Extras(), low_rank, numbers, plan),
            quantize_lhs=rows,
            rhs_transposed=plan.rhs.k_last,
            out_dtype=plan.result,
            precision=precision,
            low_rank_scaling=low_rank.scaling,
            implementation=implementation,
        )
        return explicit_mesh.reshape(out, plan.out_shape)
    options["preferred_element_type"] = jnp.promote_types(plan.result, jnp.float32)
    base = _dot.dot_general(lhs, rhs, numbers, implementation=implementation, **options)
    return (base + low_rank_delta(lhs, low_rank, numbers, precision=precision)).astype(plan.result)


def _extras(extras: Extras, low_rank: LowRank, numbers: DotDimensionNumbers, plan: dot_plan.Plan) -> Extras:
    """The update as the kernel's op takes it: [batch, K, rank], [batch, rank, N], [batch, M or 1, rank]."""
    count, rank = len(plan.rhs.batch), low_rank.rank
    given = list(numbers[0][1])
    order = [count + given.index(axis) for axis in plan.rhs.contracting]  # K is merged in the rhs' own order
    a = layout.transpose_array(low_rank.a, [*range(count), *order, low_rank.a.ndim - 1])
    batch = math.prod(plan.rhs.shape[axis] for axis in plan.rhs.batch)
    mask = low_rank.row_mask
    if mask is not None:
        rows = [plan.lhs.shape[axis] for axis in (*plan.lhs.batch, *plan.lhs.free)]
        shared = all(size == 1 for size in mask.shape[:-1])
        mask = jnp.broadcast_to(mask, (*(mask.shape[:-1] if shared else rows), rank))
        mask = mask.reshape(1 if shared else batch, -1, rank)
    return dataclasses.replace(
        extras,
        low_rank_a=explicit_mesh.reshape(a, (batch, math.prod(a.shape[count:-1]), rank)),
        low_rank_b=explicit_mesh.reshape(low_rank.b, (batch, rank, math.prod(low_rank.b.shape[count + 1 :]))),
        low_rank_mask=mask,
    )


def _checked(
    lhs: jax.Array, low_rank: LowRank, numbers: DotDimensionNumbers, rhs: tuple[int, ...] | None = None
) -> DotDimensionNumbers:
    """The dimension numbers from the front, of an update that fits them, `lhs` and the shape `rhs`."""
    for name, x in (("lhs", lhs), ("a", low_rank.a), ("b", low_rank.b)):
        if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)):
            what = x.dtype if hasattr(x, "dtype") else type(x).__name__
            raise TypeError(f"A low-rank update needs a float {name}, got {what}. Dequantize it first.")
    (left, right), (left_batch, right_batch) = numbers
    rhs = _rhs_shape(lhs, low_rank, numbers) if rhs is None else rhs
    numbers = dot_plan.canonical_numbers(numbers, tuple(lhs.shape), rhs)
    (left, right), (left_batch, right_batch) = numbers
    batch = tuple(rhs[a] for a in right_batch)
    free = tuple(size for a, size in enumerate(rhs) if a not in (*right, *right_batch))
    a_shape = (*batch, *(rhs[a] for a in right), low_rank.a.shape[-1] if low_rank.a.ndim else 0)
    b_shape = (*batch, a_shape[-1], *free)
    if tuple(low_rank.a.shape) != a_shape or tuple(low_rank.b.shape) != b_shape or not a_shape[-1]:
        raise ValueError(
            f"A low-rank update of rhs {rhs} with dimension_numbers {numbers} needs a [*batch, *contracting, "
            f"rank], {(*a_shape[:-1], 'rank')}, and b [*batch, rank, *free], {(*batch, 'rank', *free)}, with "
            f"one rank of at least 1; got a {tuple(low_rank.a.shape)} and b {tuple(low_rank.b.shape)}."
        )
    _check_mask(low_rank, (*batch, *(d for i, d in enumerate(lhs.shape) if i not in (*left, *left_batch))))
    return numbers


def _rhs_shape(lhs: jax.Array, low_rank: LowRank, numbers: DotDimensionNumbers) -> tuple[int, ...]:
    """The shape of the weight: the axes that it shares with lhs, and those that b gives it."""
    (left, right), (left_batch, right_batch) = numbers
    own = tuple(low_rank.b.shape[len(left_batch) + 1 :])
    count = len(right) + len(right_batch) + len(own)
    paired = zip((*right, *right_batch), (*left, *left_batch), strict=False)
    shared = {axis % max(count, 1): lhs.shape[other] for axis, other in paired}
    free = iter(own)
    return tuple(shared[axis] if axis in shared else next(free, 0) for axis in range(count))


def _check_mask(low_rank: LowRank, rows: tuple[int, ...]) -> None:
    if low_rank.row_mask is None:
        return
    shape, wanted = tuple(low_rank.row_mask.shape), (*rows, low_rank.rank)
    if len(shape) != len(wanted) or any(s not in (1, w) for s, w in zip(shape, wanted, strict=True)):
        raise ValueError(
            f"row_mask has shape {shape}; it must be {wanted} (batch and free axes of lhs, rank), or 1 along "
            "any of these."
        )
