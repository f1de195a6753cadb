"""`apportion methods`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from apportion.cli.terminal import Terminal
from apportion.methods.registry import METHODS


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command: none besides --json."""


def run(console: Terminal, _args: Arguments) -> dict[str, Any]:
    """Show the table of methods."""
    listed: dict[str, dict[str, Any]] = {
        method.name: {
            "summary": method.summary,
            "source": method.source,
            "options": {name: _default(field.default) for name, field in method.options.model_fields.items()},
            "descriptions": {name: field.description for name, field in method.options.model_fields.items()},
        }
        for method in METHODS.values()
    }
    table = Table("method", "summary", "options", "source")
    for name, facts in listed.items():
        options = ", ".join(f"{option}={default}" for option, default in facts["options"].items())
        table.add_row(name, facts["summary"], options, facts["source"])
    console.print(table)
    return listed


def _default(value: Any) -> Any:
    """Format a default as typed on the command line."""
    return ",".join(value) if isinstance(value, tuple) else value
