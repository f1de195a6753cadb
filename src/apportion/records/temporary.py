"""Temporary folders in which outputs are written, next to them. The next writer removes those of killed processes."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_ENDING = ".writing"
_NAME_BYTES = 64  # of the output's name, so that the temporary name is never too long
_IS_OURS = re.compile(rf"\..*\.[a-z0-9_]{{8}}{re.escape(_ENDING)}", re.DOTALL)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a folder in which an output is written, and remove it at the end, together with those of killed writers.

    The folder is locked while the process lives, which is how others know that it is in use. On file systems without
    locks, and on Windows, folders of killed processes stay.

    Args:
        parent: The output's folder, which exists.
        name: The output's name.

    Yields:
        The folder.
    """
    remove_leftovers(parent, name)
    folder, handle = _create(parent, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_leftovers(parent: Path, name: str | None = None) -> None:
    """Remove the temporary folders of processes that were killed. Those of living processes stay.

    Args:
        parent: Where they are.
        name: The name of the output that they were made for; None for any.
    """
    for folder in _leftovers(parent, name):
        handle = _lock(folder, wait=False)
        if handle is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


def _leftovers(parent: Path, name: str | None) -> list[Path]:
    """List the temporary folders of an output, or of any. In a folder that cannot be listed there are none."""
    start = _prefix(name or "")
    with suppress(OSError):
        return [path for path in parent.iterdir() if _IS_OURS.fullmatch(path.name) and path.name.startswith(start)]
    return []


def _create(parent: Path, name: str) -> tuple[Path, int | None]:
    """Create and lock a folder. Another process may remove it before it is locked; then create another one."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_prefix(name)}.", suffix=_ENDING, dir=parent))
        handle = _lock(folder, wait=True)
        if folder.is_dir():
            return folder, handle
        if handle is not None:
            os.close(handle)


def _prefix(name: str) -> str:
    """Return the beginning of the temporary names of an output."""
    return f".{name.encode(errors='surrogateescape')[:_NAME_BYTES].decode(errors='ignore')}"


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Lock a folder; return None if it is in use or gone, or if there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
