"""PEFT's registry of methods.

Checked on: peft 0.21.
When it breaks: `peft.utils.register_peft_method` requires that `PeftType`, an enumeration, has the method's name.
"""

from __future__ import annotations

from typing import Any

from peft.utils import PeftType, register_peft_method


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
