"""`apportion mask`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from apportion.cli.terminal import Terminal
from apportion.records.mask import load_mask
from apportion.records.site_name import SiteName


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    file: Path
    other: Path | None


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Show the kept share of each projection type, and the overlap with another mask."""
    mask = load_mask(args.file)
    kinds: dict[str, list[int]] = {}
    for site, (rows, columns) in mask.shapes.items():
        site_name = SiteName.parse(site)
        counts = kinds.setdefault((site_name.projection or site_name.module.rpartition(".")[2]), [0, 0])
        counts[0] += mask.kept_by_site[site]
        counts[1] += rows * columns
    table = Table("matrices", "kept", "of", "share", title=str(args.file), title_justify="left")
    for name, (kept, entries) in kinds.items():
        table.add_row(name, f"{kept:,}", f"{entries:,}", f"{kept / entries:.2%}")
    table.add_section()
    table.add_row("all", f"{mask.num_kept:,}", f"{mask.num_entries:,}", f"{mask.num_kept / mask.num_entries:.2%}")
    console.print(table)
    facts: dict[str, Any] = {
        "kept": mask.num_kept,
        "entries": mask.num_entries,
        "projections": {name: {"kept": kept, "entries": entries} for name, (kept, entries) in kinds.items()},
        "provenance": mask.provenance,
    }
    if args.other:
        facts["overlap"] = mask.overlap(load_mask(args.other))
        console.print(
            f"{facts['overlap']['shared_frac']:.1%} of its kept entries are also kept by {args.other} "
            f"({facts['overlap']['by_chance']:.1%} by chance); Jaccard {facts['overlap']['jaccard']:.3f}"
        )
    return facts
