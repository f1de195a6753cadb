"""`apportion demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apportion.cli.quiet import quiet
from apportion.cli.render import heat_map
from apportion.demo import QUICK, RESULTS_FILE, DemoResult, DemoSettings, run_demo
from apportion.records.plan import load_plan


def run(console: Console, *, output: Path, quick: bool) -> dict[str, Any]:
    """Run the demonstration and show its table."""
    quiet()
    settings = QUICK if quick else DemoSettings()
    with console.status("starting") as status:
        result = run_demo(output, settings, report=lambda text: _say(console, status, text))
    for task in settings.tasks:
        console.print(heat_map(result.profile, load_plan(output / task / "hellora" / "plan.json"), task=task))
        console.print()
    console.print(comparison_table(result))
    console.print(f"settings, figures and versions -> {output / RESULTS_FILE}")
    if quick:
        console.print("this was --quick: too little training to tell the methods apart")
    return result.as_dict()


def comparison_table(result: DemoResult) -> Table:
    """Lay out every run.

    Args:
        result: The demonstration's result.

    Returns:
        One row a task and method.
    """
    table = Table(title="five placements, same data, steps and seed", title_justify="left")
    for name in ("task", "method"):
        table.add_column(name)
    for name in (
        "trainable", "of LoRA", "FLOPs a token", "tokens/s", "exact match", "unrelated loss",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    last = None
    for run_ in result.runs:
        if last not in (None, run_.task):
            table.add_section()
        last = run_.task
        table.add_row(
            run_.task,
            run_.method,
            f"{run_.cost['trainable_parameters']:,}",
            f"{run_.cost['lora_count_ratio']:.1%}",
            f"{run_.cost['adapter_flops_per_token']:,.0f}",
            f"{run_.training['tokens_per_s']:,.0f}",
            f"{run_.before['exact_match']:.3f} -> {run_.after['exact_match']:.3f}",
            f"{run_.unrelated_before['loss']:.3f} -> {run_.unrelated_after['loss']:.3f}",
        )
    return table


def _say(console: Console, status: Any, text: str) -> None:
    """Show what is being done: a spinner on a terminal, a line elsewhere."""
    status.update(text)
    if not console.is_terminal:
        console.print(text)
