"""LoRA and QLoRA: weights stay as they are, stored float or quantized, and low-rank adapters are trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx, traverse_util

from qwix._src import linen_scope, lora_params, model, qconfig
from qwix._src.adapter import SUFFIXES, AdapterSpec
from qwix._src.adapter_plan import plan_adapter
from qwix._src.core import numerics
from qwix._src.lora_attribute import attributes_of
from qwix._src.lora_executor import LoraExecutor
from qwix._src.lora_rows import Selected
from qwix._src.lora_rule import LoraRule
from qwix._src.model_weights import Discovery, Key
from qwix._src.op_plan import OpPlan
from qwix._src.prepack import Prepack
from qwix._src.providers.boxed_param import BoxedParamProvider
from qwix._src.static_range import StaticScales
from qwix._src.weight import WeightInfo, WeightTracer
from qwix._src.with_aux import WithAux

__all__ = ["LoraProvider", "LoraRule", "apply_lora_to_model"]


_is_aux = lambda _, x: isinstance(x, WithAux)


class LoraProvider(BoxedParamProvider):
    """Gives the weights that its rules match an adapter, and stores them quantized if the rule says so.

    Args:
      rules: `LoraRule`s, and `QuantizationRule`s for weights that are quantized but not adapted; the first
        that matches decides.
      disable_jit: run the model under `jax.disable_jit()`.
      prepack: see `BoxedParamProvider`.
      **rule_kwargs: the fields of the one `LoraRule`, instead of rules.

    Raises:
      ValueError: rules and fields of a rule, or neither.
      TypeError: a field that LoraRule doesn't have.

    >>> provider = LoraProvider(module_path=".*proj", rank=8, alpha=16.0, weight_qtype="nf4", tile_size=64)
    >>> provider.rules[0].scaling
    2.0
    """

    def __init__(
        self,
        rules: Sequence[qconfig.QuantizationRule] | qconfig.QuantizationRule | None = None,
        *,
        disable_jit: bool = False,
        prepack: Prepack = False,
        **rule_kwargs: Any,
    ):
        if rules is not None and rule_kwargs:
            raise ValueError(
                f"Only one of rules and kwargs should be provided. Got both: {rules!r} and {rule_kwargs!r}."
            )
        if rules is None:
            if not rule_kwargs:
                raise ValueError(
                    "LoraProvider needs rules, or the fields of one: LoraProvider(rank=8, alpha=16.0)."
                )
            rules = [LoraRule(**rule_kwargs)]
        super().__init__(rules, disable_jit=disable_jit, prepack=prepack)
        self.adapters: dict[Key, AdapterSpec] = {}  # by path of the module and name of the weight
        self.infos: dict[Key, WeightInfo] = {}  # of the same weights, with their rules
        self.names: tuple[str, ...] = ()  # of the adapters that are stacked

    @property
    def rules(self) -> tuple[qconfig.QuantizationRule, ...]:
        """In order, with the defaults filled in."""
        return tuple(self._rules)

    def adapter_of(
        self, plan: OpPlan, weight: WeightTracer, args: Sequence[Any], params: Mapping[str, Any]
    ) -> AdapterSpec | None:
        both = plan.op != "take" and all(isinstance(a, WeightTracer) for a in args[:2])
        if not isinstance(plan.rule, LoraRule) or both or not numerics.should_quantize(weight.dtype):
            return None
        if plan.op == "conv_general_dilated" and plan.weight_side != 1:
            return None
        return plan_adapter(plan.op, weight, plan.weight_side or 0, args, params, plan.rule)

    def needs_discovery(self, params: Any) -> bool:
        return bool(self._unknown(params))

    def learn(self, seen: Discovery, params: Any = None) -> None:
        """Takes note of the adapters. Raises ValueError for those of the params that aren't among them."""
        self.adapters |= {key: spec for key, (_, spec) in seen.adapters.items()}
        self.infos |= {key: info for key, (info, _) in seen.adapters.items()}
        if params is not None and (unknown := self._unknown(params)):
            raise ValueError(
                f"The params have an adapter of {'/'.join(unknown[0])!r}, but no LoraRule of the model gives "
                "it one. Are these the params of another model or rule?"
            )

    def _unknown(self, params: Any) -> list[tuple[str, ...]]:
        """Weights that have an adapter in the params and haven't been seen."""
        suffix = SUFFIXES["a"]
        flat = traverse_util.flatten_dict(linen_scope.plain(params), is_leaf=_is_aux)
        weights = [(*p[:-1], p[-1].removesuffix(suffix)) for p in flat if p[-1].endswith(suffix)]
        return [key for key in weights if key not in self.adapters]

    def finish(self) -> None:
        """Raises ValueError for a LoraRule that gave no weight an adapter."""
        self._complete = True
        for rule in self.get_unused_rules():
            if isinstance(rule, LoraRule):
                raise ValueError(
                    f"The rule {rule} matched no op, so no weight has its adapter. {self._hint(rule)}"
                )
            self._warn_once(f"The rule {rule} matched no op. {self._hint(rule)}")
        if not self.adapters:
            raise ValueError(f"No weight of the model got an adapter. {self._hint(None)}")

    def take_options(
        self,
        method: Callable[..., Any],
        kwargs: Mapping[str, Any],
        key: Callable[[str], jax.Array | None],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Takes `adapter`, and looks at `deterministic`, which a model may have for its own dropout."""
        kwargs, options = dict(kwargs), {}
        if self.names and "adapter" in kwargs and "adapter" not in inspect.signature(method).parameters:
            options["selected"] = Selected.of(kwargs.pop("adapter"), self.names)
        drops = any(isinstance(rule, LoraRule) and rule.dropout for rule in self._rules)
        if drops and not kwargs.get("deterministic", False):
            options["dropout_key"] = key("dropout")
        return kwargs, options

    def op_handler(
        self,
        scales: StaticScales,
        *,
        strict: bool,
        dropout_key: jax.Array | None = None,
        selected: Selected | None = None,
    ) -> LoraExecutor:
        return LoraExecutor(self, scales, strict=strict, dropout_key=dropout_key, selected=selected)

    def complete_nnx(self, model: nnx.Module, seen: Discovery, rngs: nnx.Rngs | None) -> None:
        lora_params.add_to_nnx(model, seen, rngs)
        self.learn(seen)

    def complete_linen(self, params: Any, seen: Discovery, key: Callable[[], jax.Array]) -> None:
        lora_params.add_to_linen(params, seen.adapters, key() if seen.adapters else None)
        self.learn(seen)

    def class_attributes(self, module: nnx.Module) -> Mapping[str, Any]:
        return attributes_of(module)


def apply_lora_to_model[M: nn.Module | nnx.Module](
    base_model: M,
    provider: LoraProvider,
    *model_inputs: Any,
    methods: Sequence[str] = ("__call__",),
    **model_inputs_kwargs: Any,
) -> M:
    """A model with adapters, that's used like `base_model`, which isn't changed.

    Args:
      base_model: a Linen module, whose `init` then makes adapters, too; or an NNX model, which gets them now.
      provider: what to do.
      *model_inputs, methods, **model_inputs_kwargs: as for `qwix.quantize_model`. For NNX, `rngs` are an
        nnx.Rngs whose `params` the adapters are made from.

    Returns: the model. Its adapters are params called `<weight>_lora_a` and `<weight>_lora_b`, beside the
      weight: of NNX models `nnx.LoRAParam`s, so that `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)` and
      `nnx.DiffState(0, nnx.LoRAParam)` train only them.

    Raises:
      ValueError: a rule that hits no weight, a rank that's too large for a weight, and what `quantize_model`
        raises.
      TypeError: a provider that isn't a LoraProvider.

    >>> import jax.numpy as jnp
    >>> model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    >>> provider = LoraProvider(rank=4, alpha=8.0, weight_qtype="nf4", tile_size=32)
    >>> adapted = apply_lora_to_model(model, provider, jnp.ones((1, 64)), rngs=nnx.Rngs(1))
    >>> adapted.kernel_lora_a.shape, adapted.kernel_lora_b.shape
    ((64, 4), (4, 32))
    """
    if not isinstance(provider, LoraProvider):
        raise TypeError(
            f"apply_lora_to_model takes a LoraProvider, got {type(provider).__name__}. For example: "
            "LoraProvider(module_path='.*', rank=8, alpha=16.0). quantize_model takes the other providers."
        )
    return model.quantize_model(base_model, provider, *model_inputs, methods=methods, **model_inputs_kwargs)
