"""Tables and pictures for the terminal."""

from __future__ import annotations

import io
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apportion import counting
from apportion.records.cost import Cost
from apportion.records.files import write_text
from apportion.records.placement import Placement
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.records.site import Layout
from apportion.records.tensors import arrays_of

_ROUTING = {
    "profile": "the profile's shares of routed tokens",
    "even": "even routing (give --profile for the true shares)",
    "none": "no routed experts",
}
_UNITS = ("B", "kB", "MB", "GB", "TB")
_CELLS_A_LINE = 64
_COLD_RGB, _HOT_RGB = (28, 40, 72), (255, 176, 64)


def cost_table(cost: Cost, title: str) -> Table:
    """Lay a cost out as a table.

    Args:
        cost: The cost.
        title: The table's heading.

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
        f"{cost.trainable_frac:.3%} of all, adapters counted in",
    )
    table.add_row("stored parameters", f"{cost.stored_parameters:,}", "")
    table.add_row("base parameters", f"{cost.base_parameters:,}", "")
    table.add_row(
        "share of LoRA, by count",
        f"{cost.lora_count_ratio:.2%}",
        f"of {cost.lora_parameters:,} for LoRA on all targets",
    )
    table.add_row(
        "share of LoRA, by percentage of total",
        f"{cost.lora_percentage_ratio:.2%}",
        "ratio of the two percentages, as papers print it",
    )
    table.add_section()
    table.add_row("adapter FLOPs a token", f"{cost.adapter_flops_per_token:,.0f}", _ROUTING[cost.routing])
    table.add_row("share of LoRA's FLOPs", f"{cost.lora_flops_ratio:.2%}", "")
    table.add_row("checkpoint", readable_bytes(cost.checkpoint_bytes), "float32")
    table.add_row("gradients", readable_bytes(cost.gradient_bytes), "float32")
    table.add_row("optimizer state", readable_bytes(cost.optimizer_bytes), "AdamW, two float32 moments")
    return table


def sensitivity_table(profile: Profile) -> Table:
    """Show which kinds of matrices each task's gradients need: shares of the summed squared norms.

    Args:
        profile: A profile with sensitivities.

    Returns:
        One row a projection type, one column a task.
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
    """Show how many LoRA experts each matrix gets: one row a layer, one column a projection type.

    Args:
        plan: The plan.
        layout: The model's sites.

    Returns:
        The table; a dot stands for no adapter.
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
    """Show what a plan spends on which matrices: one row a projection type.

    Args:
        plan: The plan, of several ranks.
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


def heat_map(profile: Profile, plan: Plan | None = None, task: str | None = None) -> Table:
    """Draw layers by experts, coloured by their share of the layer's routed slots, with the planned experts marked.

    Args:
        profile: The profile.
        plan: Marks its experts with a dot.
        task: The task to show; all together where not given.

    Returns:
        One row a layer: the colour runs from none to the layer's hottest expert, and the last column says which share
        of the slots the planned experts take.
    """
    counts = arrays_of(profile.counts)[task] if task else profile.counts_LE
    planned: Mapping[str, list[int]] = plan.experts_by_layer() if plan else {}
    title = f"routed tokens{f', {task}' if task else ''}" + ("; planned experts: ●" if plan else "")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    table.add_column("experts, from 0", no_wrap=True)
    table.add_column("planned take" if plan else "", justify="right")
    for block, row in zip(profile.layout.blocks, counts.tolist(), strict=True):
        own = row[: block.num_experts]
        total, hottest = max(sum(own), 1), max(*own, 1)
        marked = planned.get(block.name, [])
        wide = len(own) <= _CELLS_A_LINE // 2
        cells = Text()
        for expert, count in enumerate(own):
            mark = ("●" if expert in marked else " ") + (" " if wide else "")
            cells.append(mark, style=f"bold white on {_colour(count / hottest)}")
            if (expert + 1) % _CELLS_A_LINE == 0 and expert + 1 < len(own):
                cells.append("\n")
        share = f"{sum(own[expert] for expert in marked) / total:.0%}" if plan else ""
        table.add_row(str(block.layer), cells, share)
    return table


def draw(table: Table, title: str, path: Path) -> None:
    """Write a table as an SVG picture.

    Args:
        table: What to draw.
        title: The picture's heading.
        path: The file.
    """
    console = Console(record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
    console.print(table)
    write_text(path, console.export_svg(title=title))


def readable_bytes(count: float) -> str:
    """Write a number of bytes with a fitting unit.

    Args:
        count: The bytes.

    Returns:
        Such as ``1.5 MB``.

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
    """Mix cold and hot."""
    parts = (round(cold + (hot - cold) * frac) for cold, hot in zip(_COLD_RGB, _HOT_RGB, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)
