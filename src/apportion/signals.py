"""Raise SIGTERM and SIGHUP, as sent by batch systems and closing terminals, as an exception for cleaning up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_NAMES = ("SIGTERM", "SIGHUP")  # Windows lacks the second
TERMINATING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Terminated(BaseException):
    """The process was asked to end.

    Args:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """The conventional exit code of a process ended by a signal: 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number


def end_by(number: int) -> NoReturn:
    """Raise the exception for a signal.

    Args:
        number: The signal's number.

    Raises:
        KeyboardInterrupt: the signal is SIGINT (Ctrl-C).
        Terminated: the signal is another one.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(number)


@contextmanager
def raising_terminated() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise `Terminated` in the main thread, like Ctrl-C raises KeyboardInterrupt.

    Yields:
        Nothing.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        raise Terminated(number)

    before = {number: signal.getsignal(number) for number in TERMINATING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
