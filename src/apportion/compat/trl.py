"""TRL's trainer, which is transformers' `Trainer`, with hooks around its checkpoints and its way of adding up losses.

Checked on: trl 1.16, with transformers 5.20 to 5.24.
When it breaks: ``Trainer._save_checkpoint`` writes a checkpoint's files; ``Trainer.training_step`` divides the loss by
the number of accumulated batches unless the model's loss has been divided by the number of tokens in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl import SFTTrainer


class CheckpointingTrainer(SFTTrainer):
    """TRL's trainer with a context around the writing of a checkpoint."""

    @contextmanager
    def around_checkpoint(self, folder: Path) -> Iterator[None]:
        """Do what comes before and after the writing of a checkpoint's files, on every process.

        Args:
            folder: The checkpoint's folder.

        Yields:
            Nothing, while the files are written.
        """
        yield

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with self.around_checkpoint(folder):
            super()._save_checkpoint(model, trial)

    def added_once(self, term: Any, num_items: Any) -> Any:
        """Scale a term of the loss so that accumulated batches add it up to its mean over them.

        Args:
            term: The term.
            num_items: ``num_items_in_batch``, as `compute_loss` got it.

        Returns:
            The scaled term.
        """
        if self.model_accepts_loss_kwargs and num_items is not None:  # in this case transformers does not divide
            return term / self.current_gradient_accumulation_steps
        return term
