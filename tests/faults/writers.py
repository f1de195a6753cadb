"""The writers that are killed: plans, profiles, adapters, exports, training runs, measurements and studies."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

import apportion
from apportion.configurations import config_source
from apportion.data.sources import Row
from apportion.formats.export import export
from apportion.peft.masks import random_mask
from apportion.profiling import totals
from apportion.records.mask import load_mask
from apportion.records.outputs import check_output_folder, require_empty
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.study.matrix import run_study
from apportion.study.settings import load_settings
from apportion.study.store import load_study
from apportion.training.phase import save_adapter
from apportion.training.settings import TrainSettings
from apportion.training.sft import train
from faults.kills import Writer
from study_folder import tiny_profile
from tiny_models import build_tiny

ROWS: list[Row] = [{"prompt": f"What is {n} + 1?", "completion": f" {n + 1}"} for n in range(24)]
SETTINGS = TrainSettings(steps=5, batch_size=4, lr=1e-3, save_every=1, dropout=0.1)
STUDY = """
contenders = ["lora", {method = "attention"}]
budgets = ["lora:1"]
seeds = 1
eval_rows = 4
resamples = 100
[tasks]
a = "train.jsonl"
[eval]
a = "test.jsonl"
[training]
steps = 1
batch_size = 2
[tuning]
trials = 2
rows = 4
[profile]
rows = 4
resamples = 4
"""


def quick_writers(folder: Path) -> list[Writer]:
    """Return writers of single files and folders, which take milliseconds.

    Args:
        folder: Where their sources are made.

    Returns:
        The writers.
    """
    profiles = (tiny_profile(("a",)), tiny_profile(("b",)))
    plans = tuple(apportion.plan(profiles[0], "hellora", hot=2, rank=rank) for rank in (2, 3))
    sparse = apportion.plan(profiles[0], "hellori", hot=1, rank=2, sparsity=0.9, targets="experts")
    masks = tuple(random_mask(sparse.placements, profiles[0].layout.by_name, seed=seed) for seed in (0, 1))
    model = build_tiny("olmoe")
    return [
        _file("plan", "plan.json", plans, lambda path: apportion.load_plan(path).seal, lambda one: one.seal),
        _file("profile", "p.safetensors", profiles, lambda path: apportion.load_profile(path).digest, _digest),
        _file("mask", "mask.safetensors", masks, lambda path: load_mask(path).digest, _digest),
        _adapter(model, plans[0]),
        _saved_pretrained(model, plans[0]),
        _export(folder, model, apportion.plan(profiles[0], "attention", rank=2)),
        _measurement(model),
    ]


def slow_writers(folder: Path) -> list[Writer]:
    """Return training runs and a study, which take seconds.

    Args:
        folder: Where their sources are made.

    Returns:
        The writers.
    """
    return [tiny_training(), tiny_training("hellori"), _study(folder)]


def _digest(one: Any) -> str:
    return str(one.digest)


def _file(name: str, file: str, records: Any, read_one: Any, of: Any) -> Writer:
    """Write two records to one file in turn."""
    known, order = {of(record) for record in records}, itertools.cycle(records)

    def read(folder: Path) -> Any:
        found = read_one(folder / file) if (folder / file).exists() else None
        return "one of both" if found in known else found

    return Writer(name, lambda folder: next(order).save(folder / file), read, repeats=True)


def _adapter(model: nn.Module, plan: Plan) -> Writer:
    """Save a finished run's adapter, as `train` and `combine` do, into the folder that a killed one left."""
    adapted = apportion.apply(copy.deepcopy(model), plan)

    def write(folder: Path) -> None:
        target = folder / "adapter"
        check_output_folder(target, may_hold=(target / "adapter_model.safetensors").exists())
        save_adapter(adapted, target)

    return Writer("adapter", write, lambda folder: _load(model, folder / "adapter"), repeats=True)


def _saved_pretrained(model: nn.Module, plan: Plan) -> Writer:
    """Save an adapter with PEFT's own `save_pretrained`, which writes file by file."""
    adapted = apportion.apply(copy.deepcopy(model), plan)
    return Writer(
        "save_pretrained",
        lambda folder: adapted.save_pretrained(folder / "adapter"),
        lambda folder: _load(model, folder / "adapter"),
        repeats=True,
        reports=False,
    )


def _load(model: nn.Module, folder: Path) -> Any:
    """Load an adapter; None if there is none."""
    if not (folder / "adapter_config.json").exists() and not (folder / "adapter_model.safetensors").exists():
        return None
    loaded = apportion.load(copy.deepcopy(model), folder)
    return {name: value.tolist() for name, value in loaded.named_parameters() if "lora_" in name}


def _export(folder: Path, model: nn.Module, plan: Plan) -> Writer:
    """Write an adapter as plain LoRA."""
    source, base = folder / "attention", folder / "base"
    model.config.save_pretrained(base)
    apportion.apply(copy.deepcopy(model), plan).save_pretrained(source)

    def read(place: Path) -> Any:
        out = place / "peft"
        if not (out / "adapter_config.json").exists():
            if out.exists():
                require_empty(out)  # the next writer refuses what was half written
            return None
        json.loads((out / "adapter_config.json").read_text())
        return {name: value.tolist() for name, value in load_file(out / "adapter_model.safetensors").items()}

    return Writer("export", lambda place: void(export(source, place / "peft", model=base)), read)


def _measurement(model: nn.Module) -> Writer:
    """Profile with sensitivities, which goes on from what is measured."""
    ids = torch.arange(3, 63).reshape(5, 12)
    streams = {task: [{"input_ids": ids[n : n + 1], "labels": ids[n : n + 1]} for n in range(5)] for task in ("a", "b")}

    def write(folder: Path) -> None:
        totals._SAVE_EVERY_S = 0.0
        partial = folder / "p.safetensors.partial"
        apportion.profile(model, streams, sensitivity=True, partial=partial, keep_partial=True).save(
            folder / "p.safetensors"
        )
        totals.remove_partial(partial)

    def read(folder: Path) -> Any:
        path = folder / "p.safetensors"
        return _measured(apportion.load_profile(path)) if path.exists() else None

    return Writer("profile, resumed", write, read)


def _measured(profile: Profile) -> Any:
    counts: Mapping[str, Any] = profile.counts
    return {task: counts[task].tolist() for task in profile.tasks}, profile.sensitivity, profile.tokens


def tiny_training(method: str = "hellora") -> Writer:
    """Train a tiny model with a checkpoint at every step; a killed run is resumed.

    Args:
        method: The method that plans.

    Returns:
        The writer.
    """
    tokenizer = AutoTokenizer.from_pretrained(config_source("embedded"))
    model = build_tiny("olmoe", vocab_size=len(tokenizer))
    profile = apportion.profile(model, [{"input_ids": torch.arange(3, 63).reshape(5, 12)}])
    plan = apportion.plan(profile, method, hot=2, rank=2)

    def write(folder: Path) -> None:
        copied = copy.deepcopy(model)
        train(copied, tokenizer, plan, ROWS, folder / "run", SETTINGS, resume=True, progress=False)

    return Writer(f"training, {method}", write, lambda folder: _load(model, folder / "run"))


def _study(folder: Path) -> Writer:
    """Compare two methods; a killed study goes on."""
    for file, rows in (("train.jsonl", ROWS[:16]), ("test.jsonl", ROWS[16:])):
        (folder / file).write_text("".join(json.dumps(row | {"answer": row["completion"]}) + "\n" for row in rows))
    text = STUDY.replace("train.jsonl", str(folder / "train.jsonl")).replace("test.jsonl", str(folder / "test.jsonl"))
    (folder / "study.toml").write_text(text)
    settings = load_settings(folder / "study.toml")

    def read(place: Path) -> Any:
        out = place / "out"
        if not (out / "summary.json").exists():
            return None
        study = load_study(out)
        runs = [run.model_dump(exclude={"train_s", "peak_bytes"}) for run in study.runs]
        return None if study.summary is None else (runs, study.summary.model_dump(mode="json"))

    return Writer("study", lambda place: void(run_study(place / "out", settings)), read)


def void(_: object) -> None:
    """Drop a result."""
