"""Register the method ``APPORTION`` with PEFT."""

from __future__ import annotations

from peft.utils import PeftType, register_peft_method

from apportion.peft.config import PEFT_TYPE, ApportionConfig
from apportion.peft.tuner import ApportionModel


def register() -> None:
    """Add the method to PEFT's registry, once.

    PEFT registers third-party methods, but their names must be in an enumeration, which is extended here first.
    """
    if PEFT_TYPE in PeftType.__members__:
        return
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = PEFT_TYPE
    member._value_ = PEFT_TYPE
    setattr(PeftType, PEFT_TYPE, member)
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=ApportionConfig, model_cls=ApportionModel, prefix="lora_")
