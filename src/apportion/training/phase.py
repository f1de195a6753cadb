"""One phase of supervised fine-tuning: adapters attached, trained and saved."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from apportion.errors import AdapterError
from apportion.peft.attach import apply
from apportion.peft.state import non_finite
from apportion.records.files import use_default_mode, write_text
from apportion.training.processes import on_first
from apportion.training.runs import Run, open_run
from apportion.training.trainer import TrainResult, check_rows, fit

RESULT_FILE = "training.json"


def run_phase(
    model: PreTrainedModel, run: Run, identity: dict[str, Any], attach: dict[str, Any] | None = None
) -> TrainResult:
    """Attach a plan's adapters, train them once, and save them.

    Args:
        model: The base model; it gets the adapters.
        run: What is trained, where and how.
        identity: What a run that is resumed must share with this one, as `Run.identity` returns it.
        attach: More arguments for `apply`.

    Returns:
        The trained model and the run's figures.

    Raises:
        ConfigurationError: `resume` was asked for a run of other settings.
        OutputExistsError: the folder has something in it and `resume` was not asked for.
        PlanMismatchError: the plan is for another model.
        TrainingError: the loss is not a number.
    """
    folder, settings = run.folder, run.settings
    last = on_first(lambda: open_run(folder, identity, resume=run.resume))
    checked = check_rows(run.rows, run.tokenizer, settings.max_length)
    peft_model = apply(model, run.plan, **{"seed": settings.seed, "dropout": settings.dropout} | (attach or {}))
    on_first(lambda: run.write(identity))
    fitted = fit(
        peft_model,
        run.tokenizer,
        checked.rows,
        folder,
        settings,
        truncated=checked.truncated,
        checkpoint=last,
        progress=run.progress,
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
