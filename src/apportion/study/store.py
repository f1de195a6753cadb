"""A study's folder: what is in it, and that it belongs to this study."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from apportion.errors import ConfigurationError, OutputExistsError
from apportion.records.files import write_text
from apportion.records.plan import Plan, load_plan
from apportion.records.profile import Profile, load_profile
from apportion.study.records import SCHEMA_VERSION, Base, Run, Summary, Trial
from apportion.study.settings import StudySettings

STUDY_FILE = "study.json"
SUMMARY_FILE = "summary.json"
R = TypeVar("R", bound=BaseModel)
RUNS, TUNING, PROFILES, PLANS = "runs", "tuning", "profiles", "plans"


@dataclass(frozen=True)
class StoredStudy:
    """Everything that a study's folder holds.

    Args:
        folder: The folder.
        settings: The study's settings.
        versions: Versions of what computes it.
        bases: What was measured of each model that is measured already.
        trials: The learning rates tried.
        runs: The finished runs, in the study's order: by model, task, contender, budget and seed.
        summary: What they say; None before anything was summarised.
    """

    folder: Path
    settings: StudySettings
    versions: dict[str, str]
    bases: dict[str, Base]
    trials: tuple[Trial, ...]
    runs: tuple[Run, ...]
    summary: Summary | None

    def profile(self, model: str) -> Profile:
        """Read a model's profile, with all of the study's tasks."""
        return load_profile(profile_path(self.folder, model))

    def plan(self, run: Run) -> Plan | None:
        """Read a run's plan; full fine-tuning has none."""
        return load_plan(self.folder / run.plan) if run.plan else None


def load_study(folder: str | os.PathLike[str]) -> StoredStudy:
    """Read a study's folder.

    Args:
        folder: As ``apportion compare -o`` was told.

    Returns:
        What is in it.

    Raises:
        ConfigurationError: it holds no study, or a file in it is damaged.
    """
    path = Path(folder)
    note = _read_note(path)
    if note is None:
        raise ConfigurationError(
            f"{path} holds no study.\n  fix:  make one with: apportion compare STUDY.toml -o {path}"
        )
    try:
        settings = StudySettings(**note["settings"])
    except ValidationError as error:
        raise ConfigurationError(f"{path / STUDY_FILE} is damaged, or of another version of apportion.") from error
    summary = path / SUMMARY_FILE
    order = {name: number for number, name in enumerate([*settings.models, *settings.tasks])}
    contenders = {contender.name: number for number, contender in enumerate(settings.contenders)}

    def place(record: Run | Trial) -> tuple[Any, ...]:
        last = record.seed if isinstance(record, Run) else record.lr
        names = (order[record.model], order[record.task], contenders[record.contender])
        return (*names, record.budget, last)

    return StoredStudy(
        folder=path,
        settings=settings,
        versions=note["versions"],
        bases={base.model: base for base in _read_all(path / PROFILES, Base)},
        trials=tuple(sorted(_read_all(path / TUNING, Trial), key=place)),
        runs=tuple(sorted(_read_all(path / RUNS, Run), key=place)),
        summary=read_record(summary, Summary) if summary.is_file() else None,
    )


def open_study(
    folder: str | os.PathLike[str], settings: StudySettings, versions: dict[str, str], *, begin: bool = True
) -> bool:
    """Take an empty folder, or one that the same study began in, perhaps with fewer seeds.

    Args:
        folder: The folder.
        settings: The study's settings.
        versions: Versions of what computes it: others would give other numbers.
        begin: Begin the study in an empty folder.

    Returns:
        Whether the folder holds the study now.

    Raises:
        OutputExistsError: the folder holds something else, or another study.
    """
    path = Path(folder)
    note = _read_note(path)
    if note is None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputExistsError(
                f"{path} already holds something else than a study.\n  fix:  choose another folder with -o"
            )
        if begin:
            _write_note(path, settings, versions)
        return begin
    told = settings.model_dump(mode="json")
    differing = [key for key in told if note["settings"].get(key) != told[key]]
    grows = differing == ["seeds"] and settings.seeds > note["settings"]["seeds"]
    if note["digest"] != settings.digest and not grows:
        raise OutputExistsError(
            f"{path} holds the results of another study.\n  differs in:  {', '.join(differing)}\n"
            "  fix:         choose another folder with -o, or remove this one"
        )
    if note["versions"] != versions:
        changed = [f"{key} {note['versions'].get(key)} is {versions[key]} now" for key in versions]
        found = [
            text for key, text in zip(versions, changed, strict=True) if note["versions"].get(key) != versions[key]
        ]
        raise OutputExistsError(
            f"{path} was begun with other versions, which give other numbers.\n  found:  {', '.join(found)}\n"
            "  fix:    install those, or choose another folder with -o"
        )
    if grows and begin:
        (path / SUMMARY_FILE).unlink(missing_ok=True)  # of fewer runs
        _write_note(path, settings, versions)
    return True


def read_record(path: Path, kind: type[R]) -> R:
    """Read one record.

    Args:
        path: Its file.
        kind: What it is.

    Returns:
        The record.

    Raises:
        ConfigurationError: the file is damaged.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ConfigurationError(
            f"{path} is damaged, or of another version of apportion.\n  fix:  remove it, and run the study again"
        ) from error


def write_record(path: Path, record: BaseModel) -> None:
    """Write one record whole or not at all."""
    write_text(path, record.model_dump_json() + "\n")


def profile_path(folder: Path, model: str) -> Path:
    """Give the file of a model's profile."""
    return folder / PROFILES / f"{file_name(model)}.safetensors"


def base_path(folder: Path, model: str) -> Path:
    """Give the file of what else was measured of a model."""
    return profile_path(folder, model).with_suffix(".json")


def file_name(text: str) -> str:
    """Turn a name into one that every file system takes."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


def _write_note(path: Path, settings: StudySettings, versions: dict[str, str]) -> None:
    """Write what a folder says about its study."""
    identity = {"schema_version": SCHEMA_VERSION, "digest": settings.digest, "versions": versions}
    full = identity | {"settings": settings.model_dump(mode="json")}
    write_text(path / STUDY_FILE, json.dumps(full, indent=1) + "\n")


def _read_note(path: Path) -> dict[str, Any] | None:
    """Read what a folder says about its study."""
    file = path / STUDY_FILE
    if not file.is_file():
        return None
    try:
        note: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{file} is damaged.\n  fix:  choose another folder with -o") from error
    return note


def _read_all(folder: Path, kind: type[R]) -> list[R]:
    """Read every record of a folder."""
    return [read_record(path, kind) for path in sorted(folder.glob("*.json"))]
