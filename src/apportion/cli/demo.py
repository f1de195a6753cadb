"""`apportion demo`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from apportion.cli.quiet import quiet
from apportion.cli.render import heat_map
from apportion.cli.terminal import Terminal, as_text
from apportion.demo import QUICK, DemoResult, DemoSettings, run_demo
from apportion.records.outputs import DEMO_RESULTS_FILE
from apportion.records.plan import load_plan


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    output: Path
    quick: bool


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Run the demonstration and show its table."""
    quiet()
    settings = QUICK if args.quick else DemoSettings()
    with console.status("starting") as status:
        result = run_demo(args.output, settings, report=lambda text: _say(console, status, text))
    for task in settings.tasks:
        made = load_plan(args.output / task / "hellora" / "plan.json")
        console.print(heat_map(result.profile, made, task=task, digits=not console.has_colours))
        console.print()
    console.print(comparison_table(result))
    console.print(f"settings, figures and versions -> {args.output / DEMO_RESULTS_FILE}")
    if args.quick:
        console.print("--quick trains too little to compare the methods")
    return result.as_dict()


def comparison_table(result: DemoResult) -> Table:
    """Return a table of all runs, grouped by task.

    Args:
        result: The demonstration's result.

    Returns:
        For each task, one row for the base model and one row per method.
    """
    caption = (
        "of LoRA: trainable parameters relative to LoRA; FLOPs: adapter FLOPs per token; match: exact match on "
        "held-out rows; unrelated: loss on another task, before and after training, to measure forgetting"
    )
    table = Table(
        title="five placements, same data, steps and seed",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in ("task", "method"):
        table.add_column(name)
    for name in ("trainable", "of LoRA", "FLOPs", "tokens/s", "match", "unrelated"):
        table.add_column(name, justify="right")
    for task, runs in itertools.groupby(result.runs, key=lambda run: run.task):
        for number, run_ in enumerate(runs):
            if number == 0:
                scores = (f"{run_.before['exact_match']:.3f}", f"{run_.unrelated_before['loss']:.3f}")
                table.add_row(task, "(none)", "", "", "", "", *scores, style="dim")
            table.add_row(
                "",
                run_.method,
                f"{run_.cost['trainable_parameters']:,}",
                f"{run_.cost['lora_count_ratio']:.1%}",
                f"{run_.cost['adapter_flops_per_token']:,.0f}",
                f"{run_.training['tokens_per_s']:,.0f}",
                f"{run_.after['exact_match']:.3f}",
                f"{run_.unrelated_after['loss']:.3f}",
            )
        table.add_section()
    return table


def _say(console: Terminal, status: Any, text: str) -> None:
    """Show progress: a spinner on a terminal, a line otherwise."""
    status.update(as_text(text))
    if not console.is_terminal:
        console.print(text)
