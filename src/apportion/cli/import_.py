"""`apportion import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.cli.quiet import quiet
from apportion.cli.terminal import Terminal
from apportion.formats.importing import import_adapter
from apportion.peft.load import read_adapter_plan


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    adapter: Path
    output: Path
    model: str | None
    trust_remote_code: bool


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Write an adapter of stock PEFT as one of this package."""
    quiet()
    import_adapter(args.adapter, args.output, model=args.model, trust_remote_code=args.trust_remote_code)
    sites = read_adapter_plan(args.output).cost.sites_by_kind
    console.print(
        f"{args.adapter}: {', '.join(f'{count} {kind}' for kind, count in sites.items())} sites -> {args.output}"
    )
    return {"adapter": str(args.output), "sites_by_kind": sites}
