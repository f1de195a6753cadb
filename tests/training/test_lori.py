"""LoRI's two phases: all of B, the mask, and again from zero under it; each resumes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import apportion
from apportion.data.batches import batches, encode
from apportion.data.sources import read_rows
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError
from apportion.peft.masks import extract_mask, random_mask
from apportion.peft.site_factors import site_factors
from apportion.records.mask import load_mask
from apportion.records.options import SparseTraining
from apportion.records.plan import Plan
from apportion.training.settings import TrainSettings
from apportion.training.sft import train

ROWS = read_rows("task:syllogism", num_rows=32)
SPARSE = SparseTraining(dense_steps=4, dense_lr=1e-3)
SETTINGS = TrainSettings(steps=6, batch_size=4, lr=1e-2, save_every=2, weight_decay=0.1, sparse=SPARSE)


@pytest.fixture(scope="module")
def profile(embedded_model: tuple[Any, Any]) -> apportion.Profile:
    model, tokenizer = embedded_model
    return apportion.profile(model, batches([encode(row, tokenizer) for row in ROWS], tokenizer.pad_token_id, 16))


@pytest.fixture(scope="module")
def plan(profile: apportion.Profile) -> Plan:
    return apportion.plan(profile, "hellori", hot=4, rank=4)


def _train(
    embedded_model: tuple[Any, Any], plan: Plan, folder: Path, settings: TrainSettings = SETTINGS, **kwargs: Any
) -> Any:
    model, tokenizer = embedded_model
    return train(copy.deepcopy(model), tokenizer, plan, ROWS, folder, settings, progress=False, **kwargs)


@pytest.fixture(scope="module")
def finished(embedded_model: tuple[Any, Any], plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("lori") / "run"
    return folder, _train(embedded_model, plan, folder)


def test_the_mask_keeps_the_largest_entries(finished: tuple[Path, Any], plan: Plan) -> None:
    folder, _ = finished
    mask = load_mask(folder / "mask.safetensors")
    assert mask.num_kept == plan.cost.trainable_parameters
    dense = load_file(folder / "dense" / "adapter_model.safetensors")
    kept, dropped = [], []
    for site, indices in mask.indices.items():
        values = dense[f"base_model.model.{site}.lora_B.weight"].abs().reshape(-1)
        chosen = torch.zeros(len(values), dtype=torch.bool)
        chosen[indices.long()] = True
        kept.append(values[chosen])
        dropped.append(values[~chosen])
    assert torch.cat(kept).min() >= torch.cat(dropped).max()
    counts = [len(indices) for indices in mask.indices.values()]
    assert max(counts) > 2 * min(counts)  # one threshold for all sites


def test_every_other_entry_is_zero_and_a_is_as_drawn(
    finished: tuple[Path, Any], plan: Plan, embedded_model: tuple[Any, Any]
) -> None:
    folder, result = finished
    mask = load_mask(folder / "mask.safetensors")
    for site, _, b in site_factors(result.model, "default"):
        values = b.reshape(-1).clone()
        kept = values[mask.indices[site].long()]
        assert kept.any() or not len(kept)  # one threshold for all may leave a site nothing
        values[mask.indices[site].long()] = 0
        assert not values.any()
    fresh = apportion.apply(copy.deepcopy(embedded_model[0]), plan, seed=0)
    drawn = {site: a for site, a, _ in site_factors(fresh, "default")}
    assert all(torch.equal(a, drawn[site]) for site, a, _ in site_factors(result.model, "default"))
    assert mask.a_checksum == result.model.peft_config["default"].a_checksum


def test_state_and_checkpoint_are_the_kept_share(finished: tuple[Path, Any], plan: Plan) -> None:
    folder, _ = finished
    kept = plan.cost.trainable_parameters
    checkpoint = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    moments = sum(tensor.numel() for entry in state.values() for tensor in entry.values() if tensor.numel() > 1)
    assert moments == pytest.approx(2 * kept, rel=0.05)
    stored = load_file(folder / "adapter_model.safetensors")
    assert sum(t.numel() for key, t in stored.items() if not key.endswith(".indices")) == kept


@pytest.mark.parametrize("stop", ["dense", "sparse"])
def test_each_phase_resumes(
    embedded_model: tuple[Any, Any],
    plan: Plan,
    finished: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: str,
) -> None:
    steps = {"dense": 3, "sparse": 7}[stop]  # over both phases
    from apportion.training import trainer

    done: list[int] = []
    step = trainer._Trainer.training_step

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) > steps:
            raise RuntimeError("killed")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Trainer, "training_step", stopping)
        with pytest.raises(RuntimeError, match="killed"):
            _train(embedded_model, plan, tmp_path / "run")
    assert (tmp_path / "run" / "mask.safetensors").is_file() == (stop == "sparse")
    _train(embedded_model, plan, tmp_path / "run", resume=True)
    whole, resumed = (load_file(f / "adapter_model.safetensors") for f in (finished[0], tmp_path / "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_mask_can_be_reused(
    embedded_model: tuple[Any, Any], plan: Plan, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    mask = load_mask(finished[0] / "mask.safetensors")
    given = replace(SETTINGS, sparse=SparseTraining())
    _train(embedded_model, plan, tmp_path / "run", given, mask=mask)
    assert not (tmp_path / "run" / "dense").exists()
    whole, again = (load_file(f / "adapter_model.safetensors") for f in (finished[0], tmp_path / "run"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    with pytest.raises(ConfigurationError, match="a different A"):
        _train(embedded_model, plan, tmp_path / "other", replace(given, seed=5), mask=mask)
    with pytest.raises(ConfigurationError, match="dense_steps, dense_lr have no effect if a mask is given"):
        _train(embedded_model, plan, tmp_path / "other", mask=mask)
    assert not list(tmp_path.glob("other/*"))
    with pytest.raises(ConfigurationError, match="other mask"):
        _train(embedded_model, plan, tmp_path / "run", given, resume=True)


@pytest.mark.parametrize("granularity", ["layer", "site", "projection"])
def test_granularities_keep_every_group_s_share(
    finished: tuple[Path, Any], plan: Plan, embedded_model: tuple[Any, Any], granularity: Any, tmp_path: Path
) -> None:
    dense = apportion.load(copy.deepcopy(embedded_model[0]), finished[0] / "dense")
    mask = extract_mask(dense, "default", plan, granularity)
    assert mask.num_kept == plan.cost.trainable_parameters
    sites = find_sites(dense).by_name
    groups: dict[str, list[int]] = {}
    for name, indices in mask.indices.items():
        site = sites[name]
        key = {"layer": str(site.layer), "site": name, "projection": f"{site.kind}.{site.projection}"}[granularity]
        counts = groups.setdefault(key, [0, 0])
        counts[0] += len(indices)
        counts[1] += mask.shapes[name][0] * mask.shapes[name][1]
    assert all(abs(kept - entries / 10) <= 1 for kept, entries in groups.values())


def test_the_release_s_other_a(embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=2, sparse=SparseTraining(dense_steps=2, redraw_a=True))
    result = _train(embedded_model, plan, tmp_path / "run", settings)
    dense = json.loads((tmp_path / "run" / "dense" / "adapter_config.json").read_text())
    assert dense["a_checksum"] != result.model.peft_config["default"].a_checksum


def test_what_sparse_plans_alone_have_is_refused_for_others(
    embedded_model: tuple[Any, Any], profile: apportion.Profile, plan: Plan, tmp_path: Path
) -> None:
    whole = apportion.plan(profile, "hellora", hot=4, rank=4)
    mask = random_mask(plan.placements, find_sites(embedded_model[0]).by_name, 0)
    with pytest.raises(ConfigurationError, match="a mask was given"):
        _train(embedded_model, whole, tmp_path / "run", TrainSettings(steps=1), mask=mask)
    with pytest.raises(ConfigurationError, match="dense_steps, dense_lr"):
        _train(embedded_model, whole, tmp_path / "run")
    for wrong in ({"dense_steps": 1}, {"dense_lr": 0.0}, {"mask_granularity": "expert"}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            TrainSettings(sparse=SparseTraining(**wrong))
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            TrainSettings(sparse=wrong)
