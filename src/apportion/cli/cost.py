"""`apportion cost`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.cli.render import cost_table
from apportion.cli.terminal import Terminal
from apportion.configurations import known_layout
from apportion.methods.planning import check_settings, cost_on
from apportion.records.profile import Profile, load_profile
from apportion.records.site import Layout


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    model: str
    method: str
    rank: int
    seed: int
    profile: Path | None
    options: dict[str, Any]
    trust_remote_code: bool


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Count the cost and show it."""
    measured = load_profile(args.profile) if args.profile else None
    settings = check_settings(args.rank, None, args.seed)
    counted = cost_on(_layout(args, measured), args.method, settings, args.options, measured)
    console.print(cost_table(counted, f"{args.method} on {args.model}, rank {args.rank}"))
    return counted.as_dict()


def _layout(args: Arguments, measured: Profile | None) -> Layout:
    """Return the model's sites: from the package or the cache if known, otherwise by building the model."""
    fingerprint = None if measured is None else measured.fingerprint
    layout = None if args.trust_remote_code else known_layout(args.model, fingerprint)
    if layout is not None:
        return layout
    from apportion.accounting import layout_of  # imports PyTorch
    from apportion.cli.quiet import quiet

    quiet()
    return layout_of(args.model, fingerprint, trust_remote_code=args.trust_remote_code)
