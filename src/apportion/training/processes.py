"""Coordination of a run's processes, as started by torchrun or accelerate."""

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
    """Run an action only on the first process; the others wait for it.

    Args:
        action: The action, such as checking or writing files.

    Returns:
        The action's result, on every process. If it raises an error, every process raises it.
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
    """Lock a folder for this run. The first process holds the lock for all.

    Args:
        folder: The folder.

    Yields:
        Nothing.

    Raises:
        FolderInUseError: another run has locked the folder.
    """
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(locked(folder)))
        yield


def largest(value: int) -> int:
    """Return the largest value over all processes.

    Args:
        value: This process's value.

    Returns:
        The maximum, the same on every process.
    """
    state = _state()
    if state.num_processes == 1:
        return value
    return int(gather(torch.tensor([value], device=state.device)).max())


def wait_for_all() -> None:
    """Wait until every process has reached this point."""
    _state().wait_for_everyone()


def _picklable(error: Exception | None) -> Exception | None:
    """Return an error that can be sent to the other processes."""
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
    """Return accelerate's view of this process. Without a GPU, `cpu` has to be set explicitly."""
    return PartialState(cpu=not torch.cuda.is_available())
