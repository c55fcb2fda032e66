"""Prepacking: weights stored as a kernel eats them, so that no call lays them out again.

A weight of more than two axes, [512, 4, 128] of an attention layer say, is a matrix of [512, 512] to a
kernel. On a TPU those two lie differently in memory (tiles cover the last two axes), and a reshape between
them is a copy. Stored as a `TransposedQArray`, the weight goes into the kernel as it is: the steps from the
stored form to the param's own axes, and those of the op back again, undo each other, and the compiler drops
both. Weights of convolutions and of ragged dots aren't matrices to their kernels, and stay as they are.

Which axes are contracted is read from how the weight was quantized: those without a scale for each index. For
a use that contracts others the result is the same, just not faster.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from flax.core import meta

from qwix._src import double_scale
from qwix._src.core import qarray
from qwix._src.core.transposed_qarray import TransposedQArray, make_layout

Stored = qarray.QArray | TransposedQArray


def prepack(array: qarray.QArray, how: qarray.HowToQuantize) -> Stored:
    """The weight as it is to be stored: itself, where a kernel reads it as it lies.

    >>> import jax.numpy as jnp
    >>> how = qarray.HowToQuantize(qtype="int8", channelwise_axes=(1, 2))
    >>> prepack(qarray.quantize(jnp.ones((8, 2, 4)), how), how)
    TransposedQArray(int8[1,8,8], scale=float32[1,1,8], rhs of (8, 2, 4))
    >>> how = qarray.HowToQuantize(qtype="int8", channelwise_axes=(1,))
    >>> prepack(qarray.quantize(jnp.ones((8, 4)), how), how)
    QArray(int8[8,4], scale=float32[1,4])
    """
    contracting = tuple(a for a in range(array.ndim) if a not in how.channelwise_axes)
    if array.ndim < 3 or len(contracting) in (0, array.ndim):
        return array
    arrangement = make_layout(tuple(array.shape), ((contracting, contracting), ((), ())), "rhs")
    return TransposedQArray.of(array, arrangement, "rhs")


def unpack(stored: Any) -> Any:
    """The QArray of a weight that is prepacked, or whose scales are quantized, also of one without data;
    anything else as it is.
    """
    if not isinstance(stored, qarray.QArray | TransposedQArray):
        return stored
    if isinstance(stored.qvalue, jax.ShapeDtypeStruct):
        return jax.eval_shape(_unpacked, stored)
    return _unpacked(stored)


def _unpacked(stored: Stored) -> qarray.QArray:
    stored = double_scale.rebuilt(stored)
    return stored.to_qarray() if isinstance(stored, TransposedQArray) else stored


def is_partitioned(box: Any) -> bool:
    """Whether a param's axes have partition names. They would not survive a merge of the axes."""
    if isinstance(box, nnx.Variable):
        metadata = box.get_metadata()
        specs = [metadata.get(field) for field in ("out_sharding", "sharding_names")]
    elif isinstance(box, meta.AxisMetadata):
        specs = [getattr(box, field, None) for field in ("names", "mesh_axes")]
    else:
        specs = []
    return any(spec is not None and any(name is not None for name in spec) for spec in specs)
