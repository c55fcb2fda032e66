"""Training quantized models: quantization in the forward pass only (QAT), or of gradients, too (QT)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from qwix._src import qconfig, qt_sparsity
from qwix._src.model_weights import named_einsum
from qwix._src.qt_executor import FLOAT_SCOPE
from qwix._src.qt_rule import QtRule, as_qt_rule

__all__ = ["QtProvider", "QtRule"]


# Methods with which a subclass takes the place of a function, with its arguments.
_OWN_OPS = {
    "dot_general": "jax.lax.dot_general",
    "einsum": "jax.numpy.einsum",
    "conv_general_dilated": "jax.lax.conv_general_dilated",
    "ragged_dot": "jax.lax.ragged_dot",
}


class QtProvider(qconfig.QuantizationProvider):
    """Trains a model as its rules say. Its weights stay float params, so checkpoints are those of the float
    model; ops quantize them, and their activations, each time.

    A subclass with a method `dot_general`, `einsum`, `conv_general_dilated` or `ragged_dot` replaces that
    function of JAX in the model; `_get_current_rule_and_op_id` tells it the rule. What it computes is left
    alone.

    Args:
      rules: in order; the first that matches an op's module path and name decides about it. Plain
        `QuantizationRule`s compute gradients in float.
      disable_jit: run the model under `jax.disable_jit()`.

    Raises:
      TypeError: rules of another kind.
      ValueError: a rule with `double_quantize`.

    >>> import jax, jax.numpy as jnp, qwix
    >>> from flax import nnx
    >>> rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8")
    >>> model, x = nnx.Linear(64, 8, rngs=nnx.Rngs(0)), jnp.ones((1, 64))
    >>> model = qwix.quantize_model(model, QtProvider([rule]), x)
    >>> nnx.grad(lambda model: model(x).sum())(model).kernel.shape
    (64, 8)
    """

    def __init__(
        self,
        rules: Sequence[qconfig.QuantizationRule] | qconfig.QuantizationRule,
        *,
        disable_jit: bool = False,
    ):
        super().__init__(rules, disable_jit=disable_jit)

    def _init_rule(self, rule: qconfig.QuantizationRule) -> QtRule:
        if rule.double_quantize:
            raise ValueError(
                "double_quantize=True says how quantized weights are stored, but training keeps them float, "
                f"in {rule}. Leave it out here, and set it in the rules of PtqProvider."
            )
        return as_qt_rule(super()._init_rule(as_qt_rule(rule)))

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        """Einsums are named, and a subclass may define ops of its own; all else is seen by its primitives."""
        own = {path: _whole(getattr(self, name)) for name, path in _OWN_OPS.items() if hasattr(self, name)}
        return {"jax.numpy.einsum": named_einsum} | own

    @property
    def keeps_states(self) -> bool:
        """Whether ops have states: statistics of static scales, masks of a sparsity curriculum."""
        return any(
            rule.act_static_scale or qt_sparsity.has_curriculum(rule.sparsity_rule) for rule in self.rules
        )

    @property
    def is_noisy(self) -> bool:
        """Whether gradients are rounded at random."""
        return any(rule.bwd_stochastic_rounding is not None for rule in self.rules)

    @property
    def rules(self) -> Sequence[QtRule]:
        """The rules, as rules of training with their defaults filled in."""
        return [as_qt_rule(rule) for rule in self._rules]

    def finish(self) -> None:
        super().finish()
        if not any(hasattr(self, name) for name in _OWN_OPS):
            self._warn_if_nothing()


def _whole(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op whose own dots aren't quantized."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(FLOAT_SCOPE):
            return op(*args, **kwargs)

    return call
