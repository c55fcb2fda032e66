"""How quantized collectives go: what is cut into blocks, sent, added up and put together again.

Each function takes checked arguments; collectives.py checks them. `straight_through` gives all of them the
gradient of the exact collective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix._src import collectives_blocks as blocks_lib
from qwix._src import collectives_feedback as feedback_lib
from qwix._src import collectives_wire as wire
from qwix._src.collectives_blocks import Format
from qwix._src.collectives_feedback import ErrorFeedback
from qwix._src.core import layout
from qwix._src.core.qarray import QArray

Arrays = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Call:
    """What the steps of one collective share."""

    axes: tuple[str, ...]
    devices: int
    format: Format
    mean: bool = False

    def quantized(self, blocks: Sequence[jax.Array], key: jax.Array | None, use: int) -> list[QArray]:
        """Rounded stochastically with a key: this device's own, and another for each use of it."""
        if key is not None:
            key = jax.random.fold_in(jax.random.fold_in(key, use), jax.lax.axis_index(self.axes))
        return blocks_lib.quantized(self.format, blocks, key)

    def cut(self, arrays: Arrays, feedback: ErrorFeedback | None, lead: int) -> Arrays:
        """Every array in blocks, with what was lost of it before."""
        wide = [x.astype(self.format.compute) for x in arrays]
        if feedback is not None:
            wide = [x + e[0] for x, e in zip(wide, jax.tree.leaves(feedback.sent), strict=True)]
        return [blocks_lib.cut(x, self.format.block_size, lead) for x in wide]

    def owned_sums(self, sent: QArray) -> jax.Array:
        """[blocks, block_size]: sums over all devices of the blocks that this one owns.

        `sent`: all blocks, in order of their owners, with or without an axis of owners in front.
        """
        by_owner = jax.tree.map(lambda x: x.reshape(self.devices, -1, x.shape[-1]), sent)
        sums = jax.tree.map(lambda x: wire.all_to_all(x, self.axes), by_owner).dequantize().sum(0)
        return self.averaged(sums)

    def averaged(self, sums: jax.Array) -> jax.Array:
        return sums / self.devices if self.mean else sums


def all_reduce(call: Call, leaves: Arrays, key: Any, feedback: ErrorFeedback | None) -> tuple[Arrays, Any]:
    """Sums of whole arrays, and the feedback for the next call."""
    cuts = call.cut(leaves, feedback, lead=0)
    sent = call.quantized(cuts, key, use=0)
    sums = call.owned_sums(blocks_lib.together(sent, 0, call.devices))
    if feedback is not None and feedback.reduced is not None:
        sums = sums + feedback.reduced[0]
    (owned,) = call.quantized([sums], key, use=1)
    everyones = jax.tree.map(lambda x: wire.all_gather(x, call.axes, to="invarying"), owned)
    everyones = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), everyones)
    parts = blocks_lib.apart(everyones, [x.shape[0] for x in cuts], 0)
    got = [
        blocks_lib.joined(part.dequantize(), x.shape, 0).astype(x.dtype)
        for part, x in zip(parts, leaves, strict=True)
    ]
    if feedback is None:
        return got, None
    lost = feedback_lib.lost(cuts, sent, [x.shape for x in leaves], 0)
    reduced = feedback_lib.finite(sums - owned.dequantize())[None]
    return got, ErrorFeedback(jax.tree.unflatten(jax.tree.structure(feedback.sent), lost), reduced)


def reduce_scatter(
    call: Call, dims: Sequence[int], leaves: Arrays, key: Any, feedback: ErrorFeedback | None
) -> tuple[Arrays, Any]:
    """Sums of this device's parts of `dims`, and the feedback for the next call."""
    shards = [split(x, d, call.devices) for x, d in zip(leaves, dims, strict=True)]
    held = None
    if feedback is not None:
        before = zip(jax.tree.leaves(feedback.sent), dims, strict=True)
        held = ErrorFeedback([split(e[0], d, call.devices)[None] for e, d in before])
    cuts = call.cut(shards, held, lead=1)
    sent = call.quantized(cuts, key, use=0)
    sums = call.owned_sums(blocks_lib.together(sent, 1))
    parts = blocks_lib.apart(sums, [x.shape[1] for x in cuts], 0)
    got = []
    for part, shard, x, d in zip(parts, shards, leaves, dims, strict=True):
        own = blocks_lib.joined(part, shard.shape[1:], 0).astype(x.dtype)
        got.append(jnp.moveaxis(own, 0, d))
    if feedback is None:
        return got, None
    after = zip(feedback_lib.lost(cuts, sent, [x.shape for x in shards], 1), dims, strict=True)
    lost = [_unsplit(e[0], d)[None] for e, d in after]
    return got, ErrorFeedback(jax.tree.unflatten(jax.tree.structure(feedback.sent), lost))


def all_gather(
    call: Call, along: Sequence[int], to: str, leaves: Arrays, key: Any, feedback: Any
) -> tuple[Arrays, Any]:
    """Everyone's arrays, one after the other."""
    cuts = call.cut(leaves, None, lead=0)
    sent = blocks_lib.together(call.quantized(cuts, key, use=0), 0)
    everyones = jax.tree.map(lambda x: wire.all_gather(x, call.axes, to=to), sent)
    parts = blocks_lib.apart(everyones, [x.shape[0] for x in cuts], 1)
    got = []
    for part, x, axis in zip(parts, leaves, along, strict=True):
        whole = blocks_lib.joined(part.dequantize(), (call.devices, *x.shape), 1).astype(x.dtype)
        got.append(merged(whole, axis))
    return got, feedback


def straight_through(
    run: Callable[..., Any], exact: Callable[[Arrays], Arrays], back: Callable[[Arrays], Arrays] | None = None
) -> Callable[..., Any]:
    """`run`, whose results differentiate as those of the linear `exact`; by `back`, if that is given."""

    @jax.custom_vjp
    def call(leaves: Arrays, key: Any, feedback: Any) -> Any:
        return run(leaves, key, feedback)

    def forward(leaves: Arrays, key: Any, feedback: Any) -> Any:
        return run(leaves, key, feedback), leaves

    def backward(leaves: Arrays, cotangents: Any) -> Any:
        gradients = back(cotangents[0]) if back else jax.vjp(exact, leaves)[1](cotangents[0])[0]
        return gradients, None, None

    call.defvjp(forward, backward)
    return call


def split(x: jax.Array, dimension: int, devices: int) -> jax.Array:
    """[devices, part, ...]: the parts of a dimension, in front."""
    x = jnp.moveaxis(x, dimension, 0)
    return x.reshape(devices, x.shape[0] // devices, *x.shape[1:])


def _unsplit(x: jax.Array, dimension: int) -> jax.Array:
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 0, dimension)


def merged(x: jax.Array, axis: int) -> jax.Array:
    """[devices, *shape] with the devices' shards one after the other along an axis of the shape.

    >>> merged(jnp.arange(8).reshape(2, 2, 2), 1).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    axis = layout.canonical_axis(axis, x.ndim - 1)
    shape = [*x.shape[1:]]
    shape[axis] *= x.shape[0]
    return jnp.moveaxis(x, 0, axis).reshape(shape)
