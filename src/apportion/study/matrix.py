"""All of a study: models x tasks x contenders x budgets x seeds, planned, tuned, run and summarised."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from apportion.errors import ConfigurationError
from apportion.records.locks import locked
from apportion.records.profile import Profile
from apportion.study.budgets import fit, resolve_budget, spent_by
from apportion.study.contents import read_study_rows
from apportion.study.files import keep_plan, write_record
from apportion.study.note import SUMMARY_FILE, find_study, note_runs, note_trials, open_study
from apportion.study.pool import Pool, limited_threads
from apportion.study.records import Run, Summary, Trial
from apportion.study.runner import WORK, Bench, Job, versions
from apportion.study.settings import FULL, Contender, StudySettings
from apportion.study.sitting import ONE_PROCESS, Say, Sitting
from apportion.study.store import load_study
from apportion.study.summary import summarise
from apportion.study.tuning import TuningCell, choose_rates, tuning_cell


@dataclass(frozen=True)
class Matrix:
    """A study that is planned.

    Args:
        runs: Its runs, seed after seed; their learning rates are not chosen yet.
        tuning: For each cell in which a learning rate is chosen, a run on the tuning seed.
    """

    runs: list[Job]
    tuning: dict[TuningCell, Job]

    def spread(self) -> dict[tuple[str, int], tuple[Job, Job]]:
        """Return for each model and budget the runs that spend least and most, full fine-tuning left out."""
        found: dict[tuple[str, int], tuple[Job, Job]] = {}
        for job in self.runs:
            if job.plan is not None:
                least, most = found.get((job.model, job.budget), (job, job))
                found[job.model, job.budget] = (
                    min(least, job, key=lambda one: one.spent),
                    max(most, job, key=lambda one: one.spent),
                )
        return found


def run_study(
    folder: Path,
    settings: StudySettings,
    commands: tuple[str, ...] = (),
    sitting: Sitting = ONE_PROCESS,
) -> Summary | None:
    """Plan a study, choose learning rates, do its runs and summarise them; what a folder holds is not done again.

    Args:
        folder: The study's folder.
        settings: What is compared.
        commands: What to type to get all this again.
        sitting: How the runs are done.

    Returns:
        What the runs say; None for a dry run.

    Raises:
        ConfigurationError: a method, an option or a budget does not fit a model.
        DataError: data cannot be read, or have too few rows.
        FolderInUseError: another process works in the folder.
        OutputExistsError: the folder holds something else, or results of other settings, rows or models.
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
        _do_all(Pool(folder, settings, bench, sitting), matrix, say)
        return _summarise(folder, commands, say)


def write_summary(folder: Path, commands: tuple[str, ...] = (), say: Say = str) -> Summary:
    """Summarise the runs that a folder holds.

    Args:
        folder: A study's folder.
        commands: What to type to get all this again; the last summary's where none is given.
        say: Told how many records are left out.

    Returns:
        The summary, as it stands in ``summary.json``.

    Raises:
        ConfigurationError: the folder holds no study, or a file in it is damaged.
        FolderInUseError: another process works in the folder.
    """
    with locked(folder):
        return _summarise(folder, commands, say)


def plan_study(folder: Path, settings: StudySettings, bench: Callable[[str], Bench], say: Say = str) -> Matrix:
    """Measure every model, and plan every run at its budget.

    Args:
        folder: The study's folder, where profiles and plans are kept.
        settings: The study's settings.
        bench: Gives the bench of a model.
        say: Told what is being done.

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
    """Say how many runs there are, and how equal the budgets.

    Args:
        matrix: The planned study.
        settings: The study's settings.
        say: Told it.
    """
    trials = len(matrix.tuning) * settings.tuning.trials
    say(f"{len(matrix.runs)} runs, after {trials} shorter ones that choose learning rates")
    for (model, budget), (least, most) in matrix.spread().items():
        say(
            f"{model}, budget {budget:,} {settings.unit}: plans take {least.spent / budget:.1%} ({least.contender}) to "
            f"{most.spent / budget:.1%} ({most.contender}) of it"
        )
    for contender in settings.contenders:
        if contender.method == FULL:
            say(f"{contender.name} trains every weight: it is at no budget")


def _prepared(
    folder: Path, settings: StudySettings, sitting: Sitting, *, begin: bool = True
) -> tuple[Callable[[str], Bench], Matrix]:
    """Read rows and models, make sure that the folder's results are of these, and plan the study."""
    find_study(folder, settings, versions(settings))  # a wrong folder is refused before models are loaded
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


def _do_all(pool: Pool, matrix: Matrix, say: Say) -> None:
    """Do the trials, choose the learning rates, and do the runs."""
    settings = pool.settings

    def try_all(jobs: list[Job]) -> list[Trial]:
        note_trials(pool.folder, [pool.bench(job.model).key(job, trial=True) for job in jobs])
        return pool.trials(jobs, _Progress("trial", len(jobs), say))

    rates = choose_rates(settings, matrix.tuning, try_all)
    jobs = [replace(job, lr=rates[tuning_cell(job, matrix.runs, settings.tuning.each)]) for job in matrix.runs]
    note_runs(pool.folder, [pool.bench(job.model).key(job, trial=False) for job in jobs])
    pool.runs(jobs, _Progress("run", len(jobs), say))


def _summarise(folder: Path, commands: tuple[str, ...], say: Say) -> Summary:
    """Summarise a folder that this process holds."""
    study = load_study(folder)
    if study.num_left_out:
        say(f"{study.num_left_out} records of other data, plans or settings were left out")
    summary = summarise(study, commands or (study.summary.commands if study.summary else ()))
    write_record(folder / SUMMARY_FILE, summary)
    return summary


def _planned(
    folder: Path, settings: StudySettings, part: Profile, contender: Contender, cell: TuningCell, seed: int
) -> Job:
    """Plan one run, and keep its plan."""
    model, task, name, budget = cell
    if contender.method == FULL:
        return Job(model, task, name, budget, budget, None, None, seed)
    made = fit(part, contender, settings.unit, budget, settings.tolerance, seed)
    path, plan_seal = keep_plan(folder, made)
    return Job(model, task, name, budget, spent_by(made, settings.unit), path, plan_seal, seed)


def _tell_time(folder: Path, matrix: Matrix, settings: StudySettings, sitting: Sitting) -> None:
    """Estimate how long what is left takes, from the runs that are done."""
    study = load_study(folder)
    done = [run.train_s for run in study.runs] or [trial.train_s for trial in study.trials]
    if not done:
        sitting.say("how long it takes is known after the first run")
        return
    trials = len(matrix.tuning) * settings.tuning.trials
    left = len(matrix.runs) - len(study.runs) + trials - len(study.trials)
    time_left = _duration(left * sum(done) / len(done) / sitting.processes)
    sitting.say(f"{left} runs are left: training takes about {time_left}")


class _Progress:
    """Tells of each finished run, and how long the others take: those that were done before take no time.

    Args:
        kind: What a run is called.
        total: How many there are.
        say: Told it.
    """

    def __init__(self, kind: str, total: int, say: Say) -> None:
        self.kind, self.total, self.say = kind, total, say
        self.done = self.fresh = 0
        self.start = self.last = time.monotonic()

    def __call__(self, job: Job, record: Run | Trial) -> None:
        now = time.monotonic()
        self.done += 1
        if now - self.last > 0.5:
            self.fresh += 1
        self.last = now
        if isinstance(record, Trial):
            result = f"lr {record.lr:g}, loss {'diverged' if record.loss is None else f'{record.loss:.3f}'}"
        else:
            match = "" if record.after.exact_match is None else f"exact match {record.after.exact_match:.3f}, "
            result = f"{match}loss {record.after.loss:.3f}"
        each = (now - self.start) / max(1, self.fresh)
        self.say(
            f"{self.kind} {self.done}/{self.total} {job.name}: {result}; "
            f"about {_duration(each * (self.total - self.done))} left"
        )


def _duration(seconds: float) -> str:
    """Write a time for people."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
