"""Converting NNX models, and calling them.

The new model is a merge of the old one's graph and state: new objects that hold the same arrays, so nothing
is cloned. Weights are then quantized one at a time; until all are, nobody has a reference to the new model,
so an error leaves nothing half-changed.

Every module that holds a quantized weight, or has one below it, gets a class of model_class, so each can be
called by itself, by any of its methods, and computes what it does inside the model.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.nnx import bridge

from qwix._src import (
    interception,
    model_class,
    odml_nnx,
    op_trace,
    qconfig,
    qt_nnx,
    standard_layers,
)
from qwix._src.lora_attribute import INFO
from qwix._src.model_weights import Discovery, Found, Key
from qwix._src.nnx_weights import convert, keys, slots
from qwix._src.providers.boxed_param import BoxedParamProvider
from qwix._src.providers.odml import OdmlQatProvider
from qwix._src.providers.qt import QtProvider
from qwix._src.static_range import StaticScales
from qwix._src.utils import flax_util
from qwix._src.weight import WeightInfo, WeightTracer, tag
from qwix._src.with_aux import WithAux

_INSIDE = WeightInfo(None, "weight")


def quantize_nnx_model(
    model: nnx.Module,
    provider: qconfig.QuantizationProvider,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    methods: Sequence[str],
    donate: bool = False,
) -> nnx.Module:
    """See `qwix.quantize_model`."""
    if donate and not isinstance(provider, BoxedParamProvider):
        raise ValueError(
            f"donate=True, but {type(provider).__name__} keeps the float weights. Leave it out; it's for "
            "providers that store quantized ones, as PtqProvider."
        )
    base = model_class.original(type(model))
    for method in methods:
        model_class.check_method(base, method)
    _check_no_adapters(model)
    graphdef, state = nnx.split(model)
    # `merge` takes the variables as they are: these are new ones with the same arrays.
    fresh = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    for _, module in nnx.iter_modules(fresh):
        object.__setattr__(module, "__class__", model_class.original(type(module)))
    kwargs = dict(kwargs)
    rngs = _pop_rngs(base, methods, kwargs)
    run_once = not kwargs.pop("skip_nnx_init", False) and bool(inputs or kwargs)
    if isinstance(provider, BoxedParamProvider):
        _warn_of_bridges(fresh, provider)
        if run_once:
            seen = discover(fresh, provider, _caller(methods), (tuple(inputs), kwargs))
        else:
            seen = discover(fresh, provider, lambda shadow: standard_layers.call_all(shadow), ())
            _warn_of_others(fresh, provider, seen.found)
        convert(fresh, provider, seen.found, donate=donate)
        provider.complete_nnx(fresh, seen, rngs)
        change_classes(fresh, provider)
    elif isinstance(provider, QtProvider):
        _warn_of_bridges(fresh, provider)
        qt_nnx.prepare(fresh, provider, methods)
    elif isinstance(provider, OdmlQatProvider):
        odml_nnx.prepare(fresh, provider, methods)
        run_once = run_once and not provider.converts
    else:
        object.__setattr__(fresh, "__class__", model_class.make(base, provider, methods, call))
    needs_values = not isinstance(provider, BoxedParamProvider)  # it makes its variables as the model runs
    if run_once and (needs_values or any(rule.act_static_scale for rule in provider._rules)):
        _first_run(fresh, inputs, kwargs, methods, rngs)
    if run_once or isinstance(provider, BoxedParamProvider):
        provider.finish()
    if isinstance(provider, QtProvider | OdmlQatProvider):
        # Data, so that an nnx.Rngs can take the place of None.
        set_attributes(fresh, disable_quant_stats_update=False, qwix_rngs=nnx.data(None))
    return fresh


def _check_no_adapters(model: nnx.Module) -> None:
    """Raises ValueError for a model with adapters, which another conversion would lose."""
    for _, path, name, value in flax_util.nnx_values(model):
        if isinstance(value, nnx.LoRAParam) and INFO in value.get_metadata():
            raise ValueError(
                f"The model has adapters, {'/'.join(map(str, (*path, name)))!r} for one. Merge them first, "
                "qwix.lora.merge(model).model, or convert the model they were made for."
            )


def change_classes(model: nnx.Module, provider: BoxedParamProvider) -> None:
    """Gives the modules that hold quantized or adapted weights, and those above them, their classes."""
    quantized = {
        s.path[:n]
        for s in slots(model)
        if isinstance(s.value, WithAux | nnx.LoRAParam)
        for n in range(len(s.path) + 1)
    }
    for path, module in list(nnx.iter_modules(model)):
        cls = type(module)
        attributes = provider.class_attributes(module)
        above = keys(path) in quantized | {()}
        if (above or attributes) and not isinstance(module, nnx.List | nnx.Dict):
            methods = model_class.public_methods(cls, nnx.Module)
            made = model_class.make(cls, provider, methods, call, attributes)
            object.__setattr__(module, "__class__", made)


def _pop_rngs(base: type, methods: Sequence[str], kwargs: dict[str, Any]) -> nnx.Rngs | None:
    """The rngs that are for the provider: those that the model's own method has no parameter for."""
    if "rngs" not in kwargs or any("rngs" in inspect.signature(getattr(base, m)).parameters for m in methods):
        return None
    rngs = kwargs.pop("rngs")
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"Rngs must be an nnx.Rngs instance, got {type(rngs).__name__}.")
    return rngs


def _caller(methods: Sequence[str]) -> Callable[..., None]:
    def call_methods(shadow: nnx.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for method in methods:
            getattr(shadow, method)(*args, **kwargs)

    return call_methods


def _warn_of_bridges(model: nnx.Module, provider: qconfig.QuantizationProvider) -> None:
    for path, module in nnx.iter_modules(model):
        name = "/".join(map(str, path))
        if isinstance(module, bridge.ToNNX) and provider.may_match(name):
            provider._warn_once(
                f"The params of {name!r} stay float: it's a Linen module inside an NNX model (ToNNX), which "
                "keeps its params as Linen wants them."
            )


def _warn_of_others(
    model: nnx.Module, provider: qconfig.QuantizationProvider, found: Mapping[Key, Found]
) -> None:
    """Names the matrices that a rule may mean but whose ops nobody has seen."""
    seen = {path for path, _ in provider.records}
    known = {id(slot.value) for slot in slots(model) if (*slot.path, str(slot.name)) in found}
    others = []
    for slot in slots(model):
        if id(slot.value) in known:
            continue
        path = "/".join(map(str, slot.path))
        raw = slot.value.get_raw_value() if isinstance(slot.value, nnx.Param) else None
        if path not in seen and len(getattr(raw, "shape", ())) > 1 and provider.may_match(path):
            others.append("/".join(map(str, (*slot.path, slot.name))))
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        warnings.warn(
            f"These params stay float, because only Flax's own layers are known without sample inputs: "
            f"{shown}. Call quantize_model(model, provider, *sample_inputs).",
            stacklevel=4,
        )


def discover(
    model: nnx.Module,
    provider: qconfig.QuantizationProvider,
    use: Callable[..., None],
    inputs: Sequence[Any],
) -> Discovery:
    """Which params to quantize or to adapt, by an abstract run of `use(model, *inputs)`."""
    graphdef, state = nnx.split(model)
    handler = Discovery(provider)
    leaves, rebuild = _abstract((state, *inputs))

    def body(*leaves: Any) -> None:
        shadow_state, *arguments = rebuild(leaves)
        shadow = nnx.merge(graphdef, shadow_state)

        def run(trace: op_trace.OpTrace) -> None:
            _plant(shadow, trace)
            use(shadow, *arguments)

        marked = interception.Interceptor({"flax.nnx.Variable.get_value": _marked_value}, id=id(handler))
        with flax_util.nnx_paths(shadow), qconfig.running(provider):
            call = _intercepted(provider, op_trace.run)
            call = interception.wrap_func_intercepted(call, lambda: marked, disable_jit=False)
            call(handler, run)

    jax.eval_shape(body, *leaves)
    return handler


def _abstract(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """(the array leaves, how to put others in their place); other leaves (flags, sizes) stay as they are."""
    tree = jax.tree.map(
        lambda x: nnx.split(x) if isinstance(x, nnx.Pytree) else x,
        tree,
        is_leaf=lambda x: isinstance(x, nnx.Pytree),
    )
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for x in leaves]

    def rebuild(arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        filled = [next(rest) if a else x for x, a in zip(leaves, is_array, strict=True)]
        is_split = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], nnx.GraphDef)
        unflat = jax.tree.unflatten(treedef, filled)
        return jax.tree.map(lambda x: nnx.merge(*x) if is_split(x) else x, unflat, is_leaf=is_split)

    return [x for x, a in zip(leaves, is_array, strict=True) if a], rebuild


def _marked_value(variable: nnx.Variable[Any], *args: Any, **kwargs: Any) -> Any:
    """`Variable.get_value`, where that of a param is marked as a weight: so layers under vmap are known."""
    value = nnx.Variable.get_value(variable, *args, **kwargs)
    is_float = isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.numpy.floating)
    return tag(value, _INSIDE) if isinstance(variable, nnx.Param) and is_float else value


def _plant(shadow: nnx.Module, trace: op_trace.OpTrace) -> None:
    """Makes every param a weight that knows where it comes from."""
    for slot in slots(shadow):
        if isinstance(slot.value, nnx.Param):
            raw = slot.value.get_raw_value()
            if hasattr(raw, "dtype") and not isinstance(raw, WeightTracer):
                info = WeightInfo(slot.path, str(slot.name))
                slot.value.set_raw_value(op_trace.new_weight(trace, raw, info))


def _first_run(
    model: nnx.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    methods: Sequence[str],
    rngs: nnx.Rngs | None,
) -> None:
    """Runs the converted model on the sample inputs, which finds static scales."""
    set_attributes(model, disable_quant_stats_update=True, qwix_rngs=rngs, _qwix_converting=True)
    leaves = jax.tree.leaves((nnx.state(model), _abstract((tuple(inputs), dict(kwargs)))[0]))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        _first_abstract_run(model, inputs, kwargs, methods)
    else:
        _caller(methods)(model, inputs, kwargs)
    for _, module in nnx.iter_modules(model):
        for name in ("disable_quant_stats_update", "qwix_rngs", "_qwix_converting"):
            if name in vars(module):
                delattr(module, name)


def _first_abstract_run(
    model: nnx.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any], methods: Sequence[str]
) -> None:
    """Gives the model the static scales that a run would make, as shapes."""
    leaves, rebuild = _abstract((model, tuple(inputs), dict(kwargs)))
    places: list[tuple[tuple[str | int, ...], str]] = []

    def run(*leaves: Any) -> list[WithAux]:
        shadow, *arguments = rebuild(leaves)
        _caller(methods)(shadow, *arguments)
        kept = [slot for slot in slots(shadow) if isinstance(slot.value, WithAux)]
        found = [slot for slot in kept if isinstance(slot.owner, nnx.Module)]  # scales are attributes
        places[:] = [(slot.path, slot.name) for slot in found]
        return [slot.value for slot in found]

    made = jax.eval_shape(run, *leaves)
    modules = {keys(path): module for path, module in nnx.iter_modules(model)}
    for (path, name), value in zip(places, made, strict=True):
        if not hasattr(modules[path], name):
            setattr(modules[path], name, value)


def set_attributes(model: nnx.Module, **attributes: Any) -> None:
    """Sets attributes on every module of the model."""
    for _, module in nnx.iter_modules(model):
        for name, value in attributes.items():
            setattr(module, name, value)


def call(
    provider: qconfig.QuantizationProvider, base: type, method: str, model: Any, args: Any, kwargs: Any
) -> Any:
    """One call of a converted model, or of a module of it."""
    model, args, kwargs = provider.process_model_inputs(model, args, kwargs)
    fn = getattr(base, method)
    modules = list(nnx.iter_modules(model))  # a walk over the model takes as long as tracing a layer of it
    prefix = _path(model, modules)
    with flax_util.nnx_paths(model, prefix, modules), qconfig.running(provider):
        if isinstance(provider, BoxedParamProvider):
            scales = _static_scales(model, prefix, modules)
            run = _intercepted(provider, op_trace.run)
            kwargs, options = provider.take_options(fn, kwargs, lambda name: _nnx_key(modules, name))
            handler = provider.op_handler(scales, strict=False, **options)
            output = run(handler, lambda _: fn(model, *args, **kwargs))
            scales.finish()
        else:
            output = _intercepted(provider, fn)(model, *args, **kwargs)
    return provider.process_model_output(method, output)


def _intercepted(provider: qconfig.QuantizationProvider, fn: Callable[..., Any]) -> Callable[..., Any]:
    for make in provider.get_interceptors():
        fn = interception.wrap_func_intercepted(fn, make, disable_jit=provider.disable_jit)
    return fn


def _nnx_key(modules: flax_util.Modules, stream: str) -> jax.Array | None:
    """A fresh key of the first module that wants one; None where none does.

    Raises ValueError where one does, and there are no rngs.
    """
    for _, module in modules:
        wants = "qwix_rngs" in vars(module) and not getattr(module, "deterministic", True)
        if not wants or getattr(module, "_qwix_converting", False):
            continue
        rngs: Any = getattr(module, "qwix_rngs", None)
        if rngs is None:
            raise ValueError(
                f"A model in training draws {stream} from the attribute qwix_rngs, which is None. Set it by "
                f"model.set_attributes(qwix_rngs=nnx.Rngs({stream}=seed)), or call model.eval() first."
            )
        return rngs[stream]()
    return None


def _path(model: nnx.Module, modules: flax_util.Modules) -> tuple[str | int, ...]:
    """Where in the converted model this module is: its weights know."""
    for slot in slots(model, modules):
        info = slot.value.info if isinstance(slot.value, WithAux) else slot.value.get_metadata().get(INFO)
        if info is not None and info.path is not None:
            whole = info.path
            start = len(whole) - len(slot.path)
            if whole[start:] == slot.path:
                return whole[:start]
    return ()


def _static_scales(
    model: nnx.Module, prefix: tuple[str | int, ...], found: flax_util.Modules
) -> StaticScales:
    """The model's own attributes. They can be made while it's being converted."""
    modules = {"/".join(map(str, (*prefix, *path))): module for path, module in found}

    def read(path: str, name: str) -> Any:
        return getattr(modules.get(path), name, None)

    def write(path: str, name: str, value: WithAux) -> None:
        setattr(modules[path], name, value.replace(array=nnx.Param(value.array)))
        stat = name.removesuffix("_scale")
        if isinstance(getattr(modules[path], stat, None), flax_util.QuantStat):
            delattr(modules[path], stat)  # it's in the scale now

    def stats(path: str, name: str) -> Any:
        stat = getattr(modules.get(path), name, None)
        return stat.get_value() if isinstance(stat, flax_util.QuantStat) else None

    return StaticScales(read, write if getattr(model, "_qwix_converting", False) else None, stats)
