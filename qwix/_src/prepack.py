"""Prepacking: weights stored as a kernel eats them, so that no call lays them out again.

A weight of more than two axes, [512, 4, 128] of an attention layer say, is a matrix of [512, 512] to a
kernel. On a TPU those two lie differently in memory (tiles cover the last two axes), and a reshape between
them is a copy. Stored as a `TransposedQArray`, the weight goes into the kernel as it is: the steps from the
stored form to the param's own axes, and those of the op back again, undo each other, and the compiler drops
both. Weights of convolutions and of ragged dots aren't matrices to their kernels, and stay as they are.

The matrix units of NVIDIA GPUs read 8-bit weights with the summed axis last, [N, K], and what they multiply
from registers, too; Flax keeps [K, N]. `"k_major"` stores weights as [N, K], those of ragged dots as
[groups, N, K], and those of stacked layers as [layers, N, K]. Ops get them as they lie (turned.py). Layers
that are stacked along another axis than the first stay as they are.

Which axes are contracted is read from how the weight was quantized: those without a scale for each index. For
a use that contracts others the result is the same, just not faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax

from qwix._src import double_scale, turned
from qwix._src.core import layout, qarray
from qwix._src.core.transposed_qarray import TransposedQArray, make_layout

Stored = qarray.QArray | TransposedQArray
Prepack = bool | Literal["k_major"]

# The ops whose weights each form is for.
_MATRIX_OPS = ("dot_general", "einsum")
_K_MAJOR_OPS = (*_MATRIX_OPS, "ragged_dot")


def checked(form: Any) -> Prepack:
    """What a provider was given as `prepack`. Raises ValueError if there is no such form.

    >>> checked("k_major")
    'k_major'
    """
    if isinstance(form, bool) or (isinstance(form, str) and form == "k_major"):
        return form
    raise ValueError(
        f"prepack is {form!r}; it must be False, True (weights of more than two axes are stored as kernels "
        "for TPUs read them) or 'k_major' (weights have the summed axes last, as kernels for GPUs read them)."
    )


def of_op(form: Prepack, op: str) -> Prepack:
    """The form in which a weight is stored that is eaten by `op`, as rules name it.

    >>> of_op(True, "dot_general"), of_op(True, "ragged_dot"), of_op("k_major", "ragged_dot")
    (True, False, 'k_major')
    """
    return form if op in (_K_MAJOR_OPS if form == "k_major" else _MATRIX_OPS) else False


def prepack(
    array: qarray.QArray,
    how: qarray.HowToQuantize,
    form: Prepack = True,
    stacked: Sequence[int] | None = None,
) -> Stored:
    """The weight as it is to be stored: itself, where a kernel reads it as it lies.

    Args:
      array: the weight.
      how: how it was quantized.
      form: see the module's header.
      stacked: the axes along which it can be cut, if it's several weights; None: it is one.

    >>> import jax.numpy as jnp
    >>> how = qarray.HowToQuantize(qtype="int8", channelwise_axes=(1, 2))
    >>> prepack(qarray.quantize(jnp.ones((8, 2, 4)), how), how)
    TransposedQArray(int8[1,8,8], scale=float32[1,1,8], rhs of (8, 2, 4))
    >>> how = qarray.HowToQuantize(qtype="int8", channelwise_axes=(1,))
    >>> prepack(qarray.quantize(jnp.ones((8, 4)), how), how)
    QArray(int8[8,4], scale=float32[1,4])
    >>> prepack(qarray.quantize(jnp.ones((8, 4)), how), how, "k_major")
    TransposedQArray(int8[1,4,8], scale=float32[1,4,1], rhs of (8, 4))
    """
    channelwise = layout.canonical_axes(tuple(how.channelwise_axes), array.ndim)
    contracting = tuple(a for a in range(array.ndim) if a not in channelwise)
    if form == "k_major":
        return _k_major(array, contracting, stacked)
    if not form or stacked is not None or array.ndim < 3 or len(contracting) in (0, array.ndim):
        return array
    arrangement = make_layout(tuple(array.shape), ((contracting, contracting), ((), ())), "rhs")
    return TransposedQArray.of(array, arrangement, "rhs")


def _k_major(array: qarray.QArray, contracting: Sequence[int], stacked: Sequence[int] | None) -> Stored:
    """[*stacked, 1, N, K], of a weight whose K does not come last, or comes on several axes."""
    n = len(stacked or ())
    by_layer = array.scale.shape[:n] == array.shape[:n]
    if stacked is not None and (not n or list(stacked) != list(range(n)) or not by_layer):
        return array
    shape = tuple(array.shape[n:])
    long_axes = [a for a, size in enumerate(shape) if size != 1]
    summed = tuple(a for a in long_axes if a + n in contracting)
    if len(summed) in (0, len(long_axes)) or any(a < n for a in contracting if array.shape[a] != 1):
        return array
    arrangement = make_layout(shape, ((summed, summed), ((), ())), "rhs", k_last=True)
    if not arrangement.moves and (n or len(shape) < 3):
        return array
    return TransposedQArray.of(array, arrangement, "rhs")


def is_k_major(stored: Any) -> bool:
    """Whether a weight is stored with the summed axes last, though they aren't the param's last."""
    return isinstance(stored, TransposedQArray) and stored.layout.k_last and stored.layout.moves


def payload(stored: Any) -> Any:
    """What the ops of a model get: the weight as it lies, if it's stored K-major; else as `unpack`."""
    if not is_k_major(stored):
        return unpack(stored)
    turn = lambda stored: turned.as_it_lies(double_scale.rebuilt(stored))
    return jax.eval_shape(turn, stored) if _is_abstract(stored) else turn(stored)


def unpack(stored: Any) -> Any:
    """The QArray of a weight that is prepacked, or whose scales are quantized, also of one without data;
    anything else as it is.
    """
    if not isinstance(stored, qarray.QArray | TransposedQArray):
        return stored
    return jax.eval_shape(_unpacked, stored) if _is_abstract(stored) else _unpacked(stored)


def _is_abstract(stored: Stored) -> bool:
    return isinstance(stored.qvalue, jax.ShapeDtypeStruct)


def _unpacked(stored: Stored) -> qarray.QArray:
    stored = double_scale.rebuilt(stored)
    return stored.to_qarray() if isinstance(stored, TransposedQArray) else stored
