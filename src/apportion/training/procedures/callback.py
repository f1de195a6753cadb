"""Call hooks around the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from apportion.training.procedures.base import TrainingHooks


class StepHooks(TrainerCallback):
    """Call `before_step` and `after_step`.

    transformers fires ``on_pre_optimizer_step`` after clipping, and ``on_optimizer_step`` before the schedule, the
    gradients and ``global_step`` change.

    Args:
        hooks: The hooks.
        join_groups: Called after `after_step`, to add the groups that were born in it to the optimizer.
    """

    def __init__(self, hooks: TrainingHooks, join_groups: Callable[[], None]) -> None:
        self.hooks, self.join_groups = hooks, join_groups

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call `before_step`."""
        self.hooks.before_step(state.global_step, kwargs["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call `after_step`."""
        self.hooks.after_step(state.global_step, kwargs["optimizer"])
        self.join_groups()
