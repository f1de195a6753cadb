"""Several runs at once in processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from apportion.errors import ApportionError, TrainingError
from apportion.study.contents import read_study_rows
from apportion.study.executors.base import Record, Work, do
from apportion.study.note import require_contents
from apportion.study.runner import Bench
from apportion.study.settings import StudySettings
from apportion.study.sitting import Sitting


@dataclass(frozen=True)
class Processes:
    """Does work in child processes. Each loads a model once and has the study's number of threads.

    Args:
        folder: The study's folder, where the children read plans, profiles and base measurements.
        settings: The study's settings.
        sitting: Options of this call, with the number of processes.
    """

    folder: Path
    settings: StudySettings
    sitting: Sitting

    def run(self, work: Sequence[Work]) -> Iterator[tuple[Work, Record | ApportionError]]:
        """Do several pieces of work at once, as `Executor.run`."""
        if not work:
            return
        pool = ProcessPoolExecutor(
            min(self.sitting.processes, len(work)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_child,
            initargs=(self.settings.threads, self.sitting.prepare),
        )
        try:
            sitting = replace(self.sitting, say=str, prepare=list)  # without what cannot be pickled
            waiting = {pool.submit(_in_child, str(self.folder), self.settings, sitting, one): one for one in work}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BrokenProcessPool as error:
            raise TrainingError(
                "a process of the study was killed, perhaps because memory ran out.",
                fix="run the same command again with fewer --jobs: finished runs are not repeated",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


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


def _in_child(folder: str, settings: StudySettings, sitting: Sitting, work: Work) -> Record | ApportionError:
    """Do one piece of work in a child process."""
    with contextlib.redirect_stdout(sys.stderr):
        bench = _child_bench(folder, settings.model_dump_json(), sitting, work.job.model)
        return do(bench, work, keep_adapters=sitting.keep_adapters)
