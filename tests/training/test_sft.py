"""Training: killed and resumed equals uninterrupted; bad losses and Ctrl-C stop it cleanly."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import apportion
from apportion.data.batches import batches, encode
from apportion.data.sources import read_rows
from apportion.errors import ApportionWarning, ConfigurationError, DataError, OutputExistsError, TrainingError
from apportion.records.plan import Plan
from apportion.records.shapes import Sparse
from apportion.training.checkpoints import last_checkpoint
from apportion.training.settings import TrainSettings
from apportion.training.sft import train

ROWS = read_rows("task:syllogism", num_rows=48)
SETTINGS = TrainSettings(steps=12, batch_size=4, lr=1e-3, save_every=3, dropout=0.1)

SCRIPT = """
import sys
from test_sft import ROWS, SETTINGS
import apportion
from apportion.training.sft import train
train(*apportion.embedded(), apportion.load_plan(sys.argv[1]), ROWS, sys.argv[2], SETTINGS, resume=True, progress=False)
"""


@pytest.fixture(scope="module")
def plan(embedded_model: tuple[Any, Any]) -> Plan:
    model, tokenizer = embedded_model
    encoded = [encode(row, tokenizer) for row in ROWS]
    profile = apportion.profile(model, batches(encoded, tokenizer.pad_token_id, 16))
    return apportion.plan(profile, "hellora", hot=4, rank=4)


def _train(
    embedded_model: tuple[Any, Any], plan: Plan, folder: Path, settings: TrainSettings = SETTINGS, **kwargs: Any
) -> Any:
    model, tokenizer = embedded_model
    rows = kwargs.pop("rows", ROWS)
    return train(copy.deepcopy(model), tokenizer, plan, rows, folder, settings, progress=False, **kwargs)


@pytest.fixture(scope="module")
def finished(embedded_model: tuple[Any, Any], plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, _train(embedded_model, plan, folder)


def test_training_lowers_the_loss_and_writes_the_run(finished: tuple[Path, Any], plan: Plan) -> None:
    folder, result = finished
    assert result.steps == 12
    assert result.tokens > 0
    assert not result.interrupted
    record = json.loads((folder / "training.json").read_text())
    assert record["loss"] == pytest.approx(result.loss)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == plan.cost.stored_parameters
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name and "self_attn" in name)


def test_the_saved_adapter_is_the_trained_one(finished: tuple[Path, Any], embedded_model: tuple[Any, Any]) -> None:
    folder, result = finished
    model, tokenizer = embedded_model
    ids = tokenizer(ROWS[0]["prompt"], return_tensors="pt")["input_ids"]
    loaded = apportion.load(copy.deepcopy(model), folder)
    trained = result.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)
        assert not torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_same_run_gives_the_same_weights(
    finished: tuple[Path, Any], embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path
) -> None:
    _train(embedded_model, plan, tmp_path / "again")
    assert _equal(finished[0], tmp_path / "again")


def test_runs_through_frozen_experts_are_equal_too(embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path) -> None:
    model, tokenizer = embedded_model
    encoded = [encode(row, tokenizer) for row in ROWS[:4]]
    floor = apportion.plan(apportion.profile(model, batches(encoded, tokenizer.pad_token_id, 4)), "attention", rank=4)
    settings = TrainSettings(steps=4, batch_size=16, lr=1e-2)
    for name in ("one", "other"):
        _train(embedded_model, floor, tmp_path / name, settings)
    assert _equal(tmp_path / "one", tmp_path / "other")


def test_a_run_killed_in_mid_epoch_ends_the_same(finished: tuple[Path, Any], plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    folder = tmp_path / "run"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "plan.json"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while last_checkpoint(folder / "checkpoints") is None:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "adapter_config.json").exists()
    newest = last_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert int(newest.name.rpartition("-")[2]) < 12
    half = newest.parent / "checkpoint-11"  # a checkpoint that a kill left half written
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert _equal(finished[0], folder)


def _equal(one: Path, other: Path) -> bool:
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    return all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def test_interrupting_saves_and_resuming_ends_the_same(
    finished: tuple[Path, Any],
    embedded_model: tuple[Any, Any],
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from apportion.training import trainer

    original = trainer._Trainer.training_step

    def press_ctrl_c(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
    try:
        with monkeypatch.context() as patched:
            patched.setattr(trainer._Trainer, "training_step", press_ctrl_c)
            result = _train(embedded_model, plan, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.interrupted
    assert result.steps == 5
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    resumed = _train(embedded_model, plan, tmp_path / "run", resume=True)
    assert resumed.steps == 12
    assert _equal(finished[0], tmp_path / "run")


def test_a_loss_that_is_no_number_stops_the_run(
    embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTTrainer

    original = SFTTrainer.training_step

    def poison(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 7 else loss

    monkeypatch.setattr(SFTTrainer, "training_step", poison)
    with pytest.raises(TrainingError, match=r"(?s)became nan at step 8.*checkpoint-6"):
        _train(embedded_model, plan, tmp_path / "run")
    kept = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert kept is not None
    assert all(bool(torch.isfinite(t).all()) for t in load_file(kept / "adapter_model.safetensors").values())
    assert not (tmp_path / "run" / "adapter_config.json").exists()


def test_resuming_a_finished_run_changes_nothing(
    finished: tuple[Path, Any], embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    for name in ("adapter_config.json", "adapter_model.safetensors", "training.json"):
        (tmp_path / "run" / name).unlink()  # as if it had been killed after the last step
    again = _train(embedded_model, plan, tmp_path / "run", resume=True)
    assert (again.steps, again.loss, again.tokens) == (12, finished[1].loss, finished[1].tokens)
    assert _equal(finished[0], tmp_path / "run")


def test_the_configuration_is_given_back(finished: tuple[Path, Any], embedded_model: tuple[Any, Any]) -> None:
    before, after = embedded_model[0].config, finished[1].model.config
    for name in ("output_router_logits", "router_aux_loss_coef", "use_cache"):
        assert getattr(after, name) == getattr(before, name)
    assert embedded_model[1].padding_side == "left"


def test_an_output_folder_in_use_is_refused(embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputExistsError, match=r"found:  notes\.txt"):
            _train(embedded_model, plan, tmp_path, resume=resume)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lr": 1e-4}, "other settings"), ({"rows": ROWS[:40]}, "other rows")],
)
def test_a_run_is_resumed_as_it_was_begun(
    finished: tuple[Path, Any], embedded_model: tuple[Any, Any], plan: Plan, change: dict[str, Any], message: str
) -> None:
    rows = change.pop("rows", ROWS)
    settings = TrainSettings(**{**SETTINGS.as_dict(), **change})
    with pytest.raises(ConfigurationError, match=message):
        _train(embedded_model, plan, finished[0], settings, rows=rows, resume=True)


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"lr": 0.0}, {"batch_size": 0}, {"steps": None, "epochs": 0.0}, {"save_every": 0}]
)
def test_impossible_settings_are_refused(
    embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(reversed(change)))):
        _train(embedded_model, plan, tmp_path / "run", TrainSettings(**{**SETTINGS.as_dict(), **change}))
    assert not (tmp_path / "run").exists()


def test_gradients_accumulate(embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path) -> None:
    settings = TrainSettings(**{**SETTINGS.as_dict(), "steps": 2, "batch_size": 2, "gradient_accumulation": 2})
    result = _train(embedded_model, plan, tmp_path / "run", settings)
    assert result.steps == 2
    assert isinstance(result.model, nn.Module)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_balance_loss_is_part_of_the_loss(
    embedded_model: tuple[Any, Any], tmp_path: Path, accumulation: int
) -> None:
    model, tokenizer = embedded_model
    encoded = [encode(row, tokenizer) for row in ROWS]
    profile = apportion.profile(model, batches(encoded, tokenizer.pad_token_id, 16))
    plan = apportion.plan(profile, "uniform", experts=4, rank=2)
    settings = TrainSettings(steps=3, batch_size=4 // accumulation, gradient_accumulation=accumulation, lr=1e-3)
    plain = _train(embedded_model, plan, tmp_path / "plain", settings)
    balanced = _train(embedded_model, plan, tmp_path / "balanced", replace(settings, balance_loss=0.5))
    assert 0.5 * 0.9 < balanced.loss - plain.loss < 0.5 * 2  # 1 where the experts are balanced, up to 4
    pairs = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "balanced")]
    moved = [key for key in pairs[0] if not torch.equal(pairs[0][key], pairs[1][key])]
    assert any("lora_router" in key for key in moved)


def test_a_balance_loss_without_routers_is_refused(embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no adapter has several LoRA experts"):
        _train(embedded_model, plan, tmp_path / "run", replace(SETTINGS, balance_loss=0.1))
    assert not (tmp_path / "run").exists()


def test_rows_of_several_formats_are_refused(embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="several formats"):
        _train(embedded_model, plan, tmp_path / "run", rows=[*ROWS[:3], {"text": "plain"}])
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_on_another_base(embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path) -> None:
    settings = TrainSettings(steps=1, batch_size=4)
    _train(embedded_model, plan, tmp_path / "run", settings, facts={"model": "one"})
    with pytest.raises(ConfigurationError, match="other model"):
        _train(embedded_model, plan, tmp_path / "run", settings, facts={"model": "two"}, resume=True)


def test_bfloat16_on_a_cpu_names_the_settings_that_keep_it_fast(
    embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "65536")
    settings = replace(SETTINGS, steps=1, bf16=True)
    with pytest.warns(ApportionWarning, match="set ONEDNN_PRIMITIVE_CACHE_CAPACITY=65536 before"):
        _train(embedded_model, plan, tmp_path / "warned", settings)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")
    assert _train(embedded_model, plan, tmp_path / "silent", settings).steps == 1


def test_rows_without_a_completion_token_are_left_out_with_a_warning(
    embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path
) -> None:
    long = {**ROWS[0], "prompt": ROWS[0]["prompt"] * 20}
    settings = replace(SETTINGS, steps=3, max_length=512)
    with pytest.warns(ApportionWarning, match="3 of 11 rows have no completion token within 512 tokens"):
        result = _train(embedded_model, plan, tmp_path / "run", settings, rows=[long, *ROWS[:8], long, long])
    assert (result.left_out, result.truncated) == (3, 0)
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (record["left_out"], record["truncated"]) == (3, 0)
    without = _train(embedded_model, plan, tmp_path / "without", settings, rows=ROWS[:8])
    assert without.left_out == 0
    assert _equal(tmp_path / "run", tmp_path / "without")


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_that_are_all_cut_before_their_completion_leave_no_folder(
    embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path, sparse: bool
) -> None:
    if sparse:
        placements = (replace(one, shape=Sparse(one.rank, one.alpha, 0.5)) for one in plan.placements)
        plan = replace(plan, placements=tuple(placements), procedure={"name": "lori"})
    with pytest.raises(DataError, match="no row has a completion token within 1 token"):
        _train(embedded_model, plan, tmp_path / "run", replace(SETTINGS, max_length=1))
    assert not any(path for path in tmp_path.rglob("*") if path.is_file())
