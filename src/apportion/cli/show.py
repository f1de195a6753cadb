"""`apportion show`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from apportion.cli.render import cost_table, heat_map, readable_bytes, sensitivity_table
from apportion.cli.terminal import Terminal
from apportion.report.inventory import identify

_HASH = re.compile(r"[0-9a-f]{64}")
_HASH_DIGITS = 12  # shown; --json gives all of them


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    path: Path


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Show what a path is and what it contains."""
    item = identify(args.path)
    facts = {name: value for name, value in item.facts.items() if value not in (None, [], {}, "")}
    table = Table(title=f"{args.path}: {item.kind}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, readable_bytes(value) if name == "bytes" else _format(value))
    console.print(table)
    if item.plan is not None:
        console.print(cost_table(item.plan.cost, "cost"))
    if item.profile is not None:
        if item.profile.layout.is_moe:
            console.print(heat_map(item.profile, digits=not console.has_colours))
        if item.profile.sensitivity:
            console.print(sensitivity_table(item.profile))
    return {"path": str(args.path), "kind": item.kind, **facts}


def _format(value: Any) -> str:
    """Format a value for display."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format(part)}" for name, part in value.items() if part not in (None, {}, []))
    if isinstance(value, list | tuple):
        return ", ".join(map(_format, value))
    if isinstance(value, str) and _HASH.fullmatch(value):
        return value[:_HASH_DIGITS]
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
