"""`apportion demo`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from apportion.cli.quiet import quiet
from apportion.cli.render import heat_map
from apportion.demo import QUICK, DemoResult, DemoSettings, run_demo
from apportion.records.outputs import DEMO_RESULTS_FILE
from apportion.records.plan import load_plan


@dataclass(frozen=True)
class Arguments:
    """What the command was given, by the names of its options."""

    output: Path
    quick: bool


def run(console: Console, args: Arguments) -> dict[str, Any]:
    """Run the demonstration and show its table."""
    quiet()
    settings = QUICK if args.quick else DemoSettings()
    with console.status("starting") as status:
        result = run_demo(args.output, settings, report=lambda text: _say(console, status, text))
    for task in settings.tasks:
        console.print(heat_map(result.profile, load_plan(args.output / task / "hellora" / "plan.json"), task=task))
        console.print()
    console.print(comparison_table(result))
    console.print(f"settings, figures and versions -> {args.output / DEMO_RESULTS_FILE}")
    if args.quick:
        console.print("this was --quick: too little training to tell the methods apart")
    return result.as_dict()


def comparison_table(result: DemoResult) -> Table:
    """Lay out every run under the model that it started from.

    Args:
        result: The demonstration's result.

    Returns:
        For each task, one row for the base model and one a method.
    """
    caption = (
        "of LoRA: share of its trainable parameters; FLOPs: of the adapters, a token; match: exact match on held-out "
        "rows; unrelated: loss on another task, before and after, as a measure of forgetting"
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
        table.add_column(name, no_wrap=True)
    for name in ("trainable", "of LoRA", "FLOPs", "tokens/s", "match", "unrelated"):
        table.add_column(name, justify="right", no_wrap=True)
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


def _say(console: Console, status: Any, text: str) -> None:
    """Show what is being done: a spinner on a terminal, a line elsewhere."""
    status.update(text)
    if not console.is_terminal:
        console.print(text)
