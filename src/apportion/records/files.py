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

from apportion.errors import ApportionError, OutputWriteError
from apportion.records.temporary import temporary_folder

_WORDS_OF_LIBRARIES = ("os error", "PytorchStreamWriter")  # of safetensors and tokenizers, and of PyTorch


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
    with naming_output(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target.parent, target.name) as folder:
            temporary = folder / target.name
            yield temporary
            use_default_mode(temporary)
            sync(temporary)
            temporary.replace(target)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, renamed to `path` if the block raises no error.

    Args:
        path: Path of the finished folder, which may exist if it is empty. Missing parent folders are created.

    Yields:
        The temporary folder to write to.

    Raises:
        OutputWriteError: writing failed, for example because the disk is full. Nothing is left behind.
    """
    target = Path(path).resolve()
    with naming_output(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target.parent, target.name) as temporary:
            folder = temporary / target.name
            folder.mkdir()
            yield folder
            for file in (one for one in folder.rglob("*") if one.is_file()):
                use_default_mode(file)
                sync(file)
            if target.exists():
                target.rmdir()
            folder.replace(target)


@contextmanager
def naming_output(path: str | os.PathLike[str], left: str = "") -> Iterator[None]:
    """Turn errors of the system into one that names the output.

    Args:
        path: The output.
        left: What stays behind, for the message.

    Yields:
        Nothing.

    Raises:
        OutputWriteError: writing failed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ApportionError) or not _is_of_system(error):
            raise
        raise write_error(path, error, left) from error


def _is_of_system(error: Exception) -> bool:
    """Return whether an error is the system's, as raised by Python or described by other libraries."""
    return isinstance(error, OSError) or any(words in str(error) for words in _WORDS_OF_LIBRARIES)


def write_error(path: str | os.PathLike[str], error: Exception, left: str = "") -> OutputWriteError:
    """Return the error for a file that could not be written.

    Args:
        path: The file.
        error: The error of the system, of safetensors or of PyTorch.
        left: What stays behind, if anything.

    Returns:
        The error to raise.
    """
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    full = is_full(error)
    return OutputWriteError(
        f"{os.fspath(path)} was not written{': the disk is full' if full else ''}.",
        found=reason,
        details={"left": left} if left else None,
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
