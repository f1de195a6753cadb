"""`train`: supervised fine-tuning of a planned adapter, by the plan's procedure."""

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
from apportion.training.phase import run_phase
from apportion.training.procedures.registry import find_procedure
from apportion.training.processes import locked_by_first
from apportion.training.result import TrainResult
from apportion.training.runs import Run
from apportion.training.settings import TrainSettings


class RunOptions(TypedDict, total=False):
    """Options of `train` besides the settings.

    Args:
        mask: For a sparse plan, the entries to train. If given, the first phase is skipped.
        resume: Resume a run with the same settings, plan and rows in the folder; start anew if the folder is empty.
        progress: Show a progress bar on standard error (default: True).
        facts: Facts to record in the folder: ``model``, ``dtype``, ``data``, and ``on_top_of`` as `merge_below` returns
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

    TRL and transformers provide the loop, the schedule and the checkpoints. A checkpoint is written every
    `save_every` steps and on Ctrl-C, SIGTERM and SIGHUP. With `resume`, a killed run continues from the last complete
    checkpoint and ends with the same weights as an uninterrupted run. The plan's `procedure` says what
    happens to the adapters in between; those of sparse plans are trained in two phases.

    Args:
        model: The base model; the adapters are attached to it.
        tokenizer: Its tokenizer.
        plan: The plan.
        rows: Training rows. The loss covers only completions, or all tokens of a ``text`` row.
        output: Folder for the adapter, the checkpoints and the run's files.
        settings: Settings of the run.
        **options: ``mask``, ``resume``, ``progress`` and ``facts``; see `RunOptions`.

    Returns:
        The trained model and the run's figures.

    Raises:
        ConfigurationError: a setting is out of range, `resume` was set for a run with other settings, or a mask was
            given for a plan that is not sparse.
        FolderInUseError: another process is training in the folder.
        OutputExistsError: the folder is not empty and `resume` was not set.
        PlanError: the plan's procedure is unknown, or cannot train the plan.
        PlanMismatchError: the plan is for another model.
        TrainingError: the loss or a weight is not finite, or the newest checkpoint was changed.
    """
    run = Run(tokenizer, plan, rows, Path(output), settings or TrainSettings(), **options)
    run.settings.check()
    if run.settings.balance_loss and plan.is_mergeable:
        raise ConfigurationError(
            "balance_loss is set, but no adapter has several LoRA experts.",
            fix="leave it out, or plan with lora_smoe, mola or uniform",
        )
    procedure = find_procedure(plan)
    procedure.check(run)
    with locked_by_first(run.folder):
        return procedure.train(model, run, run_phase)
