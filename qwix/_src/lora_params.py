"""Giving a converted model the params of its adapters."""

from __future__ import annotations

import collections
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from qwix._src.adapter import SUFFIXES, AdapterSpec
from qwix._src.adapter_init import axes_of, make_adapter
from qwix._src.lora_attribute import INFO
from qwix._src.model_weights import Discovery, Key
from qwix._src.utils import flax_util
from qwix._src.weight import WeightInfo
from qwix._src.with_aux import WithAux

DEFAULT_SEED = 10003


def add_to_nnx(model: nnx.Module, seen: Discovery, rngs: nnx.Rngs | None) -> None:
    """Sets `<weight>_lora_a` and so on beside every weight that was seen to get an adapter.

    A weight that stands in several places has one adapter, which stands beside it everywhere.
    """
    values: dict[Key, Any] = {}
    places: dict[int, list[tuple[Any, Key]]] = collections.defaultdict(list)
    for owner, path, name, value in list(flax_util.nnx_values(model)):
        values[*path, str(name)] = value
        places[id(value)].append((owner, (*path, str(name))))
    if rngs is None:
        warnings.warn(
            f"No rngs given: adapters are made from nnx.Rngs({DEFAULT_SEED}). Give rngs=nnx.Rngs(seed).",
            stacklevel=2,
        )
        rngs = nnx.Rngs(DEFAULT_SEED)
    key = rngs.params() if seen.adapters else None
    for where, (info, spec) in list(seen.adapters.items()):
        value = values[where]
        made = _nnx_params(info, spec, _key_of(key, where), value)
        for owner, place in places[id(value)]:
            _check_owner(owner, place)
            seen.adapters[place] = info, spec
            for part, param in made.items():
                setattr(owner, f"{place[-1]}{SUFFIXES[part]}", param)
            if spec.dropout:
                _prepare_dropout(owner)


def _check_owner(owner: Any, place: Key) -> None:
    if not isinstance(owner, nnx.Module) or isinstance(owner, nnx.List | nnx.Dict):
        raise ValueError(
            f"The weight {'/'.join(map(str, place))!r} can't have an adapter: it stands in a "
            f"{type(owner).__name__}. Make it an attribute of a module, or leave that module out of the "
            "rule's module_path."
        )


def _prepare_dropout(module: Any) -> None:
    """The attributes by which `model.train()`, `model.eval()` and the user's rngs reach dropout."""
    if not hasattr(module, "deterministic"):
        module.deterministic = False
    module.qwix_rngs = nnx.data(None)


def _nnx_params(
    info: WeightInfo, spec: AdapterSpec, key: jax.Array, value: nnx.Param | WithAux
) -> dict[str, nnx.LoRAParam]:
    payload = value.unboxed if isinstance(value, WithAux) else value.get_raw_value()
    make = lambda key, payload: make_adapter(spec, info.rule, key, payload)
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(payload))
    arrays = jax.eval_shape(make, key, payload) if abstract else make(key, payload)
    return nnx_params_of(arrays, info, spec, value)


def nnx_params_of(
    arrays: Mapping[str, Any], info: WeightInfo, spec: AdapterSpec, value: nnx.Param | WithAux
) -> dict[str, nnx.LoRAParam]:
    """The arrays of an adapter as variables, with partition names that follow those of the weight `value`."""
    box = value.array.qvalue if isinstance(value, WithAux) else value
    axes, whose = axes_of(spec), WeightInfo(info.path, info.name)
    params: dict[str, Any] = {}
    for part, array in arrays.items():
        metadata = _like(box, array, axes[part]).get_metadata() if isinstance(box, nnx.Variable) else {}
        params[part] = nnx.LoRAParam.from_metadata(array, dict(metadata) | {INFO: whose})
    return params


def linen_boxed(array: Any, part: str, spec: AdapterSpec, stored: Any) -> Any:
    """The same of a Linen param: A, B or m in a box like that of the weight that is stored."""
    box = stored.array.qvalue if isinstance(stored, WithAux) else stored
    return _like(box, array, axes_of(spec)[part])


def add_to_linen(
    params: Any, adapters: Mapping[Key, tuple[WeightInfo, AdapterSpec]], key: jax.Array | None
) -> None:
    """Puts the adapters beside the weights, in boxes like theirs."""
    for where, (info, spec) in adapters.items():
        *path, name = where
        owner = params
        for part in path:
            owner = owner[part]
        stored = owner[name]
        payload = stored.unboxed if isinstance(stored, WithAux) else flax_util.unbox(stored)
        made = make_adapter(spec, info.rule, _key_of(key, where), payload)
        for part, array in made.items():
            owner[f"{name}{SUFFIXES[part]}"] = linen_boxed(array, part, spec, stored)


def _like(box: Any, array: Any, axes: Sequence[int | None]) -> Any:
    """The array in a box like that of the weight; `axes` as in `adapter_init.axes_of`."""
    return flax_util.update_boxed(box, value=array, transpose=tuple(axes))


def _key_of(key: Any, where: Key) -> jax.Array:
    """That of one weight, whatever other weights there are."""
    return jax.random.fold_in(key, zlib.crc32("/".join(map(str, where)).encode()))
