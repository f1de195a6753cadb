"""Files of folders: adapters, studies, training runs and their checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from torch import nn

import apportion
from apportion.records.plan import Plan
from apportion.study.settings import load_settings
from apportion.study.store import load_study
from apportion.training.checkpoints import MANIFEST, last_checkpoint, seal_checkpoint
from apportion.training.runs import open_run
from faults.judges import anything, sealed
from faults.kind import JSON, TENSORS, Kind
from faults.mutations import BYTES, TEXT
from study_folder import tiny_profile, write_study


def adapter_kinds(folder: Path, model: nn.Module, plans: Mapping[str, Plan]) -> list[Kind]:
    kinds = []
    for name in ("plan", "sparse"):
        adapter = folder / f"adapter-{name}"
        apportion.apply(copy.deepcopy(model), plans[name]).save_pretrained(adapter)

        def read(adapter: Path = adapter) -> Any:
            loaded = apportion.load(copy.deepcopy(model), adapter)
            config = loaded.peft_config["default"]
            tensors = {name: tensor.tolist() for name, tensor in get_peft_model_state_dict(loaded).items()}
            return config.plan.seal, tensors

        config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
        kinds.append(Kind(f"adapter_config.json, {name}", config, read, JSON, sealed, named=adapter.name))
        kinds.append(Kind(f"adapter tensors, {name}", weights, read, TENSORS, sealed, 80, named=adapter.name))
    return kinds


def study_kinds(folder: Path) -> list[Kind]:
    study = folder / "study"
    write_study(study, tiny_profile(), seeds=1)
    toml = folder / "STUDY.toml"
    toml.write_text(
        'models = ["embedded"]\ncontenders = ["lora", {name = "hot", method = "hellora", hot = 2}]\n'
        'budgets = ["lora:1", 5000]\nseeds = 2\ntolerance = 0.05\n[tasks]\na = "a.jsonl"\n[eval]\na = "b.jsonl"\n'
        '[training]\nsteps = 1\nwarmup_frac = 0.1\n[tuning]\nlow = 1e-3\nhigh = 2e-3\n[profile]\nhot = "25%"\n'
    )

    def read_study() -> Any:
        read = load_study(study)
        plans = [plan.as_dict() for run in read.runs if (plan := read.plan(run))]
        records = [record.model_dump() for record in (*read.runs, *read.trials)]
        summary = read.summary and read.summary.model_dump()
        return read.settings.model_dump(), read.contents.model_dump(), records, summary, read.versions, plans

    def read_toml() -> Any:
        settings = load_settings(toml)
        return settings.model_dump(), settings.digest

    run = sorted((study / "runs").glob("*.json"))[0]
    return [
        Kind("STUDY.toml", toml, read_toml, (*BYTES, *TEXT, *TEXT), anything),
        Kind("study.json", study / "study.json", read_study, JSON, anything, 80),
        Kind("study run", run, read_study, JSON, anything, 80, named=f"{study.name}/"),
        Kind("study trial", study / "tuning" / "ab.json", read_study, JSON, anything, 60),
        Kind("study summary", study / "summary.json", read_study, JSON, anything, 80),
    ]


def run_kinds(folder: Path) -> list[Kind]:
    run = folder / "run"
    checkpoint = run / "checkpoints" / "checkpoint-4"
    (checkpoint / "part").mkdir(parents=True)
    identity = {"plan": "0" * 64, "rows": "1" * 64, "settings": "2" * 64, "model": "3" * 64, "mask": None}
    (run / "run.json").write_text(json.dumps({"identity": identity, "settings": {"steps": 4}, "facts": None}))
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 4, "max_steps": 8, "log_history": []}))
    (checkpoint / "part" / "data.bin").write_bytes(bytes(range(256)))
    seal_checkpoint(checkpoint)

    def read() -> Any:
        return open_run(run, identity, resume=True)

    def read_manifest() -> Any:
        found = last_checkpoint(run / "checkpoints")
        assert found is not None
        return json.loads((found / MANIFEST).read_bytes())["files"]

    return [
        Kind("run.json", run / "run.json", read, JSON, sealed, named=run.name),
        Kind("trainer_state.json", checkpoint / "trainer_state.json", read, JSON, sealed, 60),
        Kind("checkpoint manifest", checkpoint / MANIFEST, read_manifest, JSON, sealed, named=checkpoint.name),
    ]
