"""Converting an NNX model for ODML, and calling it. Statistics are `QuantStat` variables of its modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from qwix._src import model_class, odml_place, qconfig, qt_nnx
from qwix._src.odml_executor import Call
from qwix._src.odml_graph import Act
from qwix._src.op_states import OpStates
from qwix._src.utils import flax_util

if TYPE_CHECKING:
    from qwix._src.providers.odml import OdmlQatProvider


def prepare(model: nnx.Module, provider: OdmlQatProvider, methods: Sequence[str]) -> None:
    """Makes the model's class one of fake quantization."""
    base = type(model)
    object.__setattr__(model, "__class__", model_class.make(base, provider, tuple(methods), call))


def call(provider: Any, base: type, method: str, model: Any, args: Any, kwargs: Any) -> Any:
    """One call of a converted model."""
    model, args, kwargs = provider.process_model_inputs(model, args, kwargs)
    fn = getattr(base, method)
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    changes = lambda path: qt_nnx._changes(modules, path) and not provider.converts
    read = provider.stat if provider.converts else qt_nnx._reader(modules)
    states = OpStates(read, changes, creates=not provider.converts)
    made = Call(provider, states, provider.make_quantizer, provider.converts, _known(provider, model))
    op = "final_output" if method == "__call__" else f"{method}_output"
    with flax_util.nnx_paths(model), qconfig.running(provider), odml_place.marking():
        output = made.run(
            lambda args, kwargs: fn(model, *args, **kwargs),
            (args, kwargs),
            output_op=op,
            leaked=lambda: _leaked(model),
        )
    provider.after_call()
    for (path, name), state in made.emitted.items():
        qt_nnx._write(modules.get(path, model), name, state)
    return provider.process_model_output(method, output)


def _known(provider: Any, model: nnx.Module) -> dict[int, tuple[Any, Any]]:
    """In conversion, the params that the provider was given take the place of the model's."""
    known: dict[int, tuple[Any, Any]] = {}
    for _, path, name, value in flax_util.nnx_values(model) if provider.converts else ():
        if isinstance(value, nnx.Param):
            raw = value.get_raw_value()
            given = provider.params.get((*map(str, path), str(name)))
            if given is not None and isinstance(raw, jax.Array) and given.shape == raw.shape:
                known.setdefault(id(raw), (raw, given))
    return known


def _leaked(model: nnx.Module) -> tuple[list[Any], Callable[[list[Any]], None]]:
    """The Acts that the model stored in its variables."""
    found = [
        value
        for _, _, _, value in flax_util.nnx_values(model)
        if isinstance(value, nnx.Variable) and isinstance(value.get_raw_value(), Act)
    ]

    def put(values: list[Any]) -> None:
        for variable, value in zip(found, values, strict=True):
            variable.set_raw_value(value)

    return [variable.get_raw_value() for variable in found], put
