"""`apportion report`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from apportion.cli.render import readable_bytes
from apportion.report.page import write_report


def run(console: Console, *, path: Path, output: Path, profile: Path | None, force: bool) -> dict[str, Any]:
    """Write the page and say where it is."""
    written = write_report(path, output, profile, force=force)
    size = readable_bytes(written.bytes)
    console.print(f"{written.kind} {path} -> {output} ({size}; open it in a browser, no network is needed)")
    return asdict(written)
