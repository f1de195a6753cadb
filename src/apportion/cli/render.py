"""Tables and heat maps for the terminal."""

from __future__ import annotations

import io
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table
from rich.text import Text

from apportion import counting
from apportion.cli.terminal import Terminal
from apportion.records.cost import Cost
from apportion.records.files import write_text
from apportion.records.placement import Placement
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.records.site import Layout
from apportion.records.tensors import arrays_of

_ROUTING = {
    "profile": "routing measured in the profile",
    "even": "assumes even routing (give --profile for measured routing)",
    "none": "no routed experts",
}
_UNITS = ("B", "kB", "MB", "GB", "TB")
_CELLS_PER_LINE = 64
_COLD_RGB, _HOT_RGB = (28, 40, 72), (255, 176, 64)


def cost_table(cost: Cost, title: str) -> Table:
    """Return a cost as a table.

    Args:
        cost: The cost.
        title: Title of the table.

    Returns:
        The table.
    """
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for kind, count in cost.sites_by_kind.items():
        table.add_row(f"sites: {kind}", f"{count:,}", "")
    table.add_section()
    table.add_row(
        "trainable parameters",
        f"{cost.trainable_parameters:,}",
        f"{cost.trainable_frac:.3%} of all, including adapters",
    )
    table.add_row("stored parameters", f"{cost.stored_parameters:,}", "")
    table.add_row("base parameters", f"{cost.base_parameters:,}", "")
    table.add_row(
        "relative to LoRA, by count",
        f"{cost.lora_count_ratio:.2%}",
        f"of {cost.lora_parameters:,} for LoRA on all targets",
    )
    table.add_row(
        "relative to LoRA, by percentage of total",
        f"{cost.lora_percentage_ratio:.2%}",
        "ratio of the two percentages, as reported in papers",
    )
    table.add_section()
    table.add_row("adapter FLOPs per token", f"{cost.adapter_flops_per_token:,.0f}", _ROUTING[cost.routing])
    table.add_row("FLOPs relative to LoRA", f"{cost.lora_flops_ratio:.2%}", "")
    table.add_row("checkpoint", readable_bytes(cost.checkpoint_bytes), "float32")
    table.add_row("gradients", readable_bytes(cost.gradient_bytes), "float32")
    table.add_row("optimizer state", readable_bytes(cost.optimizer_bytes), "AdamW, two float32 moments")
    return table


def sensitivity_table(profile: Profile) -> Table:
    """Return each projection type's share of each task's squared gradient norm.

    Args:
        profile: A profile with sensitivities.

    Returns:
        One row per projection type, one column per task.
    """
    table = Table(title="sensitivity: share of the squared gradient norm", title_justify="left", box=None)
    table.add_column("matrices")
    tasks = list(profile.sensitivity)
    for task in tasks:
        table.add_column(task, justify="right")
    shares: dict[str, list[float]] = {}
    for site in profile.layout.sites():
        if site.name in profile.sensitivity[tasks[0]]:
            row = shares.setdefault(f"{site.kind}.{site.projection}", [0.0] * len(tasks))
            for column, task in enumerate(tasks):
                row[column] += profile.sensitivity[task][site.name]
    totals = [sum(profile.sensitivity[task].values()) for task in tasks]
    for name, row in shares.items():
        table.add_row(name, *(f"{value / total:.1%}" for value, total in zip(row, totals, strict=True)))
    return table


def lora_expert_map(plan: Plan, layout: Layout) -> Table:
    """Return the number of LoRA experts of each matrix: one row per layer, one column per projection type.

    Args:
        plan: The plan.
        layout: The model's sites.

    Returns:
        The table. A dot means no adapter.
    """
    sites = [site for site in layout.sites() if site.kind != "experts" and site.storage == "linear"]
    columns = list(dict.fromkeys(f"{site.kind}.{site.projection}" for site in sites))
    table = Table(title="LoRA experts", title_justify="left", box=None)
    table.add_column("layer", justify="right")
    for column in columns:
        table.add_column(column, justify="right")
    cells: dict[int, dict[str, int]] = {}
    for site in sites:
        placement = plan.by_site.get(site.name)
        row = cells.setdefault(site.layer, {})
        key = f"{site.kind}.{site.projection}"
        row[key] = row.get(key, 0) + (placement.num_experts if placement else 0)
    for layer, row in sorted(cells.items()):
        table.add_row(str(layer), *(str(row.get(column) or "·") for column in columns))
    return table


def rank_table(plan: Plan, layout: Layout) -> Table:
    """Return the ranks and parameters of a plan, one row per projection type.

    Args:
        plan: A plan with several ranks.
        layout: The model's sites.

    Returns:
        The table.
    """
    table = Table("matrices", title="ranks", title_justify="left", box=None)
    for column in ("adapted", "of", "smallest", "median", "largest", "parameters"):
        table.add_column(column, justify="right")
    placed: dict[str, list[Placement]] = {}
    number: Counter[str] = Counter()
    for site in layout.sites():
        name = f"{site.kind}.{site.projection}"
        number[name] += 1
        if site.name in plan.by_site:
            placed.setdefault(name, []).append(plan.by_site[site.name])
    for name, placements in placed.items():
        ranks = [placement.rank for placement in placements]
        parameters = counting.count(placements, layout.by_name).trained
        shown = (len(ranks), number[name], min(ranks), statistics.median_low(ranks), max(ranks), parameters)
        table.add_row(name, *(f"{value:,}" for value in shown))
    return table


def heat_map(profile: Profile, plan: Plan | None = None, task: str | None = None, *, digits: bool = False) -> Table:
    """Return a heat map of layers by experts, coloured by routed slots. Planned experts are marked.

    Args:
        profile: The profile.
        plan: Plan whose experts are marked with a dot.
        task: Task to show; None for the sum over tasks.
        digits: Show tenths of the layer's hottest expert as digits, where there are no colours.

    Returns:
        One row per layer. Colours are relative to the layer's hottest expert. The last column is the share of the
        slots that the planned experts take.
    """
    counts = arrays_of(profile.counts)[task] if task else profile.counts_LE
    planned: Mapping[str, list[int]] = plan.experts_by_layer() if plan else {}
    title = f"routed tokens{f', {task}' if task else ''}{', in tenths of the hottest expert' if digits else ''}"
    table = Table(
        title=title + ("; planned experts: ●" if plan else ""), title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    table.add_column("layer", justify="right")
    table.add_column("experts, from 0", no_wrap=True)
    table.add_column("planned share" if plan else "", justify="right")
    for block, row in zip(profile.layout.blocks, counts.tolist(), strict=True):
        expert_counts = row[: block.num_experts]
        marked = planned.get(block.name, [])
        share = sum(expert_counts[expert] for expert in marked) / max(sum(expert_counts), 1)
        table.add_row(str(block.layer), _cells(expert_counts, marked, digits=digits), f"{share:.0%}" if plan else "")
    return table


def _cells(expert_counts: list[int], marked: list[int], *, digits: bool) -> Text:
    """Return one layer of a heat map."""
    hottest = max(*expert_counts, 1)
    wide = digits or len(expert_counts) <= _CELLS_PER_LINE // 2
    per_line = _CELLS_PER_LINE // 2 if wide else _CELLS_PER_LINE
    cells = Text()
    for expert, count in enumerate(expert_counts):
        mark = "●" if expert in marked else " "
        if digits:
            cells.append(f"{min(9, 10 * count // hottest)}{mark}")
        else:
            cells.append(mark + (" " if wide else ""), style=f"bold white on {_colour(count / hottest)}")
        if (expert + 1) % per_line == 0 and expert + 1 < len(expert_counts):
            cells.append("\n")
    return cells


def draw(table: Table, title: str, path: Path) -> None:
    """Write a table as an SVG image.

    Args:
        table: Table to draw.
        title: Title of the image.
        path: Output file.
    """
    console = Terminal(record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
    console.print(table)
    write_text(path, console.export_svg(title=title))


def readable_bytes(count: float) -> str:
    """Format a number of bytes with a suitable unit.

    Args:
        count: Number of bytes.

    Returns:
        Text such as ``1.5 MB``.

    Example:
        >>> readable_bytes(1_500_000)
        '1.5 MB'
    """
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"


def _colour(frac: float) -> str:
    """Interpolate between the cold and the hot colour."""
    parts = (round(cold + (hot - cold) * frac) for cold, hot in zip(_COLD_RGB, _HOT_RGB, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)
