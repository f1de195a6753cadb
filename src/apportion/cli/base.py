"""The base model of an adapter that a command is given."""

from __future__ import annotations

from pathlib import Path

from apportion.errors import ConfigurationError
from apportion.peft.load import read_adapter_plan


def base_of(adapter: Path, model: str | None) -> str:
    """Tell which model an adapter is for.

    Args:
        adapter: The adapter's folder.
        model: What the user gave, if anything.

    Returns:
        A name that `load_model` takes.

    Raises:
        ConfigurationError: nothing says, or there is no adapter in the folder.
    """
    name = model or read_adapter_plan(adapter).base_model
    if name is None:
        raise ConfigurationError(f"the adapter in {adapter} does not say which model it is for.", fix="give --model")
    return name
