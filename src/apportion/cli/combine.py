"""`apportion combine`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.cli.base import base_of
from apportion.cli.quiet import quiet
from apportion.cli.terminal import Terminal
from apportion.errors import ConfigurationError, PlanMismatchError
from apportion.loading import load_model
from apportion.peft.load import load, read_adapter_config, read_adapter_plan
from apportion.records.outputs import check_output_folder
from apportion.training.phase import save_adapter


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    adapters: list[Path]
    output: Path
    weights: str | None
    how: str
    model: str | None
    dtype: str | None
    trust_remote_code: bool


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Load the adapters onto one model, combine them, and save the result."""
    quiet()
    weights = _parse_weights(args.weights, len(args.adapters))
    _check_same_base(args.adapters)
    name = base_of(args.adapters[0], args.model)
    check_output_folder(args.output, inputs=(*args.adapters, name))
    loaded, _ = load_model(name, args.dtype, trust_remote_code=args.trust_remote_code)
    names = [f"a{number}" for number in range(len(args.adapters))]
    peft_model = load(loaded, args.adapters[0], adapter_name=names[0])
    for path, adapter in zip(args.adapters[1:], names[1:], strict=True):
        peft_model.load_adapter(path, adapter)
    peft_model.add_weighted_adapter(names, weights, "default", combination_type=args.how)
    for adapter in names:
        peft_model.delete_adapter(adapter)
    save_adapter(peft_model, args.output)
    count = sum(parameter.numel() for key, parameter in peft_model.named_parameters() if ".default." in key)
    console.print(f"{len(args.adapters)} adapters combined by {args.how}: {count:,} parameters -> {args.output}")
    return {"adapter": str(args.output), "parameters": count, "weights": weights, "how": args.how}


def _parse_weights(text: str | None, count: int) -> list[float]:
    """Parse the weights; by default they are equal and sum to 1."""
    if text is None:
        return [1 / count] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"weights={text!r} is not understood.", fix="give numbers: 0.5,0.5") from error
    if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
        raise ConfigurationError(f"weights={text!r} are not {count} finite numbers.", fix="give one weight per adapter")
    return weights


def _check_same_base(adapters: list[Path]) -> None:
    """Refuse adapters of different models, before a model is loaded."""
    if len(adapters) < 2:
        raise ConfigurationError("only one adapter was given.", fix="give two or more adapters to combine")
    plans = {path: read_adapter_plan(path) for path in adapters}
    first = plans[adapters[0]]
    for path, plan in plans.items():
        if (plan.fingerprint, plan.base_model) != (first.fingerprint, first.base_model):
            raise PlanMismatchError(f"the adapters in {adapters[0]} and {path} are for different models.")
        if read_adapter_config(path).on_top_of:
            raise ConfigurationError(
                f"the adapter in {path} was trained on top of another adapter, so it cannot be combined.",
                fix="merge it instead",
            )
