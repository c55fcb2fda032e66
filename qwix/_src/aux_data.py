"""Facts attached to an object that can't carry attributes: arrays, tracers, code objects, scopes.

They belong to that very object. A copy has none, and they go away with the object, so an id that Python gives
out again never finds another object's facts.
"""

from __future__ import annotations

import weakref
from typing import Any

_MISSING = object()
_table: dict[int, tuple[weakref.ref[Any], dict[Any, Any]]] = {}


def _facts(obj: Any) -> dict[Any, Any] | None:
    entry = _table.get(id(obj))
    return entry[1] if entry is not None and entry[0]() is obj else None


def set(obj: Any, key: Any, value: Any) -> None:
    """Attaches `value` to `obj` under `key`.

    >>> class Thing: ...
    >>> thing = Thing()
    >>> set(thing, "name", "kernel")
    >>> get(thing, "name"), get(thing, "other", None)
    ('kernel', None)
    """
    facts = _facts(obj)
    if facts is None:
        facts = {}
        key_of_obj = id(obj)

        def forget(ref: Any) -> None:
            entry = _table.get(key_of_obj)
            if entry is not None and entry[0] is ref:
                del _table[key_of_obj]

        _table[key_of_obj] = (weakref.ref(obj, forget), facts)
    facts[key] = value


def get(obj: Any, key: Any, default: Any = _MISSING) -> Any:
    """What was attached. Raises KeyError when nothing was and no default is given."""
    facts = _facts(obj)
    if facts is not None and key in facts:
        return facts[key]
    if default is _MISSING:
        raise KeyError(key)
    return default


def clear(obj: Any) -> None:
    """Forgets everything attached to `obj`."""
    if _facts(obj) is not None:
        del _table[id(obj)]
