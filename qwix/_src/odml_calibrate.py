"""Collecting the statistics that a model under `OdmlQatProvider` takes its static ranges from.

Statistics are averages over batches, so a batch should look like what the model will see: one that holds a
single odd image widens the ranges for that share of the average only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from qwix._src import model_class
from qwix._src.providers.odml import OdmlQatProvider
from qwix._src.utils import flax_util

COLLECTION = "quant_stats"


def calibrate(
    model: nn.Module | nnx.Module,
    batches: Iterable[Any],
    variables: Mapping[str, Any] | None = None,
    *,
    method: str = "__call__",
    progress: bool = True,
    **kwargs: Any,
) -> dict[str, Any]:
    """Runs the model on batches and returns the statistics of its activations.

    Args:
      model: what `qwix.quantize_model(model, OdmlQatProvider(rules))` made. An NNX model holds its
        statistics, which are updated; a Linen module stays as it is.
      batches: each a tuple of the method's positional arguments, or the only one. Arrays of numpy or JAX.
      variables: of a Linen module, {"params": ..., ...}. Statistics among them are continued.
      method: which one runs.
      progress: show a progress bar, where there's a terminal.
      **kwargs: for the method, the same for all batches; they're static.

    Returns: the statistics, nested dicts: of a Linen module what belongs under "quant_stats".

    Raises:
      ValueError: no batches, or a model or a method that `OdmlQatProvider` did not convert.
      TypeError: variables missing, or given with an NNX model.
    If a batch fails, the model's statistics are what they were.

    >>> import qwix
    >>> rules = [qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")]
    >>> x = jnp.ones((2, 8))
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> model = qwix.quantize_model(model, qwix.OdmlQatProvider(rules), x)
    >>> sorted(calibrate(model, [x, 2 * x], progress=False))
    ['dot_general0_lhs', 'final_output0']
    """
    provider_of(model, (method,))
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise TypeError("variables are those of a Linen module; an NNX model holds its own.")
        return _calibrate_nnx(model, _bar(batches, progress), method, kwargs)
    if variables is None:
        raise TypeError('A Linen module needs its variables: calibrate(model, batches, {"params": params}).')
    return _calibrate_linen(model, _bar(batches, progress), variables, method, kwargs)


def provider_of(model: Any, methods: Sequence[str]) -> OdmlQatProvider:
    """The `OdmlQatProvider` of a model. Raises ValueError if one of the methods has another, or none."""
    provider = getattr(type(model), "_qwix_provider", None)
    if not model_class.is_converted(model) or not isinstance(provider, OdmlQatProvider):
        found = f"one of {type(provider).__name__}" if provider else "not quantized at all"
        raise ValueError(
            "qwix.odml needs the model that qwix.quantize_model(model, qwix.OdmlQatProvider(rules)) makes; "
            f"this {type(model).__name__} is {found}."
        )
    for method in methods:
        model_class.check_method(type(model), method)
        if method not in type(model)._qwix_methods:
            raise ValueError(
                f"The method {method!r} of this {type(model).__name__} is not quantized. Convert the model "
                f"with qwix.quantize_model(..., methods={(*type(model)._qwix_methods, method)})."
            )
    return provider


def _bar(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    return tqdm(batches, desc="calibrate", unit="batch", disable=None if progress else True)


def _arguments(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def _calibrate_linen(
    model: nn.Module, batches: Iterable[Any], variables: Mapping[str, Any], method: str, kwargs: Any
) -> dict[str, Any]:
    rest = {name: tree for name, tree in variables.items() if name != COLLECTION}

    @jax.jit
    def step(rest: Any, stats: Any, args: Any) -> Any:
        every = {**rest, COLLECTION: stats}
        return model.apply(every, *args, method=method, mutable=[COLLECTION], **kwargs)[1][COLLECTION]

    stats = variables.get(COLLECTION, {})
    is_first = True
    for batch in batches:
        args = _arguments(batch)
        if is_first:  # new statistics start at zero, which is what no batch gives: so there is one program
            made = jax.eval_shape(step, rest, stats, args)
            stats = _filled(made, stats)
        stats, is_first = step(rest, stats, args), False
    _check_any(is_first)
    return stats


def _filled(made: Any, stats: Any) -> Any:
    """Statistics of the shapes `made`: those that exist, and zeros."""
    if isinstance(made, Mapping):
        have = stats if isinstance(stats, Mapping) else {}
        return {name: _filled(one, have.get(name)) for name, one in made.items()}
    return jnp.zeros(made.shape, made.dtype) if stats is None else stats


def _calibrate_nnx(model: nnx.Module, batches: Iterable[Any], method: str, kwargs: Any) -> dict[str, Any]:
    graphdef, state = nnx.split(model)
    work = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))  # new variables of the same arrays
    work.set_attributes(disable_quant_stats_update=False, raise_if_not_found=False)

    def run(work: nnx.Module, args: Any) -> nnx.Module:
        getattr(work, method)(*args, **kwargs)
        return work

    step = nnx.jit(lambda work, args: (run(work, args), None)[1])
    is_first = True
    for batch in batches:
        args = _arguments(batch)
        if is_first and not jax.tree.leaves(nnx.state(work, flax_util.QuantStat)):
            made = nnx.eval_shape(run, work, args)
            _take(work, made, lambda stat: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stat))
        step(work, args)
        is_first = False
    _check_any(is_first)
    _take(model, work, lambda stat: stat)
    return nnx.to_pure_dict(nnx.state(model, flax_util.QuantStat))


def _take(model: nnx.Module, other: nnx.Module, made_of: Callable[[Any], Any]) -> None:
    """Gives the model the statistics that another one of its kind has."""
    modules = dict(nnx.iter_modules(model))
    for path, module in nnx.iter_modules(other):
        for name, value in vars(module).items():
            if isinstance(value, flax_util.QuantStat):
                setattr(modules[path], name, flax_util.QuantStat(made_of(value.get_value())))


def _check_any(is_first: bool) -> None:
    if is_first:
        raise ValueError("There are no batches to calibrate on: give at least one.")
