"""`apportion plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from apportion.cli.render import cost_table, draw, heat_map
from apportion.methods.planning import plan
from apportion.records.profile import load_profile


def run(
    console: Console,
    *,
    profile: Path,
    output: Path,
    method: str,
    rank: int,
    alpha: float | None,
    seed: int,
    options: dict[str, Any],
    picture: Path | None,
) -> dict[str, Any]:
    """Make a plan from a profile, save it and show it."""
    measured = load_profile(profile)
    made = plan(measured, method, rank=rank, alpha=alpha, seed=seed, **options)
    made.save(output)
    console.print(cost_table(made.cost, f"{method} on {made.model}, rank {rank}"))
    if made.cost.sites_by_kind.get("experts"):
        console.print(heat_map(measured, made))
        if picture:
            draw(heat_map(measured, made), f"{method} on {made.model}", picture)
    console.print(f"-> {output}")
    return made.as_dict() | {"plan": str(output)}
