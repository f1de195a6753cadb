"""Which of transformers' automatic classes builds a model from its configuration."""

from __future__ import annotations

from inspect import signature
from typing import Any, TypeVar

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)

from apportion.errors import ApportionError, ConfigurationError

_CLASSES: tuple[tuple[Any, Any], ...] = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
)
_Error = TypeVar("_Error", bound=ApportionError)


def needs_remote_code(error: Exception) -> bool:
    """Tell whether transformers refused to run code that comes with a model."""
    return "trust_remote_code=True" in str(error)


def remote_code_refusal(kind: type[_Error], name: str) -> _Error:
    """Say, as an error of the fitting kind, that a model comes with code, and what that means."""
    return kind(
        f"the model {name!r} comes with Python code of its own, which was not run.",
        fix="if you trust its authors, run that code with --trust-remote-code (in Python: trust_remote_code=True)",
    )


def auto_class(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """Choose the class that builds a model's language model with its head, alone where transformers has it alone.

    Models that read images or sound besides text come whole; adapters stand on their language model alone. A model
    that gives no loss for labels (one that denoises text, say) is none of them.

    Args:
        config: The model's configuration.
        trust_remote_code: Whether code that comes with the model may be run, which transformers does not know.

    Returns:
        `AutoModelForCausalLM`, `AutoModelForImageTextToText` or `AutoModelForMultimodalLM`.

    Raises:
        ConfigurationError: none of them knows the configuration.
    """
    for auto, known in _CLASSES:
        if type(config) not in known:
            continue
        if auto is AutoModelForCausalLM or "labels" in signature(known[type(config)].forward).parameters:
            return auto
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    raise ConfigurationError(
        f"model type {config.model_type!r} is no causal language model that transformers knows.",
        fix="update transformers, or give another configuration",
    )
