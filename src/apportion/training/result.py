"""What a run of the trainer returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TrainResult:
    """The trained model and the figures of a run.

    Args:
        model: The trained model.
        steps: Number of optimizer steps.
        loss: Mean training loss over the run.
        tokens: Tokens trained on, over all steps.
        seconds: Wall time since the run was started or last resumed.
        tokens_per_s: Tokens per second in that time.
        truncated: Number of rows truncated to `max_length`.
        signal: Number of the signal that ended the run early, after a checkpoint; 0 if none did.
        loss_curve: Steps and their training losses.
        left_out: Number of rows skipped because no completion token is within `max_length`.
    """

    model: PreTrainedModel | PeftModel
    steps: int
    loss: float
    tokens: int
    seconds: float
    tokens_per_s: float
    truncated: int
    signal: int
    loss_curve: tuple[dict[str, float], ...]
    left_out: int = 0

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run early."""
        return self.signal != 0

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        excluded = ("model", "loss_curve", "signal")
        figures = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in excluded}
        return figures | {"interrupted": self.interrupted}
