"""One phase of supervised fine-tuning: adapters attached, trained and saved."""

from __future__ import annotations

import json
import os
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from apportion.errors import AdapterError
from apportion.peft.attach import apply
from apportion.peft.state import non_finite
from apportion.records.files import naming_output, sync, use_default_mode, write_text
from apportion.records.outputs import ADAPTER_CONFIG_FILE, ADAPTER_TENSORS_FILE
from apportion.records.temporary import temporary_folder
from apportion.training.checked_rows import check_rows
from apportion.training.procedures.balance import BalanceLoss
from apportion.training.procedures.base import Phase
from apportion.training.procedures.composed import Composed
from apportion.training.procedures.plans import plan_to_resume
from apportion.training.processes import on_first
from apportion.training.result import TrainResult
from apportion.training.runs import open_run
from apportion.training.trainer import Session, fit

RESULT_FILE = "training.json"


def run_phase(model: PreTrainedModel, phase: Phase) -> TrainResult:
    """Attach a plan's adapters, train them once, and save them.

    A run that is resumed attaches the plan of its checkpoint, which may be derived from the run's plan.

    Args:
        model: The base model; the adapters are attached to it.
        phase: The phase.

    Returns:
        The trained model and the run's figures.

    Raises:
        ConfigurationError: `resume` was set, but the run in the folder has other settings.
        OutputExistsError: the folder is not empty and `resume` was not set.
        PlanMismatchError: the plan is for another model.
        TrainingError: the loss is not finite.
    """
    run, settings, folder = phase.run, phase.run.settings, phase.run.folder
    last = on_first(lambda: open_run(folder, phase.identity, resume=run.resume))
    checked = check_rows(run.rows, run.tokenizer, settings.max_length)
    peft_model = apply(
        model,
        run.plan if last is None else plan_to_resume(last, run.plan),
        seed=settings.seed if phase.seed is None else phase.seed,
        dropout=settings.dropout,
        mask=phase.mask,
        phase=phase.options,
    )
    on_first(lambda: run.write(phase.identity))
    session = Session(run.tokenizer, checked, folder, settings, run.plan, last, run.progress)
    hooks = Composed(phase.hooks, BalanceLoss(settings.balance_loss)) if settings.balance_loss else phase.hooks
    result = fit(peft_model, session, hooks)
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
    with naming_output(target / ADAPTER_TENSORS_FILE):
        target.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target, "adapter") as temporary:
            model.save_pretrained(temporary)
            for name in (ADAPTER_TENSORS_FILE, ADAPTER_CONFIG_FILE):
                use_default_mode(temporary / name)
                sync(temporary / name)
                (temporary / name).replace(target / name)
