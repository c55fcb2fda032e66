"""Quantized collectives: all-gather, reduce-scatter and all-reduce that send narrow integers and floats.

Everything here runs inside `jax.shard_map`. Values are quantized in blocks with a scale each
(collectives_blocks.py) and travel as bytes (collectives_wire.py). Sums are never taken of quantized values:

    reduce-scatter   each device quantizes all shards and sends each to its owner (all-to-all); the owner adds
                     up what it got in float32, always in the order of the devices
    all-reduce       that, then the owners quantize their sums and all-gather them

So a value is rounded once on its way to its owner and, in an all-reduce, once more; never once per hop, as
in a ring whose partial sums are quantized. This is the scheme of 1-bit Adam (Tang et al. 2021, arXiv
2102.02888, figure 3) and of ZeRO++ (Wang et al. 2023, arXiv 2306.10209), whose quantized gather of sharded
weights is `all_gather`. Every device adds the same numbers in the same order: results repeat bit for bit, and
an all-reduce's are the same on all devices.

Error. With A the greatest magnitude of a block on a device and h the largest relative step,

    integers of b bits    |x - q(x)| <= A / (2**b - 1), half a step: a scale is A / (2**(b - 1) - 0.5)
    float8_e4m3fn         |x - q(x)| <= max(|x| / 16, A / 448 / 1024)
    float8_e5m2           |x - q(x)| <= max(|x| / 8, A / 57344 / 131072)

twice that with stochastic rounding; blocks whose scale would be below 1.1e-19 become zeros, and
those that hold NaN or infinity NaN. A reduce-scatter
is off by at most the sum of the devices' errors and float32's own; an all-reduce by the error of quantizing
that sum besides.

Gradients pass straight through the rounding: that of a collective here is that of its exact version.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.typing import DTypeLike

from qwix._src import collectives_blocks as blocks_lib
from qwix._src import collectives_feedback as feedback_lib
from qwix._src import collectives_steps as steps
from qwix._src import collectives_wire as wire
from qwix._src.collectives_feedback import BLOCK_SIZE, ErrorFeedback
from qwix._src.collectives_steps import Call
from qwix._src.collectives_wire import AxisName
from qwix._src.core import layout, qarray
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.qarray import QArray


def all_reduce(
    tree: Any,
    axis_name: AxisName,
    *,
    qtype: DTypeLike | str = "int8",
    block_size: int = BLOCK_SIZE,
    mean: bool = False,
    key: jax.Array | None = None,
    feedback: ErrorFeedback | None = None,
) -> Any:
    """`jax.lax.psum` (`mean`: `jax.lax.pmean`) that sends `qtype` instead of floats.

    Bytes on the wire: (bits / 32 + 1 / block_size) of a float32 ring's, plus what fills up the last block
    of each array.

    Args:
      tree: float arrays of any shapes; gradients, say. On one device they are returned as they are.
      axis_name: the mesh axis, or several, to reduce over.
      qtype: what travels: "int8", "int4", "float8_e4m3fn", "nf4" and others of 4 to 16 bits.
      block_size: neighbours that share a scale.
      mean: divide by the number of devices.
      key: round stochastically, so that the result is right on average. The same key on all devices: each
        makes its own numbers from it. A new one for every call.
      feedback: what the last call returned, first `init_error_feedback`. What rounding loses is added to
        the next call's input, so that over many calls nothing is lost (Seide et al. 2014; Karimireddy et
        al. 2019, arXiv 1901.09847; on both ways, Tang et al. 2019, arXiv 1905.05957). Values that are not
        finite leave nothing behind.

    Returns:
      A tree of the same shapes and dtypes, the same on all devices of the axis; with `feedback`
      (tree, ErrorFeedback).

    Raises:
      ValueError: no such axis here, a qtype or block size that can't be, another tree's feedback.
      TypeError: a leaf that isn't a float array.

    >>> import jax.numpy as jnp
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> gradients = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.ones(3)}
    >>> mean = jax.shard_map(lambda g: all_reduce(g, "data", mean=True), mesh=mesh,
    ...     in_specs=jax.P(), out_specs=jax.P())
    >>> abs(mean(gradients)["w"] - gradients["w"]).max() <= 2 / 255 + 1e-6
    Array(True, dtype=bool)
    """
    op = "all_reduce"
    axes, devices = wire.bound_axes(axis_name, op)
    leaves, structure = blocks_lib.float_leaves(op, tree)
    if not leaves:
        return tree if feedback is None else (tree, feedback)
    call = Call(axes, devices, blocks_lib.checked_format(op, qtype, block_size, leaves), mean)
    feedback_lib.check(op, feedback, structure, leaves, (block_size, devices))

    def exact(leaves: list[jax.Array]) -> list[jax.Array]:
        return [call.averaged(jax.lax.psum(wire.varying(x, axes), axes)) for x in leaves]

    run = functools.partial(steps.all_reduce, call) if devices > 1 else lambda x, _, left: (exact(x), left)
    got, left = steps.straight_through(run, exact)(leaves, key, feedback)
    reduced = jax.tree.unflatten(structure, got)
    return reduced if feedback is None else (reduced, left)


def reduce_scatter(
    tree: Any,
    axis_name: AxisName,
    *,
    scatter_dimension: int = 0,
    qtype: DTypeLike | str = "int8",
    block_size: int = BLOCK_SIZE,
    mean: bool = False,
    key: jax.Array | None = None,
    feedback: ErrorFeedback | None = None,
    out: HowToQuantize | None = None,
) -> Any:
    """`jax.lax.psum_scatter(..., tiled=True)` that sends `qtype` instead of floats.

    Args:
      tree: float arrays whose `scatter_dimension` the number of devices divides.
      scatter_dimension: device i gets the i-th part of it.
      out: quantize the sums again, and return QArrays.
      axis_name, qtype, block_size, mean, key, feedback: as for `all_reduce`.

    Returns:
      The sums that this device owns: a tree of arrays of the same dtypes, or of QArrays with `out`; with
      `feedback` (tree, ErrorFeedback), whose `reduced` is None: `out` is not made good.

    Raises:
      ValueError: as `all_reduce`, and a dimension that the devices don't divide.
      TypeError: a leaf that isn't a float array.

    >>> import jax.numpy as jnp
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> x = jnp.linspace(-1, 1, 128).reshape(16, 8)
    >>> scattered = jax.shard_map(lambda x: reduce_scatter(x, "data", mean=True), mesh=mesh,
    ...     in_specs=jax.P(), out_specs=jax.P("data"))(x)
    >>> abs(scattered - x).max() <= 1 / 255 + 1e-6
    Array(True, dtype=bool)
    """
    op = "reduce_scatter"
    axes, devices = wire.bound_axes(axis_name, op)
    leaves, structure = blocks_lib.float_leaves(op, tree)
    if not leaves:
        return tree if feedback is None else (tree, feedback)
    call = Call(axes, devices, blocks_lib.checked_format(op, qtype, block_size, leaves), mean)
    feedback_lib.check(op, feedback, structure, leaves, None)
    dims = [_scattered(x, scatter_dimension, devices, axis_name) for x in leaves]

    def exact(leaves: list[jax.Array]) -> list[jax.Array]:
        scatter = functools.partial(jax.lax.psum_scatter, axis_name=axes, tiled=True)
        varying = [wire.varying(x, axes) for x in leaves]
        return [call.averaged(scatter(x, scatter_dimension=d)) for x, d in zip(varying, dims, strict=True)]

    run = functools.partial(steps.reduce_scatter, call, dims)
    run = run if devices > 1 else lambda x, _, left: (exact(x), left)
    got, left = steps.straight_through(run, exact)(leaves, key, feedback)
    got = got if out is None else [qarray.quantize(x, out) for x in got]
    scattered = jax.tree.unflatten(structure, got)
    return scattered if feedback is None else (scattered, left)


def all_gather(
    tree: Any,
    axis_name: AxisName,
    *,
    axis: int = 0,
    qtype: DTypeLike | str | None = None,
    block_size: int = BLOCK_SIZE,
    key: jax.Array | None = None,
    grad_qtype: DTypeLike | str | None = None,
    to: str = "varying",
) -> Any:
    """`jax.lax.all_gather(..., tiled=True)` of QArrays, or of floats that travel quantized.

    A QArray's values, scales and zero points are gathered as they are stored; nothing is rounded. One scale
    per shard along `axis` becomes one per part of it.

    Args:
      tree: QArrays; with `qtype` float arrays. Not both: a tree of weights that are quantized in part is
        gathered in two calls.
      axis: shards are put one after the other along it.
      qtype, block_size, key: how floats travel, as for `all_reduce`.
      grad_qtype: how gradients of floats travel back (a `reduce_scatter`); None sends them as they are.
      to: "varying", or "invarying" if `jax.shard_map` should know that all devices have the same; then
        gradients needn't travel.

    Returns:
      A tree of QArrays, or of arrays of the same dtypes.

    Raises:
      ValueError: no such axis, floats without a `qtype`, QArrays with one.
      TypeError: a leaf that is neither.

    >>> import qwix
    >>> import jax.numpy as jnp
    >>> mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> w = qwix.quantize(jnp.ones((16, 8)), "int4", channelwise_axes=(0, 1))
    >>> jax.shard_map(lambda w: all_gather(w, "fsdp", to="invarying"), mesh=mesh,
    ...     in_specs=jax.P("fsdp"), out_specs=jax.P())(w)
    QArray(int4[16,8], scale=float32[16,8])
    """
    op = "all_gather"
    axes, devices = wire.bound_axes(axis_name, op)
    if to not in ("varying", "invarying"):
        raise ValueError(f"all_gather: to is {to!r}; it must be 'varying' or 'invarying'.")
    stored = [isinstance(x, QArray) for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QArray))]
    if any(stored):
        if not all(stored) or qtype is not None:
            raise ValueError(
                "all_gather takes QArrays, which are sent as they are, or float arrays and a qtype; in one "
                f"call {sum(stored)} of {len(stored)} leaves are QArrays and qtype is {qtype!r}."
            )
        return jax.tree.map(lambda x: steps.merged(wire.all_gather(x, axes, to=to), axis), tree)
    leaves, structure = blocks_lib.float_leaves(op, tree)
    if not leaves:
        return tree
    if qtype is None:
        raise ValueError("all_gather of float arrays needs the qtype that they travel as, 'int8' say.")
    call = Call(axes, devices, blocks_lib.checked_format(op, qtype, block_size, leaves))
    along = [layout.canonical_axis(axis, x.ndim) for x in leaves]

    def exact(leaves: list[jax.Array]) -> list[jax.Array]:
        gather = functools.partial(jax.lax.all_gather, axis_name=axes, tiled=True, to=to)
        return [gather(wire.varying(x, axes), axis=a) for x, a in zip(leaves, along, strict=True)]

    def back(gradients: list[jax.Array]) -> list[jax.Array]:
        assert grad_qtype is not None  # see `returns`
        send = functools.partial(reduce_scatter, axis_name=axes, qtype=grad_qtype, block_size=block_size)
        return [send(g, scatter_dimension=a) for g, a in zip(gradients, along, strict=True)]

    run = functools.partial(steps.all_gather, call, along, to)
    run = run if devices > 1 else lambda x, _, left: (exact(x), left)
    returns = grad_qtype is not None and devices > 1 and to == "varying"
    got, _ = steps.straight_through(run, exact, back if returns else None)(leaves, key, None)
    return jax.tree.unflatten(structure, got)


def _scattered(x: jax.Array, dimension: int, devices: int, axis_name: AxisName) -> int:
    dimension = layout.canonical_axis(dimension, x.ndim)
    if x.shape[dimension] % devices:
        raise ValueError(
            f"reduce_scatter: {devices} devices of {axis_name!r} don't divide axis {dimension} of {x.shape}. "
            f"Pad it to {-(-x.shape[dimension] // devices) * devices}, or use all_reduce, which takes any."
        )
    return dimension
