"""What several processes of one run, as torchrun and accelerate start them, must not each do for themselves."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather

from apportion.errors import TrainingError
from apportion.records.locks import locked

T = TypeVar("T")


def on_first(action: Callable[[], T]) -> T:
    """Do something on the first process alone; the others wait for it.

    Args:
        action: What is done: files are checked or written.

    Returns:
        What it gave, on every process. Where it raised an error, every process raises it.
    """
    outcome: list[Any] = [None, None]
    if _state().is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:  # noqa: BLE001 - raised below
            outcome[1] = error
        outcome[1] = _picklable(outcome[1])
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return cast("T", result)


@contextmanager
def locked_by_first(folder: Path) -> Iterator[None]:
    """Hold a folder for this run: the first process does, for all of them.

    Args:
        folder: The folder.

    Yields:
        Nothing.

    Raises:
        FolderInUseError: another run holds the folder.
    """
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(locked(folder)))
        yield


def largest(value: int) -> int:
    """Give the largest of all processes' numbers.

    Args:
        value: This process's.

    Returns:
        The same on all of them.
    """
    state = _state()
    if state.num_processes == 1:
        return value
    return int(gather(torch.tensor([value], device=state.device)).max())


def wait_for_all() -> None:
    """Wait until every process has come here."""
    _state().wait_for_everyone()


def _picklable(error: Exception | None) -> Exception | None:
    """Give an error that the other processes can be told."""
    try:
        pickle.dumps(error)
    except Exception:  # noqa: BLE001 - any reason will do
        return TrainingError(f"{type(error).__name__}: {error}")
    return error


def num_processes() -> int:
    """Count the processes that share the run."""
    count: int = _state().num_processes
    return count


def _state() -> Any:
    """Give accelerate's view of this process; without a GPU it has to be told that processes run on CPUs."""
    return PartialState(cpu=not torch.cuda.is_available())
