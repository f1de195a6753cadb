"""`apportion merge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.cli.base import base_of
from apportion.cli.quiet import quiet
from apportion.cli.terminal import Terminal
from apportion.loading import load_model
from apportion.peft.load import check_mergeable, load, read_adapter_plan
from apportion.records.files import whole_folder
from apportion.records.outputs import check_output_folder


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    adapter: Path
    output: Path
    model: str | None
    dtype: str | None
    trust_remote_code: bool


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Merge and save. The output folder is written atomically."""
    quiet()
    name = base_of(args.adapter, args.model)
    check_output_folder(args.output, inputs=(args.adapter, name), renamed=True)
    check_mergeable(read_adapter_plan(args.adapter), args.adapter)
    loaded, tokenizer = load_model(name, args.dtype, trust_remote_code=args.trust_remote_code)
    merged = load(loaded, args.adapter).merge_and_unload(safe_merge=True)
    with whole_folder(args.output) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    console.print(f"{args.adapter} merged into {name} -> {args.output}")
    return {"model": str(args.output), "base": name}
