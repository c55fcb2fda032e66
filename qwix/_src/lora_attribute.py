"""How the code of an NNX module sees a weight that has an adapter.

The module holds three variables, `kernel`, `kernel_lora_a` and `kernel_lora_b` say, which Flax splits, scans,
saves and updates like any others. While the model runs, reading the first gives all of them: a weight that is
W + scaling * A B. So it works in whatever copy of the module Flax's transformations hand to its code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from qwix._src import model_class
from qwix._src.adapter import SUFFIXES, Adapter
from qwix._src.array_like import ArrayLike
from qwix._src.utils import flax_util
from qwix._src.weight import WeightInfo, tag
from qwix._src.with_aux import WithAux

INFO = "qwix_info"  # the metadata of A that says whose weight's it is


class AdaptedAttribute:
    """The class attribute of a weight's name."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        held = vars(module)
        if self.name not in held:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {self.name!r}")
        value = held[self.name]
        if not model_class.running(type(module)._qwix_provider):
            return value
        return adapted(module, self.name, value)

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)[self.name] = value

    def __delete__(self, module: Any) -> None:
        if self.name not in vars(module):
            raise AttributeError(self.name)
        del vars(module)[self.name]


def adapted(module: Any, name: str, value: Any) -> Any:
    """The weight and its adapter as one. Without an adapter (it was merged), still a weight to the ops."""
    parts = {part: vars(module).get(name + suffix) for part, suffix in SUFFIXES.items()}
    if parts["a"] is None or parts["b"] is None:
        return value if isinstance(value, WithAux) else AdaptedWeight(value, None, WeightInfo(None, name))
    info = parts["a"].get_metadata(INFO)
    arrays = {part: flax_util.unbox(x) for part, x in parts.items()}
    adapter = Adapter(**arrays, spec=type(module)._qwix_provider.adapters[(*info.path, info.name)])
    if isinstance(value, WithAux) and value.info is not None:
        info = dataclasses.replace(info, rule=value.info.rule, mapped=value.info.mapped)
    return AdaptedWeight(value, adapter, info)


class AdaptedWeight(ArrayLike):
    """A weight and its adapter, if it has one, to the code of a model."""

    def __init__(self, stored: Any, adapter: Adapter | None, info: WeightInfo):
        self._stored, self._adapter, self._info = stored, adapter, info

    @property
    def array(self) -> Any:
        """That of the weight alone."""
        return self._stored.array if isinstance(self._stored, WithAux) else flax_util.unbox(self._stored)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(flax_util.unbox(self._stored).shape)

    @property
    def dtype(self) -> Any:
        return flax_util.unbox(self._stored).dtype

    @property
    def value(self) -> Any:
        return self.__jax_array__()

    def __jax_array__(self) -> jax.Array:
        stored = self._stored
        payload = stored.payload if isinstance(stored, WithAux) else flax_util.unbox(stored)
        return tag(payload, self._info, self._adapter)


def attributes_of(module: nnx.Module) -> dict[str, AdaptedAttribute]:
    """What the class of a module with adapters has: one attribute per weight that has one."""
    suffix = SUFFIXES["a"]
    names = sorted(str(name)[: -len(suffix)] for name in vars(module) if str(name).endswith(suffix))
    return {name: AdaptedAttribute(name) for name in names if name in vars(module)}
