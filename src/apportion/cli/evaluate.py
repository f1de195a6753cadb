"""`apportion eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apportion.cli.quiet import quiet
from apportion.data.sources import read_rows
from apportion.evaluation import evaluate
from apportion.loading import load_model
from apportion.peft.attach import load


def run(
    console: Console,
    *,
    model: str,
    data: str,
    adapter: Path | None,
    samples: int,
    batch_size: int,
    max_length: int,
    seed: int,
    dtype: str | None,
) -> dict[str, Any]:
    """Score and show."""
    quiet()
    rows = read_rows(data, num_rows=samples, split="test", seed=seed)
    loaded, tokenizer = load_model(model, dtype)
    scored = load(loaded, adapter) if adapter else loaded
    result = evaluate(scored, tokenizer, rows, batch_size=batch_size, max_length=max_length, progress=True)
    table = Table(
        title=f"{model}{f' with {adapter}' if adapter else ''} on {data}", title_justify="left", show_header=False
    )
    table.add_row("samples", f"{result.samples:,}")
    table.add_row("loss", f"{result.loss:.4f}")
    table.add_row("perplexity", f"{result.perplexity:.4f}")
    if result.exact_match is not None:
        table.add_row("exact match", f"{result.exact_match:.4f}")
    if result.truncated:
        table.add_row("rows cut", f"{result.truncated:,}")
    console.print(table)
    return result.as_dict()
