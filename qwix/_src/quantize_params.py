"""Quantizing params that exist already, as the model that was converted abstractly wants them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util
from flax.core import FrozenDict

from qwix._src import double_scale, static_range
from qwix._src.core import layout, qarray
from qwix._src.core.transposed_qarray import TransposedQArray
from qwix._src.utils import flax_util
from qwix._src.with_aux import WithAux

Path = tuple[str | int, ...]


def quantize_params(
    params: Mapping[str, Any],
    abstract_quantized_params: Any,
    quant_stats: Mapping[str, Any] = FrozenDict(),
    *,
    allow_extra_params: bool = False,
    _qarray_module: Any = qarray,
) -> dict[str, Any]:
    """Quantizes float params, one after the other, for a quantized model.

    Args:
      params: nested dict of arrays: all params of the float model, or a part of them.
      abstract_quantized_params: what the quantized model's params are like: of a Linen model
        `jax.eval_shape(model.init, key, *inputs)["params"]`; or the converted NNX model itself.
      quant_stats: nested dict of the statistics that training collected, for static scales.
      allow_extra_params: leave out params that the quantized model doesn't have.

    Returns:
      Linen: params for `apply`. NNX: a dict for `nnx.update(model, ...)`.

    Raises:
      TypeError: leaves that aren't arrays.
      ValueError: params that the model doesn't have (the message names the nearest), or of another shape;
        statistics of no data.

    >>> import flax.linen as nn, jax.numpy as jnp, qwix
    >>> model, x = nn.Dense(4), jnp.ones((1, 8))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> quantized = qwix.quantize_model(model, qwix.QuantizationRule(weight_qtype="int8"))
    >>> abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    >>> quantized.apply({"params": quantize_params(params, abstract)}, x).shape
    (1, 4)
    """
    is_nnx = isinstance(abstract_quantized_params, nnx.Module)
    templates = dict(_templates(abstract_quantized_params))
    out: dict[Path, Any] = {}
    for path, value in _leaves(params).items():
        template = templates.get(_text(path))
        if template is None:
            if not allow_extra_params:
                raise ValueError(_unknown(path, templates))
            continue
        out[path] = converted(path, value, template, _qarray_module)
    for path, stat in _stats(quant_stats):
        out |= _static(path, stat, templates)
    if is_nnx:
        out = {(*path, *rest): leaf for path, value in out.items() for rest, leaf in _pure(value)}
    return traverse_util.unflatten_dict(out)


def _text(path: Path) -> str:
    return "/".join(map(str, path))


def _templates(tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, nnx.Module):
        for _, path, name, value in flax_util.nnx_values(tree):
            if isinstance(value, WithAux | nnx.Variable):
                yield _text((*path, name)), flax_util.unbox(value)
    else:
        tree = flax_util.unbox(tree)
        for path, value in traverse_util.flatten_dict(
            tree, is_leaf=lambda _, x: isinstance(x, WithAux)
        ).items():
            yield _text(path), value


def _leaves(params: Any) -> dict[Path, Any]:
    if not isinstance(params, Mapping):
        raise TypeError(f"params is not a pure dict of jax.Array: it's a {type(params).__name__}.")
    flat = traverse_util.flatten_dict(params)
    for path, value in flat.items():
        if not isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(
                f"params is not a pure dict of jax.Array: {_text(path)!r} is a {type(value).__name__}. "
                "Unbox params with flax.linen.meta.unbox, or take nnx.to_pure_dict(nnx.state(model))."
            )
    return flat


def _unknown(path: Path, templates: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(_text(path), templates, n=1, cutoff=0.0)
    return (
        f"{_text(path)} is not found in the abstract_quantized_params. "
        + (f"The nearest there is {near[0]!r}. " if near else "It's empty. ")
        + "Are these the params of another model? allow_extra_params=True leaves out what isn't there."
    )


def converted(path: Path, value: Any, template: Any, qarray_module: Any = qarray) -> Any:
    """A float param in the form of the template, which has no boxes."""
    if not isinstance(template, WithAux):
        if value.shape != template.shape:
            raise ValueError(
                f"{_text(path)} has shape {value.shape}, but the quantized model's is {template.shape}."
            )
        return value
    shape = tuple(template.array.shape)
    if np.prod(value.shape) != np.prod(shape):
        raise ValueError(f"{_text(path)} has shape {value.shape}, but the quantized model's is {shape}.")
    packed = template.array
    if not isinstance(packed, qarray.QArray | TransposedQArray):
        return template.replace(array=value)
    qarray.check_finite(value, f"The weight {_text(path)!r}")
    quantized = qarray_module.quantize(jax.numpy.asarray(value).reshape(shape), template.how)
    if isinstance(packed, TransposedQArray):
        stacked = packed.ndim - len(packed.scale_shape)
        quantized = with_scale_shape(quantized, (*shape[:stacked], *packed.scale_shape))
        stored: Any = TransposedQArray.of(quantized, packed.layout, packed.side)
    else:
        stored = with_scale_shape(quantized, packed.scale.shape)
    return template.replace(array=double_scale.double_like(stored, packed))


def with_scale_shape(quantized: qarray.QArray, shape: Sequence[int]) -> qarray.QArray:
    """The same values with scales of another shape, which may be finer."""
    zero_point = quantized.zero_point
    return dataclasses.replace(
        quantized,
        scale=layout.broadcast_array(quantized.scale, shape),
        zero_point=None if zero_point is None else layout.broadcast_array(zero_point, shape),
    )


def _stats(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and "count" in value:
            yield (*path, name), value
        elif isinstance(value, Mapping):
            yield from _stats(value, (*path, name))


def _static(path: Path, stat: Mapping[str, Any], templates: Mapping[str, Any]) -> dict[Path, Any]:
    """The params that a static scale is made of."""
    found: dict[Path, Any] = {}
    for suffix in ("scale", "zero_point"):
        full: Path = (*path[:-1], f"{path[-1]}_{suffix}")
        template = templates.get(_text(full))
        if template is None and suffix == "scale":
            raise ValueError(_unknown(full, templates))
        if template is not None:
            values: Any = static_range.from_quant_stat(stat, template.how, _text(path))
            value = values[suffix == "zero_point"].reshape(template.array.shape)
            found[full] = template.replace(array=value.astype(template.array.dtype))
    return found


def _pure(value: Any) -> Iterator[tuple[Path, Any]]:
    """(rest of the path, leaf) of a value as a pure dict of an NNX model has it."""
    if not isinstance(value, WithAux):
        yield (), value
    elif isinstance(value.array, qarray.QArray | TransposedQArray):
        for name in ("qvalue", "scale", "zero_point"):
            child = getattr(value.array, name)
            if isinstance(child, double_scale.DoubleScale):
                for part in ("codes", "step", "mean"):
                    yield ("array", name, part), getattr(child, part)
            elif child is not None:
                yield ("array", name), child
    else:
        yield ("array",), value.array
