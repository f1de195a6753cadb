"""What a page is made from: everything that one folder or file holds."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from apportion.errors import ConfigurationError, PlanMismatchError
from apportion.records.json_file import read_json
from apportion.records.outputs import DEMO_RESULTS_FILE
from apportion.records.plan import Plan, load_plan
from apportion.records.profile import Profile, load_profile
from apportion.report.commands import demo_command, plan_command, profile_command
from apportion.study.note import STUDY_FILE
from apportion.study.store import StoredStudy, load_study

_TAKEN = "a study's folder, a demonstration's folder, a profile (.safetensors) or a plan (.json)"


@dataclass(frozen=True)
class Material:
    """What a page can show; what there is none of is left out of it.

    Args:
        kind: What was given.
        name: Its name, for the heading.
        profiles: Profiles by model.
        plans: Plans by file, as a study's runs name them.
        study: All of a study's records.
        demo: The results of a demonstration.
        commands: What to type to get it again.
    """

    kind: Literal["study", "demonstration", "profile", "plan"]
    name: str
    profiles: dict[str, Profile] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    study: StoredStudy | None = None
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
        raise ConfigurationError(f"a profile was given, and {source} is no plan.", fix="leave --profile out")
    if (source / STUDY_FILE).is_file():
        return _read_study(source)
    if (source / DEMO_RESULTS_FILE).is_file():
        return _read_demo(source)
    if source.is_dir():
        raise ConfigurationError(
            f"{source} is the folder of neither a study nor a finished demonstration: it has no {STUDY_FILE} and "
            f"no {DEMO_RESULTS_FILE}.",
            fix=f"give {_TAKEN}",
        )
    if source.suffix == ".safetensors":
        measured = load_profile(source)
        command = profile_command(measured, source.name)
        return Material("profile", source.stem, {_model_of(measured): measured}, commands=(command,) if command else ())
    if source.suffix == ".json":
        return _read_plan(source, profile)
    missing = "is neither a folder, a .safetensors file nor a .json file" if source.exists() else "does not exist"
    raise ConfigurationError(f"{source} {missing}.", fix=f"give {_TAKEN}")


def _read_plan(source: Path, profile: str | os.PathLike[str] | None) -> Material:
    """Read a plan, and the profile behind it where it is given."""
    made = load_plan(source)
    command = plan_command(made, os.fspath(profile or "PROFILE"), source.name)
    if profile is None:
        return Material("plan", source.stem, plans={source.name: made}, commands=(command,))
    measured = load_profile(profile)
    if made.fingerprint != measured.fingerprint:
        raise PlanMismatchError(
            f"the plan {source} and the profile {profile} belong to different models.",
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
    results = read_json(
        file,
        lambda found: ConfigurationError(f"{file} is damaged.", found=found, fix="run the demonstration again"),
    )
    if not {"settings", "runs"} <= set(results):
        raise ConfigurationError(f"{file} holds no results of a demonstration.", fix=f"give {_TAKEN}")
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
