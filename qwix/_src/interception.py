"""Replacing functions by dotted path, for one thread and for the time of a call.

Patches are process-wide but only do something on threads where an interceptor is active; others see the
originals. A plain function is replaced by its code object, so `from jax.lax import dot_general` made before
is caught, too; anything else (a jitted function, a class attribute) by setting the attribute.

Which interceptors are enabled is part of JAX's trace context, so a jitted function that was traced with
them is never reused without them, nor the reverse.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax

from qwix._src import aux_data

PRIMITIVE_BIND_KEY = "jax._src.core.Primitive.bind"
_CODE = "__code__"
_PjitFunction: Any = type(jax.jit(lambda: None))

_trace_context = jax.make_user_context(())


@contextlib.contextmanager
def trace_context(token: Any) -> Iterator[None]:
    """What is traced in here is kept apart, in JAX's caches, from what is traced without `token`."""
    with _trace_context((*_trace_context.value, token)):
        yield


@contextlib.contextmanager
def _without(tokens: Collection[Any]) -> Iterator[None]:
    with _trace_context(tuple(t for t in _trace_context.value if t not in tokens)):
        yield


@dataclasses.dataclass(frozen=True)
class Interceptor(Mapping[str, Callable[..., Any]]):
    """Replacements by dotted path. Two interceptors of one id are one: it's active at most once per
    thread.
    """

    mapping: Mapping[str, Callable[..., Any]]
    id: int

    def __hash__(self) -> int:
        return hash(self.id)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.mapping[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.mapping)

    def __len__(self) -> int:
        return len(self.mapping)


def _resolve(name: str) -> tuple[Any, str]:
    """(object, attribute) that a dotted path ends in. Its first component must be an imported module."""
    root, *rest = name.split(".")
    if root not in sys.modules or not rest:
        raise AttributeError(f"{name!r} can't be resolved: {root!r} isn't an imported module.")
    return functools.reduce(getattr, rest[:-1], sys.modules[root]), rest[-1]


def get_attribute(name: str) -> Any:
    """What a dotted path stands for. Raises AttributeError when there's no such thing.

    >>> get_attribute("jax.lax.dot_general") is jax.lax.dot_general
    True
    """
    return getattr(*_resolve(name))


def has_attribute(name: str) -> bool:
    """Whether `get_attribute` would find something."""
    try:
        get_attribute(name)
    except AttributeError:
        return False
    return True


def _preprocess_interceptor(interceptor: Interceptor, disable_jit: bool) -> Interceptor:
    """The same replacements under the paths that are really patched."""
    mapping: dict[str, Callable[..., Any]] = {}
    for name, replacement in interceptor.items():
        target = get_attribute(name)
        if disable_jit and isinstance(target, _PjitFunction):
            name, target = f"{name}._fun", target._fun
        if isinstance(target, types.FunctionType) and not target.__code__.co_freevars:
            name = f"{name}.{_CODE}"
        mapping[name] = replacement
    return Interceptor(mapping, interceptor.id)


def _trampoline(*args, **kwargs):
    # Runs with the globals of the function it's put into, so it imports what it needs.
    import sys

    from qwix._src import aux_data

    return aux_data.get(sys._getframe().f_code, "qwix_target")(*args, **kwargs)


class _Patch:
    """One replaced attribute. `original` is callable as before."""

    def __init__(self, name: str):
        self.name = name
        self.owner, self.attribute = _resolve(name)
        self.users = 0
        self.saved = getattr(self.owner, self.attribute)
        # A class attribute is put back as it was stored: a method, a staticmethod, a property.
        self.own = (
            vars(self.owner).get(self.attribute, self.saved) if isinstance(self.owner, type) else self.saved
        )
        self.original = self._copy() if self.attribute == _CODE else self.saved

    @property
    def identity(self) -> tuple[int, str]:
        return id(self.owner), self.attribute

    def _copy(self) -> Callable[..., Any]:
        f = self.owner
        copy = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
        copy.__kwdefaults__ = f.__kwdefaults__
        return copy

    def install(self, dispatch: Callable[..., Any]) -> None:
        if self.attribute == _CODE:
            code = _trampoline.__code__.replace(co_name=self.saved.co_name)
            aux_data.set(code, "qwix_target", dispatch)
            self.owner.__code__ = code
        else:
            setattr(self.owner, self.attribute, functools.wraps(self.original)(dispatch))

    def remove(self) -> None:
        setattr(self.owner, self.attribute, self.own)


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.active: list[Interceptor] = []
        self.disabled: set[int] = set()


class _InterceptionManager:
    """The one owner of all patches."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._patches: dict[str, _Patch] = {}
        self._thread = _ThreadState()

    def is_active(self, interceptor_id: int) -> bool:
        """Whether the interceptor is active on this thread, disabled or not."""
        return any(i.id == interceptor_id for i in self._thread.active)

    def activate_interceptor(self, interceptor: Interceptor) -> None:
        """Puts the replacements in place for this thread; on an error nothing has changed."""
        if self.is_active(interceptor.id):
            raise ValueError(f"Interceptor {interceptor.id} is already active on this thread.")
        with self._lock:
            done: list[str] = []
            try:
                for name in interceptor:
                    self._acquire(name)
                    done.append(name)
            except (ValueError, AttributeError, TypeError):
                for name in done:
                    self._release(name)
                raise
        self._thread.active.append(interceptor)

    def deactivate_interceptor(self, interceptor: Interceptor) -> None:
        """Takes the replacements out for this thread."""
        if not self.is_active(interceptor.id):
            raise ValueError(f"Interceptor {interceptor.id} is not active on this thread.")
        if interceptor.id in self._thread.disabled:
            raise ValueError(f"Interceptor {interceptor.id} is disabled: its own handler is running.")
        active = next(i for i in self._thread.active if i.id == interceptor.id)
        self._thread.active = [i for i in self._thread.active if i.id != interceptor.id]
        with self._lock:
            for name in active:
                self._release(name)

    def disable_interception(self) -> set[int]:
        """Disables all enabled interceptors of this thread, and says which."""
        ids = {i.id for i in self._thread.active} - self._thread.disabled
        self._thread.disabled |= ids
        return ids

    def enable_interception(self, ids: Collection[int]) -> None:
        """Undoes `disable_interception`."""
        self._thread.disabled -= set(ids)

    def _acquire(self, name: str) -> None:
        patch = self._patches.get(name)
        if patch is None:
            patch = _Patch(name)
            for other in self._patches.values():
                if other.identity == patch.identity:
                    raise ValueError(
                        f"{name!r} and {other.name!r} are the same thing: intercept one of them."
                    )
            patch.install(functools.partial(self._dispatch, patch))
            self._patches[name] = patch
        patch.users += 1

    def _release(self, name: str) -> None:
        patch = self._patches[name]
        patch.users -= 1
        if not patch.users:
            patch.remove()
            del self._patches[name]

    def _dispatch(self, patch: _Patch, *args: Any, **kwargs: Any) -> Any:
        """The earliest enabled interceptor with this name; it's disabled while its handler runs."""
        thread = self._thread
        for interceptor in thread.active:
            if interceptor.id not in thread.disabled and patch.name in interceptor:
                break
        else:
            return patch.original(*args, **kwargs)
        thread.disabled.add(interceptor.id)
        try:
            with _without([_token(interceptor.id)]):
                return interceptor[patch.name](*args, **kwargs)
        finally:
            thread.disabled.discard(interceptor.id)


interception_manager = _InterceptionManager()


def _token(interceptor_id: int) -> tuple[str, int]:
    return ("intercepted", interceptor_id)


def wrap_func_intercepted(
    func: Callable[..., Any],
    get_interceptor: Callable[[], Interceptor],
    *,
    disable_jit: bool = False,
    input_transform: Callable[..., tuple[Any, Any]] = lambda args, kwargs: (args, kwargs),
    output_transform: Callable[[Any], Any] = lambda output: output,
    should_intercept: Callable[[], bool] = lambda: True,
) -> Callable[..., Any]:
    """`func` with an interceptor active during each call.

    Calls from inside such a call (the same id) and calls where `should_intercept()` is false are plain calls,
    without the transforms. With `disable_jit`, `func` runs under `jax.disable_jit()`.
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        interceptor = get_interceptor()
        if interception_manager.is_active(interceptor.id) or not should_intercept():
            return func(*args, **kwargs)
        interceptor = _preprocess_interceptor(interceptor, disable_jit)
        args, kwargs = input_transform(args, kwargs)
        interception_manager.activate_interceptor(interceptor)
        try:
            with (
                trace_context(_token(interceptor.id)),
                jax.disable_jit() if disable_jit else contextlib.nullcontext(),
            ):
                output = func(*args, **kwargs)
        finally:
            interception_manager.deactivate_interceptor(interceptor)
        return output_transform(output)

    return wrapper


def disable_interceptions(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func` with all interceptors of the calling thread disabled during each call.

    For functions that JAX calls back later, outside of the handler that made them.
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        ids = interception_manager.disable_interception()
        try:
            with _without([_token(i) for i in ids]):
                return func(*args, **kwargs)
        finally:
            interception_manager.enable_interception(ids)

    return wrapper


def opaque(make_kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A maker of kernels that sees the true JAX functions, when it's called and when its kernel is."""

    def make(*args: Any, **kwargs: Any) -> Any:
        made = disable_interceptions(make_kernel)(*args, **kwargs)
        return disable_interceptions(made) if callable(made) else made

    return make
