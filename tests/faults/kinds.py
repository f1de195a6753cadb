"""The kinds of files that the package reads: how a good one is made, read, damaged and judged."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

import apportion
from apportion.data.sources import read_rows
from apportion.discovery import find_sites
from apportion.errors import ApportionError, ApportionWarning
from apportion.peft.masks import random_mask
from apportion.profiling.totals import PartialFile
from apportion.records.arrays import Array, digest
from apportion.records.files import seal
from apportion.records.mask import Mask, load_mask
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.records.tensors import arrays_of
from apportion.study.settings import load_settings
from apportion.study.store import load_study
from apportion.training.checkpoints import MANIFEST, last_checkpoint, seal_checkpoint
from apportion.training.runs import open_run
from faults.judges import anything, possible_mask, possible_plan, possible_profile, sealed
from faults.mutations import BYTES, TEXT, VALUES, BytesMutation, change_json, change_json_bytes, change_safetensors
from study_folder import tiny_profile, write_study
from tiny_models import build_tiny


class RefusedError(ApportionError):
    """A reader warned and gave nothing, which counts as a refusal."""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Args:
        name: Its name.
        path: A good file.
        read: Reads a file at that path, and gives plain contents that can be compared with ==.
        mutations: What a mutant is made by, one drawn for each.
        judge: Says what is wrong with other contents than the good file's; None where they are possible.
        mutants: Number of mutants.
        named: What a refusal's message has to contain, if not the file's name.
    """

    name: str
    path: Path
    read: Callable[[], Any]
    mutations: tuple[BytesMutation, ...]
    judge: Callable[[Any], str | None]
    mutants: int = 120
    named: str = ""


JSON = (*BYTES, *TEXT, *[change_json_bytes] * 8)
TENSORS = (*BYTES, *[change_safetensors] * 8)


def all_kinds(folder: Path) -> list[Kind]:
    """Make a good file of every kind.

    Args:
        folder: Where to.

    Returns:
        The kinds.
    """
    model = build_tiny("olmoe")
    profile = tiny_profile(("a", "b"))
    plans = {
        "plan": apportion.plan(profile, "hellora", hot=2, rank=2),
        "sparse": apportion.plan(profile, "hellori", hot=1, rank=2, sparsity=0.9, targets="experts"),
        "routed": apportion.plan(profile, "uniform", rank=1, experts=2, targets="attention"),
    }
    return [
        *_plan_kinds(folder, plans),
        *_profile_kinds(folder, profile),
        *_mask_kinds(folder, random_mask(plans["sparse"].placements, profile.layout.by_name, seed=0)),
        _partial_kind(folder, model),
        *_adapter_kinds(folder, model, plans),
        *_study_kinds(folder),
        *_run_kinds(folder),
        *_data_kinds(folder),
    ]


def _plan_kinds(folder: Path, plans: Mapping[str, Plan]) -> list[Kind]:
    path = folder / "plan.json"
    plans["plan"].save(path)

    def read() -> dict[str, Any]:
        return apportion.load_plan(path).as_dict()

    def reseal(draw: Random, data: bytes) -> bytes:
        facts = plans[draw.choice(sorted(plans))].as_dict() if draw.random() < 0.5 else json.loads(data)
        facts = change_json(draw, {name: value for name, value in facts.items() if name != "seal"})
        return json.dumps(facts | {"seal": seal(facts)} if isinstance(facts, dict) else facts).encode()

    return [
        Kind("plan", path, read, JSON, sealed),
        Kind("plan, resealed", path, read, (reseal,), possible_plan, 200),
    ]


def _profile_kinds(folder: Path, profile: Profile) -> list[Kind]:
    path = folder / "p.safetensors"
    profile.save(path)

    def read() -> dict[str, Any]:
        read = apportion.load_profile(path)
        tensors = {"counts": read.counts, "mass": read.routing_mass}
        plain = {name: {task: part.tolist() for task, part in parts.items()} for name, parts in tensors.items()}
        types = {name: [str(part.dtype) for part in parts.values()] for name, parts in tensors.items()}
        facts = {"layout": read.layout.as_dict(), "tokens": read.tokens, "sensitivity": read.sensitivity}
        _plan_from(read)
        return {**plain, "types": types, **facts, "provenance": read.provenance}

    def reseal(draw: Random, data: bytes) -> bytes:
        return _resealed(draw, path, data, "apportion_profile", digest)

    return [
        Kind("profile", path, read, (*TENSORS, *TEXT), sealed),
        Kind("profile, resealed", path, read, (reseal,), possible_profile, 200),
    ]


def _plan_from(profile: Profile) -> None:
    """Plan from all that a profile measured: what was read can be used, or is refused."""
    for method, options in (
        ("hellora", {"hot": 2}),
        ("gradient", {"budget": 3000}),
        ("marginal", {"budget": "flops=9000"}),
    ):
        with suppress(ApportionError):
            apportion.plan(profile, method, **options)


def _mask_kinds(folder: Path, mask: Mask) -> list[Kind]:
    path = folder / "mask.safetensors"
    mask.save(path)

    def read() -> dict[str, Any]:
        read = load_mask(path)
        indices = {site: kept.tolist() for site, kept in read.indices.items()}
        types = sorted({str(kept.dtype) for kept in read.indices.values()})
        facts = {"shapes": read.shapes, "a_checksum": read.a_checksum, "provenance": read.provenance}
        return {"indices": indices, "types": types, **facts}

    def reseal(draw: Random, data: bytes) -> bytes:
        return _resealed(draw, path, data, "apportion_mask", _mask_digest)

    return [
        Kind("mask", path, read, (*TENSORS, *TEXT), sealed),
        Kind("mask, resealed", path, read, (reseal,), possible_mask, 200),
    ]


def _mask_digest(header: dict[str, Any], indices: Mapping[str, Array]) -> str:
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for site in sorted(indices):
        total.update(site.encode())
        total.update(indices[site].tobytes())
    return total.hexdigest()


def _resealed(
    draw: Random, path: Path, data: bytes, name: str, hashed: Callable[[dict[str, Any], dict[str, Array]], str]
) -> bytes:
    """Change a safetensors file's header or tensors as a foreign tool would, and hash it again."""
    path.write_bytes(data)
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()[name])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    header.pop("digest")
    if draw.random() < 0.5:
        header = change_json(draw, header)
    else:
        key = draw.choice(sorted(tensors))
        tensors = _changed_tensors(draw, tensors, key)
    if not isinstance(header, dict):
        return save(tensors, {name: json.dumps(header)})
    try:
        written = header | {"digest": hashed(header, arrays_of(tensors))}
    except UnicodeEncodeError:
        written = header
    return save(tensors, {name: json.dumps(written)})


def _changed_tensors(draw: Random, tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    tensor = tensors[key]
    types = (torch.int32, torch.int64, torch.uint8, torch.float16, torch.float32, torch.float64, torch.bool)
    number = draw.choice([value for value in VALUES if isinstance(value, int | float) and abs(value) < 2**31])
    place = draw.randrange(max(1, tensor.numel()))
    changed = tensor.clone().reshape(-1)
    if tensor.is_floating_point() or float(number).is_integer():
        changed[place : place + 1] = number
    others: list[Tensor | None] = [
        changed.view_as(tensor), changed.view_as(tensor), changed.view_as(tensor), -tensor, tensor.flip(0), tensor[:0],
        tensor[None], tensor.reshape(-1)[:1].reshape(()), torch.cat([tensor, tensor]), tensor.to(draw.choice(types)),
        tensor.to(draw.choice(types)), None,
    ]  # fmt: skip
    other = draw.choice(others)
    rest = {name: kept for name, kept in tensors.items() if name != key}
    name = draw.choice((key, key, key, key, "x"))
    return rest if other is None else rest | {name: other.contiguous()}


def _partial_kind(folder: Path, model: nn.Module) -> Kind:
    path, layout = folder / "p.partial", find_sites(model)
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    streams = {task: [{"input_ids": ids, "labels": ids}] for task in ("a", "b")}
    apportion.profile(model, streams, sensitivity=True, partial=path, keep_partial=True)
    with safe_open(path, framework="pt") as opened:
        identity = json.loads(opened.metadata()["apportion_partial"])["identity"].rpartition("/")[0]

    def read() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ApportionWarning)
            try:
                totals = PartialFile(path, identity).read(layout)
            except ApportionWarning as warning:
                raise RefusedError(str(warning)) from warning
        return {task: [part.counts.tolist(), part.mass.tolist(), part.tokens, part.sensitivity, part.seen]
                for task, part in totals.items()}  # fmt: skip

    return Kind("partial totals", path, read, (*TENSORS, *TEXT), sealed)


def _adapter_kinds(folder: Path, model: nn.Module, plans: Mapping[str, Plan]) -> list[Kind]:
    kinds = []
    for name in ("plan", "sparse"):
        adapter = folder / f"adapter-{name}"
        apportion.apply(copy.deepcopy(model), plans[name]).save_pretrained(adapter)

        def read(adapter: Path = adapter) -> Any:
            loaded = apportion.load(copy.deepcopy(model), adapter)
            config = loaded.peft_config["default"]
            tensors = {name: tensor.tolist() for name, tensor in get_peft_model_state_dict(loaded).items()}
            return config.plan["seal"], tensors

        config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
        kinds.append(Kind(f"adapter_config.json, {name}", config, read, JSON, sealed, named=adapter.name))
        kinds.append(Kind(f"adapter tensors, {name}", weights, read, TENSORS, sealed, 80, named=adapter.name))
    return kinds


def _study_kinds(folder: Path) -> list[Kind]:
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


def _run_kinds(folder: Path) -> list[Kind]:
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


def _data_kinds(folder: Path) -> list[Kind]:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    rows: list[dict[str, Any]] = [
        {"prompt": "What is 1 + 1?", "completion": "2 é", "answer": 2},
        {"prompt": 'a "quoted", b', "completion": "c\nd", "answer": None},
        {"prompt": "x" * 100, "completion": "y", "answer": 3},
    ]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "calls": [{"a": [1, 2]}]}]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*rows, {"messages": messages})))
    (folder / "d.json").write_text(json.dumps([*rows, {"text": "t"}, {"messages": messages}]))
    (folder / "d.csv").write_text('prompt,completion,answer\n"a, b",c,1\nd,"e\nf",2\n"g ""h""",i,\n')
    write_table(Table.from_pylist(rows), folder / "d.parquet")
    mutations = {"jsonl": (*BYTES, *TEXT, *TEXT), "json": JSON, "csv": (*BYTES, *TEXT), "parquet": BYTES}
    kinds = []
    for ending, chosen in mutations.items():
        path = folder / f"d.{ending}"

        def read(path: Path = path) -> str:
            return seal({"rows": read_rows(str(path))})

        kinds.append(Kind(f"data .{ending}", path, read, chosen, anything))
    return kinds


def restore(kind: Kind, data: bytes) -> None:
    """Put a file's bytes in its place, which may have become a folder or have gone."""
    if kind.path.is_dir():
        shutil.rmtree(kind.path)
    kind.path.write_bytes(data)
