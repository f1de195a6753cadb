"""One phase of supervised fine-tuning: adapters attached, trained and saved."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from apportion.errors import AdapterError
from apportion.peft.attach import PhaseOptions, apply
from apportion.peft.state import non_finite
from apportion.records.files import use_default_mode, write_text
from apportion.records.mask import Mask
from apportion.training.processes import on_first
from apportion.training.runs import Run, open_run
from apportion.training.trainer import TrainResult, check_rows, fit

RESULT_FILE = "training.json"


def run_phase(
    model: PreTrainedModel,
    run: Run,
    identity: dict[str, Any],
    options: PhaseOptions,
    *,
    mask: Mask | None = None,
    seed: int | None = None,
) -> TrainResult:
    """Attach a plan's adapters, train them once, and save them.

    Args:
        model: The base model; the adapters are attached to it.
        run: The run's plan, data, folder and settings.
        identity: What a resumed run must share with this one, as `Run.identity` returns it.
        options: Options of the phase, for `apply`.
        mask: For a sparse plan, the entries of B to train.
        seed: Seed of the factors' initial values; by default that of the settings.

    Returns:
        The trained model and the run's figures.

    Raises:
        ConfigurationError: `resume` was set, but the run in the folder has other settings.
        OutputExistsError: the folder is not empty and `resume` was not set.
        PlanMismatchError: the plan is for another model.
        TrainingError: the loss is not finite.
    """
    folder, settings = run.folder, run.settings
    last = on_first(lambda: open_run(folder, identity, resume=run.resume))
    checked = check_rows(run.rows, run.tokenizer, settings.max_length)
    peft_model = apply(
        model,
        run.plan,
        seed=settings.seed if seed is None else seed,
        dropout=settings.dropout,
        mask=mask,
        phase=options,
    )
    on_first(lambda: run.write(identity))
    result = fit(peft_model, run.tokenizer, checked, folder, settings, checkpoint=last, progress=run.progress)
    if not result.interrupted:
        result_json = json.dumps({**result.as_dict(), "loss_curve": result.loss_curve}, indent=1) + "\n"
        on_first(lambda: save_adapter(peft_model, folder))
        on_first(lambda: write_text(folder / RESULT_FILE, result_json))
    return result


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Save an adapter so that its folder has either the whole adapter or no ``adapter_config.json``.

    Args:
        model: A model with adapters.
        folder: Folder for ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        AdapterError: a value of the adapter is not finite.
    """
    bad = non_finite({name: tensor for name, tensor in model.named_parameters() if "lora_" in name})
    if bad:
        raise AdapterError(f"the adapter cannot be saved: {bad[0]} is not finite.", fix="lower the learning rate")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter.", dir=target) as temporary:
        model.save_pretrained(temporary)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            use_default_mode(Path(temporary, name))
            shutil.move(Path(temporary, name), target / name)
