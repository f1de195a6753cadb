"""Run a study: plan, tune, run and summarise models x tasks x contenders x budgets x seeds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from apportion.errors import ConfigurationError
from apportion.records.locks import locked
from apportion.records.profile import Profile
from apportion.study.budgets import plan_at_budget, resolve_budget, spent_by
from apportion.study.contents import read_study_rows
from apportion.study.driver import Driver, duration
from apportion.study.executors.base import Executor, limited_threads
from apportion.study.executors.here import Here
from apportion.study.executors.processes import Processes
from apportion.study.files import keep_plan, write_record
from apportion.study.note import SUMMARY_FILE, find_study, note_runs, note_trials, open_study
from apportion.study.records import Summary, Trial
from apportion.study.runner import WORK, Bench, Job, versions
from apportion.study.settings import FULL, Contender, StudySettings
from apportion.study.sitting import ONE_PROCESS, Say, Sitting
from apportion.study.store import load_study
from apportion.study.summary import summarise
from apportion.study.tuning import TuningCell, choose_rates, tuning_cell


@dataclass(frozen=True)
class Matrix:
    """A planned study.

    Args:
        runs: Its runs, ordered by seed, without learning rates.
        tuning: For each cell in which a learning rate is chosen, a run on the tuning seed.
    """

    runs: list[Job]
    tuning: dict[TuningCell, Job]

    def spread(self) -> dict[tuple[str, int], tuple[Job, Job]]:
        """Return the cheapest and the costliest run for each model and budget, except full fine-tuning."""
        extremes: dict[tuple[str, int], tuple[Job, Job]] = {}
        for job in self.runs:
            if job.plan is not None:
                cheapest, costliest = extremes.get((job.model, job.budget), (job, job))
                extremes[job.model, job.budget] = (
                    min(cheapest, job, key=lambda one: one.spent),
                    max(costliest, job, key=lambda one: one.spent),
                )
        return extremes


def run_study(
    folder: Path,
    settings: StudySettings,
    commands: tuple[str, ...] = (),
    sitting: Sitting = ONE_PROCESS,
) -> Summary | None:
    """Plan a study, choose learning rates, do its runs and summarise them. Finished parts are not repeated.

    Args:
        folder: The study's folder.
        settings: The study's settings.
        commands: Commands that reproduce the study.
        sitting: Options of this call.

    Returns:
        The summary; None for a dry run.

    Raises:
        ConfigurationError: a method, an option or a budget does not fit a model.
        DataError: data cannot be read, or have too few rows.
        FolderInUseError: another process uses the folder.
        OutputExistsError: the folder has other files, or results of other settings, rows or models.
        TrainingError: runs failed; all others are done.
    """
    say = sitting.say
    if sitting.dry_run and find_study(folder, settings, versions(settings)) is None:
        with tempfile.TemporaryDirectory() as elsewhere:
            _, matrix = _prepared(Path(elsewhere), settings, sitting)
            _tell_time(Path(elsewhere), matrix, settings, sitting)
        return None
    with locked(folder):
        bench, matrix = _prepared(folder, settings, sitting, begin=not sitting.dry_run)
        if sitting.dry_run:
            _tell_time(folder, matrix, settings, sitting)
            return None
        with limited_threads(settings.threads):
            for model in settings.models:
                say(f"scoring {model}")
                _ = bench(model).base
        executor: Executor = Here(bench, settings.threads, keep_adapters=sitting.keep_adapters)
        if sitting.processes > 1:
            executor = Processes(folder, settings, sitting)
        _do_all(Driver(folder, bench, executor, say), matrix, settings)
        return _summarise(folder, commands, say)


def write_summary(folder: Path, commands: tuple[str, ...] = (), say: Say = str) -> Summary:
    """Summarise the runs in a folder.

    Args:
        folder: A study's folder.
        commands: Commands that reproduce the study; by default those of the last summary.
        say: Called with the number of ignored records.

    Returns:
        The summary, as written to ``summary.json``.

    Raises:
        ConfigurationError: the folder has no study, or a file in it is damaged.
        FolderInUseError: another process uses the folder.
    """
    with locked(folder):
        return _summarise(folder, commands, say)


def plan_study(folder: Path, settings: StudySettings, bench: Callable[[str], Bench], say: Say = str) -> Matrix:
    """Profile every model, and plan every run at its budget.

    Args:
        folder: The study's folder, for profiles and plans.
        settings: The study's settings.
        bench: Returns the bench of a model.
        say: Called with progress messages.

    Returns:
        All runs.

    Raises:
        ConfigurationError: a method, an option or a budget does not fit a model.
    """
    planned: dict[tuple[TuningCell, int], Job] = {}
    for model in settings.models:
        say(f"profiling {model}")
        profile = bench(model).profile
        budgets = [resolve_budget(budget, profile, settings.unit) for budget in settings.budgets]
        if len(set(budgets)) < len(budgets):
            raise ConfigurationError(
                f"two budgets are the same on {model}: {', '.join(map(str, budgets))}.", fix="leave one out"
            )
        for task in settings.tasks:
            part = profile.of_task(task)
            for contender in settings.contenders:
                if contender.method == FULL:
                    budgets_here = [sum(p.numel() for p in bench(model).model.parameters())]
                else:
                    budgets_here = budgets
                for budget in budgets_here:
                    for seed in (*range(settings.seeds), settings.tuning.seed):
                        cell = (model, task, contender.name, budget)
                        planned[cell, seed] = _planned(folder, settings, part, contender, cell, seed)
    runs = sorted((job for job in planned.values() if job.seed != settings.tuning.seed), key=lambda job: job.seed)
    cells = {tuning_cell(job, runs, settings.tuning.each) for job in runs}
    tuning = {cell: job for (cell, seed), job in planned.items() if seed == settings.tuning.seed and cell in cells}
    return Matrix(runs, tuning)


def tell_plan(matrix: Matrix, settings: StudySettings, say: Say) -> None:
    """Report the number of runs, and how close plans are to the budgets.

    Args:
        matrix: The planned study.
        settings: The study's settings.
        say: Called with the messages.
    """
    trials = len(matrix.tuning) * settings.tuning.trials
    say(f"{len(matrix.runs)} runs, after {trials} shorter ones that choose learning rates")
    for (model, budget), (cheapest, costliest) in matrix.spread().items():
        say(
            f"{model}, budget {budget:,} {settings.unit}: plans take {cheapest.spent / budget:.1%} "
            f"({cheapest.contender}) to {costliest.spent / budget:.1%} ({costliest.contender}) of it"
        )
    for contender in settings.contenders:
        if contender.method == FULL:
            say(f"{contender.name} trains every weight: it has no budget")


def _prepared(
    folder: Path, settings: StudySettings, sitting: Sitting, *, begin: bool = True
) -> tuple[Callable[[str], Bench], Matrix]:
    """Read rows and models, check that the folder's results belong to them, and plan the study."""
    find_study(folder, settings, versions(settings))  # reject a wrong folder before models are loaded
    rows = read_study_rows(settings)

    @cache
    def bench(model: str) -> Bench:
        return Bench(folder, settings, model, rows, trust_remote_code=sitting.trust_remote_code)

    contents = rows.contents({model: bench(model).weights for model in settings.models})
    open_study(folder, settings, contents, versions(settings), begin=begin)
    shutil.rmtree(folder / WORK, ignore_errors=True)  # of runs that were killed
    with limited_threads(settings.threads):
        matrix = plan_study(folder, settings, bench, sitting.say)
    tell_plan(matrix, settings, sitting.say)
    return bench, matrix


def _do_all(driver: Driver, matrix: Matrix, settings: StudySettings) -> None:
    """Do the trials, choose the learning rates, and do the runs."""

    def try_all(jobs: list[Job]) -> list[Trial]:
        note_trials(driver.folder, [driver.benches(job.model).key(job, trial=True) for job in jobs])
        return driver.trials(jobs)

    rates = choose_rates(settings, matrix.tuning, try_all)
    jobs = [replace(job, lr=rates[tuning_cell(job, matrix.runs, settings.tuning.each)]) for job in matrix.runs]
    note_runs(driver.folder, [driver.benches(job.model).key(job, trial=False) for job in jobs])
    driver.runs(jobs)


def _summarise(folder: Path, commands: tuple[str, ...], say: Say) -> Summary:
    """Summarise a folder that this process has locked."""
    study = load_study(folder)
    if study.num_left_out:
        say(f"{study.num_left_out} records of other data, plans or settings were left out")
    summary = summarise(study, commands or (study.summary.commands if study.summary else ()))
    write_record(folder / SUMMARY_FILE, summary)
    return summary


def _planned(
    folder: Path, settings: StudySettings, part: Profile, contender: Contender, cell: TuningCell, seed: int
) -> Job:
    """Plan one run, and store its plan."""
    model, task, name, budget = cell
    if contender.method == FULL:
        return Job(model, task, name, budget, budget, None, None, seed)
    made = plan_at_budget(part, contender, settings.unit, budget, settings.tolerance, seed)
    path, plan_seal = keep_plan(folder, made)
    return Job(model, task, name, budget, spent_by(made, settings.unit), path, plan_seal, seed)


def _tell_time(folder: Path, matrix: Matrix, settings: StudySettings, sitting: Sitting) -> None:
    """Estimate the remaining time from the finished runs."""
    study = load_study(folder)
    done = [run.train_s for run in study.runs] or [trial.train_s for trial in study.trials]
    if not done:
        sitting.say("the remaining time can be estimated after the first run")
        return
    trials = len(matrix.tuning) * settings.tuning.trials
    left = len(matrix.runs) - len(study.runs) + trials - len(study.trials)
    time_left = duration(left * sum(done) / len(done) / sitting.processes)
    sitting.say(f"{left} runs are left: training takes about {time_left}")
