"""Learning rates: the same number of trials for every contender, on a seed that no run of the study has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy

from apportion.errors import TrainingError
from apportion.study.records import Trial
from apportion.study.runner import Job
from apportion.study.settings import StudySettings

Try = Callable[[list[Job]], Iterable[Trial]]
TuningCell = tuple[str, str, str, int]


def tuning_cell(job: Job, jobs: list[Job], each: str) -> TuningCell:
    """Return the cell in which a run's learning rate is chosen: model, task, contender and budget.

    Args:
        job: The run.
        jobs: All runs of the study.
        each: The setting `tuning.each`.

    Returns:
        The run's own cell, or the one whose learning rate it uses.
    """
    mine = [other for other in jobs if (other.model, other.contender) == (job.model, job.contender)]
    task = job.task if each != "contender" else mine[0].task
    budget = job.budget if each == "budget" else mine[0].budget
    return job.model, task, job.contender, budget


def grid(low: float, high: float, trials: int) -> list[float]:
    """Return learning rates at even distances on a logarithmic scale; a single one is in the middle.

    Args:
        low: The lowest.
        high: The highest.
        trials: Their number.

    Returns:
        The rates, rounded to three digits.

    Example:
        >>> grid(1e-3, 1e-1, 3)
        [0.001, 0.01, 0.1]
    """
    points = numpy.geomspace(low, high, trials) if trials > 1 else [(low * high) ** 0.5]
    return sorted({float(f"{point:.3g}") for point in points})


def choose_rates(settings: StudySettings, cells: dict[TuningCell, Job], try_all: Try) -> dict[TuningCell, float]:
    """Try the learning rates of every cell, and choose the one with the lowest loss on validation rows.

    Args:
        settings: The study's settings.
        cells: For each cell, a run on the tuning seed, without a learning rate.
        try_all: Does the trials, or reads finished ones.

    Returns:
        The learning rate of each cell.

    Raises:
        TrainingError: training diverged at every rate of a cell.
    """
    rates = {cell: _rates(settings, job) for cell, job in cells.items()}
    jobs = [replace(job, lr=rate) for cell, job in cells.items() for rate in rates[cell]]
    losses = {job: trial.loss for job, trial in zip(jobs, try_all(jobs), strict=True)}
    chosen = {}
    for cell, job in cells.items():
        finite = {rate: loss for rate in rates[cell] if (loss := losses[replace(job, lr=rate)]) is not None}
        if not finite:
            raise TrainingError(
                f"training diverged at every learning rate of {job.name}.",
                fix=f"give {job.contender} a lower lr_low",
            )
        chosen[cell] = min(finite, key=lambda rate: finite[rate])
    return chosen


def _rates(settings: StudySettings, job: Job) -> list[float]:
    """Return the learning rates to try for a contender."""
    return grid(*settings.learning_rates(settings.contender(job.contender)), settings.tuning.trials)
