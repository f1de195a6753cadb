"""Procedurally generated tasks (the reasoning-gym package) as rows of prompt, completion and answer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, Literal, TypedDict

from apportion.errors import DataError, MissingDependencyError
from apportion.records.names import nearest

Split = Literal["train", "test"]

_TEST_BUCKETS = 4  # one prompt in four belongs to the test split
_SEEDS_PER_RUN = 10_000_000
_TEST_SEED_OFFSET = 1_000_000_000


class TaskRow(TypedDict):
    """One question of a task in TRL's prompt-completion form, with the answer for exact match."""

    prompt: str
    completion: str
    answer: str


def task_names() -> list[str]:
    """List the tasks that can be generated, in alphabetical order."""
    return sorted(_registry())


def task_rows(
    name: str, split: Split = "train", *, num_rows: int, seed: int = 0, config: dict[str, Any] | None = None
) -> list[TaskRow]:
    """Generate rows of one task. The two splits share no generator seed and no prompt.

    Whether a prompt belongs to the test split depends only on its SHA-256 (one bucket of four), not on the seed. So a
    model never sees a test prompt in training.

    Args:
        name: A reasoning-gym task, such as ``chain_sum``.
        split: ``train`` or ``test``.
        num_rows: Number of rows to generate, at least 1.
        seed: Different values use different generator seeds.
        config: Options of the generator, such as ``{"max_terms": 3}``. Others have the generator's defaults.

    Returns:
        Exactly ``num_rows`` rows, the same for the same arguments.

    Raises:
        DataError: the task, the split or an option is unknown, or the task's questions have no single answer.
        MissingDependencyError: reasoning-gym is not installed.
    """
    if split not in ("train", "test"):
        raise DataError(
            f"split {split!r} of task {name!r} is unknown.", fix=f"use task:{name}:train or task:{name}:test"
        )
    if num_rows < 1:
        raise DataError(f"num_rows={num_rows} for task {name!r} is too small.", fix="give at least 1")
    rows: list[TaskRow] = []
    for item in _items(name, split, seed, config or {}):
        row = _row(name, item)
        if _split_of(row["prompt"]) == split:
            rows.append(row)
            if len(rows) == num_rows:
                return rows
    raise DataError(f"task {name!r} has only {len(rows)} rows of split {split!r}; {num_rows} were requested.")


def _items(name: str, split: Split, seed: int, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the generator's items."""
    registry = _registry()
    if name not in registry:
        near = nearest(name, registry)
        raise DataError(
            f"there is no task {name!r}.", fix=f"did you mean {near}?" if near else "see reasoning_gym.factory.DATASETS"
        )
    dataset_class, config_class = registry[name]
    known = {field.name for field in dataclasses.fields(config_class)} - {"seed", "size"}
    for option in config:
        if option not in known:
            raise DataError(f"task {name!r} has no option {option!r}.", details={"options": ", ".join(sorted(known))})
    first_seed = seed * _SEEDS_PER_RUN + (_TEST_SEED_OFFSET if split == "test" else 0)
    try:
        settings = config_class(seed=first_seed, size=_SEEDS_PER_RUN, **config)
        getattr(settings, "validate", lambda: None)()  # not every generator has one
        dataset = dataset_class(settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(f"task {name!r} does not accept the options {config}.", found=str(error)) from error
    for index in range(_SEEDS_PER_RUN):
        yield dataset[index]


def _row(name: str, item: dict[str, Any]) -> TaskRow:
    """Convert a generated item to a row."""
    answer = item["answer"]
    if answer is None or not str(answer).strip():
        raise DataError(
            f"task {name!r} has no single written answer, so exact match cannot score it.", fix="choose another task"
        )
    answer = str(answer).strip()
    return {"prompt": f"{item['question'].strip()}\nAnswer:", "completion": f" {answer}", "answer": answer}


def _split_of(prompt: str) -> Split:
    """Return the split of a prompt, from its hash."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % _TEST_BUCKETS
    return "test" if bucket == 0 else "train"


def _registry() -> dict[str, Any]:
    """Import reasoning-gym's table of generators."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingDependencyError("generated tasks", package="reasoning-gym", extra="tasks") from error
    return DATASETS  # type: ignore[no-any-return]
