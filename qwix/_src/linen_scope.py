"""What a bound Linen module's scope holds, as nested dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax.core import scope as flax_scope

from qwix._src.utils import flax_util


def scope_of(model: nn.Module) -> flax_scope.Scope:
    """The module's scope. Raises ValueError for a module that is not bound to variables."""
    if model.scope is None:
        raise ValueError(f"{type(model).__name__} is not bound to variables.")
    return model.scope


def variables_of(model: nn.Module) -> dict[str, Any]:
    """The module's own variables, unboxed, as nested dicts that are nobody else's."""
    scope = scope_of(model)
    return {c: flax_util.unbox(plain(scope._collection(c))) for c in scope.root._variables}


def params_of(model: nn.Module) -> Any:
    """The module's own params, as the scope holds them."""
    return scope_of(model)._collection("params")


def plain(tree: Any) -> Any:
    """A copy of nested mappings as dicts.

    >>> from flax.core import FrozenDict
    >>> plain(FrozenDict(a={"b": 1}))
    {'a': {'b': 1}}
    """
    return {k: plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def put(tree: Any, path: str, name: str, value: Any) -> None:
    """Sets what is called `name` under `path`, whose parts '/' separates; makes the dicts on the way.

    >>> tree = {}
    >>> put(tree, "layers/0", "kernel", 1)
    >>> tree
    {'layers': {'0': {'kernel': 1}}}
    """
    for part in filter(None, path.split("/")):
        tree = tree.setdefault(part, {})
    tree[name] = value
