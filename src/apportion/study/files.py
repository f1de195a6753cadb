"""Read and write the files of a study's folder, and check that they belong to the study."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from apportion.errors import ConfigurationError, PlanError, shortened
from apportion.records.files import write_text
from apportion.records.json_file import JsonError, read_json, require_finite
from apportion.records.numbers import describe_problem
from apportion.records.plan import Plan, load_plan
from apportion.records.profile import Profile, load_profile
from apportion.study.contents import KEY_DIGITS
from apportion.study.records import Base, Contents
from apportion.study.settings import StudySettings

RUNS, TUNING, PROFILES, PLANS = "runs", "tuning", "profiles", "plans"
R = TypeVar("R", bound=BaseModel)


def read_record(path: Path, kind: type[R]) -> R:
    """Read one record.

    Args:
        path: Its file.
        kind: Class of the record.

    Returns:
        The record.

    Raises:
        ConfigurationError: the file is damaged, or has the record of another key.
    """

    def damaged(found: str) -> ConfigurationError:
        return ConfigurationError(
            f"{path} is damaged, or of another version of apportion.",
            found=found,
            fix="remove it, and run the study again",
        )

    data = read_json(path, damaged)
    try:
        require_finite(data)
        record = kind.model_validate(data)
    except ValidationError as error:
        raise damaged(describe_problem(error)) from error
    except JsonError as error:
        raise damaged(str(error)) from error
    if getattr(record, "key", path.stem) != path.stem:
        raise foreign(path, f"the key {shortened(str(getattr(record, 'key', None)))}")
    return record


def read_base(path: Path, model: str, settings: StudySettings, contents: Contents) -> Base:
    """Read the measurements of an untrained model.

    Args:
        path: Its file.
        model: The model.
        settings: The study's settings.
        contents: Hashes of the rows and the models that the study computes with.

    Returns:
        The record.

    Raises:
        ConfigurationError: the file is damaged, or belongs to another model, other weights or other tasks.
    """
    base = read_record(path, Base)
    if base.model != model:
        raise foreign(path, f"the model {shortened(repr(base.model))}")
    if base.weights != contents.weights[model]:
        raise foreign(path, f"other weights of {model!r}")
    if {*base.before} != {*settings.tasks} or not {*base.stability} <= {*settings.tasks}:
        raise foreign(path, f"the tasks {shortened(', '.join({**base.before, **base.stability}))}")
    return base


def read_profile(path: Path, model: str, settings: StudySettings) -> Profile:
    """Read a model's profile.

    Args:
        path: Its file.
        model: The model.
        settings: The study's settings.

    Returns:
        The profile.

    Raises:
        ConfigurationError: it belongs to another model or other tasks.
        ProfileError: the file is missing or damaged.
    """
    profile = load_profile(path)
    measured = profile.provenance.get("model", model)
    if measured != model:
        raise foreign(path, f"the model {shortened(repr(measured))}")
    if {*profile.tasks} != {*settings.tasks}:
        raise foreign(path, f"the tasks {', '.join(profile.tasks)}")
    return profile


def read_plan(folder: Path, plan: str, plan_seal: str | None) -> Plan:
    """Read a plan of a study.

    Args:
        folder: The study's folder.
        plan: The plan's file below it.
        plan_seal: Hash of the plan.

    Returns:
        The plan.

    Raises:
        PlanError: the file is missing, damaged, or holds another plan.
    """
    path = folder / plan
    made = load_plan(path)
    if plan_seal not in made.known_seals:
        raise PlanError(
            f"{path} holds another plan than the one of this study.", fix="remove it, and run the study again"
        )
    return made


def keep_plan(folder: Path, made: Plan) -> tuple[str, str]:
    """Store a plan in a study's folder, named by its hash.

    Args:
        folder: The study's folder.
        made: The plan.

    Returns:
        Its path relative to the folder, and its hash.

    Raises:
        PlanError: its file already exists, but is damaged or has another plan.
    """
    plan_seal = made.seal
    path = f"{PLANS}/{plan_seal[:KEY_DIGITS]}.json"
    if (folder / path).is_file():
        read_plan(folder, path, plan_seal)
    else:
        made.save(folder / path)
    return path, plan_seal


def write_record(path: Path, record: BaseModel) -> None:
    """Write one record atomically."""
    write_text(path, record.model_dump_json() + "\n")


def profile_path(folder: Path, key: str) -> Path:
    """Return the file of a model's profile by its `profile_key`."""
    return folder / PROFILES / f"{key}.safetensors"


def base_path(folder: Path, key: str) -> Path:
    """Return the file of a model's other measurements, by its `base_key`."""
    return folder / PROFILES / f"{key}.json"


def foreign(path: Path, found: str) -> ConfigurationError:
    """Make the error for a file that does not belong to the study.

    Args:
        path: The file.
        found: Description of its contents.

    Returns:
        The error to raise.
    """
    return ConfigurationError(
        f"{path} does not belong to this study.", found=found, fix="remove it, and run the study again"
    )
