"""The places in an NNX model that hold params, and quantizing what they hold, one after the other."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx import bridge

from qwix._src import qconfig
from qwix._src.core import qarray
from qwix._src.model_weights import Found, Key, note_stored
from qwix._src.utils import flax_util
from qwix._src.weight_param import StoredForm, quantized_param
from qwix._src.weight_quantizer import all_finite
from qwix._src.with_aux import WithAux


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place that holds a param: the attribute or entry `name` of the owner, which is reached by `path`."""

    owner: Any  # a module, or a dict or list in one
    path: tuple[str | int, ...]
    name: Any
    value: Any

    def put(self, value: Any) -> None:
        if isinstance(self.owner, nnx.Module):
            setattr(self.owner, str(self.name), value)
        else:
            self.owner[self.name] = value


def keys(path: Sequence[Any]) -> tuple[str | int, ...]:
    return tuple(part if isinstance(part, int) else str(part) for part in path)


def slots(model: nnx.Module, modules: flax_util.Modules | None = None) -> Iterator[Slot]:
    """All places of params, WithAux ones included; a shared param has several. `modules`: as nnx_values."""
    modules = list(nnx.iter_modules(model)) if modules is None else modules
    bridged = [keys(path) for path, module in modules if isinstance(module, bridge.ToNNX)]
    for owner, path, name, value in flax_util.nnx_values(model, modules):
        is_param = isinstance(value, nnx.Param | WithAux)
        if is_param and not any(path[: len(prefix)] == prefix for prefix in bridged):
            yield Slot(owner, path, name, value)


def convert(
    model: nnx.Module,
    provider: qconfig.QuantizationProvider,
    found: Mapping[Key, Found],
    *,
    donate: bool = False,
) -> None:
    """Quantizes the params that were found, one after the other, in place.

    `donate`: deletes each float array once no variable holds it. All are looked at first, so that a weight
    that can't be quantized costs nobody another one.
    """
    places = list(slots(model))
    held = _held(model, places, found) if donate else None
    done: dict[int, tuple[nnx.Param, WithAux]] = {}
    for slot in places:
        if id(slot.value) in done:  # shared: the other places hold the same object
            slot.put(done[id(slot.value)][1])
        elif (what := found.get((*slot.path, str(slot.name)))) and isinstance(slot.value, nnx.Param):
            quantized = _quantize(slot, what, provider)
            done[id(slot.value)] = slot.value, quantized
            slot.put(quantized)
            raw = slot.value.get_raw_value()
            if held is not None and isinstance(raw, jax.Array):
                held[id(raw)] -= 1
                if not held[id(raw)]:
                    raw.delete()


def _held(model: nnx.Module, places: Sequence[Slot], found: Mapping[Key, Found]) -> collections.Counter[int]:
    """How many variables hold each array. Raises ValueError where one of those found can't be quantized."""
    values = (value for *_, value in flax_util.nnx_values(model))
    variables = {id(value): value.get_raw_value() for value in values if isinstance(value, nnx.Variable)}
    for slot in places:
        what, raw = found.get((*slot.path, str(slot.name))), variables.get(id(slot.value))
        if isinstance(raw, jax.core.Tracer):
            raise ValueError(
                "donate=True, but the model's arrays are traced. Under jax.jit, donate them by its "
                "donate_argnums, and leave donate out."
            )
        if what is not None and isinstance(raw, jax.Array) and not all_finite(raw):
            qarray.check_finite(raw, f"The weight {what.info.full_path!r}")
    return collections.Counter(map(id, variables.values()))


def _quantize(slot: Slot, what: Found, provider: Any) -> WithAux:
    quantized, sqnr = quantized_param(
        what.info.full_path,
        slot.value,
        what.how,
        StoredForm.of(what, provider.prepack),
        info=what.info,
        quality=True,
        _qarray_module=provider._qarray,
    )
    note_stored(provider, what.records, quantized)
    provider.note_quality(what.records, sqnr)
    return quantized
