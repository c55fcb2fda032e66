"""One call of a Linen module in training. Its states are variables of the collection 'quant_stats'.

Params stay what they are. A param's array is recognized wherever it turns up, and in `Scope.param` the value
is marked as a weight, which tells layers under vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util
from flax.core import scope as flax_scope

from qwix._src import interception, linen_scope, op_trace, qconfig
from qwix._src.op_states import OpStates
from qwix._src.qt_executor import TrainingExecutor
from qwix._src.utils import flax_util
from qwix._src.weight import WeightInfo, tag

if TYPE_CHECKING:
    from qwix._src.providers.qt import QtProvider

COLLECTION = "quant_stats"
NOISE = "stochastic_rounding"


def call(provider: QtProvider, plain: Callable[..., Any], model: nn.Module, args: Any, kwargs: Any) -> Any:
    """`plain(model, ...)`, trained quantized."""
    if not model.is_initializing():
        return _run(provider, model, lambda: plain(model, *args, **kwargs), changes=True)
    output = _initialize(provider, plain, model, args, kwargs)
    if model.path == ():
        provider.finish()
    return output


def _initialize(
    provider: QtProvider, plain: Callable[..., Any], model: nn.Module, args: Any, kwargs: Any
) -> Any:
    """Makes the params as the float module does; with these the ops, and so their states, are known."""
    scope = linen_scope.scope_of(model)
    rngs = {name: flax_scope.LazyRng.create(rng).as_jax_rng() for name, rng in scope.rngs.items()}
    before = linen_scope.variables_of(model)
    plain(model, *args, **kwargs)
    variables = linen_scope.variables_of(model)
    variables |= {collection: tree for collection, tree in before.items() if collection != "params"}
    apply = lambda: model.clone(parent=None).apply(
        variables, *args, rngs=rngs, mutable=True, method=plain, **kwargs
    )
    return _run(provider, model, lambda: apply()[0], changes=False)


def _run(provider: QtProvider, model: nn.Module, fn: Callable[[], Any], *, changes: bool) -> Any:
    """Runs code of the module with its ops trained quantized. `changes`: states may change."""
    scope = linen_scope.scope_of(model)
    writes = model.is_mutable_collection(COLLECTION)
    stored = scope._collection(COLLECTION)
    read = lambda path, name: flax_util.get_value_from_path(stored, (*filter(None, path.split("/")), name))
    states = OpStates(read, lambda path: writes and changes, creates=writes)
    noise_key = model.make_rng(NOISE) if provider.is_noisy and model.has_rng(NOISE) else None
    with qconfig.running(provider), flax_util.linen_root(model):
        handler = TrainingExecutor(provider, states, _params(model), noise_key)
        run = op_trace.run
        for make in (*provider.get_interceptors(), lambda: _params_interceptor(provider)):
            run = interception.wrap_func_intercepted(run, make, disable_jit=provider.disable_jit)
        output = run(handler, lambda _: fn())
    for (path, name), state in handler.emitted.items():
        linen_scope.put(scope._mutable_collection(COLLECTION), path, name, state)
    return output


def _params(model: nn.Module) -> dict[int, tuple[Any, WeightInfo]]:
    """The params that exist, by identity."""
    flat = traverse_util.flatten_dict(flax_util.unbox(linen_scope.plain(linen_scope.params_of(model))))
    return {id(x): (x, WeightInfo(path[:-1], path[-1])) for path, x in flat.items() if _is_float(x)}


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _params_interceptor(provider: QtProvider) -> interception.Interceptor:
    return interception.Interceptor({"flax.core.scope.Scope.param": _param}, id=id(provider.records))


def _param(
    scope: flax_scope.Scope,
    name: str,
    init_fn: Callable[..., Any],
    *args: Any,
    unbox: bool = True,
    **kwargs: Any,
) -> Any:
    """`Scope.param`, whose value is a weight."""
    value = flax_scope.Scope.param(scope, name, init_fn, *args, unbox=unbox, **kwargs)
    if not (unbox and _is_float(value)):
        return value
    return tag(value, WeightInfo(flax_util.from_linen_root(scope.path), name))
