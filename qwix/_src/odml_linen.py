"""One call of a Linen module for ODML. Its statistics are the collection 'quant_stats'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import flax.linen as nn
from flax import traverse_util
from flax.core import scope as flax_scope

from qwix._src import linen_scope, odml_place, qconfig
from qwix._src.odml_executor import Call
from qwix._src.odml_graph import Act
from qwix._src.op_states import OpStates
from qwix._src.utils import flax_util

if TYPE_CHECKING:
    from qwix._src.providers.odml import OdmlQatProvider

COLLECTION = "quant_stats"


def call(
    provider: OdmlQatProvider,
    plain: Callable[..., Any],
    method: str,
    model: nn.Module,
    args: Any,
    kwargs: Any,
) -> Any:
    """`plain(model, ...)`, fake-quantized."""
    if not model.is_initializing():
        return _run(provider, model, plain, method, args, kwargs, changes=True)
    output = _initialize(provider, plain, method, model, args, kwargs)
    if model.path == ():
        provider.finish()
    return output


def _initialize(
    provider: OdmlQatProvider,
    plain: Callable[..., Any],
    method: str,
    model: nn.Module,
    args: Any,
    kwargs: Any,
) -> Any:
    """Makes the params as the float module does; with these the ops, and so their statistics, are known."""
    if provider.converts:
        return plain(model, *args, **kwargs)
    scope = linen_scope.scope_of(model)
    rngs = {name: flax_scope.LazyRng.create(rng).as_jax_rng() for name, rng in scope.rngs.items()}
    before = linen_scope.variables_of(model)
    plain(model, *args, **kwargs)
    variables = linen_scope.variables_of(model)
    variables |= {collection: tree for collection, tree in before.items() if collection != "params"}

    def apply(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return model.clone(parent=None).apply(
            variables, *args, rngs=rngs, mutable=True, method=plain, **kwargs
        )[0]

    return _run(provider, model, apply, method, args, kwargs, changes=False)


def _run(
    provider: OdmlQatProvider,
    model: nn.Module,
    fn: Callable[..., Any],
    method: str,
    args: Any,
    kwargs: Any,
    *,
    changes: bool,
) -> Any:
    scope = linen_scope.scope_of(model)
    writes = model.is_mutable_collection(COLLECTION) and not provider.converts
    stored = linen_scope.plain(scope._collection(COLLECTION))  # scans over layers put others in their place
    read = lambda path, name: flax_util.get_value_from_path(stored, (*filter(None, path.split("/")), name))
    states = OpStates(
        provider.stat if provider.converts else read, lambda path: writes and changes, creates=writes
    )
    made = Call(provider, states, provider.make_quantizer, provider.converts, _known(provider, model))
    op = "final_output" if method == "__call__" else f"{method}_output"
    with qconfig.running(provider), flax_util.linen_root(model), odml_place.marking():
        output = made.run(
            lambda args, kwargs: fn(model, *args, **kwargs),
            (args, kwargs),
            output_op=op,
            leaked=lambda: _leaked(scope),
        )
    provider.after_call()
    for (path, name), state in made.emitted.items():
        linen_scope.put(scope._mutable_collection(COLLECTION), path, name, state)
    return output


def _known(provider: Any, model: nn.Module) -> dict[int, tuple[Any, Any]]:
    """In conversion, the params that the provider was given take the place of those the model got."""
    if not provider.converts:
        return {}
    flat: Any = traverse_util.flatten_dict(flax_util.unbox(linen_scope.plain(linen_scope.params_of(model))))
    known = {}
    for path, array in flat.items():
        given = provider.params.get(tuple(map(str, path)))
        if given is not None and given.shape == array.shape:
            known[id(array)] = array, given
    return known


def _leaked(scope: Any) -> tuple[list[Any], Callable[[list[Any]], None]]:
    """The Acts that the model stored in its variables."""
    places = [place for tree in scope.root._variables.values() for place in _acts(tree)]

    def put(values: list[Any]) -> None:
        for (tree, key, _), value in zip(places, values, strict=True):
            tree[key] = value

    return [act for _, _, act in places], put


def _acts(tree: Any) -> Iterator[tuple[Any, Any, Act]]:
    for key, value in list(tree.items() if hasattr(tree, "items") else ()):
        if isinstance(value, Act):
            yield tree, key, value
        else:
            yield from _acts(value)
