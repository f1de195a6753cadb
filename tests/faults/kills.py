"""Writers that are killed at random moments, and what their outputs must be afterwards.

Every writer runs in a forked process, so that it starts at once. A killed writer leaves either what was there before or
the whole output; what only looks whole is a defect. The next writer removes what is left and ends as if nothing had
happened.
"""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from apportion.errors import ApportionError

FINISHED, FAILED, REFUSED = 0, 1, 2
_WAIT_S = 120.0


class DefectError(Exception):
    """An output is neither whole nor absent, or the next writer failed."""


@dataclass(frozen=True)
class Writer:
    """Something that writes an output.

    Args:
        name: Its name.
        write: Writes into an empty folder, or goes on there.
        read: Reads what was written into plain data; None if there is nothing. It runs in a process of its own, and
            raises `ApportionError` for an output that it refuses.
        repeats: Whether to write again and again, since one time is too short to be killed in.
        reports: Whether errors of the system are reported, and leftovers removed, by this package.
    """

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    repeats: bool = False
    reports: bool = True


def forked(work: Callable[[], None], log: Path | None = None) -> int:
    """Run something in a forked process.

    Args:
        work: What to run.
        log: Where its output and its errors go.

    Returns:
        The process's id.
    """
    process = os.fork()
    if process:
        return process
    code = FAILED
    try:
        target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        work()
        code = FINISHED
    except ApportionError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = REFUSED
    except BaseException:  # noqa: BLE001 - the process ends here
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(process: int, seconds: float = _WAIT_S) -> int | None:
    """Wait for a process to end.

    Args:
        process: Its id.
        seconds: Longest time to wait.

    Returns:
        Its exit code, negative for a signal; None if it runs still.
    """
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def kill_one(writer: Writer, folder: Path, expected: Any, duration_s: float, draw: Random) -> str:
    """Kill a writer once or several times, then let it end.

    Args:
        writer: The writer.
        folder: An empty folder.
        expected: What it writes when it is not killed.
        duration_s: How long it takes then.
        draw: The source of random delays.

    Returns:
        What became of it: ``absent``, ``whole`` or ``refused`` after the kill, or ``ended`` before it.

    Raises:
        DefectError: a half-written output was accepted, or the next writer did not end with the expected output.
    """
    log = folder.with_suffix(".log")
    state = "ended"
    for _ in range(draw.choice((1, 1, 2))):
        process = forked(lambda: _write(writer, folder, again=writer.repeats), log)
        code = wait(process, draw.uniform(0, 1.1 * duration_s))
        if code is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            state = _judge(writer, folder, expected)
        elif code != FINISHED and not _is_second_time(writer, folder, expected, code):
            raise DefectError(f"ended with {code} before it was killed: {_tail(log)}")
    process = forked(lambda: _write(writer, folder, again=False), log)
    code = wait(process)
    if code is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise DefectError(f"the next writer did not end within {_WAIT_S:g} s")
    if _is_second_time(writer, folder, expected, code):
        return state
    if code != FINISHED:
        raise DefectError(f"the next writer failed: {_tail(log)}")
    if _judge(writer, folder, expected) != "whole":
        raise DefectError("the next writer ended without an output")
    left = sorted(path.name for path in folder.rglob("*") if path.name.endswith(".writing") or ".tmp" in path.name)
    if left and writer.reports:
        raise DefectError(f"left behind: {left[:3]}")
    return state


def limit_one(writer: Writer, folder: Path, expected: Any, sizes: list[int], draw: Random) -> str:
    """Let a writer meet the end of the disk: no file may be larger than a random size.

    Args:
        writer: The writer.
        folder: An empty folder.
        expected: What it writes otherwise.
        sizes: Sizes of the files that it writes otherwise.
        draw: The source of random limits.

    Returns:
        ``refused`` with an error of this package, or ``ended``.

    Raises:
        DefectError: the error was another one, or a half-written output was accepted.
    """
    limit = draw.choice((0, draw.randrange(max(sizes)), draw.choice(sizes) - 1, min(sizes)))

    def work() -> None:
        os.dup2(write, 1)  # a pipe has no limit
        os.dup2(write, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        _write(writer, folder, again=False)

    read, write = os.pipe()
    process = forked(work)
    os.close(write)
    with os.fdopen(read, errors="replace") as opened:
        said = opened.read()
    code = wait(process)
    if code not in (FINISHED, REFUSED):
        raise DefectError(f"ended with {code} at a limit of {limit} bytes: {said[-600:]}")
    if code == REFUSED and str(folder.name) not in said:
        raise DefectError(f"the message names no file: {said[-600:]}")
    state = _judge(writer, folder, expected)
    if code == FINISHED and state != "whole":
        raise DefectError(f"ended well at a limit of {limit} bytes, and the output is {state}")
    return "ended" if code == FINISHED else "refused"


def _write(writer: Writer, folder: Path, *, again: bool) -> None:
    writer.write(folder)
    while again:
        writer.write(folder)


def _judge(writer: Writer, folder: Path, expected: Any) -> str:
    """Read an output: ``absent``, ``whole`` or ``refused``."""
    try:
        contents = writer.read(folder)
    except ApportionError:
        return "refused"
    except Exception as error:
        raise DefectError(f"cannot be read: {type(error).__name__}: {error}") from error
    if contents is None:
        return "absent"
    if contents != expected:
        raise DefectError("other contents were accepted")
    return "whole"


def _is_second_time(writer: Writer, folder: Path, expected: Any, code: int) -> bool:
    """Return whether a writer refused to overwrite a whole output, or one of which an error says that it is not."""
    return code == REFUSED and _judge(writer, folder, expected) in ("refused", "whole")


def _tail(log: Path) -> str:
    with suppress(OSError):
        return log.read_text(errors="replace").strip()[-600:]
    return ""
