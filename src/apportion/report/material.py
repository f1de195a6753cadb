"""What a page is made from: everything that one folder or file holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from apportion.demo import RESULTS_FILE
from apportion.errors import ConfigurationError, DataError, PlanMismatchError
from apportion.records.plan import Plan, load_plan
from apportion.records.profile import Profile, load_profile
from apportion.report.commands import demo_command, plan_command, profile_command
from apportion.study.records import Run, Summary

_SUMMARY_FILE = "summary.json"
_TAKEN = "a study's folder, a demonstration's folder, a profile (.safetensors) or a plan (.json)"


@dataclass(frozen=True)
class Material:
    """What a page can show; what there is none of is left out of it.

    Args:
        kind: What was given.
        name: Its name, for the heading.
        profiles: Profiles by model.
        plans: Plans by file, as runs name them.
        summary: What a study says.
        runs: The runs of a study.
        demo: The results of a demonstration.
        commands: What to type to get it again.
    """

    kind: Literal["study", "demonstration", "profile", "plan"]
    name: str
    profiles: dict[str, Profile] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    summary: Summary | None = None
    runs: tuple[Run, ...] = ()
    demo: dict[str, Any] | None = None
    commands: tuple[str, ...] = ()


def read_material(path: str | os.PathLike[str], profile: str | os.PathLike[str] | None = None) -> Material:
    """Read whatever a path holds.

    Args:
        path: A study's or a demonstration's folder, a profile or a plan.
        profile: The profile that a plan was made from, where the path is a plan.

    Returns:
        All that can be shown.

    Raises:
        ConfigurationError: there is nothing there that a page can be made from, or a profile was given for something
            other than a plan.
        PlanMismatchError: plan and profile belong to different architectures.
    """
    source = Path(path)
    if profile is not None and source.suffix != ".json":
        raise ConfigurationError(f"a profile was given, and {source} is no plan.\n  fix:  leave --profile out")
    if (source / _SUMMARY_FILE).is_file():
        return _read_study(source)
    if (source / RESULTS_FILE).is_file():
        return _read_demo(source)
    if source.is_dir():
        raise ConfigurationError(
            f"{source} is no folder of a finished study or demonstration: it has neither {_SUMMARY_FILE} nor "
            f"{RESULTS_FILE}.\n  fix:  let apportion compare or apportion demo end in it first, or give {_TAKEN}"
        )
    if source.suffix == ".safetensors":
        measured = load_profile(source)
        command = profile_command(measured, source.name)
        return Material("profile", source.stem, {_model_of(measured): measured}, commands=(command,) if command else ())
    if source.suffix == ".json":
        return _read_plan(source, profile)
    missing = "is neither a folder, a .safetensors file nor a .json file" if source.exists() else "does not exist"
    raise ConfigurationError(f"{source} {missing}.\n  fix:  give {_TAKEN}")


def _read_plan(source: Path, profile: str | os.PathLike[str] | None) -> Material:
    """Read a plan, and the profile behind it where it is given."""
    made = load_plan(source)
    command = plan_command(made, os.fspath(profile or "PROFILE"), source.name)
    if profile is None:
        return Material("plan", source.stem, plans={source.name: made}, commands=(command,))
    measured = load_profile(profile)
    if made.fingerprint != measured.fingerprint:
        raise PlanMismatchError(
            f"the plan {source} and the profile {profile} belong to different models.\n  plan:     {made.model}\n"
            f"  profile:  {measured.layout.describe()}\n  fix:      give the profile that the plan was made from"
        )
    before = profile_command(measured, os.fspath(profile))
    commands = (before, command) if before else (command,)
    return Material("plan", source.stem, {_model_of(measured): measured}, {source.name: made}, commands=commands)


def _read_study(folder: Path) -> Material:
    """Read a study's summary, runs, profiles and plans."""
    with _damaged(folder / _SUMMARY_FILE):
        summary = Summary.model_validate_json((folder / _SUMMARY_FILE).read_bytes())
    runs = []
    for file in sorted((folder / "runs").glob("*.json")):
        with _damaged(file):
            runs.append(Run.model_validate_json(file.read_bytes()))
    return Material(
        "study",
        summary.name,
        profiles={file.stem: load_profile(file) for file in sorted((folder / "profiles").glob("*.safetensors"))},
        plans=_plans(folder, "plans/*.json"),
        summary=summary,
        runs=tuple(runs),
        commands=summary.commands,
    )


def _read_demo(folder: Path) -> Material:
    """Read a demonstration's results, profile and plans."""
    with _damaged(folder / RESULTS_FILE):
        results = json.loads((folder / RESULTS_FILE).read_bytes())
        if not isinstance(results, dict) or not {"settings", "runs"} <= set(results):
            raise ValueError("it has no settings or no runs")
    measured = load_profile(folder / "profile.safetensors")
    return Material(
        "demonstration",
        "demonstration",
        {_model_of(measured): measured},
        _plans(folder, "*/*/plan.json"),
        demo=results,
        commands=(demo_command(folder.name),),
    )


def _plans(folder: Path, pattern: str) -> dict[str, Plan]:
    """Read the plans below a folder, by their path below it."""
    return {file.relative_to(folder).as_posix(): load_plan(file) for file in sorted(folder.glob(pattern))}


def _model_of(profile: Profile) -> str:
    """Name the model that was profiled."""
    return str(profile.provenance.get("model") or profile.layout.model_class)


@contextmanager
def _damaged(file: Path) -> Iterator[None]:
    """Turn what is wrong inside a file into one message that names the file."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise DataError(
            f"{file} is damaged or of another version.\n  place:  {place}\n  found:  {first['msg']}\n"
            "  fix:    run the command that wrote it again"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{file} is damaged.\n  found:  {error}\n  fix:    run the command that wrote it again"
        ) from error
