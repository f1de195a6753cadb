"""Outputs are checked before anything is read at length or measured."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from apportion.errors import OutputExistsError, OutputPathError
from apportion.records.files import is_full, require_empty, write_error
from apportion.records.json_file import MAX_JSON_BYTES, parse_record
from apportion.records.profile import PROFILE_HEADER

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
    """Make sure that a file can be written, and that nothing is lost by it.

    Args:
        path: The file that is to be written.
        kind: What will be written. A file of the same kind may be replaced.
        inputs: What is read: files, folders, or names of something that is neither. An input is never replaced, nor is
            a file of another kind in a folder that is one.
        force: Replace a file of any kind that is no input.

    Raises:
        OutputExistsError: the output is an input, a folder, or a file of another kind.
        OutputPathError: nothing can be written there.
        OutputWriteError: the disk is full.
    """
    target = Path(path)
    for name in inputs:
        _check_no_input(target, Path(name), kind)
    mode = _mode(target)
    if stat.S_ISDIR(mode):
        raise OutputExistsError(f"{target} is a folder; a file was expected.", fix=f"give a file for the {kind}")
    if mode and not stat.S_ISREG(mode):
        raise OutputExistsError(f"{target} is no regular file.", fix=f"give another file for the {kind}")
    if mode and not force and not _may_be_replaced(target, kind):
        raise OutputExistsError(
            f"{target} is there already, and is no {kind} that this one could replace.",
            fix="choose another file, or replace it with --force",
        )
    _try_to_write(target.parent, target.name)


def check_output_folder(
    path: str | os.PathLike[str],
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    may_hold: bool = False,
    renamed: bool = False,
) -> Path:
    """Make sure that an output folder can be written, is empty, and lies in nothing that is read.

    Args:
        path: The folder, which may be missing.
        inputs: What is read: files, folders, or names of something that is neither.
        may_hold: Whether the folder may have something in it, which its user looks at.
        renamed: Whether the folder is made under another name beside this one, and renamed.

    Returns:
        The folder as a path.

    Raises:
        OutputExistsError: the folder is a file, lies in an input, or has something in it.
        OutputPathError: nothing can be written there.
        OutputWriteError: the disk is full.
    """
    folder = Path(path)
    for source in map(Path, inputs):
        if stat.S_ISDIR(_mode(source)) and _real(folder).is_relative_to(_real(source)):
            raise OutputExistsError(
                f"the output folder {folder} lies in a folder that is read.",
                found=source,
                fix="choose a folder outside it",
            )
    if not may_hold or stat.S_ISREG(_mode(folder)):
        require_empty(folder)
    _try_to_write(folder, "file")
    if renamed:
        _try_to_write(folder.parent, folder.name)
    return folder


def _check_no_input(target: Path, source: Path, kind: OutputKind) -> None:
    """Refuse an output that is an input, or a file of another kind in a folder that is one."""
    same = _real(target) == _real(source) or (
        bool(_mode(target)) and bool(_mode(source)) and target.samefile(source)  # by another name, such as a hard link
    )
    within = stat.S_ISDIR(_mode(source)) and _mode(target) and _real(target).is_relative_to(_real(source))
    if same or (within and not _may_be_replaced(target, kind)):
        raise OutputExistsError(
            f"{target} is an input, and would be replaced by the {kind}.", fix=f"choose another file for the {kind}"
        )


def _mode(path: Path) -> int:
    """Give the type of what is there; 0 where there is nothing, or nothing that can be looked at."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def _real(path: Path) -> Path:
    """Follow links, and leave out what is `..`."""
    return Path(os.path.realpath(path))


def _may_be_replaced(path: Path, kind: OutputKind) -> bool:
    """Tell whether a file holds nothing, or what is written again."""
    try:
        return path.stat().st_size == 0 or _KINDS[kind](path)
    except (OSError, ValueError, SafetensorError):
        return False


def _is_profile(path: Path) -> bool:
    """Recognise a profile by its header."""
    with safe_open(path, framework="np") as opened:
        return PROFILE_HEADER in (opened.metadata() or {})


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
    """Write a file of a like name in the folder, and remove it; where the folder is missing, make one of its name."""
    wanted = _real(folder)
    present = next(place for place in (wanted, *wanted.parents) if _mode(place))
    probe = None
    try:
        probe = Path(tempfile.mkdtemp(prefix=".probe.", dir=present))
        place = probe / wanted.relative_to(present)
        place.mkdir(parents=True, exist_ok=True)
        handle, _ = tempfile.mkstemp(prefix=f".{name}.", dir=place)
        os.close(handle)
    except (OSError, ValueError) as error:
        if is_full(error):
            raise write_error(folder / name, error) from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputPathError(
            f"nothing can be written to {folder}.", found=reason, fix="choose another place for the output"
        ) from error
    finally:
        if probe is not None:
            shutil.rmtree(probe, ignore_errors=True)
