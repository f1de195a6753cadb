"""`apportion export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from apportion.cli.base import base_of
from apportion.cli.quiet import quiet
from apportion.loading import load_model
from apportion.peft.export import export_lora
from apportion.peft.load import load
from apportion.records.files import require_empty


def run(console: Console, *, adapter: Path, output: Path, model: str | None, dtype: str | None) -> dict[str, Any]:
    """Load an adapter and write it as plain LoRA."""
    quiet()
    require_empty(output)
    loaded, _ = load_model(base_of(adapter, model), dtype)
    export_lora(load(loaded, adapter), output)
    console.print(f"{adapter} as plain LoRA -> {output}")
    return {"adapter": str(output)}
