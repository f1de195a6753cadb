"""Contents of a page, read from a folder or a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from apportion.errors import ConfigurationError, PlanMismatchError
from apportion.records.demonstration import read_results
from apportion.records.outputs import DEMO_RESULTS_FILE
from apportion.records.plan import Plan, load_plan
from apportion.records.profile import Profile, load_profile
from apportion.report.commands import demo_command, plan_command, profile_command
from apportion.study.note import STUDY_FILE
from apportion.study.store import StoredStudy, load_study

_ACCEPTED = "a study's folder, a demonstration's folder, a profile (.safetensors) or a plan (.json)"


@dataclass(frozen=True)
class Material:
    """Contents of a page. Sections without contents are not shown.

    Args:
        kind: Kind of the source.
        name: Its name, for the heading.
        profiles: Profiles by model.
        plans: Plans by file, as named in a study's runs.
        study: All records of a study.
        demo: Results of a demonstration.
        commands: Commands that reproduce the contents.
    """

    kind: Literal["study", "demonstration", "profile", "plan"]
    name: str
    profiles: dict[str, Profile] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    study: StoredStudy | None = None
    demo: dict[str, Any] | None = None
    commands: tuple[str, ...] = ()


def read_material(path: str | os.PathLike[str], profile: str | os.PathLike[str] | None = None) -> Material:
    """Read the contents of a page.

    Args:
        path: Folder of a study or a demonstration, a profile or a plan.
        profile: Profile that the plan was made from, if the path is a plan.

    Returns:
        The contents.

    Raises:
        ConfigurationError: the path is none of these, or a profile was given but the path is not a plan.
        PlanMismatchError: plan and profile are for different architectures.
    """
    source = Path(path)
    if profile is not None and source.suffix != ".json":
        raise ConfigurationError(f"--profile was given, but {source} is not a plan.", fix="drop --profile")
    if (source / STUDY_FILE).is_file():
        return _read_study(source)
    if (source / DEMO_RESULTS_FILE).is_file():
        return _read_demo(source)
    if source.is_dir():
        raise ConfigurationError(
            f"{source} is neither a study's folder nor that of a finished demonstration: it has no {STUDY_FILE} and "
            f"no {DEMO_RESULTS_FILE}.",
            fix=f"give {_ACCEPTED}",
        )
    if source.suffix == ".safetensors":
        measured = load_profile(source)
        command = profile_command(measured, source.name)
        return Material("profile", source.stem, {_model_of(measured): measured}, commands=(command,) if command else ())
    if source.suffix == ".json":
        return _read_plan(source, profile)
    problem = "is not a folder, a .safetensors file or a .json file" if source.exists() else "does not exist"
    raise ConfigurationError(f"{source} {problem}.", fix=f"give {_ACCEPTED}")


def _read_plan(source: Path, profile: str | os.PathLike[str] | None) -> Material:
    """Read a plan, and its profile if given."""
    made = load_plan(source)
    command = plan_command(made, os.fspath(profile or "PROFILE"), source.name)
    if profile is None:
        return Material("plan", source.stem, plans={source.name: made}, commands=(command,))
    measured = load_profile(profile)
    if made.fingerprint != measured.fingerprint:
        raise PlanMismatchError(
            f"the plan {source} and the profile {profile} are for different models.",
            details={"plan": made.model, "profile": measured.layout.describe()},
            fix="give the profile that the plan was made from",
        )
    before = profile_command(measured, os.fspath(profile))
    commands = (before, command) if before else (command,)
    return Material("plan", source.stem, {_model_of(measured): measured}, {source.name: made}, commands=commands)


def _read_study(folder: Path) -> Material:
    """Read a study with the profiles and plans of its finished runs."""
    study = load_study(folder)
    plans: dict[str, Plan] = {}
    for run in study.runs:
        if run.plan is not None and run.plan not in plans and (plan := study.plan(run)):
            plans[run.plan] = plan
    return Material(
        "study",
        study.settings.name,
        profiles={name: study.profile(name) for name in study.settings.models if study.profile_path(name).is_file()},
        plans=plans,
        study=study,
        commands=study.summary.commands if study.summary else (),
    )


def _read_demo(folder: Path) -> Material:
    """Read a demonstration's results, profile and plans."""
    file = folder / DEMO_RESULTS_FILE
    results = read_results(
        file,
        lambda found: ConfigurationError(f"{file} is damaged.", found=found, fix="run the demonstration again"),
    )
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
    """Read the plans in a folder, by their relative path."""
    return {file.relative_to(folder).as_posix(): load_plan(file) for file in sorted(folder.glob(pattern))}


def _model_of(profile: Profile) -> str:
    """Return the name of the profiled model."""
    return str(profile.provenance.get("model") or profile.layout.model_class)
