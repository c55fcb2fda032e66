"""The arrays behind a report's lines: a model's or a param tree's weights by path, their bytes and their
SQNR.

A provider's record is written while tracing, where a weight has no values and a scanned layer is one slice of
a stack. Where the arrays themselves are at hand, they decide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from qwix._src import prepack
from qwix._src.core import numerics, qarray
from qwix._src.report_records import OpRecord, device_bytes, sqnr_db
from qwix._src.utils import flax_util

# "layers/0/mlp/up/kernel" -> an array, or a quantized weight as it is stored; without boxes
Weights = dict[str, Any]


def weights_of(tree: Any) -> Weights:
    """The weights of an NNX model, an `nnx.State` or a nested dict (with or without linen's `params` on
    top)."""
    if isinstance(tree, nnx.Module):
        return dict(_walk_modules(tree))
    if isinstance(tree, nnx.State):
        tree = nnx.to_pure_dict(tree)
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"params must be a nested dict, an nnx.State or an nnx.Module, got {type(tree).__name__}."
        )
    return dict(_walk_dict(tree["params"] if set(tree) == {"params"} else tree, ()))


def _walk_modules(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    for path, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, nnx.Param) or _is_with_aux(value):
                yield _key((*path, name)), _payload(value)


def _walk_dict(tree: Mapping[Any, Any], path: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk_dict(value, (*path, name))
        else:
            yield _key((*path, name)), _payload(value)


def _key(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _is_with_aux(value: Any) -> bool:
    # By its parts: the providers, which define WithAux, import this package's records.
    return hasattr(value, "array") and hasattr(value, "how")


def _payload(value: Any) -> Any:
    return flax_util.unbox(value.array if _is_with_aux(value) else value)


def measured(record: OpRecord, stored: Weights, floats: Weights) -> OpRecord:
    """The record with what the arrays say: bytes from the stored weight, SQNR from the float one.

    Without the stored weight, the float one is quantized here as the provider would do it, a layer at a time.
    """
    if record.weight is None or record.weight_shape is None:
        return record
    key = f"{record.path}/{record.weight}" if record.path else record.weight
    weight, original = stored.get(key), floats.get(key)
    # One tree of a Linen model serves as both: what it holds decides what it is.
    weight = weight if qarray.is_quantized(weight) or not record.is_quantized else None
    original = None if qarray.is_quantized(original) else original
    changes: dict[str, Any] = {}
    copies = _copies(record, weight if weight is not None else original)
    if weight is not None:
        size = copies * math.prod(record.weight_shape)
        changes["device_bytes_before"] = numerics.device_bytes(record.weight_dtype or weight.dtype, size)
        changes["device_bytes_after"] = device_bytes(weight)
    elif copies > 1:
        changes["device_bytes_before"] = copies * record.device_bytes_before
        changes["device_bytes_after"] = copies * record.device_bytes_after
    if record.is_quantized and original is not None:
        changes["sqnr_db"] = _sqnr_db(record, original, weight)
    return dataclasses.replace(record, **changes)


def _copies(record: OpRecord, weight: Any) -> int:
    """How many layers are stacked in one array (the length of a scan)."""
    size = math.prod(record.weight_shape or ())
    return math.prod(weight.shape) // size if weight is not None and size else 1


def _sqnr_db(record: OpRecord, original: Any, weight: Any) -> float | None:
    if qarray.is_quantized(weight) and math.prod(weight.shape) == original.size:
        return sqnr_db(original.reshape(weight.shape), qarray.dequantize(prepack.unpack(weight)))
    if record.how is None or record.weight_shape is None:
        return None
    if original.size == math.prod(record.weight_shape):
        original = original.reshape(record.weight_shape)
        return sqnr_db(original, qarray.dequantize(qarray.quantize(original, record.how)))
    shape, layer = original.shape, record.weight_shape
    stacked = [axis for axis in range(len(shape)) if shape[:axis] + shape[axis + 1 :] == layer]
    if not stacked:
        return None
    fake = jax.vmap(lambda w: qarray.dequantize(qarray.quantize(w, record.how)), stacked[0], stacked[0])
    return sqnr_db(original, fake(original))
