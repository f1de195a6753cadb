"""Several hooks in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from apportion.records.plan import Plan
from apportion.training.procedures.base import BornGroup, TrainingHooks


class Composed(TrainingHooks):
    """A procedure's hooks together with other ones, which add to the loss but have no state and change no plan.

    Args:
        main: The procedure's hooks.
        *others: The other hooks.
    """

    def __init__(self, main: TrainingHooks, *others: TrainingHooks) -> None:
        self.main, self.parts = main, (main, *others)

    def attach(self, model: PeftModel, adapter_name: str, *, num_steps: int, seed: int) -> None:
        """Prepare all parts."""
        for part in self.parts:
            part.attach(model, adapter_name, num_steps=num_steps, seed=seed)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the procedure's state."""
        self.main.restore(state)

    def before_forward(self, inputs: Mapping[str, Any]) -> None:
        """Prepare all parts for a forward pass."""
        for part in self.parts:
            part.before_forward(inputs)

    def penalty(self) -> Tensor | None:
        """Return the sum over the parts."""
        penalties = [penalty for part in self.parts if (penalty := part.penalty()) is not None]
        if not penalties:
            return None
        return torch.stack([penalty.to(penalties[0].device) for penalty in penalties]).sum()

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Let all parts act."""
        for part in self.parts:
            part.before_step(step, optimizer)

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Let all parts act."""
        for part in self.parts:
            part.after_step(step, optimizer)

    def groups(self) -> Sequence[BornGroup]:
        """Return the procedure's groups."""
        return self.main.groups()

    def state(self) -> dict[str, Tensor]:
        """Return the procedure's state."""
        return self.main.state()

    def plan_now(self) -> Plan | None:
        """Return the procedure's plan."""
        return self.main.plan_now()

    def finish(self) -> Plan | None:
        """Let the procedure finish."""
        return self.main.finish()

    def detach(self) -> None:
        """Remove all parts from the model."""
        for part in self.parts:
            part.detach()
