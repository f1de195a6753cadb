"""Atomic writes, and seals to detect damaged files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from apportion.errors import ApportionError, OutputExistsError, OutputWriteError
from apportion.records.locks import LOCK_FILES
from apportion.records.temporary import remove_leftovers, temporary_folder


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, renamed to `path` if the block raises no error.

    Args:
        path: Path of the finished file. Missing parent folders are created.

    Yields:
        The temporary path to write to.

    Raises:
        OutputWriteError: writing failed, for example because the disk is full. The old file is unchanged.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target.parent, target.name) as folder:
            temporary = folder / target.name
            yield temporary
            use_default_mode(temporary)
            sync(temporary)
            temporary.replace(target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, ApportionError) or not (isinstance(error, OSError) or "os error" in str(error)):
            raise
        raise write_error(target, error) from error


def write_error(path: str | os.PathLike[str], error: Exception) -> OutputWriteError:
    """Return the error for a file that could not be written.

    Args:
        path: The file.
        error: The error of the system or of safetensors.

    Returns:
        The error to raise.
    """
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    full = is_full(error)
    return OutputWriteError(
        f"{os.fspath(path)} was not written{': the disk is full' if full else ''}.",
        found=reason,
        fix="free disk space, then run the command again" if full else "choose another location for the output",
    )


def is_full(error: Exception) -> bool:
    """Return whether an error means that the disk or quota is full; safetensors wraps the system's error."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def sync(path: Path) -> None:
    """Flush a file to disk, so that a power failure does not lose it.

    Args:
        path: The file.
    """
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def use_default_mode(path: Path) -> None:
    """Set the default permissions of a new file. Temporary files and safetensors files are readable by the owner only.

    Args:
        path: The file.
    """
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def seal(data: dict[str, Any]) -> str:
    """Return the SHA-256 of plain data in canonical JSON."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def require_empty(folder: str | os.PathLike[str]) -> Path:
    """Check that an output folder is missing or empty, and remove what killed processes left in it.

    Args:
        folder: An output folder, which may be missing.

    Returns:
        The folder as a path.

    Raises:
        OutputExistsError: the path is a file or a folder that is not empty.
    """
    path = Path(folder)
    if path.is_file():
        raise OutputExistsError(f"{path} is a file; a folder was expected.", fix="choose another output folder")
    remove_leftovers(path)
    names = sorted({entry.name for entry in path.iterdir()} - set(LOCK_FILES)) if path.is_dir() else []
    if names:
        raise OutputExistsError(
            f"the output folder {path} is not empty.",
            found=names,
            fix="choose another folder or empty this one (to continue a training run, use --resume)",
        )
    return path
