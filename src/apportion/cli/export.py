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
from apportion.records.outputs import check_output_folder


def run(
    console: Console, *, adapter: Path, output: Path, model: str | None, dtype: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Load an adapter and write it as plain LoRA."""
    quiet()
    name = base_of(adapter, model)
    check_output_folder(output, inputs=(adapter, name))
    loaded, _ = load_model(name, dtype, trust_remote_code=trust_remote_code)
    export_lora(load(loaded, adapter), output)
    console.print(f"{adapter} as plain LoRA -> {output}")
    return {"adapter": str(output)}
