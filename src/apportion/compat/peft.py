"""PEFT's registry of methods, and its table of LoRA layers.

Checked on: peft 0.21.
When it breaks: `peft.utils.register_peft_method` requires that `PeftType`, an enumeration, has the method's name.
`peft.tuners.lora.LoraModel` chooses a LoRA layer by the class of a layer and of its weight.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.utils import PeftType, register_peft_method
from torch import nn


def register_method(name: str, config_class: type[Any], model_class: type[Any], prefix: str) -> None:
    """Register a method with PEFT, once. Its name becomes a member of PEFT's enumeration.

    Args:
        name: The method's name, in capitals.
        config_class: Class of its configuration.
        model_class: Class of its tuner.
        prefix: Prefix of the names of its parameters.
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    register_peft_method(name=name.lower(), config_cls=config_class, model_cls=model_class, prefix=prefix)


def has_lora_layer(module: nn.Module) -> bool:
    """Return whether PEFT has a LoRA layer for a linear layer.

    Args:
        module: The linear layer, which does not change.

    Returns:
        Whether a LoRA layer of rank 1 could be built around it. It is dropped.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            LoraModel._create_new_module(LoraConfig(r=1), "default", module, r=1, lora_alpha=1)
    except (TypeError, ValueError):
        return False
    return True
