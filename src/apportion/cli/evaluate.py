"""`apportion eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from apportion.cli.quiet import quiet
from apportion.cli.terminal import Terminal
from apportion.data.sources import named_sources, read_rows
from apportion.evaluation import evaluate_tasks
from apportion.loading import load_model
from apportion.peft.load import load


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    model: str
    data: list[str]
    adapter: Path | None
    samples: int
    batch_size: int
    max_length: int
    seed: int
    dtype: str | None
    trust_remote_code: bool


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Score the model and show a table; with several data sets, also their mean."""
    quiet()
    sources = named_sources(args.data)
    rows = {
        task: read_rows(text, num_rows=args.samples, split="test", seed=args.seed) for task, text in sources.items()
    }
    loaded, tokenizer = load_model(args.model, args.dtype, trust_remote_code=args.trust_remote_code)
    scored = load(loaded, args.adapter) if args.adapter else loaded
    result = evaluate_tasks(
        scored, tokenizer, rows, batch_size=args.batch_size, max_length=args.max_length, progress=True
    )
    table = Table("task", title=f"{args.model}{f' with {args.adapter}' if args.adapter else ''}", title_justify="left")
    for heading in ("samples", "loss", "perplexity", "exact match", "rows cut"):
        table.add_column(heading, justify="right")
    for task, one in result.tasks.items():
        match = "" if one.exact_match is None else f"{one.exact_match:.4f}"
        table.add_row(task, f"{one.samples:,}", f"{one.loss:.4f}", f"{one.perplexity:.4f}", match, f"{one.truncated:,}")
    notes = [
        f"{task}: {one.left_out} of {one.samples} rows have no completion token within {args.max_length} tokens; "
        "the loss skips them"
        for task, one in result.tasks.items()
        if one.left_out
    ]
    if len(result.tasks) == 1:
        console.print(table, *notes, sep="\n")
        return next(iter(result.tasks.values())).as_dict()
    match = "" if result.exact_match is None else f"{result.exact_match:.4f}"
    table.add_section()
    table.add_row("mean", "", f"{result.loss:.4f}", "", match, "")
    console.print(table, *notes, sep="\n")
    return result.as_dict()
