"""Checks of output paths, to run before any expensive work."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from apportion.errors import OutputExistsError, OutputPathError
from apportion.records.arrays import read_header
from apportion.records.files import is_full, write_error
from apportion.records.json_file import MAX_JSON_BYTES, parse_record
from apportion.records.locks import LOCK_FILES
from apportion.records.profile import PROFILE_HEADER
from apportion.records.temporary import remove_leftovers, temporary_folder

OutputKind = Literal["profile", "plan", "report", "study page", "study data", "picture"]

ADAPTER_CONFIG_FILE, ADAPTER_TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
RUN_FILE, TRAINING_RESULT_FILE = "run.json", "training.json"
DEMO_RESULTS_FILE = "results.json"

_HEAD_BYTES = 4096


def check_output(
    path: str | os.PathLike[str],
    kind: OutputKind,
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    force: bool = False,
) -> None:
    """Check that a file can be written without overwriting an input or a file of another kind.

    Args:
        path: Output file.
        kind: Kind of the output. A file of the same kind may be overwritten.
        inputs: Input files, folders or other names. Inputs are never overwritten, nor are files of another kind inside
            an input folder.
        force: Overwrite a file of any kind that is not an input.

    Raises:
        OutputExistsError: the output is an input, a folder, or a file of another kind.
        OutputPathError: the output is not writable.
        OutputWriteError: the disk is full.
    """
    target = Path(path)
    for name in inputs:
        _check_no_input(target, Path(name), kind)
    mode = _output_mode(target)
    if stat.S_ISDIR(mode):
        raise OutputExistsError(f"{target} is a folder; a file was expected.", fix=f"give a file for the {kind}")
    if mode and not stat.S_ISREG(mode):
        raise OutputExistsError(f"{target} is not a regular file.", fix=f"give another file for the {kind}")
    if mode and not force and not _may_be_replaced(target, kind):
        raise OutputExistsError(
            f"{target} already exists and is another kind of file.",
            expected=kind,
            fix="choose another file, or overwrite it with --force",
        )
    _try_to_write(target.parent, target.name)


def check_output_folder(
    path: str | os.PathLike[str],
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    may_hold: bool = False,
    renamed: bool = False,
) -> Path:
    """Check that an output folder is writable, empty, and not inside an input folder.

    Args:
        path: Output folder, which may be missing.
        inputs: Input files, folders or other names.
        may_hold: Allow a folder that is not empty; the caller checks its contents.
        renamed: Whether the folder is written next to the path first, then renamed.

    Returns:
        The folder as a path.

    Raises:
        OutputExistsError: the path is a file, is inside an input folder, or is not empty.
        OutputPathError: the folder is not writable.
        OutputWriteError: the disk is full.
    """
    folder = Path(path)
    for source in map(Path, inputs):
        if stat.S_ISDIR(_mode(source)) and _real(folder).is_relative_to(_real(source)):
            raise OutputExistsError(
                f"the output folder {folder} is inside an input folder.",
                found=source,
                fix="choose a folder outside it",
            )
    if stat.S_ISREG(_output_mode(folder)) or not may_hold:
        require_empty(folder)
    _try_to_write(folder, "file")
    if renamed:
        _try_to_write(folder.parent, folder.name)
    return folder


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


def _check_no_input(target: Path, source: Path, kind: OutputKind) -> None:
    """Refuse an output that is an input, or a file of another kind inside an input folder."""
    same = _real(target) == _real(source) or (
        bool(_mode(target)) and bool(_mode(source)) and target.samefile(source)  # hard links
    )
    within = stat.S_ISDIR(_mode(source)) and _mode(target) and _real(target).is_relative_to(_real(source))
    if same or (within and not _may_be_replaced(target, kind)):
        raise OutputExistsError(
            f"{target} is an input, and would be overwritten by the {kind}.", fix=f"choose another file for the {kind}"
        )


def _mode(path: Path) -> int:
    """Return the mode of a path; 0 if it does not exist or cannot be read."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def _output_mode(path: Path) -> int:
    """Return the mode of an output; 0 if it does not exist. Raises OutputPathError if it never can."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return 0
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long or has a null character
        raise _not_writable(path, error) from error


def _real(path: Path) -> Path:
    """Resolve symbolic links and `..`."""
    return Path(os.path.realpath(path))


def _may_be_replaced(path: Path, kind: OutputKind) -> bool:
    """Return whether a file is empty or of the given kind."""
    try:
        return path.stat().st_size == 0 or _KINDS[kind](path)
    except (OSError, ValueError):
        return False


def _is_profile(path: Path) -> bool:
    """Recognise a profile by its header."""
    return PROFILE_HEADER in read_header(path)[0]


def _has_fields(path: Path, fields: Iterable[str]) -> bool:
    """Recognise a JSON object by its fields."""
    if path.stat().st_size > MAX_JSON_BYTES:
        return False
    return set(fields) <= set(parse_record(path.read_bytes()))


def _head(path: Path) -> bytes:
    """Read the beginning of a file."""
    with path.open("rb") as opened:
        return opened.read(_HEAD_BYTES)


_KINDS: dict[OutputKind, Callable[[Path], bool]] = {
    "profile": _is_profile,
    "plan": lambda path: _has_fields(path, ("schema_version", "method", "fingerprint", "placements", "seal")),
    "report": lambda path: b'<meta name="generator" content="apportion ' in _head(path),
    "study page": lambda path: _head(path).startswith(b"# Study: "),
    "study data": lambda path: _has_fields(path, ("settings", "versions", "summary", "runs")),
    "picture": lambda path: b"<svg" in _head(path),
}


def _try_to_write(folder: Path, name: str) -> None:
    """Check that the folder is writable by creating and removing a file with a similar name."""
    target = _real(folder)
    existing = next(place for place in (target, *target.parents) if _mode(place))
    try:
        with temporary_folder(existing, "probe") as probe:
            place = probe / target.relative_to(existing)
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(b"")
    except (OSError, ValueError) as error:
        if is_full(error):
            raise write_error(folder / name, error) from error
        raise _not_writable(f"the folder {folder}", error) from error


def _not_writable(path: str | os.PathLike[str], error: Exception) -> OutputPathError:
    """Make the error for a place where no output can be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OutputPathError(
        f"{os.fspath(path)} is not writable.", found=reason, fix="choose another location for the output"
    )
