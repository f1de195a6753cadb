"""Choose the transformers auto class that builds a model from its configuration."""

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
    """Return whether transformers refused to run code that comes with a model."""
    return "trust_remote_code=True" in str(error)


def remote_code_refusal(kind: type[_Error], name: str) -> _Error:
    """Make the error for a model whose own code was not allowed to run."""
    return kind(
        f"the model {name!r} comes with Python code of its own, which was not run.",
        fix="if you trust its authors, allow that code with --trust-remote-code (in Python: trust_remote_code=True)",
    )


def auto_class(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """Choose the class that builds a model's language model with its head.

    The language model is built without other parts if transformers has a class for that. Otherwise models for images
    or sound are built as a whole, and adapters are attached only to their language model. Models that do not compute a
    loss from labels, such as those that denoise text, are not supported.

    Args:
        config: The model's configuration.
        trust_remote_code: Whether code that comes with the model may be run.

    Returns:
        `AutoModelForCausalLM`, `AutoModelForImageTextToText` or `AutoModelForMultimodalLM`.

    Raises:
        ConfigurationError: none of them supports the configuration.
    """
    for auto, known in _CLASSES:
        if type(config) not in known:
            continue
        if auto is AutoModelForCausalLM or "labels" in signature(known[type(config)].forward).parameters:
            return auto
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    raise ConfigurationError(
        f"model type {config.model_type!r} is not a causal language model that transformers supports.",
        fix="update transformers, or give another configuration",
    )
