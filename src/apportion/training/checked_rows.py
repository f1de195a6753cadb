"""Check a run's rows before training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from apportion.data.batches import TrainableRows, trainable_rows
from apportion.data.sources import Row
from apportion.errors import ApportionWarning, DataError, lay_out


def check_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TrainableRows:
    """Check that rows can be trained on.

    All rows must have one format, because the trainer reads them all in the format of the first one. Rows without a
    completion token within `max_length` are skipped with a warning.

    Args:
        rows: Training rows.
        tokenizer: The model's tokenizer.
        max_length: Maximum number of tokens per row.

    Returns:
        The rows to train on.

    Raises:
        DataError: the rows have several formats, no row has a completion token within `max_length`, a row has no token,
            or the tokenizer has no chat template for messages.
    """
    trainable = trainable_rows(rows, tokenizer, max_length)
    formats = {
        "text" if "text" in row else "text prompts" if isinstance(row["prompt"], str) else "messages" for row in rows
    }
    if len(formats) > 1:
        raise DataError(
            f"the rows have several formats: {' and '.join(sorted(formats))}.", fix="convert all tasks to one format"
        )
    if trainable.left_out:
        warnings.warn(
            lay_out(f"{trainable.left_out_message(max_length)} and were left out.", {"fix": "raise --max-length"}),
            ApportionWarning,
            stacklevel=3,
        )
    return trainable
