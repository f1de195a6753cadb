"""`apportion plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from apportion.cli.render import cost_table, draw, heat_map, lora_expert_map, rank_table
from apportion.errors import ConfigurationError
from apportion.methods.budget import spent
from apportion.methods.planning import plan
from apportion.records.outputs import check_output
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
    force: bool,
) -> dict[str, Any]:
    """Make a plan from a profile, save it and show it."""
    check_output(output, "plan", inputs=(profile,), force=force)
    if picture:
        if picture.resolve() == output.resolve():
            raise ConfigurationError(f"plan and picture would both be written to {output}.", fix="give two files")
        check_output(picture, "picture", inputs=(profile,), force=force)
    measured = load_profile(profile)
    made = plan(measured, method, rank=rank, alpha=alpha, seed=seed, **options)
    made.save(output)
    ranks = sorted({placement.rank for placement in made.placements})
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    console.print(cost_table(made.cost, f"{method} on {made.model}, {shown}"))
    if len(ranks) > 1:
        console.print(rank_table(made, measured.layout))
    if not made.is_mergeable:
        console.print(lora_expert_map(made, measured.layout))
    if made.options.get("budget"):
        taken, allowed = spent(made.options["budget"], made.placements, measured)
        unit = made.options["budget"].partition("=")[0]
        console.print(f"budget: {taken:,} of {allowed:,} {unit}, {allowed - taken:,} under")
    if made.cost.sites_by_kind.get("experts"):
        console.print(heat_map(measured, made))
        if picture:
            draw(heat_map(measured, made), f"{method} on {made.model}", picture)
    console.print(f"-> {output}")
    return made.as_dict() | {"plan": str(output)}
