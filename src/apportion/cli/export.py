"""`apportion export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from apportion.cli.base import base_of
from apportion.cli.quiet import quiet
from apportion.loading import load_model
from apportion.peft.export import export_lora
from apportion.peft.load import load
from apportion.records.outputs import check_output_folder


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    adapter: Path
    output: Path
    model: str | None
    dtype: str | None
    trust_remote_code: bool


def run(console: Console, args: Arguments) -> dict[str, Any]:
    """Load an adapter and write it as plain LoRA."""
    quiet()
    name = base_of(args.adapter, args.model)
    check_output_folder(args.output, inputs=(args.adapter, name))
    loaded, _ = load_model(name, args.dtype, trust_remote_code=args.trust_remote_code)
    export_lora(load(loaded, args.adapter), args.output)
    console.print(f"{args.adapter} exported as plain LoRA -> {args.output}")
    return {"adapter": str(args.output)}
