"""Converting an NNX model for training, and calling it. Its states are `QuantStat` variables of its modules.

Params stay what they are. A param's array is recognized wherever it turns up, and what a param's `get_value`
returns is marked as a weight, which tells layers under vmap.

Every module has the attributes `disable_quant_stats_update` and `qwix_rngs`, for `model.set_attributes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwix._src import interception, model_class, op_trace, qconfig
from qwix._src.op_states import OpStates
from qwix._src.qt_executor import TrainingExecutor
from qwix._src.utils import flax_util
from qwix._src.weight import WeightInfo, WeightTracer, materialize, tag

if TYPE_CHECKING:
    from qwix._src.providers.qt import QtProvider

NOISE = "stochastic_rounding"
_INSIDE = WeightInfo(None, "weight")


def prepare(model: nnx.Module, provider: QtProvider, methods: Sequence[str]) -> None:
    """Makes the model's class one of training: all of its public methods."""
    base = type(model)
    every = dict.fromkeys((*methods, *model_class.public_methods(base, nnx.Module)))
    object.__setattr__(model, "__class__", model_class.make(base, provider, tuple(every), call))


def call(provider: Any, base: type, method: str, model: Any, args: Any, kwargs: Any) -> Any:
    """One call of a converted model, of a `QtProvider`."""
    model, args, kwargs = provider.process_model_inputs(model, args, kwargs)
    fn = getattr(base, method)
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    states = OpStates(_reader(modules), lambda path: _changes(modules, path), creates=True)
    with flax_util.nnx_paths(model), qconfig.running(provider):
        noise_key = _noise_key(model) if provider.is_noisy else None
        handler = TrainingExecutor(provider, states, _params(model), noise_key)
        run = op_trace.run
        for make in (*provider.get_interceptors(), lambda: _values_interceptor(provider)):
            run = interception.wrap_func_intercepted(run, make, disable_jit=provider.disable_jit)
        output = run(handler, lambda _: fn(model, *args, **kwargs))
    _settle(model)
    for (path, name), state in handler.emitted.items():
        _write(modules.get(path, model), name, state)
    return provider.process_model_output(method, output)


def _reader(modules: Mapping[str, nnx.Module]) -> Callable[[str, str], Any]:
    def read(path: str, name: str) -> Any:
        stat = getattr(modules.get(path), name, None)
        return stat.get_value() if isinstance(stat, flax_util.QuantStat) else None

    return read


def _write(module: nnx.Module, name: str, state: Mapping[str, jax.Array]) -> None:
    stat = getattr(module, name, None)
    if isinstance(stat, flax_util.QuantStat):
        stat.set_value(dict(state))
    else:
        setattr(module, name, flax_util.QuantStat(dict(state)))


def _changes(modules: Mapping[str, nnx.Module], path: str) -> bool:
    return not getattr(modules.get(path), "disable_quant_stats_update", False)


def _noise_key(model: nnx.Module) -> jax.Array | None:
    """A fresh key of the first module that has rngs; None if none has."""
    for _, module in nnx.iter_modules(model):
        rngs = getattr(module, "qwix_rngs", None)
        if rngs is not None:
            return rngs[NOISE]()
    return None


def _params(model: nnx.Module) -> dict[int, tuple[Any, WeightInfo]]:
    """The params by identity; one that stands in several places is the first."""
    found: dict[int, tuple[Any, WeightInfo]] = {}
    for _, path, name, value in flax_util.nnx_values(model):
        if isinstance(value, nnx.Param):
            raw = value.get_raw_value()
            if _is_float(raw):
                found.setdefault(id(raw), (raw, WeightInfo(path, str(name))))
    return found


def _is_float(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)


def _values_interceptor(provider: QtProvider) -> interception.Interceptor:
    return interception.Interceptor({"flax.nnx.Variable.get_value": _get_value}, id=id(provider.records))


def _get_value(variable: nnx.Variable[Any], *args: Any, **kwargs: Any) -> Any:
    """`Variable.get_value`, where that of a param is a weight."""
    value = nnx.Variable.get_value(variable, *args, **kwargs)
    return tag(value, _INSIDE) if isinstance(variable, nnx.Param) and _is_float(value) else value


def _settle(model: nnx.Module) -> None:
    """Variables that the model gave a weight as their value get the array: the trace is over."""
    for _, _, _, value in flax_util.nnx_values(model):
        if isinstance(value, nnx.Variable) and isinstance(value.get_raw_value(), WeightTracer):
            value.set_raw_value(materialize(value.get_raw_value()))
