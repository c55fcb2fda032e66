"""x W + scaling * (x A) B for each kind of op: what the low-rank path is, and where it can be taken.

Everything is said of the op as it is: `axes` leads from the axes of the weight in the op to those of the
weight at home, in which its adapter is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwix._src.adapter import Adapter, AdapterSpec, ordered
from qwix._src.core import dot_general
from qwix._src.core.low_rank import LowRank
from qwix._src.dot_sides import swapped
from qwix._src.op_plan import OpPlan
from qwix._src.weight import WeightTracer, dense


@dataclasses.dataclass(frozen=True)
class Use:
    """A weight with an adapter in one op.

    Attributes:
      plan: of the op.
      weight: without its adapter.
      adapter: its arrays in the dtype in which the model computes with the weight.
      axes: for each axis of the weight in the op, where it is at home.
      args, params: of the op.
    """

    plan: OpPlan
    weight: WeightTracer
    adapter: Adapter
    axes: tuple[int, ...]
    args: Sequence[Any]
    params: dict[str, Any]

    @property
    def spec(self) -> AdapterSpec:
        return self.adapter.spec

    @property
    def x(self) -> Any:
        """The other operand."""
        return self.args[1 - (self.plan.weight_side or 0)]

    @property
    def base_args(self) -> list[Any]:
        """The args of the same op on the weight without its adapter."""
        args = list(self.args)
        args[self.plan.weight_side or 0] = self.weight if self.weight.is_quantized else self.weight.value()
        return args

    @property
    def numbers(self) -> Any:
        """The dimension numbers of a dot with the weight on the right."""
        dnums = self.params["dimension_numbers"]
        return swapped(dnums) if self.plan.weight_side == 0 else dnums

    def low_rank(self) -> LowRank | None:
        """A and B for a dot with these numbers; None if the dot has other axes."""
        (_, contracting), (_, batch) = self.numbers
        return self.adapter.low_rank(self.axes, contracting, batch)


def fits(use: Use) -> bool:
    """Whether the op has the axes of the adapter."""
    if use.plan.op == "conv_general_dilated":
        out = use.params["dimension_numbers"].rhs_spec[0]
        groups = use.params["feature_group_count"], use.params["batch_group_count"]
        return use.spec.conv and use.spec.outs == (use.axes[out],) and groups == (use.spec.groups, 1)
    if use.plan.op == "ragged_dot":
        return _fits_ragged(use)
    if use.plan.op == "take":
        (row,) = use.params["dimension_numbers"].start_index_map
        return len(use.axes) == 2 and use.spec.ins == (use.axes[row],) and not use.spec.batch
    (_, contracting), (_, batch) = use.numbers
    forward = {use.axes[c] for c in contracting} == set(use.spec.ins)
    if use.low_rank() is None:
        shared = {use.axes[b] for b in batch} < set(use.spec.batch)
        return forward and shared and not (use.spec.conv or use.spec.dora)
    return forward or not use.spec.dora


def _fits_ragged(use: Use) -> bool:
    """Rows in groups, each with a matrix of its own."""
    numbers = use.params["ragged_dot_dimension_numbers"]
    (left, right), (left_batch, _) = numbers.dot_dimension_numbers
    (ragged,), groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    return (
        use.plan.weight_side == 1
        and not use.spec.dora
        and not left_batch
        and ragged not in left
        and tuple(use.axes[g] for g in groups) == use.spec.batch
        and {use.axes[c] for c in right} == set(use.spec.ins)
    )


def conv_delta(use: Use, x: jax.Array, masked: Any) -> jax.Array:
    """(x * A) B of a convolution, in float32. `masked` is given x A, [..., groups, rank]."""
    spec, out_axis = use.spec, use.params["dimension_numbers"].out_spec[1]
    kernel = use.adapter.a.transpose(use.axes)
    options = dict(use.params) | {"preferred_element_type": jnp.float32}
    low = lax.conv_general_dilated_p.bind(x.astype(kernel.dtype), kernel, **options)
    low = jnp.moveaxis(low, out_axis, -1)
    low = masked(low.reshape(*low.shape[:-1], spec.groups, spec.rank), out_axis)
    b = use.adapter.b.reshape(spec.groups, spec.rank, -1).astype(jnp.float32)
    out = jnp.einsum("...gr,gro->...go", low, b, precision=use.params["precision"])
    return spec.scaling * jnp.moveaxis(out.reshape(*out.shape[:-2], -1), -1, out_axis)


def ragged_delta(use: Use, x: jax.Array, masked: Any) -> jax.Array:
    """(x A) B of a ragged dot, in float32."""
    spec, params, groups = use.spec, use.params, use.args[2]
    numbers = params["ragged_dot_dimension_numbers"]
    (left, right), _ = numbers.dot_dimension_numbers
    a = use.adapter.a.reshape(*spec.sizes((*spec.batch, *spec.ins)), spec.rank)
    b = use.adapter.b.reshape(*spec.sizes(spec.batch), spec.rank, *spec.sizes(spec.outs))
    contracted = [use.axes[c] for c in right]
    kept = [h for i, h in enumerate(use.axes) if i not in right and h not in spec.batch]
    a = ordered(a, (*spec.batch, *spec.ins, "rank"), (*spec.batch, *contracted, "rank"))
    b = ordered(b, (*spec.batch, "rank", *spec.outs), (*spec.batch, "rank", *kept))
    (ragged,) = numbers.lhs_ragged_dimensions
    bind = lambda lhs, rhs, contracting, ragged: lax.ragged_dot_general(
        lhs,
        rhs,
        groups,
        lax.RaggedDotDimensionNumbers((contracting, ((), ())), (ragged,), tuple(range(len(spec.batch)))),
        precision=params["precision"],
        preferred_element_type=jnp.float32,
        group_offset=params["group_offset"],
    )
    first = len(spec.batch)
    low = bind(x.astype(a.dtype), a, (tuple(left), tuple(range(first, first + len(left)))), ragged)
    free = [axis for axis in range(x.ndim) if axis not in left]
    last = low.ndim - 1
    return spec.scaling * bind(masked(low), b.astype(jnp.float32), ((last,), (first,)), free.index(ragged))


def take_delta(use: Use, indices: jax.Array, masked: Any) -> jax.Array:
    """Rows of A, times B, in float32."""
    params, spec = use.params, use.spec
    (row,), (feature,) = params["dimension_numbers"].start_index_map, params["dimension_numbers"].offset_dims
    a = use.adapter.a.reshape(-1, spec.rank)
    sizes = (1, spec.rank) if row == 0 else (spec.rank, 1)
    low = lax.gather(a if row == 0 else a.T, indices, **dict(params) | {"slice_sizes": sizes})
    low = masked(jnp.moveaxis(low, feature, -1).astype(jnp.float32), None if feature == 0 else 0)
    out = jnp.matmul(low, use.adapter.b.reshape(spec.rank, -1).astype(jnp.float32))
    return spec.scaling * jnp.moveaxis(out, -1, feature)


def shared_delta(use: Use, x: jax.Array, masked: Any) -> jax.Array:
    """(x A) B of a dot whose x all weights share (layers under vmap), in float32.

    The axes along which the weight is several are kept by the op, as its own free axes are.
    """
    spec, ((left, right), (left_batch, right_batch)) = use.spec, use.numbers
    names = {axis: f"w{axis}" for axis in use.axes}
    of_x: list[Any] = [f"x{axis}" for axis in range(x.ndim)]
    for mine, theirs in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        of_x[mine] = names[use.axes[theirs]]
    place = lambda axes: [names[a] for a in axes]
    batch = place([use.axes[b] for b in right_batch])
    free = [name for axis, name in enumerate(of_x) if axis not in left and axis not in left_batch]
    kept = place([h for i, h in enumerate(use.axes) if i not in right and i not in right_batch])
    several = [name for name in place(spec.batch) if name not in batch]
    a = use.adapter.a.reshape(*spec.sizes((*spec.batch, *spec.ins)), spec.rank)
    b = use.adapter.b.reshape(*spec.sizes(spec.batch), spec.rank, *spec.sizes(spec.outs))
    low_names = [*batch, *several, *free, "rank"]
    low = _einsum(x, of_x, a, [*place(spec.batch), *place(spec.ins), "rank"], low_names, use)
    rows = low_names.index(of_x[0]) if of_x[0] in free else None
    b_names = [*place(spec.batch), "rank", *place(spec.outs)]
    return spec.scaling * _einsum(masked(low, rows), low_names, b, b_names, [*batch, *free, *kept], use)


def _einsum(
    x: jax.Array, of_x: list[str], y: jax.Array, of_y: list[str], out: list[str], use: Use
) -> jax.Array:
    number = {name: i for i, name in enumerate(dict.fromkeys([*of_x, *of_y]))}
    axes = [[number[name] for name in names] for names in (of_x, of_y, out)]
    precision = use.params["precision"]
    options = {"precision": precision, "preferred_element_type": jnp.float32}
    return jnp.einsum(x, axes[0], y, axes[1], axes[2], **options)


def gain(use: Use, update: LowRank) -> jax.Array | None:
    """What DoRA multiplies each feature of the result by: m / |W + scaling * A B|, [*batch, *kept axes].

    |W + s A B|^2 is the sum of |W|^2, 2 s W.(A B) and s^2 |A B|^2, so that no second matrix of W's shape is
    made. There is no gradient through the norm (arXiv:2402.09353, section 4.3).
    """
    m, spec = use.adapter.m, use.spec
    if m is None:
        return None
    (_, contracting), (_, batch) = use.numbers
    n, k = len(batch), len(contracting)
    a, b = (x.astype(jnp.float32) for x in (update.a, update.b))
    payload = use.weight.payload
    over_k = (tuple(range(n, n + k)), tuple(contracting)), (tuple(range(n)), tuple(batch))
    cross = dot_general.dot_general(a, payload, over_k, "highest", jnp.float32)  # [*batch, rank, *kept]
    gram = lax.dot_general(a, a, ((over_k[0][0],) * 2, (tuple(range(n)),) * 2), "highest")
    square = lax.dot_general(gram, b, (((n + 1,), (n,)), (tuple(range(n)),) * 2), "highest")
    change = jnp.sum(b * (2 * spec.scaling * cross + spec.scaling**2 * square), n)
    weight = jnp.sum(jnp.square(dense(payload, jnp.float32)), tuple(contracting))
    left = [axis for axis in range(len(use.axes)) if axis not in contracting]
    kept = [axis for axis in left if axis not in batch]
    norm = jnp.sqrt(ordered(weight, left, (*batch, *kept)) + change)
    names = (*spec.batch, *spec.outs)
    m = ordered(m.reshape(spec.sizes(names)), names, [use.axes[axis] for axis in (*batch, *kept)])
    return m.astype(jnp.float32) / lax.stop_gradient(norm)


def gain_of_conv(use: Use) -> jax.Array | None:
    """The same of a convolution, for each output channel."""
    m = use.adapter.m
    if m is None:
        return None
    out = use.params["dimension_numbers"].rhs_spec[0]
    kernel = dense(use.weight.payload, jnp.float32)
    total = kernel + use.adapter.change_at_home().transpose(use.axes)
    norm = jnp.sqrt(jnp.sum(jnp.square(total), [a for a in range(kernel.ndim) if a != out]))
    return m.astype(jnp.float32) / lax.stop_gradient(norm)


def shape_of_low(use: Use) -> tuple[tuple[int, ...], int | None]:
    """The shape of x A of a dot, and which axis of it is the first of x; None if that's contracted or a
    batch axis.
    """
    (contracting, _), (batch, _) = use.numbers
    free = [axis for axis in range(use.x.ndim) if axis not in contracting and axis not in batch]
    shape = [use.x.shape[axis] for axis in (*batch, *free)]
    return (*shape, use.spec.rank), len(batch) + free.index(0) if 0 in free else None
