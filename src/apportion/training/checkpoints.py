"""Complete checkpoints: a manifest, written last, lists all files. Runs resume only from checkpoints with one."""

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
    """Write a checkpoint's manifest (sizes and digests of its files) after all files are on disk.

    Args:
        folder: The checkpoint.
    """
    files = {}
    for path in _files(folder):
        sync(path)
        files[path.relative_to(folder).as_posix()] = _describe(path)
    write_text(folder / MANIFEST, json.dumps({"files": files, "seal": seal(files)}, indent=1) + "\n")


def unseal_checkpoint(folder: Path) -> None:
    """Remove the manifest of a checkpoint that is about to be rewritten."""
    (folder / MANIFEST).unlink(missing_ok=True)


def last_checkpoint(folder: Path) -> Path | None:
    """Find the newest complete checkpoint.

    Args:
        folder: Where the checkpoints are.

    Returns:
        Its folder, or None if there is none.

    Raises:
        TrainingError: one of its files is missing or was changed.
    """
    for checkpoint in _newest_first(folder):
        if (checkpoint / MANIFEST).is_file():
            _check(checkpoint)
            return checkpoint
    return None


def remove_unfinished(folder: Path, used: Path | None) -> None:
    """Remove incomplete checkpoints with a warning.

    Otherwise a trainer that keeps only the newest few would count them, and delete complete ones instead.

    Args:
        folder: Where the checkpoints are.
        used: The checkpoint that the run resumes from, if any.
    """
    unfinished = [path for path in _newest_first(folder) if not (path / MANIFEST).is_file()]
    names = [path.name for path in unfinished]
    for path in unfinished:
        shutil.rmtree(path)
    if names:
        consequence = f"resumes from {used.name}" if used else "starts from the beginning"
        warnings.warn(
            f"{', '.join(names)} was incomplete and was removed; the run {consequence}.", ApportionWarning, stacklevel=3
        )


def _check(checkpoint: Path) -> None:
    """Raise an error if a checkpoint's files differ from its manifest."""
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
    """Make the error for a checkpoint that was changed."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return TrainingError(
        f"the run cannot resume from {checkpoint}: it was changed after it was written.",
        found=f"{problems[0]}{more}",
        fix="restore the file, or remove this checkpoint to resume from the previous one",
    )


def _newest_first(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, latest step first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    numbered = [(int(match[1]), path) for path in paths if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def _files(folder: Path) -> list[Path]:
    """List a checkpoint's files except its manifest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _describe(path: Path) -> dict[str, Any]:
    """Return a file's size and digest."""
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return {"bytes": os.fstat(opened.fileno()).st_size, "sha256": digest}
