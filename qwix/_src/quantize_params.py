"""Quantizing params that exist already, as the model that was converted abstractly wants them.

They come one after the other, from a tree or from whoever reads a checkpoint, and no frame here holds one
that was dealt with.
"""

from __future__ import annotations

import collections
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util
from flax.core import FrozenDict
from jax.sharding import AbstractMesh, NamedSharding

from qwix._src import double_scale, static_range
from qwix._src.core import qarray
from qwix._src.core.transposed_qarray import TransposedQArray
from qwix._src.utils import flax_util
from qwix._src.weight_quantizer import Form, all_finite, quantize_weight
from qwix._src.with_aux import WithAux

Path = tuple[str | int, ...]


# A pair of a path and an array, or a part of a tree of params.
Weights = Mapping[str, Any] | Iterable[tuple[str | Sequence[str | int], Any] | Mapping[str, Any]]


def quantize_params(
    params: Weights,
    abstract_quantized_params: Any,
    quant_stats: Mapping[str, Any] = FrozenDict(),
    *,
    allow_extra_params: bool = False,
    donate: bool = False,
    _qarray_module: Any = qarray,
) -> dict[str, Any]:
    """Quantizes float params, one after the other, for a quantized model.

    Beside the params that are held by others, memory holds the quantized ones and one layer: see
    `quantize_stream`, of which this is the result in one dict.

    Args:
      params: nested dict of arrays: all params of the float model, or a part of them. Or an iterable of
        such parts, or of (path, array) pairs, as a reader of checkpoint shards yields them.
      abstract_quantized_params: what the quantized model's params are like: of a Linen model
        `jax.eval_shape(model.init, key, *inputs)["params"]`; or the converted NNX model itself, which may
        be abstract. Where its arrays have shardings, weights are put there before they are quantized.
      quant_stats: nested dict of the statistics that training collected, for static scales.
      allow_extra_params: leave out params that the quantized model doesn't have.
      donate: delete each `jax.Array` of a weight as soon as it's quantized. Params that stay float are
        returned as they are.

    Returns:
      Linen: params for `apply`. NNX: a dict for `nnx.update(model, ...)`.

    Raises:
      TypeError: leaves that aren't arrays.
      ValueError: params that the model doesn't have (the message names the nearest), or of another shape,
        or that come twice; statistics of no data. Of a dict, names and shapes are looked at before the first
        weight is quantized, and with `donate` the values, too.

    >>> import flax.linen as nn, jax.numpy as jnp, qwix
    >>> model, x = nn.Dense(4), jnp.ones((1, 8))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> quantized = qwix.quantize_model(model, qwix.QuantizationRule(weight_qtype="int8"))
    >>> abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    >>> quantized.apply({"params": quantize_params(params, abstract)}, x).shape
    (1, 4)
    """
    stream = quantize_stream(
        params,
        abstract_quantized_params,
        quant_stats,
        allow_extra_params=allow_extra_params,
        donate=donate,
        _qarray_module=_qarray_module,
    )
    return traverse_util.unflatten_dict(dict(stream))


def quantize_stream(
    weights: Weights,
    abstract_quantized_params: Any,
    quant_stats: Mapping[str, Any] = FrozenDict(),
    *,
    allow_extra_params: bool = False,
    donate: bool = False,
    _qarray_module: Any = qarray,
) -> Iterator[tuple[Path, Any]]:
    """Quantizes float params as they come, and gives each away before it asks for the next.

    For models that don't fit into memory as floats, or, where the results are written at once, not even
    quantized. At any time this holds one weight, what it becomes, and at most a few pieces of 16 MiB.

    Args:
      weights: and all others as for `quantize_params`. A path is a tuple, or a text with slashes.

    Yields:
      (path, param) pairs. Linen: a `WithAux` or an array. NNX: the paths and arrays of `nnx.state`, so a
      quantized weight gives several.

    Raises:
      As `quantize_params`. What was yielded before stays valid.

    >>> import jax.numpy as jnp, qwix
    >>> linear = nnx.eval_shape(lambda: nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
    >>> model = qwix.quantize_model(linear, qwix.QuantizationRule(weight_qtype="int8"))
    >>> shard = iter([("kernel", jnp.ones((64, 8))), ("bias", jnp.zeros(8))])
    >>> for path, array in qwix.quantize_stream(shard, model):
    ...     print(path, array.dtype, array.shape)
    ('kernel', 'array', 'qvalue') int8 (64, 8)
    ('kernel', 'array', 'scale') float32 (1, 8)
    ('bias',) float32 (8,)
    """
    is_nnx = isinstance(abstract_quantized_params, nnx.Module)
    paths, templates = {}, {}
    for own, template in _templates(abstract_quantized_params):
        paths[_text(own)], templates[_text(own)] = own, template
    pairs, left = _pairs(weights), None
    if isinstance(weights, Mapping):
        left = _looked_at(_leaves(weights), templates, allow_extra_params, donate)
    seen: set[str] = set()
    for path, value in pairs:
        name = _text(path)
        template = templates.get(name)
        if template is None and not allow_extra_params:
            raise ValueError(_unknown(path, templates))
        if name in seen:
            raise ValueError(f"{name!r} came twice. Every param can be given once.")
        seen.add(name)
        if template is None:
            continue
        made = converted(path, value, template, _qarray_module)
        if donate and isinstance(template, WithAux) and isinstance(value, jax.Array):
            _release(value, left)
        del value  # the caller's next weight comes while this frame waits
        yield from _as_leaves(paths[name], made, is_nnx)  # which has numbers where a checkpoint has texts
        del made
    for path, stat in _stats(quant_stats):
        for full, made in _static(path, stat, templates).items():
            yield from _as_leaves(paths[_text(full)], made, is_nnx)


def _as_leaves(path: Path, made: Any, is_nnx: bool) -> Iterator[tuple[Path, Any]]:
    if not is_nnx:
        yield path, made
    else:
        yield from (((*path, *rest), leaf) for rest, leaf in _pure(made))


def _pairs(weights: Weights) -> Iterator[tuple[Path, Any]]:
    """The (path, array) pairs in what was given. None of their arrays is held here while the next is made."""
    if isinstance(weights, Mapping):
        yield from _leaves(weights).items()
        return
    if not isinstance(weights, Iterable) or isinstance(weights, str | bytes | jax.Array | np.ndarray):
        raise TypeError(
            f"params is not a pure dict of jax.Array: it's a {type(weights).__name__}. An iterable gives "
            "(path, array) pairs or such dicts."
        )
    items = iter(weights)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        if isinstance(item, Mapping):
            leaves = _leaves(item)
            item = None
            while leaves:
                path = next(iter(leaves))
                yield path, leaves.pop(path)
            continue
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str | tuple | list)):
            raise TypeError(
                "params is not a pure dict of jax.Array, nor an iterable of (path, array) pairs or such "
                f"dicts: it gave a {type(item).__name__}."
            )
        path = tuple(item[0].split("/")) if isinstance(item[0], str) else tuple(item[0])
        _check_array(path, item[1])
        pair, item = [(path, item[1])], None
        yield pair.pop()


def _looked_at(
    leaves: Mapping[Path, Any], templates: Mapping[str, Any], allow_extra_params: bool, donate: bool
) -> collections.Counter[int]:
    """How many params hold each array. Raises what would otherwise be raised half-way."""
    for path, value in leaves.items():
        template = templates.get(_text(path))
        if template is None and not allow_extra_params:
            raise ValueError(_unknown(path, templates))
        if template is not None:
            _check_shape(path, value, template)
        is_weight = donate and isinstance(template, WithAux) and isinstance(value, jax.Array)
        if is_weight and not isinstance(value, jax.core.Tracer) and not all_finite(value):
            qarray.check_finite(value, f"The weight {_text(path)!r}")
    return collections.Counter(map(id, leaves.values()))


def _release(value: jax.Array, left: collections.Counter[int] | None) -> None:
    """Deletes an array, if no other param has it."""
    if left is not None:
        left[id(value)] -= 1
        if left[id(value)]:
            return
    if not isinstance(value, jax.core.Tracer):
        value.delete()


def _text(path: Path) -> str:
    return "/".join(map(str, path))


def _templates(tree: Any) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, nnx.Module):
        for owner, path, name, value in flax_util.nnx_values(tree):
            if isinstance(value, WithAux | nnx.Variable):
                key = int(name) if isinstance(owner, nnx.List) else name  # as `nnx.state` has it
                yield (*path, key), flax_util.unbox(value)
    else:
        tree = flax_util.unbox(tree)
        yield from traverse_util.flatten_dict(tree, is_leaf=lambda _, x: isinstance(x, WithAux)).items()


def _leaves(params: Any) -> dict[Path, Any]:
    if not isinstance(params, Mapping):
        raise TypeError(f"params is not a pure dict of jax.Array: it's a {type(params).__name__}.")
    flat = traverse_util.flatten_dict(params)
    for path, value in flat.items():
        _check_array(path, value)
    return flat


def _check_array(path: Path, value: Any) -> None:
    if not isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        raise TypeError(
            f"params is not a pure dict of jax.Array: {_text(path)!r} is a {type(value).__name__}. "
            "Unbox params with flax.linen.meta.unbox, or take nnx.to_pure_dict(nnx.state(model))."
        )
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.is_deleted():
        raise ValueError(f"The array of {_text(path)!r} was deleted: was it donated before?")


def _unknown(path: Path, templates: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(_text(path), templates, n=1, cutoff=0.0)
    return (
        f"{_text(path)} is not found in the abstract_quantized_params. "
        + (f"The nearest there is {near[0]!r}. " if near else "It's empty. ")
        + "Are these the params of another model? allow_extra_params=True leaves out what isn't there."
    )


def _check_shape(path: Path, value: Any, template: Any) -> None:
    if not isinstance(template, WithAux):
        shape, fits = template.shape, value.shape == template.shape
    else:
        shape = tuple(template.array.shape)
        fits = np.prod(value.shape) == np.prod(shape)
    if not fits:
        raise ValueError(f"{_text(path)} has shape {value.shape}, but the quantized model's is {shape}.")


def converted(path: Path, value: Any, template: Any, qarray_module: Any = qarray) -> Any:
    """A float param in the form of the template, which has no boxes, and where its shardings say."""
    _check_shape(path, value, template)
    if not isinstance(template, WithAux):
        return _placed(value, template)
    packed = template.array
    if not isinstance(packed, qarray.QArray | TransposedQArray):
        return template.replace(array=_placed(value, packed))
    array = jax.numpy.asarray(_placed(value, packed.qvalue)).reshape(packed.shape)
    stored, _ = quantize_weight(
        array,
        Form.like(packed, template.how),
        qarray_module,
        name=f"The weight {_text(path)!r}",
        shardings=_shardings(packed),
    )
    return template.replace(array=stored)


def _placed(value: Any, like: Any) -> Any:
    """The array where an abstract one of its shape says that it lies."""
    sharding = like.sharding if isinstance(like, jax.ShapeDtypeStruct) else None
    is_abstract = isinstance(value, jax.ShapeDtypeStruct | jax.core.Tracer)
    if not isinstance(sharding, NamedSharding) or is_abstract or value.shape != like.shape:
        return value
    # A model made abstractly under `jax.set_mesh` knows that mesh's axes, and not its devices.
    return jax.device_put(value, sharding.spec if isinstance(sharding.mesh, AbstractMesh) else sharding)


def _shardings(packed: Any) -> Any:
    """Those of an abstract weight's arrays, in their places; None where one has none."""
    found = jax.tree.map(lambda x: x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None, packed)
    leaves = jax.tree.leaves(found, is_leaf=lambda x: x is None)
    return found if all(isinstance(x, NamedSharding) for x in leaves) else None


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
