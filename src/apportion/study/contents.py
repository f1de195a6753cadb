"""The rows of a study, and hashes of everything that its results depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from apportion.data.sources import Row, read_rows
from apportion.errors import DataError
from apportion.records.files import seal
from apportion.study.records import Contents, TaskDigests
from apportion.study.settings import StudySettings

KEY_DIGITS = 16


@dataclass(frozen=True)
class StudyRows:
    """All rows of a study, by task.

    Args:
        train: Training rows; the first of them are the calibration rows.
        validation: Rows for choosing learning rates.
        held_out: Rows for evaluating runs.
        unrelated: Rows whose loss measures forgetting; None if the study has none.
    """

    train: dict[str, list[Row]]
    validation: dict[str, list[Row]]
    held_out: dict[str, list[Row]]
    unrelated: list[Row] | None

    @cached_property
    def _digests(self) -> tuple[dict[str, TaskDigests], str | None]:
        tasks = {
            task: TaskDigests(
                train=_digest(self.train[task]),
                validation=_digest(self.validation[task]),
                held_out=_digest(self.held_out[task]),
            )
            for task in self.train
        }
        return tasks, None if self.unrelated is None else _digest(self.unrelated)

    def contents(self, weights: Mapping[str, str]) -> Contents:
        """Return the hashes of the rows and of models.

        Args:
            weights: By model, the hash of a sample of its weights.

        Returns:
            Both together.
        """
        tasks, unrelated = self._digests
        return Contents(tasks=tasks, unrelated=unrelated, weights=dict(weights))


def read_study_rows(settings: StudySettings) -> StudyRows:
    """Read all rows of a study.

    Args:
        settings: The study's settings.

    Returns:
        The rows.

    Raises:
        DataError: data cannot be read, or have too few rows.
    """
    wanted = settings.training.steps * settings.training.batch_size
    train, validation = {}, {}
    for task, source in settings.tasks.items():
        rows = read_rows(source, num_rows=wanted + settings.tuning.rows)
        num_train = len(rows) - settings.tuning.rows
        if num_train < 1:
            raise DataError(
                f"the data of task {task!r} have {len(rows)} rows, and {settings.tuning.rows} of them are needed to "
                "choose learning rates.",
                fix="give more rows, or fewer to tuning.rows",
            )
        train[task], validation[task] = rows[:num_train], rows[num_train:]

    def held_out(source: str) -> list[Row]:
        return read_rows(source, num_rows=settings.eval_rows, split="test")

    return StudyRows(
        train=train,
        validation=validation,
        held_out={task: held_out(settings.eval.get(task, source)) for task, source in settings.tasks.items()},
        unrelated=held_out(settings.unrelated) if settings.unrelated else None,
    )


def changed_contents(settings: StudySettings, before: Contents, now: Contents) -> list[str]:
    """Describe the rows and models that changed since a study was started.

    Args:
        settings: The study's settings.
        before: Hashes at the start.
        now: Hashes now; models that are missing here are not compared.

    Returns:
        A description of each changed set of rows and each changed model.
    """
    changed = []
    for task, source in settings.tasks.items():
        old, new = before.tasks[task], now.tasks[task]
        if old.train != new.train:
            changed.append(f"the training rows of task {task!r} ({source})")
        if old.validation != new.validation:
            changed.append(f"the validation rows of task {task!r} ({source})")
        if old.held_out != new.held_out:
            changed.append(f"the held-out rows of task {task!r} ({settings.eval.get(task, source)})")
    if before.unrelated != now.unrelated:
        changed.append(f"the unrelated rows ({settings.unrelated})")
    changed += [
        f"the weights of model {model!r}" for model, digest in now.weights.items() if before.weights[model] != digest
    ]
    return changed


def profile_key(settings: StudySettings, contents: Contents, versions: Mapping[str, str], model: str) -> str:
    """Hash everything that a model's profile depends on.

    Args:
        settings: The study's settings.
        contents: Hashes of rows and weights.
        versions: Versions of what computes it.
        model: The model.

    Returns:
        The hash, which names the profile's file.
    """
    return key_of(
        {
            "model": model,
            "weights": contents.weights[model],
            "sources": settings.tasks,
            "rows": {task: digests.train for task, digests in contents.tasks.items()},
            "calibration_rows": settings.profile.rows,
            "max_length": settings.training.max_length,
            "versions": dict(versions),
        }
    )


def base_key(settings: StudySettings, contents: Contents, versions: Mapping[str, str], model: str) -> str:
    """Hash everything that the scores and the stability of an untrained model depend on.

    Args:
        settings: The study's settings.
        contents: Hashes of rows and weights.
        versions: Versions of what computes it.
        model: The model.

    Returns:
        The hash, which names the file of the model's `Base`.
    """
    return key_of(
        {
            "profile": profile_key(settings, contents, versions, model),
            "held_out": {task: digests.held_out for task, digests in contents.tasks.items()},
            "unrelated": contents.unrelated,
            "hot": settings.profile.hot,
            "resamples": settings.profile.resamples,
            "level": settings.level,
        }
    )


def key_of(facts: dict[str, object]) -> str:
    """Hash plain data into a key, which names a file."""
    return seal(facts)[:KEY_DIGITS]


def _digest(rows: list[Row]) -> str:
    """Hash rows in their order."""
    return seal({"rows": rows})
