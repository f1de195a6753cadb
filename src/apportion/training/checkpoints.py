"""Checkpoints that are whole: the last file written lists all others, and a run goes on from nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from apportion.errors import ApportionWarning, TrainingError
from apportion.records.files import seal, sync, write_text
from apportion.records.json_file import read_json

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"

_NAME = re.compile(r"checkpoint-(\d+)")


def seal_checkpoint(folder: Path) -> None:
    """List a checkpoint's files with their sizes and digests in a last file, after all of them are on the disk.

    Args:
        folder: The checkpoint.
    """
    files = {}
    for path in _files(folder):
        sync(path)
        files[path.relative_to(folder).as_posix()] = _describe(path)
    write_text(folder / MANIFEST, json.dumps({"files": files, "seal": seal(files)}, indent=1) + "\n")


def unseal_checkpoint(folder: Path) -> None:
    """Remove the list of a checkpoint that is about to be written again."""
    (folder / MANIFEST).unlink(missing_ok=True)


def last_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that was written to its end.

    Args:
        folder: Where the checkpoints are.

    Returns:
        Its folder; None where there is none.

    Raises:
        TrainingError: a file of it is missing or was changed since.
    """
    for checkpoint in _newest_first(folder):
        if (checkpoint / MANIFEST).is_file():
            _check(checkpoint)
            return checkpoint
    return None


def remove_unfinished(folder: Path, used: Path | None) -> None:
    """Remove the checkpoints whose writing was cut short, and say so.

    A trainer that keeps the newest few would count them, and remove whole ones instead.

    Args:
        folder: Where the checkpoints are.
        used: The checkpoint that the run goes on from, if any.
    """
    unfinished = [path for path in _newest_first(folder) if not (path / MANIFEST).is_file()]
    names = [path.name for path in unfinished]
    for path in unfinished:
        shutil.rmtree(path)
    if names:
        consequence = f"goes on from {used.name}" if used else "begins anew"
        warnings.warn(
            f"{', '.join(names)} was not written to its end; the run {consequence}.", ApportionWarning, stacklevel=3
        )


def _check(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files are not those that its list names."""
    manifest = read_json(checkpoint / MANIFEST, lambda _found: _refusal(checkpoint, f"{MANIFEST} was changed"))
    expected = manifest.get("files")
    if not isinstance(expected, dict) or manifest.get("seal") != seal(expected):
        raise _refusal(checkpoint, f"{MANIFEST} was changed")
    problems = [f"{name} is missing" for name in expected if not (checkpoint / name).is_file()]
    present = [name for name in expected if (checkpoint / name).is_file()]
    problems += [f"{name} was changed" for name in present if _describe(checkpoint / name) != expected[name]]
    if problems:
        raise _refusal(checkpoint, *problems)


def _refusal(checkpoint: Path, *problems: str) -> TrainingError:
    """Say why a run cannot go on from a checkpoint."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return TrainingError(
        f"the run cannot go on from {checkpoint}: it is not as it was written.",
        found=f"{problems[0]}{more}",
        fix="put the file back, or remove this checkpoint to go on from the one before",
    )


def _newest_first(folder: Path) -> list[Path]:
    """Give the checkpoints of a folder, that of the latest step first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    numbered = [(int(match[1]), path) for path in paths if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def _files(folder: Path) -> list[Path]:
    """Give a checkpoint's files but for its list."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _describe(path: Path) -> dict[str, Any]:
    """Give a file's size and digest."""
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return {"bytes": os.fstat(opened.fileno()).st_size, "sha256": digest}
