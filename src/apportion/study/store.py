"""Read a study's folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from apportion.errors import ConfigurationError, shortened
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.study.contents import base_key, profile_key
from apportion.study.files import (
    RUNS,
    TUNING,
    base_path,
    foreign,
    profile_path,
    read_base,
    read_plan,
    read_profile,
    read_record,
)
from apportion.study.note import SUMMARY_FILE, Note, read_note
from apportion.study.records import Base, Contents, Run, Summary, Trial
from apportion.study.settings import StudySettings

K = TypeVar("K", Run, Trial)


@dataclass(frozen=True)
class StoredStudy:
    """Everything in a study's folder that belongs to the study.

    Args:
        folder: The folder.
        settings: The study's settings.
        versions: Versions of the software that computes it.
        contents: Hashes of its rows and models.
        bases: Measurements of each untrained model, so far.
        trials: The finished trials of learning rates.
        runs: The finished runs, in the study's order: by model, task, contender, budget and seed.
        summary: The summary; None if there is none yet.
        num_left_out: Number of records in the folder with other rows, plans or settings than the study's.
    """

    folder: Path
    settings: StudySettings
    versions: dict[str, str]
    contents: Contents
    bases: dict[str, Base]
    trials: tuple[Trial, ...]
    runs: tuple[Run, ...]
    summary: Summary | None
    num_left_out: int

    def profile_path(self, model: str) -> Path:
        """Return the file of a model's profile, which may not be measured yet."""
        return profile_path(self.folder, profile_key(self.settings, self.contents, self.versions, model))

    def profile(self, model: str) -> Profile:
        """Read a model's profile, with all of the study's tasks."""
        return read_profile(self.profile_path(model), model, self.settings)

    def plan(self, run: Run) -> Plan | None:
        """Read a run's plan; full fine-tuning has none."""
        return None if run.plan is None else read_plan(self.folder, run.plan, run.plan_seal)


def load_study(folder: str | os.PathLike[str]) -> StoredStudy:
    """Read a study's folder.

    Args:
        folder: The output folder of ``apportion compare``.

    Returns:
        The study.

    Raises:
        ConfigurationError: it has no study, or a file in it is damaged or does not belong to the study.
    """
    path = Path(folder)
    note = read_note(path)
    if note is None:
        raise ConfigurationError(
            f"{path} holds no study.", fix=f"make one with: apportion compare STUDY.toml -o {path}"
        )
    trials, other_trials = _read_all(path / TUNING, Trial, note.settings, note.trials)
    runs, other_runs = _read_all(path / RUNS, Run, note.settings, note.runs)
    return StoredStudy(
        folder=path,
        settings=note.settings,
        versions=note.versions,
        contents=note.contents,
        bases=_read_bases(path, note),
        trials=trials,
        runs=runs,
        summary=_read_summary(path / SUMMARY_FILE, note),
        num_left_out=other_trials + other_runs,
    )


def _read_summary(path: Path, note: Note) -> Summary | None:
    """Read the summary, unless it is of other settings."""
    summary = read_record(path, Summary) if path.is_file() else None
    return summary if summary is not None and summary.digest == note.digest else None


def _read_bases(path: Path, note: Note) -> dict[str, Base]:
    """Read the measurements of the study's untrained models."""
    files = {
        model: base_path(path, base_key(note.settings, note.contents, note.versions, model))
        for model in note.settings.models
    }
    return {
        model: read_base(file, model, note.settings, note.contents) for model, file in files.items() if file.is_file()
    }


def _read_all(folder: Path, kind: type[K], settings: StudySettings, keys: Iterable[str]) -> tuple[tuple[K, ...], int]:
    """Read the records with the given keys, in the study's order, and count all others."""
    known = set(keys)
    records = []
    for path in sorted(folder.glob("*.json")):
        record = read_record(path, kind)
        _require_known_names(path, record, settings)
        records.append(record)
    mine = [record for record in records if record.key in known]
    return tuple(sorted(mine, key=lambda record: _place(record, settings))), len(records) - len(mine)


def _require_known_names(path: Path, record: Run | Trial, settings: StudySettings) -> None:
    """Raise an error for a record of a model, a task or a contender that the study does not have."""
    contenders = [contender.name for contender in settings.contenders]
    for name, known in (("model", settings.models), ("task", settings.tasks), ("contender", contenders)):
        if getattr(record, name) not in known:
            raise foreign(path, f"the {name} {shortened(repr(getattr(record, name)))}, which the study does not have")


def _place(record: Run | Trial, settings: StudySettings) -> tuple[Any, ...]:
    """Return a record's place in the study's order."""
    contenders = [contender.name for contender in settings.contenders]
    names = (
        settings.models.index(record.model),
        list(settings.tasks).index(record.task),
        contenders.index(record.contender),
    )
    return *names, record.budget, record.seed if isinstance(record, Run) else record.lr
