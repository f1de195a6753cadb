"""`apportion combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from apportion.cli.base import base_of
from apportion.cli.quiet import quiet
from apportion.errors import ConfigurationError
from apportion.loading import load_model
from apportion.peft.attach import load
from apportion.records.files import require_empty
from apportion.training.phase import save_adapter


def run(
    console: Console,
    *,
    adapters: list[Path],
    output: Path,
    weights: str | None,
    how: str,
    model: str | None,
    dtype: str | None,
) -> dict[str, Any]:
    """Load the adapters onto one model, combine them, and save the result."""
    quiet()
    require_empty(output)
    shares = _weights(weights, len(adapters))
    loaded, _ = load_model(base_of(adapters[0], model), dtype)
    names = [f"a{number}" for number in range(len(adapters))]
    peft_model = load(loaded, adapters[0], adapter_name=names[0])
    for path, adapter in zip(adapters[1:], names[1:], strict=True):
        peft_model.load_adapter(path, adapter)
    peft_model.add_weighted_adapter(names, shares, "default", combination_type=how)
    for adapter in names:
        peft_model.delete_adapter(adapter)
    save_adapter(peft_model, output)
    count = sum(parameter.numel() for key, parameter in peft_model.named_parameters() if ".default." in key)
    console.print(f"{len(adapters)} adapters combined by {how}: {count:,} parameters -> {output}")
    return {"adapter": str(output), "parameters": count, "weights": shares, "how": how}


def _weights(text: str | None, count: int) -> list[float]:
    """Read the weights; equal ones that add up to 1 where none were given."""
    if text is None:
        return [1 / count] * count
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"weights={text!r} is not understood.\n  fix:  give numbers: 0.5,0.5") from error
