"""Folders that one process at a time may write to."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from apportion.errors import FolderInUseError, OutputExistsError
from apportion.records.json_file import parse_record

LOCK_FILE = ".lock"
_OWNER_FILE = ".lock.owner"
LOCK_FILES = (LOCK_FILE, _OWNER_FILE)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for this process while the block runs.

    The operating system releases the lock when the process ends, however it ends; on file systems without such locks a
    file stands for it, which a killed process leaves behind. The folder is created when missing, and a folder that was
    created here is removed again if nothing was written to it.

    Args:
        folder: The folder.

    Yields:
        Nothing.

    Raises:
        FolderInUseError: another process holds the folder; the message names it and its host.
        OutputExistsError: there is a file in place of the folder.
    """
    path = Path(folder)
    if path.is_file():
        raise OutputExistsError(f"{path} is a file; a folder was expected.", fix="choose another output folder")
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    owner = path / _OWNER_FILE
    lock = FileLock(path / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise FolderInUseError(
            f"{path} is in use by another process.",
            found=_describe_owner(owner),
            fix=f"wait until it has ended, choose another folder, or remove {LOCK_FILE} there if it is gone",
        ) from error
    try:
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        (path / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):
                path.rmdir()  # fails, as it should, where something was written


def require_unlocked(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that another process holds, before much is read or loaded.

    Args:
        folder: The folder, which may be missing.

    Raises:
        FolderInUseError: another process holds it.
    """
    if Path(folder, LOCK_FILE).is_file():
        with locked(folder):
            pass


def _describe_owner(path: Path) -> str:
    """Name the process that holds a folder, as far as it has said so."""
    try:
        owner = parse_record(path.read_bytes())
        return f"process {owner['pid']} on host {owner['host']}"
    except (OSError, ValueError, KeyError):
        return "a process that has just started"
