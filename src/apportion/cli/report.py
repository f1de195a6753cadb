"""`apportion report`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apportion.cli.render import readable_bytes
from apportion.cli.terminal import Terminal
from apportion.report.page import write_report


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    path: Path
    output: Path
    profile: Path | None
    force: bool


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Write the page and print its path."""
    written = write_report(args.path, args.output, args.profile, force=args.force)
    size = readable_bytes(written.bytes)
    console.print(f"{written.kind} {args.path} -> {args.output} ({size}; open it in a browser, works offline)")
    return asdict(written)
