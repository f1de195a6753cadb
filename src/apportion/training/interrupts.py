"""Signals that end a training run after a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from apportion.signals import TERMINATING
from apportion.training.processes import largest


class StopOnSignal(TrainerCallback):
    """Write a checkpoint and stop on Ctrl-C, SIGTERM and SIGHUP.

    `signal` is the number of the signal that any process of the run received, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals while training runs. A second signal gets its previous handler.

        Yields:
            Nothing.
        """
        before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, *TERMINATING)}

        def note(number: int, _frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, before[number])

        try:
            for number, handler in before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, note)
        except ValueError:  # not in the main thread, where signal handlers cannot be set
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and stop after the step in which a signal arrived."""
        self.signal = largest(self.signal)
        if self.signal:
            control.should_save = True
            control.should_training_stop = True
        return control
