"""`apportion profile`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from apportion.cli.options import Loading
from apportion.cli.quiet import quiet
from apportion.cli.render import heat_map, sensitivity_table
from apportion.cli.terminal import Terminal
from apportion.data.batches import TrainableRows, batches, encode, trainable_rows
from apportion.data.sources import Row, named_sources, read_rows
from apportion.errors import ApportionWarning, ConfigurationError, DataError, OutputWriteError
from apportion.loading import load_model
from apportion.profiling.run import SensitivityProcedure, profile
from apportion.profiling.totals import own_partial, remove_partial
from apportion.records.files import write_error
from apportion.records.outputs import check_output
from apportion.records.profile import Profile
from apportion.records.temporary import temporary_folder

_MAX_SIZE_RATIO = 10


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    model: str
    data: list[str]
    output: Path
    samples: int
    max_length: int
    batch_size: int
    sensitivity: bool
    procedure: SensitivityProcedure | None
    seed: int
    loading: Loading
    force: bool


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Read the data, run the model on it, save the profile and show it."""
    quiet()
    if args.procedure and not args.sensitivity:
        raise ConfigurationError("--sensitivity-procedure needs --sensitivity.", fix="add --sensitivity")
    if args.loading.low_memory and args.sensitivity:
        raise ConfigurationError(
            "--sensitivity needs all weights in memory, but --low-memory keeps them on disk.",
            fix="drop --sensitivity or --low-memory",
        )
    sources = named_sources(args.data)
    check_output(args.output, "profile", inputs=(args.model, *sources.values()), force=args.force)
    partial = f"{args.output}.partial"
    rows = {name: read_rows(source, num_rows=args.samples, seed=args.seed) for name, source in sources.items()}
    facts = {
        "model": args.model,
        "data": sources,
        "max_length": args.max_length,
        "seed": args.seed,
        "batch_size": args.batch_size,
    }
    with _weights_on_disk(args.output) if args.loading.low_memory else nullcontext() as offload:
        loaded, tokenizer = load_model(
            args.model, args.loading.dtype, offload=offload, trust_remote_code=args.loading.trust_remote_code
        )
        usable = {
            name: _with_labels(name, part, tokenizer, args.max_length)
            for name, part in rows.items()
            if args.sensitivity
        }
        rows |= {name: part.rows for name, part in usable.items()}
        left_out = {name: part.left_out for name, part in usable.items()}
        _warn_of_uneven_sizes({name: len(part) for name, part in rows.items()}, sensitive=args.sensitivity)
        encoded = {name: [encode(row, tokenizer, args.max_length) for row in part] for name, part in rows.items()}
        truncated = {name: sum(row.truncated for row in part) for name, part in encoded.items()}
        pad_id = int(tokenizer.pad_token_id or 0)
        streams = {
            name: tqdm(list(batches(part, pad_id, args.batch_size)), desc=name, delay=2.0)
            for name, part in encoded.items()
        }
        measured = profile(
            loaded,
            streams,
            sensitivity=args.procedure or args.sensitivity,
            provenance=facts | {"truncated": truncated, "left_out": left_out, "samples": args.samples},
            partial=partial,
            keep_partial=True,
        )
    _save(measured, args.output, partial)
    cut = {
        name: f"{count} rows were longer than {args.max_length} tokens and were cut"
        for name, count in truncated.items()
    }
    notes = [f"{name}: {text}" for name, text in cut.items() if truncated[name]]
    notes += [f"{n}: {p.left_out_message(args.max_length)} and were skipped" for n, p in usable.items() if p.left_out]
    _show(console, measured, notes)
    console.print(f"{_tokens(measured)} of {measured.layout.describe()} -> {args.output}")
    return {
        "profile": str(args.output),
        "digest": measured.digest,
        "tokens": measured.tokens,
        "truncated": truncated,
        "left_out": left_out,
        "sensitivity": measured.sensitivity,
        "counts": {task: counts.tolist() for task, counts in measured.counts.items()},
    }


def _show(console: Terminal, measured: Profile, notes: list[str]) -> None:
    """Show the notes on truncated and skipped rows, and the measurements."""
    for note in notes:
        console.print(note)
    if measured.layout.is_moe:
        for task in measured.tasks:
            console.print(heat_map(measured, task=task, digits=not console.has_colours))
    if measured.sensitivity:
        console.print(sensitivity_table(measured))


def _save(measured: Profile, output: Path, partial: str) -> None:
    """Save the profile, then remove the partial totals."""
    try:
        measured.save(output)
    except OSError as error:
        if not own_partial(partial).is_file():
            raise
        reason = error if isinstance(error, OutputWriteError) else write_error(output, error)
        kept = f"the measurements, in {partial}; run the same command again to continue from them"
        raise reason.adding(details={"kept": kept}) from error
    remove_partial(partial)


def _weights_on_disk(output: Path) -> AbstractContextManager[Path]:
    """Create a folder next to the output for weights that the checkpoint stores in another form."""
    output.parent.mkdir(parents=True, exist_ok=True)
    return temporary_folder(output.parent, "weights")


def _with_labels(task: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TrainableRows:
    """Drop rows without a labelled token, which have no gradient."""
    try:
        return trainable_rows(rows, tokenizer, max_length)
    except DataError as error:
        raise error.within(f"task {task!r}") from error


def _warn_of_uneven_sizes(sizes: dict[str, int], *, sensitive: bool) -> None:
    """Warn if one task has far fewer rows than another."""
    small, large = min(sizes, key=lambda name: sizes[name]), max(sizes, key=lambda name: sizes[name])
    if sensitive and sizes[large] >= _MAX_SIZE_RATIO * sizes[small]:
        warnings.warn(
            f"task {small!r} has {sizes[small]} rows and {large!r} has {sizes[large]}: all tasks have equal weight, "
            "but the sensitivity of the small one is measured on less data.",
            ApportionWarning,
            stacklevel=2,
        )


def _tokens(measured: Profile) -> str:
    """Format the number of tokens of each task."""
    return ", ".join(f"{task}: {count:,} tokens" for task, count in measured.tokens.items())
