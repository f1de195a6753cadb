"""Learning rates: the same number of trials for every contender, on a seed that no run of the study has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy
import optuna

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
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna_trials: dict[Job, tuple[optuna.Study, optuna.trial.Trial]] = {}
    studies = {}
    for cell, job in cells.items():
        rates = grid(*settings.learning_rates(settings.contender(job.contender)), settings.tuning.trials)
        studies[cell] = study = optuna.create_study()
        for rate in rates:
            study.enqueue_trial({"lr": rate})
            trial = study.ask()
            trial.suggest_float("lr", rates[0], rates[-1], log=True)
            optuna_trials[replace(job, lr=rate)] = study, trial
    for (study, trial), done in zip(optuna_trials.values(), try_all(list(optuna_trials)), strict=True):
        failed = optuna.trial.TrialState.FAIL if done.loss is None else None
        study.tell(trial, done.loss, state=failed)
    chosen = {}
    for cell, study in studies.items():
        if not any(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials):
            raise TrainingError(
                f"training diverged at every learning rate of {cells[cell].name}.",
                fix=f"give {cells[cell].contender} a lower lr_low",
            )
        chosen[cell] = float(study.best_params["lr"])
    return chosen
