"""The class of a converted model: a subclass of the model's own, of the same name, whose methods run
quantized.

Its instances can be pickled: they remember how their class is made. It's made once per provider, so equal
layers have equal types.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwix._src import qconfig

_NONE: Mapping[str, Any] = types.MappingProxyType({})
# (provider, original class, method's name, model, args, kwargs) -> the method's result
Call = Callable[[qconfig.QuantizationProvider, type, str, Any, Any, Any], Any]


def original(cls: type) -> type:
    """The class that a converted model's class was made from; any other class as it is."""
    return getattr(cls, "_unquantized_type", cls)


def is_converted(model: Any) -> bool:
    """Whether `quantize_model` made this."""
    return hasattr(type(model), "_qwix_provider")


def check_method(cls: type, method: str) -> None:
    """Raises ValueError if the class has no such method."""
    if not callable(getattr(cls, method, None)):
        known = sorted(
            n for n, f in inspect.getmembers(cls, callable) if n == "__call__" or not n.startswith("_")
        )
        raise ValueError(
            f"{cls.__name__} has no method {method!r} to quantize. Its methods: {', '.join(known)}."
        )


def public_methods(cls: type, base: type) -> tuple[str, ...]:
    """The methods that a class has over `base` and whose names say that anyone may call them."""
    names: dict[str, None] = {}
    for owner in cls.__mro__:
        if owner not in base.__mro__:
            for name, value in vars(owner).items():
                is_method = callable(value) and not isinstance(value, type | staticmethod)
                if is_method and (name == "__call__" or not name.startswith("_")):
                    names.setdefault(name)
    return tuple(names)


def running(provider: qconfig.QuantizationProvider) -> bool:
    """Whether a call of a model of this provider is going on, on this thread."""
    return any(run.provider is provider for run in qconfig.all_runs())


def make(
    base: type,
    provider: qconfig.QuantizationProvider,
    methods: Sequence[str],
    call: Call,
    attributes: Mapping[str, Any] = _NONE,
) -> type:
    """The subclass. A call inside such a call is a plain one. `attributes` are those of the class: what has a
    name is of one kind.
    """
    key = base, tuple(methods), call, tuple(attributes)
    if key not in provider.classes:
        provider.classes[key] = _make(base, provider, tuple(methods), call, attributes)
    return provider.classes[key]


def _make(
    base: type,
    provider: qconfig.QuantizationProvider,
    methods: tuple[str, ...],
    call: Call,
    attributes: Mapping[str, Any],
) -> type:
    namespace: dict[str, Any] = {
        "_qwix_provider": provider,
        "_unquantized_type": base,
        "_qwix_methods": methods,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce__": functools.partialmethod(_reduce, methods, call, attributes),
        **attributes,
    }
    for method in methods:
        namespace[method] = _method(base, provider, method, call)
    metaclass: Any = type(base)
    return metaclass(base.__name__, (base,), namespace)


def _method(
    base: type, provider: qconfig.QuantizationProvider, method: str, call: Call
) -> Callable[..., Any]:
    plain = getattr(base, method)

    @functools.wraps(plain)
    def quantized(self: Any, *args: Any, **kwargs: Any) -> Any:
        if running(provider):
            return plain(self, *args, **kwargs)
        return call(provider, base, method, self, args, kwargs)

    return quantized


def _reduce(
    self: Any, methods: tuple[str, ...], call: Call, attributes: Mapping[str, Any]
) -> tuple[Any, ...]:
    cls = type(self)
    made_of = cls._unquantized_type, cls._qwix_provider, methods, call, dict(attributes)
    return _rebuild, made_of, _state(self)


def _state(model: Any) -> Any:
    state = getattr(model, "__getstate__", None)
    return state() if state is not None else vars(model)


def _rebuild(
    base: type, provider: Any, methods: tuple[str, ...], call: Call, attributes: Mapping[str, Any]
) -> Any:
    cls: Any = make(base, provider, methods, call, attributes)
    return cls.__new__(cls)
