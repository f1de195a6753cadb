"""The protocol of executors, and one piece of work done on a bench."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from apportion.errors import ApportionError
from apportion.study.records import Run, Trial
from apportion.study.runner import Bench, Job

Record = Run | Trial
Benches = Callable[[str], Bench]


@dataclass(frozen=True)
class Work:
    """One run or one trial to do.

    Args:
        job: What is run.
        is_trial: Whether it is a shorter run that tries a learning rate.
    """

    job: Job
    is_trial: bool = False


class Executor(Protocol):
    """Does work and returns its records. It reads no record and writes none: that is the driver's part."""

    def run(self, work: Sequence[Work]) -> Iterator[tuple[Work, Record | ApportionError]]:
        """Do work.

        Args:
            work: What to do.

        Returns:
            Each piece of work with its record, or with the error that ended it, in the order of completion.

        Raises:
            TrainingError: the executor itself failed, for example because a process was killed.
        """


def do(bench: Bench, work: Work, *, keep_adapters: bool) -> Record | ApportionError:
    """Do one piece of work. Its errors are returned, so that they do not stop other work.

    Args:
        bench: The bench of its model.
        work: The work.
        keep_adapters: Keep the adapter of a run in the study's folder.

    Returns:
        The record, or the error.
    """
    try:
        return bench.trial(work.job) if work.is_trial else bench.run(work.job, keep_adapter=keep_adapters)
    except ApportionError as error:
        return error
    except Exception as error:
        error.add_note(f"in the run {work.job.name}")
        raise


@contextmanager
def limited_threads(number: int) -> Iterator[None]:
    """Set PyTorch's number of threads inside the context. Results depend on it.

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
