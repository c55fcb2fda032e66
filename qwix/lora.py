"""LoRA and QLoRA: what can be done with the adapters of a model.

`qwix.apply_lora_to_model` makes them. Here they are taken out and put in, saved and loaded, also in the
layout of Hugging Face PEFT, merged into the weights, and stacked so that one base model serves several.
"""

from qwix._src.lora_files import adapters_of, load_adapters, read_metadata, save_adapters, with_adapters
from qwix._src.lora_init import init_adapters
from qwix._src.lora_merge import Merged, merge, unmerge
from qwix._src.lora_peft import load_peft, save_peft
from qwix._src.lora_peft_config import PeftConfig, read_peft_config
from qwix._src.lora_stack import stack
from qwix._src.providers.lora import LoraProvider, LoraRule, apply_lora_to_model

__all__ = [
    "LoraProvider",
    "LoraRule",
    "Merged",
    "PeftConfig",
    "adapters_of",
    "apply_lora_to_model",
    "init_adapters",
    "load_adapters",
    "load_peft",
    "merge",
    "read_metadata",
    "read_peft_config",
    "save_adapters",
    "save_peft",
    "stack",
    "unmerge",
    "with_adapters",
]
