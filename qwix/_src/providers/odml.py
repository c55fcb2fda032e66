"""Integer models for devices: training with fake quantization, and conversion for LiteRT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qwix._src import odml_ops, odml_quantizers, qconfig
from qwix._src.odml_graph import Node
from qwix._src.utils import flax_util

__all__ = ["Break", "OdmlConversionProvider", "OdmlQatProvider"]


# Functions that JAX keeps by name and that are one op here. Others of the table's names are primitives.
_CALLS = frozenset(
    {"relu", "relu6", "silu", "hard_silu", "hard_sigmoid", "leaky_relu", "hard_tanh", "elu", "softplus"}
    | {"log_softmax", "clip"}
)


class Break(NamedTuple):
    """An op that has no integer form in LiteRT, though a rule quantizes it."""

    path: str
    op: str
    op_id: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op_id} in {self.path!r}: {self.reason}"


class OdmlQatProvider(qconfig.QuantizationProvider):
    """Trains and calibrates a model with the integer arithmetic of LiteRT's kernels, by fake quantization.

    `act_qtype` of a rule is that of the tensors that an op makes, and of those it reads that no other rule
    quantizes; it's static unless `act_static_scale=False`, and minmax by default. `weight_qtype` is that of
    the weights of contractions, per channel.

    Args:
      rules: in order; the first that matches an op's module path and name decides about it.
      disable_per_channel_weights: one scale for each weight.
      fixed_range_for_inputs, fixed_range_for_outputs: (low, high) of the model's inputs and outputs, where
        they are known: (0, 1) of an image, say.
      strict: an op that a rule quantizes and that LiteRT has no integer form of is an error, which lists
        all of them; else a warning does.

    Raises:
      TypeError: rules of another kind, a range that's no pair of numbers.
      ValueError: a rule with tiles, a range without 0, a qtype that LiteRT has not.

    >>> import jax.numpy as jnp, qwix
    >>> from flax import nnx
    >>> rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
    >>> model, x = nnx.Linear(8, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 8))
    >>> model = qwix.quantize_model(model, OdmlQatProvider([rule]), x)
    >>> sorted(name for name, value in vars(model).items() if isinstance(value, qwix.QuantStat))
    ['dot_general0_lhs', 'final_output0']
    """

    converts = False
    make_quantizer: Callable[..., Any] = odml_quantizers.TrainingQuantizer

    def __init__(
        self,
        rules: Sequence[qconfig.QuantizationRule] | qconfig.QuantizationRule,
        *,
        disable_per_channel_weights: bool = False,
        fixed_range_for_inputs: tuple[float, float] | None = None,
        fixed_range_for_outputs: tuple[float, float] | None = None,
        strict: bool = True,
    ):
        super().__init__(rules)
        self._given = [rules] if isinstance(rules, qconfig.QuantizationRule) else list(rules)
        self.disable_per_channel_weights = disable_per_channel_weights
        self.fixed_range_for_inputs = _range("fixed_range_for_inputs", fixed_range_for_inputs)
        self.fixed_range_for_outputs = _range("fixed_range_for_outputs", fixed_range_for_outputs)
        self.strict = strict
        self._ops: dict[str, Any] = dict(odml_ops.TABLE)
        self._breaks: dict[tuple[str, str], Break] = {}

    def _init_rule(self, rule: qconfig.QuantizationRule) -> qconfig.QuantizationRule:
        if rule.tile_size is not None:
            raise ValueError(f"LiteRT has no tiles: tile_size={rule.tile_size} in {rule}. Leave it out.")
        for field in ("weight_qtype", "act_qtype"):
            if getattr(rule, field) is not None:
                odml_quantizers.qtype_name(getattr(rule, field))
        wanted = rule.act_static_scale
        checked = super()._init_rule(rule)
        return dataclasses.replace(
            checked,
            act_static_scale=rule.act_qtype is not None and wanted is not False,
            act_calibration_method=rule.act_calibration_method or "minmax",
        )

    @property
    def breaks(self) -> list[Break]:
        """What breaks the chain of integer ops, in the order in which it was seen."""
        return list(self._breaks.values())

    def for_conversion(self, params: Any, quant_stats: Any) -> OdmlConversionProvider:
        """The provider that converts what this one trained, with the same rules.

        It only collects `breaks`: whoever converts says what to do about them.
        """
        made = OdmlConversionProvider(
            self._given,
            params,
            quant_stats,
            disable_per_channel_weights=self.disable_per_channel_weights,
            fixed_range_for_inputs=self.fixed_range_for_inputs,
            fixed_range_for_outputs=self.fixed_range_for_outputs,
            strict=False,
        )
        made._ops = dict(self._ops)
        made.quiet = True
        return made

    quiet = False

    def stat(self, path: str, name: str) -> Any:
        """The statistics that it was given; in training the model has them."""
        return None

    def spec_of(self, node: Node) -> Any:
        """What kind of op a node is."""
        return odml_ops.spec_of(node, self._ops)

    def is_call(self, name: str, jaxpr: Any) -> bool:
        """Whether a jitted function is one op: of JAX's those the table knows, and those a user added."""
        if name in odml_ops.TABLE:
            return name in _CALLS and "/jax/" in str(jaxpr.debug_info.func_src_info)
        return name in self._ops

    def note_break(self, path: str, op: str, op_id: str, reason: str) -> None:
        """Remembers an op without an integer form."""
        self._breaks.setdefault((path, op_id), Break(path, op, op_id, reason))

    def after_call(self) -> None:
        """Says what breaks the chain, once."""
        if not self._breaks or self.quiet:
            return
        lines = "\n".join(f"  {one}" for one in self._breaks.values())
        message = f"These ops have no integer form in LiteRT:\n{lines}\n"
        if self.strict:
            raise ValueError(
                f"{message}Write them otherwise, leave them float by a rule of their own without qtypes, or "
                "set strict=False."
            )
        self._warn_once(f"{message}They stay float.")


class OdmlConversionProvider(OdmlQatProvider):
    """Makes of a trained model the program that LiteRT's converter reads.

    The rules and options must be those it was trained with. Scales are computed when the model is traced.

    Args:
      rules: as of OdmlQatProvider.
      params: the trained params, nested dicts of arrays; boxed, or of NNX, or of numpy.
      quant_stats: what training or calibration collected.
      **options: as of OdmlQatProvider.

    Raises:
      TypeError: a param that's no array.
    """

    converts = True
    make_quantizer = odml_quantizers.ConversionQuantizer

    def __init__(self, rules: Any, params: Any, quant_stats: Any, **options: Any):
        super().__init__(rules, **options)
        self.params = _flat(params, "")
        self.quant_stats = quant_stats

    def stat(self, path: str, name: str) -> Any:
        """The statistics of an op; None if there are none."""
        keys = [*filter(None, path.split("/")), name]
        return _follow(flax_util.unbox(self.quant_stats), keys)


def _follow(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key, tree.get(int(key)) if key.isdigit() else None)
    return tree


def _range(name: str, given: Any) -> tuple[float, float] | None:
    if given is None:
        return None
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(f"{name} is a pair (low, high), got {given!r}.")
    low, high = map(float, given)
    if not (np.isfinite([low, high]).all() and low <= 0 <= high and low < high):
        raise ValueError(f"{name} must contain 0 and not be empty, got {given!r}.")
    return low, high


def _flat(tree: Any, path: str) -> dict[tuple[str, ...], Any]:
    """{path: concrete array}."""
    found: dict[tuple[str, ...], Any] = {}
    if hasattr(tree, "to_pure_dict"):
        tree = tree.to_pure_dict()
    tree = flax_util.unbox(tree)
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            inner = _flat(value, f"{path}/{key}" if path else str(key))
            found |= {(str(key), *rest): array for rest, array in inner.items()}
        return found
    if not isinstance(tree, jax.Array | np.ndarray | np.generic | float | int):
        raise TypeError(
            f"ODML conversion parameters must unbox to array-like values; parameter {path} has type "
            f"{type(tree)}."
        )
    return {(): tree if isinstance(tree, jax.Array) else jax.numpy.asarray(tree)}
