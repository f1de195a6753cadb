"""Identify any file or folder written by apportion, by its contents, and describe it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from apportion.errors import ConfigurationError, PlanError
from apportion.records.arrays import ArrayFileError, read_header
from apportion.records.demonstration import read_results
from apportion.records.files import seal
from apportion.records.json_file import read_json
from apportion.records.mask import load_mask
from apportion.records.outputs import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_TENSORS_FILE,
    DEMO_RESULTS_FILE,
    RUN_FILE,
    TRAINING_RESULT_FILE,
)
from apportion.records.plan import Plan, load_plan
from apportion.records.profile import PROFILE_HEADER, Profile, load_profile
from apportion.study.files import read_record
from apportion.study.note import STUDY_FILE, SUMMARY_FILE
from apportion.study.records import Base, Run, Summary, Trial
from apportion.study.settings import StudySettings, load_settings
from apportion.study.store import load_study
from apportion.training.checkpoints import CHECKPOINTS, MANIFEST, last_checkpoint

_KNOWN = (
    "a profile, a plan, a mask, an adapter, a training run, a checkpoint, a study, a demonstration, or a file of one"
)


@dataclass(frozen=True)
class Item:
    """An identified file or folder.

    Args:
        kind: ``profile``, ``plan``, ``adapter``, ...
        facts: Facts about its contents, by the names to show.
        profile: The profile, if it is one.
        plan: The plan, if it is or contains one.
    """

    kind: str
    facts: dict[str, Any]
    profile: Profile | None = None
    plan: Plan | None = field(default=None)


Reader = Callable[[Path], Item]


def identify(path: str | os.PathLike[str]) -> Item:
    """Identify a file or folder, with the same checks as the commands that use it.

    Args:
        path: A file or folder written by apportion.

    Returns:
        Its kind and contents.

    Raises:
        ApportionError: the path does not exist, is damaged, or was not written by apportion.
    """
    source = Path(path)
    if source.is_dir():
        return _folder(source)
    if not source.is_file():
        raise ConfigurationError(f"{source} does not exist.", fix="give the path of a file or folder")
    readers = {".safetensors": _safetensors, ".json": _json, ".toml": _study_settings, ".html": _page}
    item = readers[source.suffix](source) if source.suffix in readers else None
    return item or _unknown(source)


def _folder(folder: Path) -> Item:
    """Identify a folder by its marker file."""
    markers: dict[str, Reader] = {
        STUDY_FILE: _study,
        DEMO_RESULTS_FILE: lambda path: _demonstration(path / DEMO_RESULTS_FILE),
        MANIFEST: _checkpoint,
        RUN_FILE: _training_run,
        ADAPTER_CONFIG_FILE: _adapter,
        "config.json": _model,
    }
    for name, reader in markers.items():
        if (folder / name).is_file():
            return reader(folder)
    return _unknown(folder)


def _unknown(path: Path) -> Item:
    raise ConfigurationError(f"{path} was not written by apportion.", expected=_KNOWN)


def _safetensors(path: Path) -> Item | None:
    """Identify a safetensors file by its metadata."""
    try:
        metadata, names = read_header(path)
    except ArrayFileError as error:
        raise ConfigurationError(f"{path} is damaged.", found=str(error)) from error
    if PROFILE_HEADER in metadata:
        return _profile(load_profile(path))
    if "apportion_mask" in metadata:
        mask = load_mask(path)
        facts = {"sites": len(mask.shapes), "kept entries": mask.num_kept, "of": mask.num_entries, **mask.provenance}
        return Item("mask", facts)
    if "apportion_partial" in metadata:
        return Item("unfinished profile", {"next": "run the same apportion profile command again to continue"})
    if any(".lora_A." in name or ".lora_B." in name for name in names):
        return Item("tensors of an adapter", {"tensors": len(names), "next": f"apportion show {path.parent}"})
    return None


def _profile(profile: Profile) -> Item:
    """Describe a profile."""
    facts = {
        "model": profile.provenance.get("model"),
        "layout": profile.layout.describe(),
        "tokens": profile.tokens,
        "data": profile.provenance.get("data"),
        "sensitivity": "measured" if profile.sensitivity else "not measured",
        "fingerprint": profile.fingerprint,
        "digest": profile.digest,
    }
    return Item("profile", facts, profile=profile)


def _plan_facts(plan: Plan) -> dict[str, Any]:
    """Describe a plan."""
    return {
        "method": plan.method,
        "options": plan.options,
        "ranks": _range([placement.rank for placement in plan.placements]),
        "procedure": plan.procedure["name"],
        "model": plan.base_model,
        "layout": plan.model,
        "sites": plan.cost.sites_by_kind,
        "shapes": dict(Counter(placement.shape.kind for placement in plan.placements)),
        "mergeable": "yes" if plan.is_mergeable else "no: it has routed LoRA experts",
        "fingerprint": plan.fingerprint,
        "profile": plan.profile_digest,
        "derived from": list(plan.derived_from),
        "seal": plan.seal,
    }


def _json(path: Path) -> Item | None:
    """Identify a JSON file by its fields, its name or its folder."""

    def damaged(found: str) -> ConfigurationError:
        return ConfigurationError(f"{path} is damaged.", found=found)

    fields = read_json(path, damaged)
    by_name: dict[str, Reader] = {
        DEMO_RESULTS_FILE: _demonstration,
        STUDY_FILE: lambda file: _study(file.parent),
        SUMMARY_FILE: lambda file: _record(file, "summary of a study", Summary),
        MANIFEST: lambda file: _checkpoint(file.parent),
        RUN_FILE: lambda file: _training_run(file.parent),
        TRAINING_RESULT_FILE: lambda file: _training_run(file.parent),
        ADAPTER_CONFIG_FILE: lambda file: _adapter(file.parent),
    }
    by_folder: dict[str, Reader] = {
        "runs": lambda file: _record(file, "run of a study", Run),
        "tuning": lambda file: _record(file, "learning-rate trial of a study", Trial),
        "profiles": lambda file: _record(file, "base measurement of a study", Base),
    }
    if {"method", "placements", "seal"} <= set(fields):
        plan = load_plan(path)
        return Item("plan", _plan_facts(plan), plan=plan)
    reader = by_name.get(path.name) or by_folder.get(path.parent.name)
    return reader(path) if reader else None


def _record(path: Path, kind: str, model: type[BaseModel]) -> Item:
    """Describe a record of a study by its plain fields."""
    fields = read_record(path, model).model_dump(mode="json", exclude={"cells", "comparisons", "hot_set_stability"})
    return Item(kind, {name: value for name, value in fields.items() if not isinstance(value, dict)})


def _study(folder: Path) -> Item:
    """Describe a study's folder."""
    study = load_study(folder)
    settings = study.settings
    facts = _settings_facts(settings) | {
        "finished runs": f"{len(study.runs)} of {settings.planned_runs}",
        "learning-rate trials": len(study.trials),
        "verdict": study.summary.verdicts[0] if study.summary and study.summary.verdicts else None,
        "next": f"apportion report {folder}",
    }
    return Item("study", facts)


def _study_settings(path: Path) -> Item:
    """Describe a study's file."""
    settings = load_settings(path)
    facts = {"runs": settings.planned_runs, "next": f"apportion compare {path}"}
    return Item("study file", _settings_facts(settings) | facts)


def _settings_facts(settings: StudySettings) -> dict[str, Any]:
    """Describe what a study compares."""
    return {
        "name": settings.name,
        "models": list(settings.models),
        "tasks": settings.tasks,
        "contenders": [contender.name for contender in settings.contenders],
        "budgets": list(settings.budgets),
        "seeds": settings.seeds,
    }


def _demonstration(path: Path) -> Item:
    """Describe the results of a demonstration."""

    def damaged(found: str) -> ConfigurationError:
        return ConfigurationError(f"{path} is damaged.", found=found)

    runs = read_results(path, damaged)["runs"]
    names = {key: list(dict.fromkeys(run[key] for run in runs)) for key in ("task", "method")}
    facts = {"tasks": names["task"], "methods": names["method"], "runs": len(runs)}
    return Item("demonstration", facts | {"next": f"apportion report {path.parent}"})


def _training_run(folder: Path) -> Item:
    """Describe a training run's folder, finished or not."""

    def damaged(found: str) -> ConfigurationError:
        return ConfigurationError(f"a file in {folder} is damaged.", found=found)

    run = read_json(folder / RUN_FILE, damaged)
    finished = (folder / TRAINING_RESULT_FILE).is_file()
    facts = {name: run.get(name) for name in ("model", "data", "dtype")}
    if finished:
        result = read_json(folder / TRAINING_RESULT_FILE, damaged)
        facts |= {name: result.get(name) for name in ("steps", "loss", "tokens_per_s")}
        return Item("finished training run", facts | _adapter(folder).facts, plan=_adapter(folder).plan)
    last = last_checkpoint(folder / CHECKPOINTS)
    facts["last checkpoint"] = None if last is None else last.name
    facts["next"] = "run the same apportion train command with --resume to continue"
    return Item("unfinished training run", facts)


def _checkpoint(folder: Path) -> Item:
    """Describe a checkpoint."""

    def damaged(found: str) -> ConfigurationError:
        return ConfigurationError(f"the checkpoint {folder} is damaged.", found=found)

    manifest = read_json(folder / MANIFEST, damaged)
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("seal") != seal(files):
        raise damaged(f"{MANIFEST} was changed")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise damaged(f"{missing[0]} is missing")
    state = read_json(folder / "trainer_state.json", damaged)
    total = sum((folder / name).stat().st_size for name in files)
    return Item("checkpoint", {"step": state.get("global_step"), "files": len(files), "bytes": total})


def _adapter(folder: Path) -> Item:
    """Describe a saved adapter by its plan."""
    file = folder / ADAPTER_CONFIG_FILE

    def damaged(found: str) -> ConfigurationError:
        return ConfigurationError(f"{file} is damaged.", found=found)

    config = read_json(file, damaged)
    if config.get("peft_type") != "APPORTION":
        facts = {"peft_type": config.get("peft_type"), "model": config.get("base_model_name_or_path")}
        return Item("adapter of another library", facts)
    if not isinstance(config.get("plan"), dict):
        raise damaged("it has no plan")
    try:
        plan = Plan.from_dict(config["plan"])
    except PlanError as error:
        raise error.within(str(file)) from error
    below = config.get("on_top_of")
    facts = _plan_facts(plan) | {
        "tensors": _num_tensors(folder / ADAPTER_TENSORS_FILE),
        "trained on top of": below.get("path") if isinstance(below, dict) else None,
    }
    return Item("adapter", facts, plan=plan)


def _num_tensors(path: Path) -> int | str:
    """Count a file's tensors."""
    try:
        return len(read_header(path)[1])
    except ArrayFileError as error:
        return f"none: {error}"


def _model(folder: Path) -> Item:
    """Describe a model's folder, such as one written by `apportion merge`."""
    config = read_json(folder / "config.json", lambda found: ConfigurationError(f"{folder} is damaged.", found=found))
    facts = {"model_type": config.get("model_type"), "architectures": config.get("architectures")}
    return Item("model", facts | {"next": f"apportion cost {folder} --method hellora"})


def _page(path: Path) -> Item | None:
    """Identify a report."""
    with path.open("rb") as opened:
        is_report = b'<meta name="generator" content="apportion ' in opened.read(4096)
    return Item("report", {"next": "open it in a browser"}) if is_report else None


def _range(values: list[int]) -> str:
    """Format numbers as their minimum and maximum."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
