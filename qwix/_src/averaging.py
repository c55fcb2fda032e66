"""Averages of calibration statistics over steps, for static-range quantization.

A statistic is a dict of arrays with the scale's shape, as `calibrate` returns it; a running average is
{'count': int32, 'sum_of_<key>': float32}, which is what checkpoints hold.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Calibration = dict[str, jax.Array]
QuantStat = dict[str, jax.Array]


class SimpleMovingAverage:
    """The mean of all calibrations so far.

    Args:
      bootstrap_steps: `get_calibration` returns its default until more than so many updates were made.

    >>> average = SimpleMovingAverage()
    >>> stat = average.init({"absmax": jnp.zeros((1, 1))})
    >>> for value in (1.0, 3.0):
    ...     stat = average.update(stat, {"absmax": jnp.full((1, 1), value)})
    >>> average.get_calibration(stat)
    {'absmax': Array([[2.]], dtype=float32)}
    """

    def __init__(self, bootstrap_steps: int = 0):
        self._bootstrap_steps = bootstrap_steps

    def init(self, calibration: Calibration) -> QuantStat:
        """Statistics of no calibration yet."""
        sums = {f"sum_of_{key}": jnp.zeros_like(x, dtype=jnp.float32) for key, x in calibration.items()}
        return {"count": jnp.zeros([], jnp.int32), **sums}

    def update(self, quant_stat: Mapping[str, jax.Array], calibration: Calibration) -> QuantStat:
        """The statistics with one more calibration. Raises ValueError when shapes differ."""
        updated: QuantStat = dict(quant_stat)
        updated["count"] = count = quant_stat["count"] + 1
        for key, value in calibration.items():
            total = quant_stat[f"sum_of_{key}"]
            if total.shape != value.shape:
                raise ValueError(
                    f"Shape mismatch between the statistics of {key!r}, {total.shape}, and the calibration, "
                    f"{value.shape}: they come from different shapes of activations or different rules."
                )
            updated[f"sum_of_{key}"] = self._add(total, value.astype(jnp.float32), count)
        return updated

    def _add(self, total: jax.Array, value: jax.Array, count: jax.Array) -> jax.Array:
        """The new sum, which `count` values are in."""
        del count
        return total + value

    def get_calibration(
        self, quant_stat: Mapping[str, jax.Array], default: Calibration | None = None
    ) -> Calibration:
        """The average in float32, or the default (and its dtypes) during the bootstrap steps.

        Without a default, statistics of no calibration give nan.
        """
        count = quant_stat["count"]
        average = {
            # Stacked layers have a count each, in front.
            key.removeprefix("sum_of_"): total / count.reshape(count.shape + (1,) * (total.ndim - count.ndim))
            for key, total in quant_stat.items()
            if key.startswith("sum_of_")
        }
        if default is None:
            return average
        average = jax.tree.map(lambda x, d: x.astype(d.dtype), average, default)
        return jax.lax.cond(count > self._bootstrap_steps, lambda: average, lambda: default)


class ExponentialMovingAverage(SimpleMovingAverage):
    """An average that forgets: after n updates, calibration i weighs (1 - decay) decay^(n - i) / (1 -
    decay^n).

    It's stored as a simple average is (the sum is count times the average), so whoever reads statistics need
    not know which it was.

    Args:
      decay: in (0, 1), of the weight from one update to the next.
      bootstrap_steps: as for SimpleMovingAverage.

    >>> average = ExponentialMovingAverage(decay=0.5)
    >>> stat = average.init({"absmax": jnp.zeros(1)})
    >>> for value in (1.0, 4.0):
    ...     stat = average.update(stat, {"absmax": jnp.full(1, value)})
    >>> average.get_calibration(stat)
    {'absmax': Array([3.], dtype=float32)}
    """

    def __init__(self, decay: float, bootstrap_steps: int = 0):
        if not 0 < decay < 1:
            raise ValueError(f"The decay of an average is between 0 and 1, such as 0.99; got {decay}.")
        super().__init__(bootstrap_steps)
        self._decay = decay

    def _add(self, total: jax.Array, value: jax.Array, count: jax.Array) -> jax.Array:
        n = count.astype(jnp.float32)
        before = total / jnp.maximum(n - 1, 1)
        # expm1: 1 - decay^n loses all digits when the decay is near 1 and n small.
        weight = (1 - self._decay) / -jnp.expm1(n * jnp.log(jnp.float32(self._decay)))
        return (before + (value - before) * weight) * n


def parse_averaging(text: str, bootstrap_steps: int = 0) -> SimpleMovingAverage:
    """The average that 'mean' or 'ema,<decay>' names.

    >>> type(parse_averaging("ema,0.99")).__name__
    'ExponentialMovingAverage'
    """
    name, *args = (part.strip() for part in text.split(","))
    if name == "mean" and not args:
        return SimpleMovingAverage(bootstrap_steps)
    if name == "ema" and len(args) == 1:
        try:
            decay = float(args[0])
        except ValueError:
            raise ValueError(f"The decay of {text!r} is no number: 'ema,0.99'.") from None
        return ExponentialMovingAverage(decay, bootstrap_steps)
    raise ValueError(f"Averages are 'mean' and 'ema,<decay>' such as 'ema,0.99'; got {text!r}.")
