"""Error feedback: what rounding takes away from a sum is kept on the device and added to the next one.

Over many calls then nothing is lost: the sum of all results is that of all inputs, but for what is held at
the end. What isn't finite is never held, so one bad step doesn't spoil those after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qwix._src import collectives_blocks as blocks_lib
from qwix._src import collectives_wire as wire
from qwix._src.collectives_wire import AxisName
from qwix._src.core.qarray import QArray

BLOCK_SIZE = 256


@flax.struct.dataclass
class ErrorFeedback:
    """What earlier rounding lost and the next call makes good. A pytree, different on every device.

    Attributes:
      sent: like the tree that is reduced, each leaf with an axis of size 1 in front.
      reduced: [1, blocks, block_size], of the sums that this device owns; None for a reduce-scatter.

    The axis in front is the mesh's: outside of `jax.shard_map`, with spec P(axis_name), it has an entry for
    each device.
    """

    sent: Any
    reduced: jax.Array | None = None


def init_error_feedback(
    tree: Any, axis_name: AxisName, *, block_size: int = BLOCK_SIZE, scattered: bool = False
) -> ErrorFeedback:
    """Nothing lost so far: zeros, float32. Called inside `jax.shard_map`, with the arrays as they are there.

    Args:
      tree: what `all_reduce` (`scattered`: `reduce_scatter`) will be given, or arrays of the same shapes.
      axis_name, block_size: as there.

    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> start = jax.shard_map(lambda g: init_error_feedback(g, "data"), mesh=mesh,
    ...     in_specs=jax.P(), out_specs=jax.P("data"))
    >>> state = start({"w": jnp.ones((4, 3))})
    >>> state.sent["w"].shape, state.reduced.shape
    ((1, 4, 3), (1, 1, 256))
    """
    op = "init_error_feedback"
    axes, devices = wire.bound_axes(axis_name, op)
    leaves, structure = blocks_lib.float_leaves(op, tree)
    format = blocks_lib.checked_format(op, "int8", block_size, leaves)
    everywhere = frozenset(axes).union(*(wire.varying_axes(x) for x in leaves))
    zeros = lambda shape, over: wire.varying(jnp.zeros((1, *shape), format.compute), sorted(over))
    sent = [zeros(x.shape, wire.varying_axes(x) | set(axes)) for x in leaves]
    owned = owned_blocks(leaves, block_size, devices)
    reduced = None if scattered else zeros((owned, block_size), everywhere)
    return ErrorFeedback(jax.tree.unflatten(structure, sent), reduced)


def lost(
    cuts: Sequence[jax.Array], sent: Sequence[QArray], shapes: Sequence[tuple[int, ...]], lead: int
) -> list[jax.Array]:
    """What rounding took away from arrays of these shapes, [1, *shape] for each."""
    return [
        blocks_lib.joined(finite(c - q.dequantize()), shape, lead)[None]
        for c, q, shape in zip(cuts, sent, shapes, strict=True)
    ]


def finite(x: jax.Array) -> jax.Array:
    """x, and 0 where it is NaN or infinite."""
    return jnp.where(jnp.isfinite(x), x, 0)


def owned_blocks(leaves: Sequence[jax.Array], block_size: int, devices: int) -> int:
    """Blocks of the sum that one device owns."""
    return blocks_lib.count(sum(blocks_lib.count(x.size, block_size) for x in leaves), devices)


def check(
    op: str,
    feedback: ErrorFeedback | None,
    structure: Any,
    leaves: Sequence[jax.Array],
    owned: tuple[int, int] | None,
) -> None:
    """Raises ValueError for feedback of another tree, or of the other op.

    `owned`: (block_size, devices) of an all-reduce.
    """
    if feedback is None:
        return
    shapes = [tuple(e.shape) for e in jax.tree.leaves(feedback.sent)]
    if jax.tree.structure(feedback.sent) != structure or shapes != [(1, *x.shape) for x in leaves]:
        raise ValueError(
            f"{op}: the feedback is of another tree. It holds {shapes}; for what is reduced now it must hold "
            f"{[(1, *x.shape) for x in leaves]}. Make it with init_error_feedback inside jax.shard_map, and "
            "pass it through in_specs and out_specs that begin with the mesh axis."
        )
    needed = None if owned is None else (1, owned_blocks(leaves, *owned), owned[0])
    got = None if feedback.reduced is None else tuple(feedback.reduced.shape)
    if got != needed:
        raise ValueError(
            f"{op}: the feedback's `reduced` is {got}, but {needed} is needed; init_error_feedback needs the "
            f"same block_size, and scattered={owned is None}."
        )
