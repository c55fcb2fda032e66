"""Adapters by themselves: out of a model or a tree of params, into another one, and on disk.

A nested dict holds them, whatever the model is: {"layers": {"0": {"kernel_lora_a": array, ...}}}, its keys
the path of the module as texts, then the name of the param.

Invariants:
- `with_adapters` takes all or nothing: every name and shape is checked before anything changes.
- What it puts in is like what it replaces: the same dtype, sharding and box.
- Files hold adapters alone, never the weights that they change.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from flax.core import meta

from qwix._src.utils import flax_util
from qwix._src.with_aux import WithAux

Adapters = dict[str, Any]
Format = Literal["orbax", "safetensors"]
ADAPTER_NAME = re.compile(r"(?P<weight>.+)_lora_(?P<part>[abm])")
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_METADATA = "qwix_lora"  # the key of a safetensors file's metadata


def adapters_of(model_or_params: Any) -> Adapters:
    """The adapters of a model, and nothing else.

    Args:
      model_or_params: an NNX model, or a Linen model's params: nested dicts, boxed or not, with or without
        `params` on top. Abstract ones give `jax.ShapeDtypeStruct`s.

    Returns: nested dict of arrays without boxes; empty where there are none.

    Raises:
      TypeError: something else than a model or a dict.

    >>> adapters_of({"dense": {"kernel": 1.0, "kernel_lora_a": 2.0, "kernel_lora_b": 3.0}})
    {'dense': {'kernel_lora_a': 2.0, 'kernel_lora_b': 3.0}}
    """
    return nested({path: flax_util.unbox(value) for path, value in _found(model_or_params).items()})


def with_adapters(model_or_params: Any, adapters: Mapping[str, Any]) -> Any:
    """The model with other adapters.

    Args:
      model_or_params: as of `adapters_of`; it must have adapters already, of the same ranks.
      adapters: as `adapters_of` and `load_adapters` return them, for all adapters of the model. They are cast
        to the dtype of those that they replace, and get their sharding.

    Returns: the NNX model itself, changed in place; of Linen params a new tree.

    Raises:
      ValueError: adapters that the model hasn't, or lacks, or of another shape: the message names the first.
        The model is as it was.

    >>> import jax.numpy as jnp
    >>> params = {"dense": {"kernel_lora_a": jnp.ones((4, 2)), "kernel_lora_b": jnp.zeros((2, 3))}}
    >>> with_adapters(params, {"dense": {"kernel_lora_a": jnp.ones((4, 2))}})
    Traceback (most recent call last):
    ...
    ValueError: The adapters lack 'dense/kernel_lora_b', which the model has (1 missing of 2)...
    """
    own = _found(model_or_params)
    given = flat(adapters)
    _check_names(own, given)
    for path in sorted(given):
        _check_array(path, given[path], flax_util.unbox(own[path]))
    made = {path: _like(flax_util.unbox(old), given[path]) for path, old in own.items()}
    if not isinstance(model_or_params, nnx.Module):
        return _replaced(model_or_params, lambda path, old: meta.replace_boxed(old, made[path]))
    for path, variable in own.items():
        variable.set_raw_value(made[path])
    return model_or_params


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers/0/kernel_lora_a": array} of nested dicts."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def nested(leaves: Mapping[str, Any]) -> Adapters:
    """Undoes `flat`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def _found(model_or_params: Any) -> dict[str, Any]:
    """{path: what holds the array}: a Variable, a linen box or the array itself. An adapter that stands in
    several places of an NNX model has the first one's path.
    """
    if isinstance(model_or_params, nnx.Module):
        values = flax_util.nnx_values(model_or_params)
        pairs = (((*path, name), value) for _, path, name, value in values if isinstance(value, nnx.Variable))
    elif isinstance(model_or_params, Mapping):
        pairs = _walk(_params(model_or_params), ())
    else:
        raise TypeError(
            f"Adapters are in an nnx.Module or in a Linen model's params, not in a "
            f"{type(model_or_params).__name__}. Pass the model itself, or the nested dict of its params."
        )
    found: dict[str, Any] = {}
    shared: set[int] = set()
    for path, value in pairs:
        if ADAPTER_NAME.fullmatch(str(path[-1])) and id(value) not in shared:
            found["/".join(map(str, path))] = value
            shared |= {id(value)} if isinstance(value, nnx.Variable) else set()
    return found


def _params(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    return tree["params"] if set(tree) == {"params"} else tree


def _walk(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, (*path, name))
        elif not isinstance(value, WithAux):
            yield (*path, name), value


def _replaced(tree: Mapping[str, Any], new: Callable[[str, Any], Any]) -> Any:
    """A copy of a Linen tree with other adapters."""

    def copy(tree: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
        out: dict[str, Any] = {}
        for name, value in tree.items():
            if isinstance(value, Mapping):
                out[name] = copy(value, (*path, name))
            else:
                text = "/".join((*path, name))
                out[name] = new(text, value) if ADAPTER_NAME.fullmatch(name) else value
        return flax.core.freeze(out) if isinstance(tree, flax.core.FrozenDict) else out

    params = copy(_params(tree), ())
    if _params(tree) is tree:
        return params
    return (
        flax.core.freeze({"params": params}) if isinstance(tree, flax.core.FrozenDict) else {"params": params}
    )


def _check_names(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    if not own:
        raise ValueError(
            "The model has no adapters. Make them first: qwix.apply_lora_to_model(model, provider, *inputs); "
            "a Linen model's are in the params that its init returns."
        )
    unknown = sorted(set(given) - set(own))
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no adapter of the model ({len(unknown)} unknown of {len(given)}); the "
            f"nearest is {nearest(unknown[0], own)!r}. Are these the adapters of another model, or should a "
            "rule's module_path match more?"
        )
    missing = sorted(set(own) - set(given))
    if missing:
        raise ValueError(
            f"The adapters lack {missing[0]!r}, which the model has ({len(missing)} missing of {len(own)}). "
            "Are these the adapters of another model, or should a rule's module_path match less?"
        )


def nearest(name: str, names: Any) -> str | None:
    """The name that is most like `name`."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)), None)


def _check_array(path: str, new: Any, old: Any) -> None:
    dtype = getattr(new, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        what = type(new).__name__ if dtype is None else f"of {dtype}"
        raise ValueError(f"The adapter {path!r} must be a float array, but it is {what}.")
    new_shape, old_shape = tuple(new.shape), tuple(old.shape)
    if new_shape == old_shape:
        return
    shapes = f"The adapter {path!r} has shape {new_shape}, but the model's has {old_shape}"
    if path.endswith("_lora_a") and new_shape[:-1] == old_shape[:-1]:
        raise ValueError(
            f"{shapes}: its rank is {new_shape[-1]}, the model's {old_shape[-1]}. Make the model with "
            f"rank={new_shape[-1]}."
        )
    raise ValueError(f"{shapes}: it's for a weight of another shape. Is this the adapter of another model?")


def _like(old: Any, new: Any) -> jax.Array:
    """The new array with the dtype and the place of the old one."""
    array = jnp.asarray(new, old.dtype)
    placed = isinstance(old, jax.ShapeDtypeStruct) or getattr(old, "committed", False)
    return array if not placed or old.sharding is None else jax.device_put(array, old.sharding)


def save_adapters(
    path: str | os.PathLike[str],
    model_or_params: Any,
    *,
    format: Format = "orbax",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes the adapters of a model, and nothing else of it.

    Args:
      path: what to make: a directory for orbax, a file for safetensors.
      model_or_params: as of `adapters_of`; adapters alone will do.
      format: "orbax" writes each shard where it is; "safetensors" one file of arrays named
        `layers.0.kernel_lora_a`, and needs the package safetensors.
      metadata: what JSON can hold, such as {"rank": 8, "alpha": 16}; `read_metadata` returns it.

    Raises:
      ValueError: a model without adapters, an unknown format, names that a safetensors file can't tell apart.
      FileExistsError: something is there already.
    """
    if format not in ("orbax", "safetensors"):
        raise ValueError(f"format must be 'orbax' or 'safetensors', got {format!r}.")
    leaves = flat(adapters_of(model_or_params))
    if not leaves:
        raise ValueError(
            "There are no adapters to save. Make them first: qwix.apply_lora_to_model(model, provider, "
            "*inputs)."
        )
    target = as_path(path)
    if target.exists():
        raise FileExistsError(f"{str(target)!r} exists already. Remove it, or choose another path.")
    if format == "orbax":
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target, nested(leaves), custom_metadata=dict(metadata or {}))
            checkpointer.wait_until_finished()
        return
    dotted = next((name for name in leaves if "." in name), None)
    if dotted is not None:
        raise ValueError(
            f"{dotted!r} has a dot in it, which separates modules in a safetensors file. Use format='orbax'."
        )
    tensors = {name.replace("/", "."): value for name, value in leaves.items()}
    write_safetensors(target, tensors, {_METADATA: json.dumps(dict(metadata or {}))})


def load_adapters(path: str | os.PathLike[str]) -> Adapters:
    """Reads what `save_adapters` wrote, in whichever format: nested dict of numpy arrays.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: something else is there.
    """
    source = as_path(path)
    if not _is_directory(source):
        return nested({k.replace(".", "/"): x for k, x in read_safetensors(source)[0].items()})
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(source).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(source, restore_args=args)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save_adapters` was given. Raises what `load_adapters` does."""
    source = as_path(path)
    if not _is_directory(source):
        return json.loads(read_safetensors(source)[1].get(_METADATA, "{}"))
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return dict(checkpointer.metadata(source).custom_metadata or {})


def as_path(path: str | os.PathLike[str]) -> Any:
    """An absolute path, which may be in a bucket."""
    from etils import epath

    return epath.Path(path).expanduser().absolute()


def _is_directory(source: Any) -> bool:
    """Whether it's a checkpoint of orbax, and not a file."""
    if not source.exists():
        raise FileNotFoundError(f"There are no adapters at {str(source)!r}.")
    if not source.is_dir():
        return False
    if (source / "adapter_config.json").exists():
        raise ValueError(f"{str(source)!r} is in the layout of PEFT. Read it with load_peft.")
    if not (source / "_METADATA").exists():
        raise ValueError(f"{str(source)!r} is no checkpoint of adapters: save_adapters makes those.")
    return True


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "Files of safetensors need the package safetensors: pip install safetensors."
        ) from None
    return safetensors


def write_safetensors(path: Any, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes a file that appears whole or not at all."""
    # The package takes the memory of an array for its values in order, whatever its strides are.
    arrays = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    data = _safetensors().numpy.save(arrays, metadata=dict(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f"{path.name}.partial"
    partial.write_bytes(data)
    partial.replace(path)


def read_safetensors(path: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata). Raises ValueError for another kind of file."""
    package, data = _safetensors(), path.read_bytes()
    try:
        stored = dict(package.deserialize(data))
    except package.SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file: {error}") from error
    other = next((name for name, x in stored.items() if x["dtype"] not in _DTYPES), None)
    if other is not None:
        raise ValueError(f"{other!r} in {str(path)!r} is {stored[other]['dtype']}, not one of {[*_DTYPES]}.")
    tensors = {
        name: np.frombuffer(x["data"], _DTYPES[x["dtype"]]).reshape(x["shape"]) for name, x in stored.items()
    }
    size = int.from_bytes(data[:8], "little")
    return tensors, json.loads(data[8 : 8 + size]).get("__metadata__", {})
