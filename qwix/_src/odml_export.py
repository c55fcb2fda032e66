"""`export`: from a calibrated or trained model to a `.tflite` file, in one call.

The model's own `OdmlQatProvider` says what is quantized; the same rules with `OdmlConversionProvider` make
the function that LiteRT's converter reads, so file and model have the same tensors, and scales from the same
statistics.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from qwix._src import model as model_api
from qwix._src import model_class
from qwix._src.odml_calibrate import provider_of
from qwix._src.odml_convert import Signature, converter, floats_beside_integers, run_converter
from qwix._src.odml_integer_io import with_integer_io
from qwix._src.odml_model import TfliteModel
from qwix._src.utils import flax_util

DEFAULT = "serving_default"
Names = Sequence[str] | Mapping[str, Sequence[str]] | None


def export(
    model: nn.Module | nnx.Module,
    params: Mapping[str, Any] | None = None,
    quant_stats: Mapping[str, Any] | None = None,
    sample_inputs: Any = (),
    *,
    methods: Mapping[str, str] | None = None,
    input_names: Names = None,
    output_names: Names = None,
    variables: Mapping[str, Any] | None = None,
    static: Mapping[str, Any] | None = None,
    strict: bool = False,
    integer_io: bool = False,
) -> TfliteModel:
    """The model as a `.tflite` file, integer where its rules quantize it.

    Args:
      model: what `qwix.quantize_model(model, qwix.OdmlQatProvider(rules))` made, calibrated or trained.
      params: of a Linen module. An NNX model holds its own, and its statistics: leave both out.
      quant_stats: of a Linen module, what `calibrate` returns or training collected.
      sample_inputs: arrays or `jax.ShapeDtypeStruct`s, whose shapes and dtypes the file gets: the only
        argument of the model, a tuple of all of them, or for several signatures {name: a tuple}.
      methods: {name of the signature: name of the model's method}. By default the signature
        "serving_default" is `__call__`, and others are the methods of their names.
      input_names, output_names: of arrays in the file, as in `Signature`, or of several signatures
        {name: names}. By default those of the method's parameters and of the keys that it returns.
      variables: other collections of a Linen module: {"batch_stats": ...}.
      static: keyword arguments for the methods that are part of the program: {"train": False}.
      strict: float ops beside quantized ones, and ops without an integer form, are an error that lists all
        of them; by default a warning does.
      integer_io: inputs and outputs are the integers themselves, see `with_integer_io`.

    Raises:
      ImportError: LiteRT's packages are not installed; the message says how.
      ValueError: a model that is not of `OdmlQatProvider`, statistics of no batch, scales that are not
        finite, shapes that are not numbers, an op that the converter lacks, or what `strict` says.
      TypeError: params missing, or given with an NNX model.

    >>> import qwix
    >>> from qwix import odml
    >>> rules = [qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")]
    >>> x = jnp.linspace(-1, 1, 16).reshape(2, 8)
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> model = qwix.quantize_model(model, qwix.OdmlQatProvider(rules), x)
    >>> stats = odml.calibrate(model, [x], progress=False)
    >>> [op.name for op in odml.export(model, sample_inputs=x).summary().ops]  # doctest: +SKIP
    ['QUANTIZE', 'FULLY_CONNECTED', 'DEQUANTIZE']
    """
    converter()  # first, since what follows takes a while
    static = dict(static or {})
    calls = _calls(sample_inputs, methods)
    for one in (input_names, output_names):
        _check_names(one, calls)
    used = tuple(dict.fromkeys(method for method, _ in calls.values()))
    provider = provider_of(model, used)
    if isinstance(model, nnx.Module):
        conversion, function = _nnx(model, provider, (params, quant_stats, variables), used, static)
    else:
        conversion, function = _linen(model, provider, (params, quant_stats, variables), used, static)
    signatures = []
    for name, (method, inputs) in calls.items():
        fn = _like(function(method), getattr(model_class.original(type(model)), method), static)
        names = [_names_of(one, name) for one in (input_names, output_names)]
        signatures.append(Signature(fn, inputs, name, *names))
    converted = run_converter(signatures)
    _report(conversion, converted, strict)
    return with_integer_io(converted) if integer_io else converted


def _calls(sample_inputs: Any, methods: Mapping[str, str] | None) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """{name of the signature: (method, its inputs)}."""
    several = isinstance(sample_inputs, Mapping)
    inputs = dict(sample_inputs) if several else {DEFAULT: sample_inputs}
    if unknown := set(methods or {}) - set(inputs):
        raise ValueError(f"methods names {sorted(unknown)}, but the signatures are {list(inputs)}.")
    found = {}
    for name, given in inputs.items():
        method = (methods or {}).get(name, "__call__" if name == DEFAULT else name)
        found[name] = method, given if isinstance(given, tuple) else (given,)
        if not found[name][1]:
            raise ValueError(f"sample_inputs of {name!r} are missing: the file's shapes are theirs.")
    return found


def _check_names(names: Names, calls: Mapping[str, Any]) -> None:
    if isinstance(names, Mapping) and (unknown := set(names) - set(calls)):
        raise ValueError(f"Names are given for {sorted(unknown)}, but the signatures are {list(calls)}.")
    if names is not None and not isinstance(names, Mapping) and len(calls) > 1:
        raise ValueError(f"There are the signatures {list(calls)}: give names as {{signature: names}}.")


def _names_of(names: Names, signature: str) -> Sequence[str] | None:
    return names.get(signature) if isinstance(names, Mapping) else names


def _linen(model: nn.Module, provider: Any, given: Any, methods: Sequence[str], static: Any) -> Any:
    params, quant_stats, variables = given
    if params is None:
        raise TypeError("A Linen module needs params: export(model, params, quant_stats, sample_inputs).")
    every = _arrays({**(variables or {}), "params": params})
    conversion = provider.for_conversion(every["params"], _arrays(quant_stats or {}))
    converted = model_api.quantize_model(model, conversion, methods=methods)

    def function(method: str) -> Callable[..., Any]:
        return lambda *inputs: converted.apply(every, *inputs, method=method, **static)

    return conversion, function


def _nnx(model: nnx.Module, provider: Any, given: Any, methods: Sequence[str], static: Any) -> Any:
    if any(one is not None for one in given):
        raise TypeError(
            "An NNX model holds its params, statistics and other variables: export(model, sample_inputs=x)."
        )
    params, stats = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, flax_util.QuantStat))
    conversion = provider.for_conversion(params, stats)
    converted = model_api.quantize_model(model, conversion, methods=methods)
    graphdef, state = nnx.split(converted)

    def function(method: str) -> Callable[..., Any]:
        return lambda *inputs: getattr(nnx.merge(graphdef, state), method)(*inputs, **static)

    return conversion, function


def _arrays(tree: Any) -> Any:
    """The tree with arrays of numpy as JAX's."""
    return jax.tree.map(jnp.asarray, tree)


def _like(fn: Callable[..., Any], method: Callable[..., Any], static: Mapping[str, Any]) -> Any:
    """fn with the parameters of a method, which name the inputs."""

    named: Any = lambda *inputs: fn(*inputs)
    _, *parameters = inspect.signature(method).parameters.values()
    kept = [p.replace(annotation=p.empty, default=p.empty) for p in parameters if p.name not in static]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named.__signature__ = inspect.Signature([p for p in kept if p.kind in positional])
    return named


def _report(conversion: Any, converted: TfliteModel, strict: bool) -> None:
    """Says what is not integer, in all signatures at once."""
    lines = [f"  {one}" for one in conversion.breaks]
    if floats := floats_beside_integers(converted):
        lines.insert(0, f"  {floats}")
    if not lines:
        return
    message = "Not all of the model is integer:\n" + "\n".join(lines)
    if strict:
        raise ValueError(f"{message}\nLeave out strict to get the file all the same.")
    warnings.warn(message, stacklevel=3)
