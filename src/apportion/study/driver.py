"""Drive a study's runs: read the finished ones, have an executor do the others, and write their records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from apportion.errors import ApportionError, TrainingError
from apportion.study.executors.base import Benches, Executor, Record, Work
from apportion.study.files import RUNS, TUNING, read_record, write_record
from apportion.study.records import Run, Trial
from apportion.study.runner import Job
from apportion.study.sitting import Say

_SHOWN_FAILURES = 3


@dataclass(frozen=True)
class Driver:
    """Does runs and trials that have no record in the study's folder yet.

    Args:
        folder: The study's folder.
        benches: Returns the bench of a model.
        executor: Where the work is done.
        say: Called with a message after each piece of work.
    """

    folder: Path
    benches: Benches
    executor: Executor
    say: Say

    def trials(self, jobs: Sequence[Job]) -> list[Trial]:
        """Try learning rates.

        Args:
            jobs: The trials.

        Returns:
            Their records, in the same order.

        Raises:
            TrainingError: some failed; the others are done.
        """
        return [record for record in self._records(jobs, is_trial=True) if isinstance(record, Trial)]

    def runs(self, jobs: Sequence[Job]) -> list[Run]:
        """Do runs.

        Args:
            jobs: The runs.

        Returns:
            Their records, in the same order.

        Raises:
            TrainingError: some failed; the others are done.
        """
        return [record for record in self._records(jobs, is_trial=False) if isinstance(record, Run)]

    def _records(self, jobs: Sequence[Job], *, is_trial: bool) -> list[Record]:
        """Return the records of all jobs, then raise an error if some failed."""
        progress = Progress("trial" if is_trial else "run", len(jobs), self.say)
        records: dict[Job, Record] = {}
        failures: list[str] = []
        for job, result in self._results([Work(job, is_trial) for job in jobs]):
            if isinstance(result, ApportionError):
                failures.append(result.within(job.name).what)
            else:
                records[job] = result
                progress(job, result)
        if failures:
            rest = len(failures) - _SHOWN_FAILURES
            more = f"\n  and {rest} more" if rest > 0 else ""
            shown = "\n  ".join(failures[:_SHOWN_FAILURES])
            raise TrainingError(f"{len(failures)} of {len(jobs)} runs failed; the others are done.\n  {shown}{more}")
        return [records[job] for job in jobs]

    def _results(self, work: Sequence[Work]) -> Iterator[tuple[Job, Record | ApportionError]]:
        """Go through finished work, then through the rest as it is done and written."""
        files = {one: self._file(one) for one in work}
        for one in [one for one in work if files[one].is_file()]:
            file = files.pop(one)
            yield one.job, read_record(file, Trial) if one.is_trial else read_record(file, Run)
        for one, result in self.executor.run(list(files)):
            if not isinstance(result, ApportionError):
                write_record(files[one], result)
            yield one.job, result

    def _file(self, work: Work) -> Path:
        """Name the file of a record."""
        key = self.benches(work.job.model).key(work.job, trial=work.is_trial)
        return self.folder / (TUNING if work.is_trial else RUNS) / f"{key}.json"


class Progress:
    """Reports each finished run and the remaining time. Runs that are only read take no time.

    Args:
        kind: Name for a run.
        total: Number of runs.
        say: Called with the messages.
    """

    def __init__(self, kind: str, total: int, say: Say) -> None:
        self.kind, self.total, self.say = kind, total, say
        self.done = self.fresh = 0
        self.start = self.last = time.monotonic()

    def __call__(self, job: Job, record: Record) -> None:
        """Report one."""
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
            f"about {duration(each * (self.total - self.done))} left"
        )


def duration(seconds: float) -> str:
    """Format a duration.

    Args:
        seconds: The duration.

    Returns:
        Hours and minutes.

    Example:
        >>> duration(3720)
        '1 h 2 min'
    """
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
