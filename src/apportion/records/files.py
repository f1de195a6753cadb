"""Files that are written whole or not at all, and seals that tell a damaged file from a good one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from apportion.errors import ApportionError, OutputExistsError, OutputWriteError
from apportion.records.locks import LOCK_FILES


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Hand out a temporary path beside `path`; it takes the name only when the block ends without an error.

    Args:
        path: Where the finished file belongs. Its folder is made when missing.

    Yields:
        The temporary path to write to.

    Raises:
        OutputWriteError: the system refused, for example because the disk is full; the file is as it was.
    """
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        use_default_mode(temporary)
        sync(temporary)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, ApportionError) or not (isinstance(error, OSError) or "os error" in str(error)):
            raise
        raise write_error(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_error(path: str | os.PathLike[str], error: Exception) -> OutputWriteError:
    """Say that a file was not written.

    Args:
        path: The file.
        error: What the system, or safetensors for it, said.

    Returns:
        The error to raise.
    """
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    full = is_full(error)
    return OutputWriteError(
        f"{os.fspath(path)} was not written{': the disk is full' if full else ''}.",
        found=reason,
        fix="make room, then run it again" if full else "choose another place for the output",
    )


def is_full(error: Exception) -> bool:
    """Tell whether an error means that a disk is full, or a quota used up; safetensors wraps the system's error."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def sync(path: Path) -> None:
    """Wait until a file's contents are on the disk, so that a power failure cannot take them.

    Args:
        path: The file.
    """
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def use_default_mode(path: Path) -> None:
    """Give a file the permissions that a newly made one has; temporary files and safetensors are for the owner alone.

    Args:
        path: The file.
    """
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def seal(data: dict[str, Any]) -> str:
    """Give the SHA-256 of plain data in canonical JSON."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def require_empty(folder: str | os.PathLike[str]) -> Path:
    """Make sure that nothing would be overwritten.

    Args:
        folder: An output folder, which may be missing.

    Returns:
        The folder as a path.

    Raises:
        OutputExistsError: the folder is a file or has something in it.
    """
    path = Path(folder)
    if path.is_file():
        raise OutputExistsError(f"{path} is a file; a folder was expected.", fix="choose another output folder")
    names = sorted({entry.name for entry in path.iterdir()} - set(LOCK_FILES)) if path.is_dir() else []
    if names:
        raise OutputExistsError(
            f"the output folder {path} already has something in it.",
            found=names,
            fix="choose another folder or empty this one (a training run goes on with --resume)",
        )
    return path
