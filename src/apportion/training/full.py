"""Full fine-tuning of all weights, the baseline for adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apportion.data.sources import Row
from apportion.training.checked_rows import check_rows
from apportion.training.procedures.base import TrainingHooks
from apportion.training.result import TrainResult
from apportion.training.settings import TrainSettings
from apportion.training.trainer import Session, fit


def train_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    folder: Path,
    settings: TrainSettings,
) -> TrainResult:
    """Train all weights of a model in place. Nothing is saved, and the run cannot be resumed.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Training rows.
        folder: Folder for the trainer's files.
        settings: Settings of the run. Those of adapters are ignored.

    Returns:
        The trained model and the run's figures.

    Raises:
        DataError: the rows cannot be trained on.
        TrainingError: the loss is not finite.
    """
    settings.check()
    checked = check_rows(rows, tokenizer, settings.max_length)
    model.requires_grad_(True)  # noqa: FBT003 - PyTorch's signature
    return fit(model, Session(tokenizer, checked, folder, settings, progress=False), TrainingHooks())
