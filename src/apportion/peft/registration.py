"""Register the method ``APPORTION`` with PEFT."""

from __future__ import annotations

from apportion.compat.peft import register_method
from apportion.peft.config import PEFT_TYPE, ApportionConfig
from apportion.peft.tuner import ApportionModel


def register() -> None:
    """Add the method to PEFT's registry, once."""
    register_method(PEFT_TYPE, ApportionConfig, ApportionModel, "lora_")
