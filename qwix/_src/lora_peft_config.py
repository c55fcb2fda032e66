"""adapter_config.json of Hugging Face PEFT: what is read of it, what is refused, and what is written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwix._src import lora_files

CONFIG_FILE = "adapter_config.json"

# What changes no output of an adapter that is there: initial values, notes, and training's own business.
_IRRELEVANT = {
    *("auto_mapping", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_ga_config", "megatron_config", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config"),
}
# Fields whose only value here is the one that says "not used", and why.
_REFUSED = {
    "bias": "biases of the base model are trained, too",
    "fan_in_fan_out": "the base model stores its weights transposed",
    "modules_to_save": "whole modules are trained, too",
    "layer_replication": "layers of the base model are repeated",
    "lora_bias": "B has a bias",
    "trainable_token_indices": "single rows of an embedding are trained, too",
    "target_parameters": "adapters are on parameters that aren't a module's weight",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # as their initialization
_OFF = (None, False, "none", [], {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What an adapter_config.json says of LoRA. Fields have PEFT's names and defaults.

    Attributes:
      r: rank of the adapters.
      lora_alpha: the change is multiplied by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
      use_rslora, use_dora: as of `LoraRule`.
      lora_dropout: the part of activations that adapters don't see in training.
      target_modules: modules with adapters, by the end of their path; or a regular expression for all of it.
      rank_pattern, alpha_pattern: {end of a module's path, as a regular expression: its rank or alpha}.
      base_model_name_or_path, task_type: notes for PEFT.

    >>> config = PeftConfig(r=8, lora_alpha=16, rank_pattern={"o_proj": 4})
    >>> config.scaling_of("model.layers.0.q_proj"), config.scaling_of("model.layers.0.o_proj")
    (2.0, 4.0)
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    def rank_of(self, module: str) -> int:
        """The rank of a module of the PyTorch model."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module of the PyTorch model."""
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha)

    def scaling_of(self, module: str, rank: int | None = None) -> float:
        """What the change of a module is multiplied by; `rank`, where the patterns don't say it yet."""
        rank = self.rank_of(module) if rank is None else rank
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def rule_fields(self, module: str = "") -> dict[str, Any]:
        """The fields of a `LoraRule` for a module, the same as everywhere by default.

        >>> PeftConfig(r=4, lora_alpha=6).rule_fields()["alpha"]
        6
        """
        return {
            "rank": self.rank_of(module),
            "alpha": self.alpha_of(module),
            "dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }

    def completed(self, ranks: Mapping[str, int]) -> PeftConfig:
        """With the modules that there are, {module: rank}.

        Raises ValueError if `target_modules` leaves one of them out: PEFT would ignore its adapter.
        """
        targets = sorted(ranks) if self.target_modules is None else self.target_modules
        for module in ranks:
            if not _targets(targets, module):
                raise ValueError(
                    f"target_modules={targets!r} leaves out {module!r}, which has an adapter. Leave "
                    "target_modules out to have it filled in."
                )
        others = {module: rank for module, rank in ranks.items() if self.rank_of(module) != rank}
        escaped = {re.escape(module): rank for module, rank in others.items()}
        return dataclasses.replace(
            self, target_modules=targets, rank_pattern={**escaped, **dict(self.rank_pattern)}
        )

    def to_json(self) -> dict[str, Any]:
        """The file's contents."""
        fields = {name: getattr(self, name) for name in (f.name for f in dataclasses.fields(self))}
        targets = self.target_modules
        return fields | {
            "auto_mapping": None,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
            "peft_type": "LORA",
            "target_modules": targets if isinstance(targets, str) or targets is None else list(targets),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the module's path ends in."""
    matches = (v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matches, default)


def _targets(targets: Sequence[str] | str, module: str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def read_peft_config(directory: str | os.PathLike[str]) -> PeftConfig:
    """Reads adapter_config.json.

    Raises:
      FileNotFoundError: it isn't there.
      ValueError: not JSON; not LoRA; or it says what can't be done here.
    """
    path = lora_files.as_path(directory) / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"There is no {CONFIG_FILE} in {str(directory)!r}.")
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}.") from None
    return from_json(data)


def from_json(data: Mapping[str, Any]) -> PeftConfig:
    """The config of an adapter_config.json's contents. Raises ValueError for what can't be done here."""
    if data.get("peft_type") != "LORA":
        raise ValueError(
            f"peft_type is {data.get('peft_type')!r}. Only 'LORA' adapters can be loaded; PEFT can merge "
            "others into the weights of the base model."
        )
    names = {field.name for field in dataclasses.fields(PeftConfig)}
    for name, value in data.items():
        if name in _REFUSED and value not in _OFF:
            raise ValueError(
                f"{name} is {value!r}: {_REFUSED[name]}, which can't be done here. PEFT can merge such an "
                "adapter into the weights of the base model."
            )
        known = names | _IRRELEVANT | set(_REFUSED) | {"peft_type", "init_lora_weights"}
        if name not in known and value not in _OFF:
            raise ValueError(
                f"{name} is {value!r}, which isn't known here. If it changes nothing that the adapter "
                f"computes, take it out of {CONFIG_FILE}."
            )
    start = data.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights is {start!r}, which changes the weights of the base model. Convert the "
            "adapter with PEFT first: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    given = {name: data[name] for name in names if data.get(name) is not None}
    return PeftConfig(**given)
