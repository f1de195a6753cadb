"""`train`: supervised fine-tuning of a planned adapter, in as many phases as the plan needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apportion.data.sources import Row
from apportion.errors import ConfigurationError
from apportion.records.mask import Mask
from apportion.records.plan import Plan
from apportion.training.lori import train_sparse
from apportion.training.phase import run_phase
from apportion.training.processes import locked_by_first
from apportion.training.runs import Run
from apportion.training.settings import TrainSettings
from apportion.training.trainer import TrainResult


class RunOptions(TypedDict, total=False):
    """What `train` may be told beside the settings; a run's results do not depend on most of it.

    Args:
        mask: For a sparse plan, the entries to train, instead of those that a first phase finds.
        resume: Go on in a folder that a run with the same settings, plan and rows has left; begin if it is empty.
        progress: Show a bar on standard error; it does where not given.
        facts: More facts to keep in the folder: ``model``, ``dtype``, ``data``; ``on_top_of``, as `merge_below` gives
            it.
    """

    mask: Mask | None
    resume: bool
    progress: bool
    facts: dict[str, Any] | None


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    rows: Sequence[Row],
    output: str | os.PathLike[str],
    settings: TrainSettings | None = None,
    **options: Unpack[RunOptions],
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
        **options: A ``mask``, ``resume``, ``progress`` and ``facts``, as `RunOptions` has them.

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
    run = Run(tokenizer, plan, rows, Path(output), settings or TrainSettings(), **options)
    run.settings.check()
    if run.settings.balance_loss and plan.is_mergeable:
        raise ConfigurationError(
            "a balance loss was asked for, and no adapter has several LoRA experts.",
            fix="leave it out, or plan with lora_smoe, mola or uniform",
        )
    if not plan.is_sparse and (run.mask is not None or run.settings.sparse.given):
        asked = "a mask" if run.mask is not None else ", ".join(run.settings.sparse.given)
        raise ConfigurationError(
            f"{asked} was given, and the plan is not sparse.", fix="leave it out, or plan with lori or hellori"
        )
    with locked_by_first(run.folder):
        if plan.is_sparse:
            return train_sparse(model, run)
        return run_phase(model, run, run.identity(), {"on_top_of": (run.facts or {}).get("on_top_of")})
