"""What several processes of one run, as torchrun and accelerate start them, must not each do for themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce

T = TypeVar("T")


def on_first(action: Callable[[], T]) -> T:
    """Do something on the first process alone; the others wait for it.

    Args:
        action: What is done: files are checked or written.

    Returns:
        What it gave, on every process.
    """
    found = [action() if _state().is_main_process else None]
    result: T = broadcast_object_list(found)[0]
    return result


def on_any(*, said: bool) -> bool:
    """Tell whether any process says so.

    Args:
        said: What this one says.

    Returns:
        The same on all of them.
    """
    state = _state()
    if state.num_processes == 1:
        return said
    return bool(reduce(torch.tensor(float(said), device=state.device)) > 0)


def num_processes() -> int:
    """Count the processes that share the run."""
    count: int = _state().num_processes
    return count


def _state() -> Any:
    """Give accelerate's view of this process; without a GPU it has to be told that processes run on CPUs."""
    return PartialState(cpu=not torch.cuda.is_available())
