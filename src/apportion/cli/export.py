"""`apportion export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apportion.cli.quiet import quiet
from apportion.cli.terminal import Terminal
from apportion.formats.export import FORMATS, export
from apportion.formats.readme import README_FILE, USE


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    adapter: Path
    output: Path
    format: str
    model: str | None
    dtype: str | None
    router: Literal["refuse", "merge"]
    trust_remote_code: bool


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Write the adapter in another form."""
    quiet()
    export(
        args.adapter, args.output, format=args.format, dtype=args.dtype, router=args.router, model=args.model,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    console.print(f"{args.adapter} for {FORMATS[args.format].summary} -> {args.output}")
    text = (args.output / README_FILE).read_text(encoding="utf-8")
    console.print(text.partition(USE)[2].strip(), soft_wrap=True)
    return {"adapter": str(args.output), "format": args.format}
