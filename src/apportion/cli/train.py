"""`apportion train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.cli.options import Loading
from apportion.cli.quiet import quiet
from apportion.cli.terminal import Terminal
from apportion.data.mixture import mix, parse_weights
from apportion.data.sources import named_sources, read_rows
from apportion.errors import ConfigurationError
from apportion.loading import load_model
from apportion.peft.load import merge_below
from apportion.records.locks import require_unlocked
from apportion.records.mask import load_mask
from apportion.records.outputs import check_output_folder
from apportion.records.plan import load_plan
from apportion.signals import end_by
from apportion.training.procedures.registry import find_procedure
from apportion.training.processes import on_first
from apportion.training.settings import TrainSettings
from apportion.training.sft import train


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    plan: Path
    data: list[str]
    weights: str | None
    output: Path
    model: str | None
    samples: int | None
    loading: Loading
    settings: dict[str, Any]
    mask: Path | None
    on_top_of: Path | None
    resume: bool


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Train, save the adapter and print a summary."""
    quiet()
    chosen = load_plan(args.plan)
    find_procedure(chosen)  # an unknown one is refused before the model is loaded
    checked = TrainSettings(**args.settings, bf16=args.loading.dtype == "bfloat16")
    checked.check()
    name = args.model or chosen.base_model
    if name is None:
        raise ConfigurationError("the plan does not name its model.", fix="give --model")
    inputs: list[str | Path] = [name, *([args.on_top_of] if args.on_top_of else [])]
    on_first(lambda: require_unlocked(args.output))
    on_first(lambda: check_output_folder(args.output, inputs=inputs, may_hold=args.resume))
    sources, shares = named_sources(args.data), parse_weights(args.weights)
    parts = {task: read_rows(source, num_rows=args.samples, seed=checked.seed) for task, source in sources.items()}
    rows = mix(parts, shares, checked.seed)
    chosen_mask = load_mask(args.mask) if args.mask else None
    facts: dict[str, Any] = {"model": name, "dtype": args.loading.dtype, "data": sources, "weights": shares}
    loaded, tokenizer = load_model(name, args.loading.dtype, trust_remote_code=args.loading.trust_remote_code)
    below = None
    if args.on_top_of:
        loaded, below = merge_below(loaded, args.on_top_of)
    result = train(
        loaded,
        tokenizer,
        chosen,
        rows,
        args.output,
        checked,
        mask=chosen_mask,
        resume=args.resume,
        facts=facts | {"on_top_of": below},
    )
    console.print(str(result.model.receipt))
    if result.truncated:
        console.print(f"{result.truncated} rows were longer than {checked.max_length} tokens and were cut")
    if result.interrupted:
        console.print(
            f"stopped at step {result.steps} with a checkpoint; run the same command with --resume to continue"
        )
        end_by(result.signal)
    console.print(
        f"{result.steps} steps, mean loss {result.loss:.4f}, {result.tokens_per_s:,.0f} tokens per second "
        f"-> {args.output}"
    )
    return result.as_dict() | {
        "adapter": str(args.output),
        "trainable_parameters": result.model.receipt.trainable_parameters,
    }
