"""Locks, so that only one process at a time writes to a folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from apportion.errors import FolderInUseError, OutputExistsError
from apportion.records.files import naming_output, write_error
from apportion.records.json_file import parse_record

LOCK_FILE = ".lock"
_OWNER_FILE = ".lock.owner"
LOCK_FILES = (LOCK_FILE, _OWNER_FILE)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a folder for this process while the block runs.

    The operating system releases the lock when the process ends. On file systems without locks, a lock file is used
    instead, which a killed process leaves behind. A missing folder is created, and removed again if nothing was written
    to it.

    Args:
        folder: The folder.

    Yields:
        Nothing.

    Raises:
        FolderInUseError: another process holds the lock; the message names the process and its host.
        OutputExistsError: the path is a file.
        OutputWriteError: nothing can be written in the folder.
    """
    path = Path(folder)
    if path.is_file():
        raise OutputExistsError(f"{path} is a file; a folder was expected.", fix="choose another output folder")
    is_new = not path.exists()
    owner = path / _OWNER_FILE
    lock = FileLock(path / LOCK_FILE)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise FolderInUseError(
            f"{path} is in use by another process.",
            found=_describe_owner(owner),
            fix=f"wait for it to end, choose another folder, or delete {LOCK_FILE} there if the process is gone",
        ) from error
    except OSError as error:
        raise write_error(path / LOCK_FILE, error) from error
    try:
        with naming_output(owner):
            owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        (path / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):
                path.rmdir()  # fails if something was written, as intended


def require_unlocked(folder: str | os.PathLike[str]) -> None:
    """Raise early if another process holds a folder.

    Args:
        folder: The folder, which may be missing.

    Raises:
        FolderInUseError: another process holds the folder.
    """
    if Path(folder, LOCK_FILE).is_file():
        with locked(folder):
            pass


def _describe_owner(path: Path) -> str:
    """Describe the process that holds a folder, if known."""
    try:
        owner = parse_record(path.read_bytes())
        return f"process {owner['pid']} on host {owner['host']}"
    except (OSError, ValueError, KeyError):
        return "an unknown process"
