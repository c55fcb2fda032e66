"""How one contraction is quantized in training: forward, and each of its two gradients.

One config serves dots, convolutions and ragged dots. Fields are named for what they quantize: `lhs_*` and
`rhs_*` the operands of the forward op, `dlhs_*` and `drhs_*` the op that computes the gradient of lhs and
that of rhs. In that op `d*_grad_*` quantizes the incoming gradient, and `d*_residual_*` the other operand
where the forward op left it float.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax.typing import DTypeLike

from qwix._src.core import numerics
from qwix._src.core.calibration import Calibration, parse_method
from qwix._src.core.numerics import NoiseFn
from qwix._src.core.sparsity import SparsityRule

QType = DTypeLike | str | None
TileSize = int | float | Mapping[int, int | float] | None
CollectStat = Callable[[Calibration], Calibration]
Side = Literal["lhs", "rhs"]

_DYNAMIC = ("dlhs_stochastic_rounding_noise_fn", "drhs_stochastic_rounding_noise_fn")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QtConfig:
    """How to quantize one op in training. The default quantizes nothing.

    A pytree: the noise functions are its children (they hold keys), all else is static.

    Attributes:
      lhs_qtype, rhs_qtype: formats of the forward operands; None leaves one float.
      tile_size: elements per scale along the (last) contracting axis of each operand, a fraction of it, or
        {axis: size} for 2-D tiles. lhs_tile_size and rhs_tile_size, where given, take its place for one side.
      lhs_calibration_method, rhs_calibration_method: how ranges are found; see `qwix.quantize`.
      lhs_collect_quant_stat, rhs_collect_quant_stat: a function from this call's calibration to the one to
        use: records statistics and returns averages, for static scales.
      lhs_disable_channelwise_axes, rhs_disable_channelwise_axes: one scale for all channels.
      dlhs_grad_qtype, drhs_grad_qtype: format of the incoming gradient; None leaves it float.
      dlhs_grad_calibration_method, dlhs_tile_size, dlhs_grad_disable_channelwise_axes, and those of drhs: as
        for operands. The tile size is that of the gradient's own contracting axis in this op.
      dlhs_stochastic_rounding_noise_fn, drhs_...: noise added before the gradient is rounded; see
        `stochastic_rounding.get_noise_fn`.
      dlhs_residual_qtype, dlhs_residual_calibration_method, dlhs_residual_disable_channelwise_axes, and those
        of drhs: quantizes the other operand in this op where it is float there. Only beside a gradient that
        is quantized.
      use_original_residuals: multiply gradients with the float operands, not with the quantized ones.
      disable_gradient_clipping: let gradients through where an operand lies outside its calibrated range.
      sparsity_rule: N:M patterns that prune rhs (weight_*) and lhs (activation_*) before anything else.

    >>> QtConfig(lhs_qtype="int8", rhs_qtype="int4", tile_size=32).tile_size_of("lhs")
    32
    """

    lhs_qtype: QType = None
    rhs_qtype: QType = None
    tile_size: TileSize = None
    lhs_tile_size: TileSize = None
    rhs_tile_size: TileSize = None
    lhs_calibration_method: str = "absmax"
    rhs_calibration_method: str = "absmax"
    lhs_collect_quant_stat: CollectStat | None = None
    rhs_collect_quant_stat: CollectStat | None = None
    lhs_disable_channelwise_axes: bool = False
    rhs_disable_channelwise_axes: bool = False
    dlhs_grad_qtype: QType = None
    dlhs_grad_calibration_method: str = "absmax"
    dlhs_tile_size: TileSize = None
    dlhs_stochastic_rounding_noise_fn: NoiseFn | None = None
    dlhs_grad_disable_channelwise_axes: bool = False
    drhs_grad_qtype: QType = None
    drhs_grad_calibration_method: str = "absmax"
    drhs_tile_size: TileSize = None
    drhs_stochastic_rounding_noise_fn: NoiseFn | None = None
    drhs_grad_disable_channelwise_axes: bool = False
    disable_gradient_clipping: bool = False
    use_original_residuals: bool = False
    dlhs_residual_qtype: QType = None
    dlhs_residual_calibration_method: str = "absmax"
    dlhs_residual_disable_channelwise_axes: bool = False
    drhs_residual_qtype: QType = None
    drhs_residual_calibration_method: str = "absmax"
    drhs_residual_disable_channelwise_axes: bool = False
    sparsity_rule: SparsityRule | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_qtype") and value is not None:
                object.__setattr__(self, field.name, numerics.canonical_qtype(value))
            elif field.name.endswith("_calibration_method"):
                parse_method(str(value))
            elif field.name.endswith("tile_size") and isinstance(value, Mapping):
                object.__setattr__(self, field.name, _Tiles(value))

    def tile_size_of(self, side: Side) -> TileSize:
        """The tile size of one forward operand."""
        own = getattr(self, f"{side}_tile_size")
        return self.tile_size if own is None else own

    def replace(self, **changes: Any) -> QtConfig:
        """A copy with some fields changed.

        Raises:
          TypeError: a name that isn't a field; the message has the nearest one.

        >>> QtConfig().replace(dlhs_grad_qtpye="int8")
        Traceback (most recent call last):
        TypeError: QtConfig has no field 'dlhs_grad_qtpye'. Did you mean 'dlhs_grad_qtype'? ...
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"QtConfig has no field {name!r}.{hint} Fields: {', '.join(names)}.")
        return dataclasses.replace(self, **changes)


class _Tiles(dict):
    """{axis: tile}, hashable."""

    def __hash__(self):
        return hash(tuple(sorted(self.items())))


jax.tree_util.register_dataclass(
    QtConfig,
    data_fields=list(_DYNAMIC),
    meta_fields=[f.name for f in dataclasses.fields(QtConfig) if f.name not in _DYNAMIC],
)
