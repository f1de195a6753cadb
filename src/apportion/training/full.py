"""Full fine-tuning: every weight trains. The baseline that adapters save against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apportion.data.sources import Row
from apportion.training.settings import TrainSettings
from apportion.training.trainer import TrainResult, check_rows, fit


def train_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    folder: Path,
    settings: TrainSettings,
) -> TrainResult:
    """Train every weight of a model, in place; nothing is saved and nothing resumed.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Training rows.
        folder: Folder for the trainer's files.
        settings: Settings of the run; those of adapters are not used.

    Returns:
        The trained model and the run's figures.

    Raises:
        DataError: the rows cannot be trained on.
        TrainingError: the loss is not a number.
    """
    settings.check()
    checked = check_rows(rows, tokenizer, settings.max_length)
    model.requires_grad_(True)  # noqa: FBT003 - PyTorch's signature
    fitted = fit(model, tokenizer, checked.rows, folder, settings, truncated=checked.truncated, progress=False)
    return replace(fitted, left_out=checked.left_out)
