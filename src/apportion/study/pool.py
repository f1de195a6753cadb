"""Do runs in this process or in several at once. Each has the study's number of threads, so results are the same."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from apportion.errors import ApportionError, TrainingError
from apportion.study.contents import read_study_rows
from apportion.study.note import require_contents
from apportion.study.records import Run, Trial
from apportion.study.runner import Bench, Job
from apportion.study.settings import StudySettings
from apportion.study.sitting import Sitting

OnDone = Callable[[Job, Run | Trial], None]


class Pool:
    """Does the runs of a study.

    Args:
        folder: The study's folder.
        settings: The study's settings.
        bench: Returns the bench of a model in this process.
        sitting: Options of this call.
    """

    def __init__(self, folder: Path, settings: StudySettings, bench: Callable[[str], Bench], sitting: Sitting) -> None:
        self.folder, self.settings, self.bench, self.sitting = folder, settings, bench, sitting

    def trials(self, jobs: list[Job], on_done: OnDone) -> list[Trial]:
        """Try learning rates.

        Args:
            jobs: The trials.
            on_done: Called after each.

        Returns:
            Their records, in the same order.

        Raises:
            TrainingError: some failed; the others are done.
        """
        return [record for record in self._all(jobs, on_done, trial=True) if isinstance(record, Trial)]

    def runs(self, jobs: list[Job], on_done: OnDone) -> list[Run]:
        """Do runs.

        Args:
            jobs: The runs.
            on_done: Called after each.

        Returns:
            Their records, in the same order.

        Raises:
            TrainingError: some failed; the others are done.
        """
        return [record for record in self._all(jobs, on_done, trial=False) if isinstance(record, Run)]

    def _all(self, jobs: list[Job], on_done: OnDone, *, trial: bool) -> list[Run | Trial]:
        """Do all jobs, then raise an error if some failed."""
        records: dict[Job, Run | Trial] = {}
        failed: list[str] = []
        each = self._here if self.sitting.processes == 1 else self._in_processes
        for job, result in each(jobs, trial=trial):
            if isinstance(result, ApportionError):
                failed.append(result.within(job.name).what)
            else:
                records[job] = result
                on_done(job, result)
        if failed:
            more = f"\n  and {len(failed) - 3} more" if len(failed) > 3 else ""
            raise TrainingError(
                f"{len(failed)} of {len(jobs)} runs failed; the others are done.\n  " + "\n  ".join(failed[:3]) + more
            )
        return [records[job] for job in jobs]

    def _here(self, jobs: list[Job], *, trial: bool) -> Iterator[tuple[Job, Run | Trial | ApportionError]]:
        """Do jobs one after the other."""
        for job in jobs:
            with limited_threads(self.settings.threads):
                result = _do(self.bench(job.model), job, trial=trial, keep_adapters=self.sitting.keep_adapters)
            yield job, result

    def _in_processes(self, jobs: list[Job], *, trial: bool) -> Iterator[tuple[Job, Run | Trial | ApportionError]]:
        """Do several jobs at once, in child processes. Results come in the order of completion."""
        pool = ProcessPoolExecutor(
            min(self.sitting.processes, max(1, len(jobs))),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_child,
            initargs=(self.settings.threads, self.sitting.prepare),
        )
        try:
            here = replace(self.sitting, say=str, prepare=list)  # without what cannot be pickled
            waiting = {pool.submit(_in_child, str(self.folder), self.settings, here, job, trial): job for job in jobs}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BrokenProcessPool as error:
            raise TrainingError(
                "a process of the study was killed, perhaps because memory ran out.",
                fix="run the same command again with fewer --jobs: finished runs are not repeated",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def limited_threads(number: int) -> Iterator[None]:
    """Set PyTorch's number of threads inside the context.

    Args:
        number: Threads.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _do(bench: Bench, job: Job, *, trial: bool, keep_adapters: bool) -> Run | Trial | ApportionError:
    """Do one run. Its errors are returned, so that they do not stop other runs."""
    try:
        return bench.trial(job) if trial else bench.run(job, keep_adapter=keep_adapters)
    except ApportionError as error:
        return error
    except Exception as error:
        error.add_note(f"in the run {job.name}")
        raise


def _start_child(threads: int, prepare: Callable[[], object]) -> None:
    """Prepare a child process, and make it end when its parent ends or is killed."""
    torch.set_num_threads(threads)
    prepare()
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@cache
def _child_bench(folder: str, settings: str, sitting: Sitting, model: str) -> Bench:
    """Load a model and its data once per process, and check that they are still those of the study."""
    parsed = StudySettings.model_validate_json(settings)
    rows = read_study_rows(parsed)
    bench = Bench(Path(folder), parsed, model, rows, trust_remote_code=sitting.trust_remote_code)
    require_contents(Path(folder), bench.contents)
    return bench


def _in_child(
    folder: str,
    settings: StudySettings,
    sitting: Sitting,
    job: Job,
    trial: bool,  # noqa: FBT001
) -> Run | Trial | ApportionError:
    """Do one run in a process of the pool."""
    with contextlib.redirect_stdout(sys.stderr):
        bench = _child_bench(folder, settings.model_dump_json(), sitting, job.model)
        return _do(bench, job, trial=trial, keep_adapters=sitting.keep_adapters)
