"""Add parameter groups to an optimizer and its schedule while a run goes on."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from apportion.errors import TrainingError
from apportion.training.procedures.base import BornGroup
from apportion.training.processes import num_processes


class OwnClock:
    """The schedule of a group that was born in training: linear warm-up, then a cosine to zero at the run's end.

    The scheduler's file holds its attributes, so they are numbers.

    Args:
        birth: Step at which it starts.
        warmup_steps: Warm-up steps.
        num_steps: Steps of the run.
    """

    def __init__(self, birth: int, warmup_steps: int, num_steps: int) -> None:
        self.birth, self.warmup_steps, self.num_steps = birth, warmup_steps, num_steps

    def __call__(self, step: int) -> float:
        """Return the factor of the peak learning rate at a step of the run."""
        done, span = step - self.birth, self.num_steps - self.birth
        if done < self.warmup_steps:
            return max(0, done) / max(1, self.warmup_steps)
        progress = (done - self.warmup_steps) / max(1, span - self.warmup_steps)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def join(group: BornGroup, optimizer: Optimizer, scheduler: LambdaLR, *, warmup_steps: int, num_steps: int) -> None:
    """Add a group with the settings of the optimizer's first group, and a schedule of its own.

    `LambdaLR` has one function per group, so the schedule gets one more too.

    Args:
        group: The group.
        optimizer: The optimizer.
        scheduler: Its schedule.
        warmup_steps: The run's warm-up steps.
        num_steps: The run's steps.

    Raises:
        TrainingError: the run has several processes, whose gradients of new parameters would not be averaged.
    """
    if num_processes() > 1:
        raise TrainingError(
            "the procedure adds parameters during training, which several processes cannot share.",
            found=f"{num_processes()} processes",
            fix="train on one process",
        )
    for parameter in group.parameters:
        parameter.requires_grad_(True)  # noqa: FBT003 - PyTorch's signature
    settings: dict[str, Any] = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    clock, peak = OwnClock(group.birth, warmup_steps, num_steps), settings["initial_lr"]
    settings |= {"params": list(group.parameters), "lr": peak * clock(scheduler.last_epoch)}
    optimizer.add_param_group(settings)
    scheduler.lr_lambdas.append(clock)
    scheduler.base_lrs.append(peak)
