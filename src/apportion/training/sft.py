"""`train`: supervised fine-tuning of a planned adapter, in as many phases as the plan needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apportion.data.sources import Row
from apportion.errors import ConfigurationError
from apportion.records.mask import Mask
from apportion.records.plan import Plan
from apportion.training.lori import train_sparse
from apportion.training.phase import run_phase
from apportion.training.processes import locked_by_first
from apportion.training.runs import run_identity
from apportion.training.settings import TrainSettings
from apportion.training.trainer import TrainResult


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    rows: Sequence[Row],
    output: str | os.PathLike[str],
    settings: TrainSettings | None = None,
    *,
    mask: Mask | None = None,
    resume: bool = False,
    progress: bool = True,
    facts: dict[str, Any] | None = None,
) -> TrainResult:
    """Attach a plan's adapters, train them on the rows' completions, and save them.

    The loop, the schedule and the checkpoints are TRL's and transformers'. A checkpoint is written every
    `save_every` steps and on Ctrl-C, SIGTERM and SIGHUP; a run that was killed goes on from the last whole one with
    `resume`, and ends with the same weights as a run that was not. A sparse plan is trained as `train_sparse` says.

    Args:
        model: The base model; it gets the adapters.
        tokenizer: Its tokenizer.
        plan: The plan.
        rows: Training rows; the loss counts their completions alone, or all of a ``text`` row.
        output: Folder for the adapter, the checkpoints and the run's facts.
        settings: Settings of the run.
        mask: For a sparse plan, the entries to train, instead of those that a first phase finds.
        resume: Go on in a folder that a run with the same settings, plan and rows has left; begin if it is empty.
        progress: Show a bar on standard error.
        facts: More facts to keep in the folder: ``model``, ``dtype``, ``data``; ``on_top_of``, as `merge_below` gives
            it.

    Returns:
        The trained model and the run's figures.

    Raises:
        ConfigurationError: a setting is out of range, `resume` was asked for a run of other settings, or a mask was
            given for a plan that is not sparse.
        FolderInUseError: another process trains in the folder.
        OutputExistsError: the folder has something in it and `resume` was not asked for.
        PlanMismatchError: the plan is for another model.
        TrainingError: the loss or a weight is not a number, or the newest checkpoint was changed.
    """
    settings = settings or TrainSettings()
    settings.check()
    if settings.balance_loss and plan.is_mergeable:
        raise ConfigurationError(
            "a balance loss was asked for, and no adapter has several LoRA experts.",
            fix="leave it out, or plan with lora_smoe, mola or uniform",
        )
    if not plan.is_sparse and (mask is not None or settings.of_sparse_plans()):
        asked = "a mask" if mask is not None else ", ".join(settings.of_sparse_plans())
        raise ConfigurationError(
            f"{asked} was given, and the plan is not sparse.", fix="leave it out, or plan with lori or hellori"
        )
    folder = Path(output)
    common: dict[str, Any] = {"resume": resume, "progress": progress, "facts": facts}
    with locked_by_first(folder):
        if plan.is_sparse:
            return train_sparse(model, tokenizer, plan, rows, folder, settings, mask=mask, **common)
        identity = run_identity(plan, rows, settings, facts)
        attach = {"on_top_of": (facts or {}).get("on_top_of")}
        return run_phase(model, tokenizer, plan, rows, folder, settings, identity=identity, attach=attach, **common)
