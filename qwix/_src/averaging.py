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
        updated = dict(quant_stat)
        updated["count"] = quant_stat["count"] + 1
        for key, value in calibration.items():
            total = quant_stat[f"sum_of_{key}"]
            if total.shape != value.shape:
                raise ValueError(
                    f"Shape mismatch between the statistics of {key!r}, {total.shape}, and the calibration, "
                    f"{value.shape}: they come from different shapes of activations or different rules."
                )
            updated[f"sum_of_{key}"] = total + value
        return updated

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
