"""One phase of supervised fine-tuning: adapters attached, trained and saved."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apportion.data.sources import Row
from apportion.errors import AdapterError
from apportion.peft.attach import apply
from apportion.peft.state import non_finite
from apportion.records.files import use_default_mode, write_text
from apportion.records.plan import Plan
from apportion.training.processes import on_first
from apportion.training.runs import RUN_FILE, open_run
from apportion.training.settings import TrainSettings
from apportion.training.trainer import TrainResult, check_rows, fit

RESULT_FILE = "training.json"


def run_phase(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    rows: Sequence[Row],
    folder: Path,
    settings: TrainSettings,
    *,
    identity: dict[str, Any],
    attach: dict[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
    facts: dict[str, Any] | None = None,
) -> TrainResult:
    """Attach a plan's adapters, train them once, and save them.

    Args:
        model: The base model; it gets the adapters.
        tokenizer: Its tokenizer.
        plan: The plan.
        rows: Training rows.
        folder: Folder for the adapter, the checkpoints and the run's facts.
        settings: Settings of the run.
        identity: As `run_identity` gives it.
        attach: More arguments for `apply`.
        resume: Go on in a folder that the same run has left; begin if it is empty.
        progress: Show a bar on standard error.
        facts: More facts to keep in the folder.

    Returns:
        The trained model and the run's figures.

    Raises:
        ConfigurationError: `resume` was asked for a run of other settings.
        OutputExistsError: the folder has something in it and `resume` was not asked for.
        PlanMismatchError: the plan is for another model.
        TrainingError: the loss is not a number.
    """
    last = on_first(lambda: open_run(folder, identity, resume=resume))
    checked = check_rows(rows, tokenizer, settings.max_length)
    peft_model = apply(model, plan, **{"seed": settings.seed, "dropout": settings.dropout} | (attach or {}))
    run = {"identity": identity, "settings": settings.as_dict(), **(facts or {})}
    on_first(lambda: write_text(folder / RUN_FILE, json.dumps(run, indent=1) + "\n"))
    fitted = fit(
        peft_model,
        tokenizer,
        checked.rows,
        folder,
        settings,
        truncated=checked.truncated,
        checkpoint=last,
        progress=progress,
    )
    result = replace(fitted, left_out=checked.left_out)
    if not result.interrupted:
        facts_of_run = json.dumps({**result.as_dict(), "loss_curve": result.loss_curve}, indent=1) + "\n"
        on_first(lambda: save_adapter(peft_model, folder))
        on_first(lambda: write_text(folder / RESULT_FILE, facts_of_run))
    return result


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Save an adapter so that its folder holds either all of it or no ``adapter_config.json``.

    Args:
        model: A model with adapters.
        folder: Where ``adapter_model.safetensors`` and ``adapter_config.json`` belong.

    Raises:
        AdapterError: a number of the adapter is not finite.
    """
    bad = non_finite({name: tensor for name, tensor in model.named_parameters() if "lora_" in name})
    if bad:
        raise AdapterError(f"the adapter cannot be saved: {bad[0]} is not finite.", fix="lower the weights or rates")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter.", dir=target) as temporary:
        model.save_pretrained(temporary)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            use_default_mode(Path(temporary, name))
            shutil.move(Path(temporary, name), target / name)
