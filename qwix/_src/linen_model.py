"""Converting Linen modules: their `init` makes quantized params, and `apply` computes with them.

`init` runs the float module, sees abstractly which op eats which param, quantizes those params one by one,
and returns the output of the quantized module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util
from flax.core import scope as flax_scope

from qwix._src import interception, linen_scope, model_class, odml_linen, op_trace, qconfig, qt_linen
from qwix._src.adapter import SUFFIXES, Adapter
from qwix._src.model_weights import Discovery, Found, note_stored
from qwix._src.providers.boxed_param import BoxedParamProvider
from qwix._src.providers.odml import OdmlQatProvider
from qwix._src.providers.qt import QtProvider
from qwix._src.static_range import StaticScales
from qwix._src.utils import flax_util
from qwix._src.weight import WeightInfo, float_type, tag
from qwix._src.weight_param import StoredForm, quantized_param
from qwix._src.with_aux import WithAux

_is_aux = lambda x: isinstance(x, WithAux)


def quantize_linen_model(
    model: nn.Module, provider: qconfig.QuantizationProvider, methods: Sequence[str]
) -> nn.Module:
    """See `qwix.quantize_model`."""
    base = model_class.original(type(model))
    for method in methods:
        model_class.check_method(base, method)
    converted = model.clone()
    object.__setattr__(converted, "__class__", model_class.make(base, provider, methods, call))
    return converted


def call(
    provider: qconfig.QuantizationProvider, base: type, method: str, model: Any, args: Any, kwargs: Any
) -> Any:
    """One call of a converted module."""
    plain = getattr(base, method)
    if model.scope is None:
        return plain(model, *args, **kwargs)
    model, args, kwargs = provider.process_model_inputs(model, args, kwargs)
    if isinstance(provider, QtProvider):
        output = qt_linen.call(provider, plain, model, args, kwargs)
    elif isinstance(provider, OdmlQatProvider):
        output = odml_linen.call(provider, plain, method, model, args, kwargs)
    elif not isinstance(provider, BoxedParamProvider):
        with qconfig.running(provider), flax_util.linen_root(model):
            output = _intercepted(provider, plain)(model, *args, **kwargs)
    else:
        key = lambda name: model.make_rng(name) if model.has_rng(name) else None
        kwargs, options = provider.take_options(plain, kwargs, key)
        if model.is_initializing() and not _holds_quantized(model):
            output = _initialize(provider, plain, model, args, kwargs, options)
        else:
            params = linen_scope.params_of(model)
            if provider.needs_discovery(params):
                provider.learn(_rediscover(provider, plain, model, args, kwargs), params)
            scales = StaticScales(lambda path, name: _get(params, path, name), None)
            output = _run(provider, scales, model, lambda: plain(model, *args, **kwargs), options)
    return provider.process_model_output(method, output)


def _intercepted(
    provider: qconfig.QuantizationProvider, fn: Callable[..., Any], **extra: Any
) -> Callable[..., Any]:
    for make in provider.get_interceptors():
        more = lambda make=make: _with_scope_param(make(), extra)
        fn = interception.wrap_func_intercepted(fn, more, disable_jit=provider.disable_jit)
    return fn


def _with_scope_param(
    interceptor: interception.Interceptor, extra: Mapping[str, Any]
) -> interception.Interceptor:
    return dataclasses.replace(interceptor, mapping={**interceptor.mapping, **extra})


_SCOPE_PARAM = {"flax.core.scope.Scope.param": lambda *args, **kwargs: _scope_param(*args, **kwargs)}


def _run(
    provider: BoxedParamProvider,
    scales: StaticScales,
    model: nn.Module,
    fn: Callable[[], Any],
    options: Mapping[str, Any],
) -> Any:
    """Runs code of the module with its ops carried out by the provider."""
    handler = provider.op_handler(scales, strict=True, **options)
    with qconfig.running(provider), flax_util.linen_root(model):
        run = _intercepted(provider, op_trace.run, **_SCOPE_PARAM)
        return run(handler, lambda _: fn())


def _scope_param(
    scope: flax_scope.Scope,
    name: str,
    init_fn: Callable[..., Any],
    *args: Any,
    unbox: bool = True,
    **kwargs: Any,
) -> Any:
    """`Scope.param`, where the param may be quantized."""
    stored = scope.get_variable("params", name) if scope.has_variable("params", name) else None
    info = WeightInfo(flax_util.from_linen_root(scope.path), name)
    if not isinstance(stored, WithAux):
        value = flax_scope.Scope.param(scope, name, init_fn, *args, unbox=unbox, **kwargs)
        is_array = unbox and hasattr(value, "dtype") and jax.numpy.issubdtype(value.dtype, jax.numpy.floating)
        return tag(value, info, _adapter(scope, info)) if is_array and stored is not None else value
    scope.reserve(name, "params")
    expected = jax.eval_shape(lambda: init_fn(jax.random.key(0), *args, **kwargs))
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(expected)]
    if shapes != [stored.shape]:
        raise ValueError(
            f"The quantized param {info.full_path!r} has shape {stored.shape}, but the module's is "
            f"{shapes[0]}. Are these the params of another model?"
        )
    if stored.info is not None:
        info = dataclasses.replace(stored.info, path=info.path, name=name)
    return tag(stored.payload, info, _adapter(scope, info))


def _adapter(scope: flax_scope.Scope, info: WeightInfo) -> Adapter | None:
    """The adapter that the scope holds beside the weight."""
    names = {part: info.name + suffix for part, suffix in SUFFIXES.items()}
    if not scope.has_variable("params", names["a"]):
        return None
    arrays = {part: flax_util.unbox(scope.get_variable("params", name)) for part, name in names.items()}
    run = qconfig.current_run()
    known = getattr(run.provider if run else None, "adapters", {})
    return Adapter(**arrays, spec=known[(*(info.path or ()), info.name)])


def _rediscover(
    provider: BoxedParamProvider, plain: Callable[..., Any], model: nn.Module, args: Any, kwargs: Any
) -> Discovery:
    """What `init` would find, from params that it made elsewhere."""
    scope = linen_scope.scope_of(model)
    rngs = {name: flax_scope.LazyRng.create(rng).as_jax_rng() for name, rng in scope.rngs.items()}
    variables = linen_scope.variables_of(model)
    flat: Any = traverse_util.flatten_dict(variables.get("params", {}), is_leaf=lambda _, x: _is_aux(x))
    floats = {
        path: jax.ShapeDtypeStruct(*float_type(x.unboxed)) if _is_aux(x) else x
        for path, x in flat.items()
        if not path[-1].endswith(tuple(SUFFIXES.values()))
    }
    variables["params"] = traverse_util.unflatten_dict(floats)
    apply = lambda variables: model.clone(parent=None).apply(
        variables, *args, rngs=rngs, mutable=True, method=plain, **kwargs
    )
    return _discover(provider, model, variables, apply)


def _initialize(
    provider: BoxedParamProvider,
    plain: Callable[..., Any],
    model: nn.Module,
    args: Any,
    kwargs: Any,
    options: Mapping[str, Any],
) -> Any:
    """Makes float params, quantizes them where they are, and returns what the quantized module does."""
    scope = linen_scope.scope_of(model)
    rngs = {name: flax_scope.LazyRng.create(rng).as_jax_rng() for name, rng in scope.rngs.items()}
    before = {c: v for c, v in linen_scope.variables_of(model).items() if c != "params"}
    plain(model, *args, **kwargs)
    variables = linen_scope.variables_of(model)
    apply = lambda variables: model.clone(parent=None).apply(
        variables, *args, rngs=rngs, mutable=True, method=plain, **kwargs
    )[0]
    seen = _discover(provider, model, variables, apply)
    variables.pop("params", None)  # or all float weights would live on beside the quantized ones
    params = scope._mutable_collection("params")
    for key, what in seen.found.items():
        _quantize(provider, params, key, what)
    provider.complete_linen(params, seen, lambda: model.make_rng("params"))
    stored = {"params": flax_util.unbox(linen_scope.plain(params))}
    writes = lambda path, name, value: linen_scope.put(params, path, name, value)
    scales = StaticScales(lambda path, name: _get(params, path, name), writes)
    provider.finish()
    output = _run(provider, scales, model, lambda: apply({**variables, **before, **stored}), options)
    scales.finish()
    return output


def _discover(
    provider: BoxedParamProvider, model: nn.Module, variables: Mapping[str, Any], apply: Callable[[Any], Any]
) -> Discovery:
    handler = Discovery(provider)
    flat = traverse_util.flatten_dict(variables.get("params", {}))
    rest = {collection: tree for collection, tree in variables.items() if collection != "params"}

    def body(leaves: Mapping[tuple[str, ...], Any], rest: Mapping[str, Any]) -> None:
        def run(trace: op_trace.OpTrace) -> None:
            tagged = {p: op_trace.new_weight(trace, x, WeightInfo(p[:-1], p[-1])) for p, x in leaves.items()}
            apply({**rest, "params": traverse_util.unflatten_dict(tagged)})

        with qconfig.running(provider), flax_util.linen_root(None):
            _intercepted(provider, op_trace.run, **_SCOPE_PARAM)(handler, run)

    jax.eval_shape(body, flat, rest)
    return handler


def _quantize(provider: BoxedParamProvider, params: Any, key: tuple[Any, ...], what: Found) -> None:
    *path, name = key
    for part in path:
        params = params[part]
    weight, sqnr = quantized_param(
        what.info.full_path,
        params[name],
        what.how,
        StoredForm.of(what, provider.prepack),
        info=what.info,
        quality=True,
        _qarray_module=provider._qarray,
    )
    note_stored(provider, what.records, weight)
    provider.note_quality(what.records, sqnr)
    params[name] = weight


def _holds_quantized(model: nn.Module) -> bool:
    return any(
        map(_is_aux, jax.tree.leaves(linen_scope.plain(linen_scope.params_of(model)), is_leaf=_is_aux))
    )


def _get(params: Any, path: str, name: str) -> Any:
    return flax_util.get_value_from_path(params, (*filter(None, path.split("/")), name))
