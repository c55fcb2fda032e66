"""Adapters merged into the weights they change, and taken out of them again.

A float weight becomes W + scaling * A B. A quantized one is quantized again, in the format it's stored in,
which rounds it a second time: by how much is reported for each weight.

Neither the model nor the params that are given change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from qwix._src import linen_scope
from qwix._src.adapter import SUFFIXES, Adapter, AdapterSpec
from qwix._src.lora_files import ADAPTER_NAME, adapters_of, flat
from qwix._src.lora_params import linen_boxed, nnx_params_of
from qwix._src.providers.lora import LoraProvider
from qwix._src.quantize_params import converted
from qwix._src.report_records import sqnr_db
from qwix._src.utils import flax_util
from qwix._src.weight import WeightInfo, dense
from qwix._src.with_aux import WithAux

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Merged:
    """What `merge` and `unmerge` return.

    Attributes:
      model: the NNX model; of Linen None.
      params: those of the Linen model; of NNX None.
      sqnr_db: {path of a weight: signal to quantization noise of what is stored, against the exact sum, in
        dB}; inf where nothing was lost, None under a trace.
    """

    model: Any
    params: Any
    sqnr_db: dict[str, float | None]


def merge(model: nnx.Module | nn.Module, params: Any = None, *, requantize: bool = True) -> Merged:
    """The model with its adapters merged into the weights, and none left.

    Args:
      model: as `apply_lora_to_model` returned it.
      params: of a Linen model, with the adapters among them.
      requantize: store quantized weights quantized again; False: as floats.

    Raises:
      ValueError: a model without adapters, or with several stacked ones.
      TypeError: not a model of a LoraProvider; params of an NNX model, or none of a Linen one.

    >>> import qwix
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> provider = qwix.LoraProvider(rank=2, alpha=4.0)
    >>> adapted = qwix.apply_lora_to_model(model, provider, jnp.ones((1, 8)), rngs=nnx.Rngs(1))
    >>> merged = merge(adapted)
    >>> bool(jnp.allclose(merged.model(jnp.ones((1, 8))), adapted(jnp.ones((1, 8))))), merged.sqnr_db
    (True, {'kernel': inf})
    """
    provider = provider_of(model, params)
    weights = Weights(model, params)
    given = arrays_of(adapters_of(model if params is None else params))
    if not given:
        raise ValueError("There are no adapters to merge.")
    quality = {}
    for path, parts in given.items():
        adapter = Adapter(**parts, spec=spec_of(provider, path))
        quality[path] = weights.replace(path, adapter.applied(_float(weights.get(path))), requantize)
    weights.drop_adapters()
    return Merged(weights.model, weights.params, quality)


def unmerge(model: nnx.Module | nn.Module, adapters: Mapping[str, Any], params: Any = None) -> Merged:
    """The merged model with the adapters taken out of its weights, and beside them again.

    Float weights are what they were, up to rounding. Quantized weights were rounded when they were merged and
    are rounded again now; keep the base weights if they matter.

    Args:
      model: of `merge`; of Linen, the module that was merged.
      adapters: those that were merged, as `adapters_of` returned them.
      params: of a Linen model, as `merge` returned them.

    Raises:
      ValueError: adapters that weren't merged into this model; DoRA, whose magnitudes can't be divided out.
      TypeError: as of `merge`.
    """
    provider = provider_of(model, params)
    weights, given = Weights(model, params), arrays_of(adapters)
    present = arrays_of(adapters_of(model if params is None else params))
    if present:
        raise ValueError(
            f"{next(iter(present))!r} has an adapter beside it that isn't merged. Merge it first."
        )
    quality = {}
    for path, parts in given.items():
        if parts["m"] is not None:
            raise ValueError("DoRA can't be unmerged: the norms of the weights before it are gone.")
        adapter = Adapter(**parts, spec=spec_of(provider, path))
        _check_shapes(path, adapter)
        quality[path] = weights.replace(path, _float(weights.get(path)) - adapter.change(), requantize=True)
        weights.add_adapter(path, parts, adapter.spec)
    return Merged(weights.model, weights.params, quality)


def provider_of(model: Any, params: Any) -> LoraProvider:
    """The provider of a model with adapters. Raises TypeError for any other."""
    provider = getattr(type(model), "_qwix_provider", None)
    if not isinstance(provider, LoraProvider):
        raise TypeError(
            "Adapters are those of a model that qwix.apply_lora_to_model made; this "
            f"{type(model).__name__} isn't one."
        )
    if isinstance(model, nn.Module) == (params is None):
        raise TypeError("Give params with a Linen model, which holds none, and no params with an NNX model.")
    return provider


def arrays_of(adapters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{path of a weight: its "a", "b" and "m" (or None)}. Raises for what isn't a dict of whole adapters."""
    if not isinstance(adapters, Mapping):
        raise TypeError(
            "Adapters are nested dicts, as qwix.lora.adapters_of(model) gives them, not a "
            f"{type(adapters).__name__}."
        )
    found: dict[str, dict[str, Any]] = {}
    for path, array in flat(adapters).items():
        match = ADAPTER_NAME.fullmatch(path)
        if match is None:
            raise ValueError(f"{path!r} is no adapter. qwix.lora.adapters_of(model) gives adapters alone.")
        parts = found.setdefault(match["weight"], dict.fromkeys(SUFFIXES))
        parts[match["part"]] = jnp.asarray(array)
    for path, parts in found.items():
        if lacking := [SUFFIXES[part] for part in ("a", "b") if parts[part] is None]:
            raise ValueError(f"The adapter of {path!r} lacks {path + lacking[0]!r}.")
    return found


def spec_of(provider: LoraProvider, path: str) -> AdapterSpec:
    """The facts of the adapter of a weight. Raises ValueError if the model knows none."""
    known = {"/".join(map(str, key)): spec for key, spec in provider.adapters.items()}
    if path not in known:
        some = ", ".join(map(repr, list(known)[:5])) or "none yet"
        raise ValueError(
            f"The model has no adapter for {path!r}; it knows {some}. A Linen model knows its adapters once "
            "it has been initialized (jax.eval_shape(model.init, key, *inputs) will do) or applied."
        )
    if known[path].members:
        names = [name for name, _ in known[path].members]
        raise ValueError(f"Several adapters are stacked, {names}: merge each into a model of its own.")
    return known[path]


def _check_shapes(path: str, adapter: Adapter) -> None:
    lifted, spec = adapter.spec.lifted, adapter.spec
    given, wanted = (adapter.a.shape, adapter.b.shape), ((*lifted, *spec.a_shape), (*lifted, *spec.b_shape))
    if given != wanted:
        raise ValueError(
            f"The adapter of {path!r} has A and B of {given[0]} and {given[1]}, but {wanted[0]} and "
            f"{wanted[1]} were merged. Is it of another model?"
        )


class Weights:
    """The weights of a new model, or of new params, by path."""

    def __init__(self, model: Any, params: Any):
        self.model = self.params = None
        self._places: dict[str, tuple[Any, Any]] = {}  # what holds the weight, and under which name
        self._paths: dict[str, Path] = {}
        if params is None:
            graphdef, state = nnx.split(model)
            self.model = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
            for owner, path, name, _ in list(flax_util.nnx_values(self.model)):
                text = "/".join(map(str, (*path, name)))
                self._places[text], self._paths[text] = (owner, name), path
        else:
            self.params = linen_scope.plain(params)
            self._walk(self.params["params"] if set(self.params) == {"params"} else self.params, "")

    def _walk(self, tree: dict[str, Any], above: str) -> None:
        for name, value in tree.items():
            if isinstance(value, dict):
                self._walk(value, f"{above}{name}/")
            else:
                self._places[above + name] = tree, name

    def get(self, path: str) -> Any:
        """The weight as it's stored: a WithAux, a variable, a box or an array."""
        if path not in self._places:
            raise ValueError(f"There is no weight {path!r}. Are these adapters of another model?")
        owner, name = self._places[path]
        return owner[name] if isinstance(owner, dict) else vars(owner)[name]

    def replace(self, path: str, total: jax.Array, requantize: bool) -> float | None:
        """Stores a weight in the form of the one that's there; returns its quality, as `Merged.sqnr_db`."""
        stored = self.get(path)
        is_aux = isinstance(stored, WithAux)
        if is_aux and requantize:
            plain = converted((path,), total, stored.replace(array=flax_util.unbox(stored.array)))
            boxed = jax.tree.map(
                lambda box, x: flax_util.update_boxed(box, value=x),
                stored.array,
                plain.array,
                is_leaf=flax_util.is_box,
            )
            new: Any = stored.replace(array=boxed)
        else:
            box = stored.array.qvalue if is_aux else stored
            new = flax_util.update_boxed(
                box, value=total.astype(stored.dtype if is_aux else _raw(stored).dtype)
            )
        for place, (owner, name) in self._places.items():
            if self.get(place) is stored:
                put(owner, name, new)
        return sqnr_db(total, _float(new))

    def drop_adapters(self) -> None:
        for path, (owner, name) in list(self._places.items()):
            if ADAPTER_NAME.fullmatch(path):
                if isinstance(owner, dict):
                    del owner[name]
                else:
                    delattr(owner, name)
                del self._places[path]

    def add_adapter(self, path: str, parts: Mapping[str, Any], spec: AdapterSpec) -> None:
        stored = self.get(path)
        given = {part: array for part, array in parts.items() if array is not None}
        info = WeightInfo(self._paths.get(path, ()), path.rpartition("/")[2])
        made = nnx_params_of(given, info, spec, stored) if self.model is not None else {}
        for owner, name in [p for place, p in self._places.items() if self.get(place) is stored]:
            for part, array in given.items():
                value = made[part] if made else linen_boxed(array, part, spec, stored)
                put(owner, f"{name}{SUFFIXES[part]}", value)


def put(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, str(name), value)


def _raw(stored: Any) -> Any:
    return stored.unboxed if isinstance(stored, WithAux) else flax_util.unbox(stored)


def _float(stored: Any) -> jax.Array:
    return dense(_raw(stored), jnp.float32)
