"""`apportion plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.cli.render import cost_table, draw, heat_map, lora_expert_map, rank_table
from apportion.cli.terminal import Terminal
from apportion.errors import ConfigurationError
from apportion.methods.budget import spent
from apportion.methods.planning import plan
from apportion.records.outputs import check_output
from apportion.records.profile import load_profile


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    profile: Path
    output: Path
    method: str
    rank: int
    alpha: float | None
    seed: int
    options: dict[str, Any]
    picture: Path | None
    force: bool


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Make a plan from a profile, save it and show its cost."""
    check_output(args.output, "plan", inputs=(args.profile,), force=args.force)
    if args.picture:
        if args.picture.resolve() == args.output.resolve():
            raise ConfigurationError(
                f"the plan and the picture would both be written to {args.output}.", fix="give two different files"
            )
        check_output(args.picture, "picture", inputs=(args.profile,), force=args.force)
    measured = load_profile(args.profile)
    made = plan(measured, args.method, rank=args.rank, alpha=args.alpha, seed=args.seed, **args.options)
    made.save(args.output)
    ranks = sorted({placement.rank for placement in made.placements})
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    console.print(cost_table(made.cost, f"{args.method} on {made.model}, {shown}"))
    if len(ranks) > 1:
        console.print(rank_table(made, measured.layout))
    if not made.is_mergeable:
        console.print(lora_expert_map(made, measured.layout))
    if made.options.get("budget"):
        taken, allowed = spent(made.options["budget"], made.placements, measured)
        unit = made.options["budget"].partition("=")[0]
        console.print(f"budget: {taken:,} of {allowed:,} {unit} used, {allowed - taken:,} left")
    if made.cost.sites_by_kind.get("experts"):
        console.print(heat_map(measured, made, digits=not console.has_colours))
        if args.picture:
            draw(heat_map(measured, made), f"{args.method} on {made.model}", args.picture)
    console.print(f"-> {args.output}")
    return made.as_dict() | {"plan": str(args.output)}
