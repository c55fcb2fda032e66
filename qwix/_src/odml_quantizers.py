"""Fake quantization in training, and as LiteRT's converter reads it: one arithmetic, two ways to a scale.

In training scales come from averaged statistics, and gradients pass straight through. In conversion they are
numbers, computed from the same statistics when the program is traced, and `odml_fake_quant` says them to the
converter. Activations of int16 and weights are symmetric and leave out the lowest integer where LiteRT's
kernels want that, in training too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import config

from qwix._src import averaging, odml_fake_quant
from qwix._src.core import calibration, numerics, qarray
from qwix._src.odml_plan import Request
from qwix._src.op_states import OpStates

# The ends of ranges for which LiteRT's kernels demand the step 1/32768 of int16.
_ONES = (127 / 128, 255 / 256, 32767 / 32768)
_AVERAGE = averaging.SimpleMovingAverage()


@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
    """How a tensor is quantized.

    Attributes:
      qtype: "int4", "int8" or "int16".
      step, zero_point: for the whole tensor, or along the axis; arrays of the tensor's rank or of one number.
      ends: {"absmax"} or {"min", "max"}: what is outside passes no gradient.
      axis: of the channels, if they have scales of their own.
      is_weight: the lowest integer isn't used.
    """

    qtype: str
    step: Any
    zero_point: Any
    ends: Mapping[str, Any]
    axis: int | None = None
    is_weight: bool = False


class Quantizer(Protocol):
    """What `fake_quant` is."""

    def of_request(self, request: Request, value: Callable[[], jax.Array]) -> Scale:
        """The scale of an activation, given what computes its float value."""
        ...

    def of_weight(self, x: Any, qtype: Any, method: str, axis: int | None) -> Scale:
        """The scale of a weight or a constant."""
        ...

    def apply(self, x: jax.Array, scale: Scale) -> jax.Array:
        """x on the grid of the scale."""
        ...

    def dynamic(self, x: jax.Array, rule: Any, axes: Sequence[int]) -> jax.Array:
        """x, quantized by its own range along each index of the axes."""
        ...


def qtype_name(qtype: Any) -> str:
    """'int8' of any spelling. Raises ValueError for a format that LiteRT has not."""
    qtype = numerics.canonical_qtype(qtype)
    name = qtype if isinstance(qtype, str) else np.dtype(qtype).name
    if name not in ("int4", "int8", "int16"):
        raise ValueError(f"Unsupported dtype {name} for ODML conversion. LiteRT has int4, int8 and int16.")
    return name


def method_of(qtype: str, method: str, fixed: tuple[float, float] | None) -> str:
    """The calibration method for activations: int16 is symmetric, as LiteRT's kernels want it."""
    symmetric = qtype == "int16"
    if fixed is not None:
        low, high = fixed
        top = 1.0 if max(-low, high) in _ONES else max(-low, high)
        return f"fixed,{top}" if symmetric else f"fixed,{low},{high}"
    name, args = calibration.parse_method(method)
    if not symmetric or name not in ("minmax", "fixed"):
        return method
    if name == "fixed" and len(args) == 2:
        return f"fixed,{max(map(abs, args))}"
    return ",".join(["absmax" if name == "minmax" else name, *map(str, args)])


def statistics(request: Request, x: jax.Array) -> dict[str, jax.Array]:
    """The range of one input, for the whole tensor: the mean of that of each example."""
    qtype = qtype_name(request.rule.act_qtype)
    method = method_of(qtype, request.rule.act_calibration_method or "minmax", request.fixed)
    axes = tuple(a for a in request.rule.act_batch_axes if -x.ndim <= a < x.ndim)
    how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=axes, calibration_method=method)
    return _means(jax.lax.stop_gradient(x), how)


@functools.partial(jax.jit, static_argnums=1)
def _means(x: jax.Array, how: qarray.HowToQuantize) -> dict[str, jax.Array]:
    """Jitted, as all that each quantization does, so that it's traced once for each shape."""
    found = calibration.calibrate(x.astype(jnp.float32), how)
    return {key: value.mean(keepdims=True) for key, value in found.items()}


def weight_statistics(x: Any, qtype: str, method: str, axis: int | None) -> dict[str, Any]:
    axes = () if axis is None else (axis,)
    how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=axes, calibration_method=method)
    return _range_of(x, how)


@functools.partial(jax.jit, static_argnums=1)
def _range_of(x: Any, how: qarray.HowToQuantize) -> dict[str, jax.Array]:
    return calibration.calibrate(x.astype(jnp.float32), how)


_no_average, _averaged = jax.jit(_AVERAGE.init), jax.jit(_AVERAGE.update)
_average = jax.jit(_AVERAGE.get_calibration)
_scale_of = jax.jit(calibration.compute_scale_zero_point, static_argnums=1)


@functools.partial(jax.jit, static_argnames=("axis", "low", "high"))
def _on_grid(
    x: jax.Array, step: Any, zero: Any, bottom: Any, top: Any, *, axis: int | None, low: int, high: int
) -> jax.Array:
    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
    step, zero, bottom, top = (jnp.asarray(v, jnp.float32).reshape(shape) for v in (step, zero, bottom, top))
    return _straight_through(x.astype(jnp.float32), step, zero, bottom, top, low, high).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _straight_through(
    x: jax.Array, step: jax.Array, zero: jax.Array, bottom: jax.Array, top: jax.Array, low: int, high: int
) -> jax.Array:
    """The nearest value of the grid; its derivative is that of a clip to the ends, and of x alone."""
    del bottom, top
    return (jnp.clip(jnp.round(x / step) + zero, low, high) - zero) * step


@_straight_through.defjvp
def _straight_through_jvp(low: int, high: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, step, zero, bottom, top = primals
    clip = lambda x: jnp.clip(x, bottom, top)
    return _straight_through(x, step, zero, bottom, top, low, high), jax.jvp(clip, (x,), tangents[:1])[1]


def ends_to_scale(ends: Mapping[str, Any], qtype: str, axis: int | None, is_weight: bool) -> Scale:
    step, zero = _scale_of(dict(ends), qtype)
    return Scale(qtype, step, zero, ends, axis, is_weight)


def by_rows(x: jax.Array, rule: Any, axes: Sequence[int]) -> jax.Array:
    """x quantized by the range of each row, with a straight-through gradient."""
    method = rule.act_calibration_method
    how = qarray.HowToQuantize(qtype=rule.act_qtype, channelwise_axes=axes, calibration_method=method)
    rounded = qarray.dequantize(qarray.quantize(jax.lax.stop_gradient(x), how)).astype(x.dtype)
    return x + jax.lax.stop_gradient(rounded - x)


class TrainingQuantizer:
    """Scales from statistics, which it takes and averages.

    Args:
      states: of the ops.
      layer: the step of each scan around the op.
      emitted: what is to be stored after the call.
    """

    def __init__(self, states: OpStates, layer: Sequence[Any], emitted: dict[Any, Any]):
        self.states, self.layer, self.emitted = states, layer, emitted

    def of_request(self, request: Request, value: Callable[[], jax.Array]) -> Scale:
        now = statistics(request, value())
        fresh = lambda: _no_average(now)
        state, _ = self.states.step(
            (request.path, request.name),
            self.layer,
            fresh,
            lambda state: _averaged(fresh() if request.fixed else state, now),
            self.emitted,
        )
        ends = _average(state, now)
        return ends_to_scale(ends, qtype_name(request.rule.act_qtype), None, is_weight=False)

    def of_weight(self, x: Any, qtype: Any, method: str, axis: int | None) -> Scale:
        name = qtype_name(qtype)
        return ends_to_scale(weight_statistics(x, name, method, axis), name, axis, is_weight=True)

    def dynamic(self, x: jax.Array, rule: Any, axes: Sequence[int]) -> jax.Array:
        return by_rows(x, rule, axes)

    def apply(self, x: jax.Array, scale: Scale) -> jax.Array:
        low, high = numerics.integer_range(scale.qtype)
        low += scale.is_weight and scale.zero_point is None
        zero = jnp.zeros_like(scale.step) if scale.zero_point is None else scale.zero_point
        top = scale.ends.get("max", scale.ends.get("absmax"))
        bottom = scale.ends.get("min", -top)
        return _on_grid(x, scale.step, zero, bottom, top, axis=scale.axis, low=low, high=high)


class ConversionQuantizer:
    """Scales as numbers, and `fake_quant`s that the converter reads.

    Args:
      read: (module path, name) -> statistics; None where there are none.
      layer: the number of the step of each scan around the op.
    """

    def __init__(self, states: OpStates, layer: Sequence[int], emitted: dict[Any, Any]):
        del emitted
        self.read, self.layer = states.read, layer

    def of_request(self, request: Request, value: Callable[[], jax.Array]) -> Scale:
        stored = self.read(request.path, request.name)
        where = "/".join(filter(None, (request.path, request.name)))
        qtype = qtype_name(request.rule.act_qtype)
        if request.fixed is not None and stored is None:
            with jax.ensure_compile_time_eval():
                ends = statistics(request, jnp.zeros((1,)))
                return ends_to_scale(ends, qtype, None, is_weight=False)
        if stored is None or "count" not in stored:
            raise ValueError(
                f"quant_stats is not initialized for {where}: run the model of OdmlQatProvider on some "
                "inputs with mutable 'quant_stats' (qwix.odml.calibrate does), and give what it collects."
            )
        row = {key: np.asarray(value) for key, value in stored.items()}
        for index in self.layer:
            row = {key: value[index] for key, value in row.items()}
        if not row["count"]:
            raise ValueError(
                f"quant_stats is not initialized for {where}: its count is 0. Run the model of "
                "OdmlQatProvider on some inputs first, with statistics that may change."
            )
        with jax.ensure_compile_time_eval():
            ends = _AVERAGE.get_calibration({key: jnp.asarray(value) for key, value in row.items()})
            _check_ends(ends, where)
            return ends_to_scale(ends, qtype, None, is_weight=False)

    def of_weight(self, x: Any, qtype: Any, method: str, axis: int | None) -> Scale:
        name = qtype_name(qtype)
        if isinstance(x, jax.core.Tracer):
            raise ValueError(
                f"A weight of shape {x.shape} is traced, but its scale is part of the program. Give the "
                "model's params to OdmlConversionProvider, and close over other variables."
            )
        with jax.ensure_compile_time_eval():
            ends = weight_statistics(jnp.asarray(x), name, method, axis)
            _check_ends(ends, f"a weight of shape {x.shape}")
            return ends_to_scale(ends, name, axis, is_weight=True)

    def dynamic(self, x: jax.Array, rule: Any, axes: Sequence[int]) -> jax.Array:
        """LiteRT's kernels for float activations and integer weights find the ranges themselves."""
        quantize = lambda x: by_rows(x, rule, axes)
        return odml_fake_quant.dynamic_fake_quant(x, quantize, qtype_name(rule.act_qtype))

    def apply(self, x: jax.Array, scale: Scale) -> jax.Array:
        zero = scale.zero_point
        with config.eager_constant_folding(False):  # what it marks stays in the program, be it of a constant
            return odml_fake_quant.fake_quant(
                x,
                np.asarray(scale.step),
                None if zero is None else np.asarray(zero).astype(np.int64),
                qtype=scale.qtype,
                axis=scale.axis,
                narrow_range=scale.is_weight and zero is None,
            )


def _check_ends(ends: Mapping[str, Any], where: str) -> None:
    for key, value in ends.items():
        if not np.isfinite(np.asarray(value)).all():
            raise ValueError(
                f"Invalid scale: the statistics of {where} hold a {key} that isn't finite: {value}."
            )
