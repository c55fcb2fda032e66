"""The rule of training: a `QuantizationRule` that says how gradients are computed, too."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from flax.core import FrozenDict

from qwix._src import averaging, qconfig
from qwix._src.core import calibration, numerics, sparsity
from qwix._src.core.qt_config import QtConfig

Noise = Literal["uniform", "low_bit_uniform"]
_NOISES = ("uniform", "low_bit_uniform")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QtRule(qconfig.QuantizationRule):
    """Which ops to train quantized, and how. The fields of `QuantizationRule` say what the forward pass does.

    Attributes:
      bwd_qtype: format of incoming gradients; None computes gradients in float, from float operands (QAT).
      bwd_calibration_method: how their range is found; see `HowToQuantize.calibration_method`.
      bwd_weight_grad_tile_size: gradients that share a scale in the op that computes a weight's gradient,
        along the axis it sums over: a count or, as a float, a fraction of the axis.
      disable_channelwise_axes: one scale for all channels, of weights, activations and gradients.
      bwd_stochastic_rounding: 'uniform' or 'low_bit_uniform' rounds gradients at random, without bias. Keys
        are those of the Flax stream 'stochastic_rounding'.
      channelwise_noise_axes: axes of the incoming gradient along which that noise varies.
      act_averaging: how statistics of static scales are averaged over steps: 'mean', or 'ema,0.99'.
      act_bootstrap_steps: use each input's own range until so many steps have been averaged.
      additional_qt_config: fields of `DotGeneralQtConfig` that take the place of what the rule says, for
        every op; 'sparsity_rule' is one of them. Sides are those of the op as the model calls it.

    Raises:
      ValueError: at construction, for anything that could never work.
      TypeError: for a value of the wrong type, or a name that `additional_qt_config` doesn't know.

    >>> QtRule(weight_qtype="int8", act_qtype="int8", additional_qt_config={"dlhs_grad_qtpye": "int8"})
    Traceback (most recent call last):
    ...
    TypeError: additional_qt_config: no field 'dlhs_grad_qtpye'; did you mean 'dlhs_grad_qtype'? ...
    """

    bwd_qtype: Any = None
    bwd_calibration_method: str = "absmax"
    bwd_weight_grad_tile_size: int | float | None = None
    disable_channelwise_axes: bool = False
    bwd_stochastic_rounding: Noise | None = None
    channelwise_noise_axes: Sequence[int] = (0,)
    act_averaging: str = "mean"
    act_bootstrap_steps: int = 0
    additional_qt_config: Mapping[str, Any] | None = None

    def __post_init__(self):
        super().__post_init__()
        qconfig.check_field("bwd_qtype", self.bwd_qtype, numerics.canonical_qtype)
        qconfig.check_field("bwd_calibration_method", self.bwd_calibration_method, calibration.parse_method)
        qconfig.check_field("act_averaging", self.act_averaging, averaging.parse_averaging)
        qconfig.check_tile_size(self.bwd_weight_grad_tile_size, "bwd_weight_grad_tile_size")
        if isinstance(self.bwd_weight_grad_tile_size, Mapping):
            raise TypeError(
                "bwd_weight_grad_tile_size is a number; tiles by axis are those of dlhs_tile_size and "
                f"drhs_tile_size in additional_qt_config. Got {self.bwd_weight_grad_tile_size!r}."
            )
        if self.act_bootstrap_steps < 0:
            raise ValueError(f"act_bootstrap_steps counts steps, got {self.act_bootstrap_steps}.")
        axes = tuple(self.channelwise_noise_axes)
        if any(isinstance(a, bool) or not isinstance(a, int) for a in axes):
            raise TypeError(
                f"channelwise_noise_axes are numbers of axes, got {self.channelwise_noise_axes!r}."
            )
        object.__setattr__(self, "channelwise_noise_axes", axes)
        if self.additional_qt_config is not None:
            object.__setattr__(self, "additional_qt_config", _checked(self.additional_qt_config))
        self._check_noise()

    def _check_noise(self) -> None:
        noise = self.bwd_stochastic_rounding
        if noise is not None and noise not in _NOISES:
            near = difflib.get_close_matches(str(noise), _NOISES, n=1, cutoff=0.0)
            raise ValueError(
                f"bwd_stochastic_rounding is 'uniform', 'low_bit_uniform' or None, got {noise!r}; did you "
                f"mean {near[0]!r}?"
            )
        extra = self.extra
        if noise is not None and not any((self.bwd_qtype, *(extra.get(f"d{s}_grad_qtype") for s in _SIDES))):
            raise ValueError(
                f"bwd_stochastic_rounding={noise!r} rounds quantized gradients, but bwd_qtype is None. Set "
                "bwd_qtype, or leave bwd_stochastic_rounding out."
            )

    @property
    def extra(self) -> Mapping[str, Any]:
        """`additional_qt_config`, or nothing."""
        return self.additional_qt_config or {}

    @property
    def sparsity_rule(self) -> sparsity.SparsityRule | None:
        return self.extra.get("sparsity_rule")

    @property
    def quantizes_forward(self) -> bool:
        """Whether any operand of an op can be quantized."""
        given = (self.weight_qtype, self.act_qtype, *(self.extra.get(f"{side}_qtype") for side in _SIDES))
        return any(qtype is not None for qtype in given)


_SIDES = ("lhs", "rhs")


def _checked(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The overrides, hashable, if a config takes them."""
    names = [field.name for field in dataclasses.fields(QtConfig)]
    for name in config:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(
                f"additional_qt_config: no field {name!r}{hint} Fields of DotGeneralQtConfig: "
                f"{', '.join(names)}."
            )
    rule = config.get("sparsity_rule")
    if rule is not None and not isinstance(rule, sparsity.SparsityRule):
        raise TypeError(f"additional_qt_config: sparsity_rule is a qwix.SparsityRule, got {rule!r}.")
    try:
        QtConfig(**config)
    except (ValueError, TypeError) as error:
        raise type(error)(f"additional_qt_config: {error}") from error
    return FrozenDict(config)


def as_qt_rule(rule: qconfig.QuantizationRule) -> QtRule:
    """A plain rule as a rule of training: gradients are computed in float.

    Raises:
      TypeError: a rule of another kind, which says things that training can't do.
    """
    if isinstance(rule, QtRule):
        return rule
    fields = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    unknown = [name for name in fields if name not in {f.name for f in dataclasses.fields(QtRule)}]
    if unknown:
        raise TypeError(
            f"QtProvider takes QtRule and QuantizationRule objects. {type(rule).__name__} also says "
            f"{', '.join(unknown)}, which training knows nothing of."
        )
    return QtRule(**fields)
