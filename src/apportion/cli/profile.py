"""`apportion profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm

from apportion.cli.quiet import quiet
from apportion.cli.render import heat_map
from apportion.data.batches import batches, encode
from apportion.data.sources import named_source, read_rows
from apportion.errors import ConfigurationError
from apportion.loading import load_model
from apportion.profiling.run import profile
from apportion.records.profile import Profile


def run(
    console: Console,
    *,
    model: str,
    data: list[str],
    output: Path,
    samples: int,
    max_length: int,
    batch_size: int,
    sensitivity: bool,
    seed: int,
    dtype: str | None,
) -> dict[str, Any]:
    """Read the data, run the model over them, save and show the profile."""
    quiet()
    sources = _sources(data)
    rows = {name: read_rows(source, num_rows=samples, seed=seed) for name, source in sources.items()}
    loaded, tokenizer = load_model(model, dtype)
    encoded = {name: [encode(row, tokenizer, max_length) for row in part] for name, part in rows.items()}
    truncated = {name: sum(row.truncated for row in part) for name, part in encoded.items()}
    pad_id = int(tokenizer.pad_token_id or 0)
    streams = {
        name: tqdm(list(batches(part, pad_id, batch_size)), desc=name, delay=2.0) for name, part in encoded.items()
    }
    measured = profile(
        loaded,
        streams,
        sensitivity=sensitivity,
        provenance={"model": model, "data": sources, "truncated": truncated, "max_length": max_length, "seed": seed},
    )
    measured.save(output)
    for name, count in truncated.items():
        if count:
            console.print(f"{name}: {count} rows were longer than {max_length} tokens and were cut")
    if measured.layout.is_moe:
        for task in measured.tasks:
            console.print(heat_map(measured, task=task))
    console.print(f"{_tokens(measured)} of {measured.layout.describe()} -> {output}")
    return {
        "profile": str(output),
        "digest": measured.digest,
        "tokens": measured.tokens,
        "truncated": truncated,
        "counts": {task: counts.tolist() for task, counts in measured.counts.items()},
    }


def _sources(data: list[str]) -> dict[str, str]:
    """Name every data set, and refuse two of one name."""
    named = [named_source(text) for text in data]
    sources = dict(named)
    if len(sources) < len(named):
        raise ConfigurationError("two data sets have the same name.\n  fix:  name them: --data NAME=DATA")
    return sources


def _tokens(measured: Profile) -> str:
    """Say how much was counted."""
    return ", ".join(f"{task}: {count:,} tokens" for task, count in measured.tokens.items())
