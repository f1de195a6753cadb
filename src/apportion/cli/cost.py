"""`apportion cost`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from apportion.accounting import cost
from apportion.cli.quiet import quiet
from apportion.cli.render import cost_table
from apportion.loading import config_source
from apportion.records.profile import load_profile


def run(
    console: Console,
    *,
    model: str,
    method: str,
    rank: int,
    seed: int,
    profile: Path | None,
    options: dict[str, Any],
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Count and show."""
    quiet()
    measured = load_profile(profile) if profile else None
    counted = cost(
        config_source(model),
        method,
        rank=rank,
        seed=seed,
        profile=measured,
        trust_remote_code=trust_remote_code,
        **options,
    )
    console.print(cost_table(counted, f"{method} on {model}, rank {rank}"))
    return counted.as_dict()
