"""``study.json``: the description of a folder's study, and checks that the folder can be used."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from apportion.errors import ConfigurationError, OutputExistsError
from apportion.records.files import write_text
from apportion.records.json_file import read_json
from apportion.records.locks import LOCK_FILES
from apportion.records.numbers import describe_problem
from apportion.study.contents import changed_contents
from apportion.study.records import Contents
from apportion.study.settings import StudySettings

STUDY_FILE = "study.json"
SUMMARY_FILE = "summary.json"


class Note(BaseModel):
    """The description of a study: ``study.json``.

    Args:
        schema_version: Version of the folder's format.
        digest: Hash of the settings.
        versions: Versions of the software that computes the study.
        contents: Hashes of the study's rows and models.
        settings: The study's settings.
        trials: Keys of its trials, as far as they are planned.
        runs: Keys of its runs, once learning rates are chosen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2] = 2
    digest: str
    versions: dict[str, str]
    contents: Contents
    settings: StudySettings
    trials: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Note:
        if self.settings.digest != self.digest:
            raise ValueError("the settings do not match their digest")
        if {*self.contents.tasks} != {*self.settings.tasks} or {*self.contents.weights} != {*self.settings.models}:
            raise ValueError("the contents are those of other tasks or models")
        return self


def find_study(folder: str | os.PathLike[str], settings: StudySettings, versions: dict[str, str]) -> Note | None:
    """Read the study in a folder, and check that it is this one, perhaps with fewer seeds.

    Args:
        folder: The folder.
        settings: The study's settings.
        versions: Versions of the software that computes it.

    Returns:
        The study's description; None for a missing or empty folder.

    Raises:
        ConfigurationError: ``study.json`` is damaged.
        OutputExistsError: the folder has other files, or another study.
    """
    path = Path(folder)
    note = read_note(path)
    if note is None:
        if path.exists() and (not path.is_dir() or any(not _is_ours(entry) for entry in path.iterdir())):
            raise OutputExistsError(
                f"{path} already holds something else than a study.", fix="choose another folder with -o"
            )
        return None
    before, now = note.settings.model_dump(mode="json"), settings.model_dump(mode="json")
    differing = [key for key in now if before[key] != now[key]]
    if differing and (differing != ["seeds"] or settings.seeds < note.settings.seeds):
        raise OutputExistsError(
            f"{path} holds the results of another study.",
            details={"differs in": ", ".join(differing)},
            fix="choose another folder with -o, or remove this one",
        )
    if note.versions != versions:
        changes = [
            f"{key} {note.versions.get(key)} is {version} now"
            for key, version in versions.items()
            if note.versions.get(key) != version
        ]
        raise OutputExistsError(
            f"{path} was started with other versions, which give other numbers.",
            found=", ".join(changes),
            fix="install those, or choose another folder with -o",
        )
    return note


def open_study(
    folder: str | os.PathLike[str],
    settings: StudySettings,
    contents: Contents,
    versions: dict[str, str],
    *,
    begin: bool = True,
) -> None:
    """Open an empty folder, or one with the same study, perhaps with fewer seeds.

    Args:
        folder: The folder.
        settings: The study's settings.
        contents: Hashes of the study's rows and models.
        versions: Versions of the software that computes it.
        begin: Start the study in an empty folder, and record a larger number of seeds.

    Raises:
        ConfigurationError: ``study.json`` is damaged.
        OutputExistsError: the folder has other files, another study, or results of other rows or models.
    """
    path = Path(folder)
    note = find_study(path, settings, versions)
    if note is not None:
        _refuse_changes(path, note, contents)
    if not begin:
        return
    if note is None:
        _write_note(path, Note(digest=settings.digest, versions=versions, contents=contents, settings=settings))
    elif settings != note.settings:
        (path / SUMMARY_FILE).unlink(missing_ok=True)  # of fewer runs
        _write_note(path, note.model_copy(update={"settings": settings, "digest": settings.digest}))


def require_contents(folder: Path, contents: Contents) -> None:
    """Check that rows and models are still those that a study was started with.

    Args:
        folder: The study's folder.
        contents: Their current hashes.

    Raises:
        OutputExistsError: some have changed.
    """
    note = read_note(folder)
    if note is not None:
        _refuse_changes(folder, note, contents)


def note_trials(folder: Path, keys: Iterable[str]) -> None:
    """Record the keys of a study's trials. Other records are ignored when the folder is read."""
    _update_note(folder, trials=tuple(keys))


def note_runs(folder: Path, keys: Iterable[str]) -> None:
    """Record the keys of a study's runs. Other records are ignored when the folder is read."""
    _update_note(folder, runs=tuple(keys))


def read_note(path: Path) -> Note | None:
    """Read the description of a folder's study.

    Args:
        path: The folder.

    Returns:
        The description; None if there is none.

    Raises:
        ConfigurationError: the file is damaged.
    """
    file = path / STUDY_FILE
    if not file.is_file():
        return None

    def damaged(found: str) -> ConfigurationError:
        return ConfigurationError(
            f"{file} is damaged, or of another version of apportion.", found=found, fix="choose another folder with -o"
        )

    data = read_json(file, damaged)
    try:
        return Note.model_validate(data)
    except ValidationError as error:
        raise damaged(describe_problem(error)) from error


def _is_ours(entry: Path) -> bool:
    """Return whether a file was left by a process that stopped before its study started."""
    return entry.name in LOCK_FILES or entry.name.startswith(f".{STUDY_FILE}.")


def _refuse_changes(path: Path, note: Note, contents: Contents) -> None:
    """Raise an error if rows or models are not those of the study's results."""
    changed = changed_contents(note.settings, note.contents, contents)
    if changed:
        shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise OutputExistsError(
            f"{path} holds the results of other data or models.",
            details={"changed": shown},
            fix="choose another folder with -o, or restore what was changed",
        )


def _write_note(path: Path, note: Note) -> None:
    """Write the description of a folder's study."""
    write_text(path / STUDY_FILE, json.dumps(note.model_dump(mode="json"), indent=1) + "\n")


def _update_note(path: Path, **changes: tuple[str, ...]) -> None:
    """Update the description of a folder's study."""
    note = read_note(path)
    if note is not None and (changed := note.model_copy(update=changes)) != note:
        _write_note(path, changed)
