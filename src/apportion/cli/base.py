"""The base model of an adapter given to a command."""

from __future__ import annotations

from pathlib import Path

from apportion.errors import ConfigurationError
from apportion.peft.load import read_adapter_plan


def base_of(adapter: Path, model: str | None) -> str:
    """Return the name of an adapter's base model.

    Args:
        adapter: The adapter's folder.
        model: Name given by the user, if any.

    Returns:
        A name for `load_model`.

    Raises:
        ConfigurationError: the base model is unknown, or the folder has no adapter.
    """
    name = model or read_adapter_plan(adapter).base_model
    if name is None:
        raise ConfigurationError(f"the adapter in {adapter} does not name its base model.", fix="give --model")
    return name
