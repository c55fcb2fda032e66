"""Static scales of activations: found once, stored beside the weights as `<op id>_lhs_scale` and
`<op id>_lhs_zero_point`, and used for every input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix._src import averaging, qconfig
from qwix._src.core import qarray
from qwix._src.ragged_rows import without_dead
from qwix._src.weight import WeightInfo
from qwix._src.with_aux import WithAux

Params = tuple[jax.Array, jax.Array | None]  # scale and zero point


def calibrated_act(
    x: jax.Array, how: qarray.HowToQuantize, rule: qconfig.QuantizationRule, live: jax.Array | None = None
) -> Params:
    """Scale and zero point of one input, with the statistics averaged over the rule's batch axes."""
    return from_calibration(act_statistics(x, how, rule, live), how)


def act_statistics(
    x: jax.Array, how: qarray.HowToQuantize, rule: qconfig.QuantizationRule, live: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The statistics of one input, averaged over the rule's batch axes: of a shape that doesn't depend on the
    batch. `live`: which entries count, to be broadcast against x; None: all.
    """
    x = without_dead(x, live)
    return averaged(qarray.calibrate(x, static_how(how, rule, x.ndim)), rule, live)


def static_how(how: qarray.HowToQuantize, rule: qconfig.QuantizationRule, ndim: int) -> qarray.HowToQuantize:
    """Statistics are taken per index of the batch axes only (and per tile)."""
    axes = tuple(a for a in rule.act_batch_axes if -ndim <= a < ndim and a % ndim not in how.tiled_axes)
    return dataclasses.replace(how, channelwise_axes=axes)


def averaged(
    calibration: Mapping[str, jax.Array], rule: qconfig.QuantizationRule, live: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The mean over the batch axes, which become 1: over their live indices, where those differ in that."""

    def mean(x: jax.Array) -> jax.Array:
        axes = tuple({a % x.ndim for a in rule.act_batch_axes if -x.ndim <= a < x.ndim})
        if live is None or any(n > 1 and a not in axes for a, n in enumerate(live.shape)):
            return x.mean(axis=axes, keepdims=True)
        counted = jnp.broadcast_to(live, [n if a in axes else 1 for a, n in enumerate(x.shape)])
        total = jnp.where(counted, x, 0).sum(axes, keepdims=True)
        return total / jnp.maximum(counted.sum(axes, keepdims=True), 1).astype(x.dtype)

    return {key: mean(value) for key, value in calibration.items()}


def from_calibration(calibration: Mapping[str, jax.Array], how: qarray.HowToQuantize) -> Params:
    """The scale and zero point to store."""
    return qarray.compute_scale_zero_point(dict(calibration), how.qtype)


def from_quant_stat(stat: Mapping[str, jax.Array], how: qarray.HowToQuantize, path: str) -> Params:
    """The scale and zero point that collected statistics give.

    Raises:
      ValueError: nothing was collected.
    """
    count = stat["count"]
    if not isinstance(count, jax.core.Tracer) and not jnp.all(count > 0):
        raise ValueError(
            f"quant_stats is not initialized for {path}: run the calibration on some data first."
        )
    return from_calibration(averaging.SimpleMovingAverage().get_calibration(stat), how)


class StaticScales:
    """Where a model keeps its static scales.

    They are stored by `finish`, when the run is over: while it lasts, Flax's transformations restore modules
    to what they were before.

    A module whose params are stacked along axis 0, for a scan over layers, has its scales stacked likewise.

    Args:
      read: (module path, name) -> the stored WithAux or array, or None.
      write: (module path, name, value) stores one; None where the model's params can't change any more.
      stats: (module path, name) -> statistics collected in training, or None.
    """

    def __init__(
        self,
        read: Callable[[str, str], Any],
        write: Callable[[str, str, Any], None] | None,
        stats: Callable[[str, str], Mapping[str, jax.Array] | None] = lambda path, name: None,
    ):
        self.read, self.write, self.stats = read, write, stats
        self._whole: dict[tuple[str, str], tuple[qarray.HowToQuantize, Params]] = {}
        self._rows: dict[tuple[str, str], tuple[qarray.HowToQuantize, dict[tuple[int, ...], Params]]] = {}

    def get(
        self,
        path: str,
        name: str,
        make: Callable[[], Params],
        how: qarray.HowToQuantize,
        layer: Sequence[Any] = (),
    ) -> Params:
        """The scale and zero point of an activation, for this layer of the scans around it; made and kept
        for `finish` if that's possible.
        """
        whole = self._stored(path, name, how)
        if whole is not None:
            return jax.tree.map(lambda x: _row(x, layer), whole)
        if self.write is None:
            raise ValueError(
                f"The model has no {name}_scale in {path!r}. Static scales are found while the model "
                "is converted: by quantize_model with sample inputs (NNX), or by init and by quantize_params "
                "with quant_stats (Linen)."
            )
        params = make()
        self._rows.setdefault((path, name), (how, {}))[1][tuple(layer)] = params
        return params

    def _stored(self, path: str, name: str, how: qarray.HowToQuantize) -> Params | None:
        scale = self.read(path, f"{name}_scale")
        if scale is not None:
            zero_point = self.read(path, f"{name}_zero_point")
            return _array(scale), None if zero_point is None else _array(zero_point)
        stat = self.stats(path, name) if self.write is not None else None
        if stat is not None and (path, name) not in self._whole:
            self._whole[path, name] = how, from_quant_stat(stat, how, f"{path}/{name}")
        return self._whole[path, name][1] if (path, name) in self._whole else None

    def finish(self) -> None:
        """Stores what was found in the run; scales of layers are stacked."""
        for key, (how, rows) in self._rows.items():
            order = sorted(rows)
            lengths = [i + 1 for i in order[-1]]
            stacked: Params = jax.tree.map(
                lambda *leaves, lengths=lengths: jnp.stack(leaves).reshape(*lengths, *leaves[0].shape),
                *(rows[i] for i in order),
            )
            self._whole[key] = how, stacked
        for (path, name), (how, params) in self._whole.items():
            for suffix, value in zip(("scale", "zero_point"), params, strict=True):
                if value is not None and self.write is not None:
                    info = WeightInfo(tuple(path.split("/")) if path else (), f"{name}_{suffix}")
                    self.write(path, f"{name}_{suffix}", WithAux(value, how, info))
        self._rows.clear()
        self._whole.clear()


def _array(stored: Any) -> Any:
    return stored.unboxed if isinstance(stored, WithAux) else stored


def _row(array: jax.Array, layer: Sequence[Any]) -> jax.Array:
    for index in layer:
        array = jax.lax.dynamic_index_in_dim(array, index, keepdims=False)
    return array
