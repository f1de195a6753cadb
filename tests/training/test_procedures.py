"""Procedures: every hook takes effect, a killed run ends the same, and the plan that it ends with is saved."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_procedures import BIRTH, Halving, Pruning, Recording
from typer.testing import CliRunner

import apportion
from apportion.cli.main import app
from apportion.data.batches import batches, encode
from apportion.data.sources import read_rows
from apportion.errors import ConfigurationError, PlanError, TrainingError
from apportion.peft.load import read_adapter_plan
from apportion.records.options import SparseTraining
from apportion.records.plan import Plan
from apportion.training import phase, trainer
from apportion.training.procedures import groups
from apportion.training.procedures.groups import OwnClock
from apportion.training.procedures.plans import plan_to_resume
from apportion.training.procedures.registry import find_procedure, register_procedure
from apportion.training.settings import TrainSettings
from apportion.training.sft import train

ROWS = read_rows("task:syllogism", num_rows=24)
SETTINGS = TrainSettings(steps=6, batch_size=4, lr=1e-2, save_every=2, warmup_frac=0.4, weight_decay=0.1)
STATE = "procedure.safetensors"

for _name, _procedure in {"test_pruning": Pruning, "test_halving": Halving, "test_recording": Recording}.items():
    register_procedure(_name)(_procedure)


@pytest.fixture(scope="module")
def profile(embedded_model: tuple[Any, Any]) -> apportion.Profile:
    model, tokenizer = embedded_model
    return apportion.profile(model, batches([encode(row, tokenizer) for row in ROWS], tokenizer.pad_token_id, 12))


@pytest.fixture(scope="module")
def plan(profile: apportion.Profile) -> Plan:
    return replace(apportion.plan(profile, "hellora", hot=2, rank=4), procedure={"name": "test_pruning"})


@pytest.fixture(scope="module")
def attention(profile: apportion.Profile) -> Plan:
    return apportion.plan(profile, "attention", rank=4)


def _train(model: tuple[Any, Any], plan: Plan, folder: Path, settings: TrainSettings = SETTINGS, **kwargs: Any) -> Any:
    return train(copy.deepcopy(model[0]), model[1], plan, ROWS, folder, settings, progress=False, **kwargs)


@pytest.fixture(scope="module")
def finished(embedded_model: tuple[Any, Any], plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, _train(embedded_model, plan, folder)


def _kill_after(
    steps: int, model: tuple[Any, Any], plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch, **kwargs: Any
) -> None:
    """Train until a batch of a later step would be run, or until the adapter would be saved after the last step."""
    step = trainer._Trainer.training_step

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == steps:
            raise RuntimeError("killed")
        return step(self, *args, **kwargs)

    def kill(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Trainer, "training_step", stopping)
        patch.setattr(phase, "save_adapter", kill)
        with pytest.raises(RuntimeError, match="killed"):
            _train(model, plan, folder, **kwargs)
    assert not (folder / "adapter_config.json").exists()


def _equal(one: Path, other: Path) -> bool:
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
    configs = [json.loads((folder / "adapter_config.json").read_text())["plan"] for folder in (one, other)]
    assert configs[0] == configs[1]
    assert tensors[0].keys() == tensors[1].keys()
    return all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def test_hooks_are_called_in_their_order(embedded_model: tuple[Any, Any], attention: Plan, tmp_path: Path) -> None:
    Recording.calls.clear()
    settings = TrainSettings(
        epochs=1.0, batch_size=6, gradient_accumulation=2, lr=1e-3, save_every=1, max_grad_norm=1e-3, warmup_frac=0.0
    )
    recorded = replace(attention, procedure={"name": "test_recording"})
    _train(embedded_model, recorded, tmp_path / "run", replace(settings, seed=7))
    batch = [("before_forward", True), "penalty"]
    steps = [
        [*batch, *batch, ("before_step", step, True), ("after_step", step, True, True, True), "state"]
        for step in (0, 1)
    ]
    assert Recording.calls == [("attach", "default", 2, 7), *steps[0], *steps[1], "finish", "detach"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_penalty_counts_once_per_step(
    embedded_model: tuple[Any, Any], attention: Plan, tmp_path: Path, accumulation: int
) -> None:
    settings = TrainSettings(steps=2, batch_size=4 // accumulation, gradient_accumulation=accumulation, lr=1e-3)
    plain = _train(embedded_model, attention, tmp_path / "plain", settings)
    penalised = replace(attention, procedure={"name": "test_recording"})
    assert _train(embedded_model, penalised, tmp_path / "run", settings).loss - plain.loss == pytest.approx(
        0.5, abs=1e-4
    )


def test_a_penalty_and_the_balance_loss_add_up(
    embedded_model: tuple[Any, Any], profile: apportion.Profile, tmp_path: Path
) -> None:
    routed = apportion.plan(profile, "uniform", experts=2, rank=2)
    settings = TrainSettings(steps=1, batch_size=4, lr=1e-3, balance_loss=0.25)
    balanced = _train(embedded_model, routed, tmp_path / "balanced", settings)
    Recording.calls.clear()
    both = _train(embedded_model, replace(routed, procedure={"name": "test_recording"}), tmp_path / "both", settings)
    assert both.loss - balanced.loss == pytest.approx(0.5, abs=1e-4)
    assert [call for call in Recording.calls if call == "detach"] == ["detach"]
    assert not any(getattr(module, "balance", None) for module in both.model.modules())


def test_options_in_the_plan_reach_the_procedure(
    embedded_model: tuple[Any, Any], plan: Plan, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    heavier = replace(plan, procedure={"name": "test_pruning", "weight": 0.1})
    result = _train(embedded_model, heavier, tmp_path / "run")
    assert result.loss_curve[0] == finished[1].loss_curve[0]  # B is zero
    assert result.loss_curve[-1]["loss"] > finished[1].loss_curve[-1]["loss"]
    with pytest.raises(ConfigurationError, match="procedure test_pruning has no option 'wait'"):
        find_procedure(replace(plan, procedure={"name": "test_pruning", "wait": 1}))


def test_the_state_is_in_the_checkpoint_s_list_of_files(finished: tuple[Path, Any]) -> None:
    checkpoint = finished[0] / "checkpoints" / "checkpoint-4"
    state = load_file(checkpoint / STATE)
    assert (int(state["draws"]), int(state["birth"])) == (4, BIRTH)
    assert state["norm"] > 0
    assert STATE in json.loads((checkpoint / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("steps", [3, 5, 6])
def test_a_killed_run_ends_the_same(
    embedded_model: tuple[Any, Any],
    plan: Plan,
    finished: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    """The checkpoints are those before and after the birth of the group, and that of the last step."""
    _kill_after(steps, embedded_model, plan, tmp_path / "run", monkeypatch)
    resumed = _train(embedded_model, plan, tmp_path / "run", resume=True)
    assert resumed.steps == 6
    assert _equal(finished[0], tmp_path / "run")


def test_a_run_whose_state_was_changed_is_not_resumed(
    embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _kill_after(3, embedded_model, plan, tmp_path / "run", monkeypatch)
    file = tmp_path / "run" / "checkpoints" / "checkpoint-2" / STATE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(TrainingError, match=f"{STATE} was changed"):
        _train(embedded_model, plan, tmp_path / "run", resume=True)


def test_a_born_group_trains_from_its_birth_on_its_own_schedule(finished: tuple[Path, Any], plan: Plan) -> None:
    folder, _ = finished
    optimizer = torch.load(folder / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert len(optimizer["param_groups"]) == 3
    moved_once = {float(optimizer["state"][number]["step"]) for number in optimizer["param_groups"][2]["params"]}
    moved_always = {float(optimizer["state"][number]["step"]) for number in optimizer["param_groups"][0]["params"]}
    assert (moved_once, moved_always) == ({6.0 - BIRTH}, {6.0})
    assert optimizer["param_groups"][2]["weight_decay"] == optimizer["param_groups"][0]["weight_decay"] == 0.1
    rates = {}
    for step in (4, 6):
        schedule = torch.load(folder / "checkpoints" / f"checkpoint-{step}" / "scheduler.pt", weights_only=True)
        rates[step] = schedule["_last_lr"]
    clock = OwnClock(BIRTH, warmup_steps=3, num_steps=6)
    assert [clock(step) for step in (2, 3, 4, 5, 6)] == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    assert rates[4][2] == pytest.approx(1e-2 * clock(4))
    assert (
        rates[4][0] == rates[4][1] == pytest.approx(1e-2 * 0.75)
    )  # a third of the way between the warm-up's end and the last step


def test_parameters_cannot_be_born_on_several_processes(
    embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "num_processes", lambda: 2)
    with pytest.raises(TrainingError, match="which several processes cannot share"):
        _train(embedded_model, plan, tmp_path / "run")


def test_the_plan_that_training_ends_with_is_saved_and_loads(
    embedded_model: tuple[Any, Any], plan: Plan, finished: tuple[Path, Any]
) -> None:
    folder, result = finished
    model, tokenizer = embedded_model
    ended = read_adapter_plan(folder)
    assert ended.derived_from == (plan.seal,)
    assert ended.procedure == plan.procedure
    assert {site: p.rank for site, p in ended.by_site.items()} == dict.fromkeys(plan.by_site, 2)
    assert {p.scale for p in ended.placements} == {p.scale for p in plan.placements}
    stored = sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
    assert stored == ended.cost.stored_parameters == result.model.receipt.trainable_parameters
    assert 2 * stored == plan.cost.stored_parameters
    ids = tokenizer(ROWS[0]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = result.model.eval()(input_ids=ids).logits
        assert torch.equal(apportion.load(copy.deepcopy(model), folder)(input_ids=ids).logits, logits)
        assert not torch.equal(model(input_ids=ids).logits, logits)
    assert read_adapter_plan(folder / "checkpoints" / "checkpoint-6") == plan


@pytest.mark.parametrize("steps", [3, 5, 6])
def test_a_run_whose_ranks_have_changed_resumes_with_the_checkpoint_s_plan(
    embedded_model: tuple[Any, Any], attention: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    start = replace(attention, procedure={"name": "test_halving"})
    whole = _train(embedded_model, start, tmp_path / "whole")
    _kill_after(steps, embedded_model, start, tmp_path / "run", monkeypatch)
    newest = tmp_path / "run" / "checkpoints" / f"checkpoint-{2 * (steps // 2)}"
    assert read_adapter_plan(newest).derived_from == (() if steps == 3 else (start.seal,))
    resumed = _train(embedded_model, start, tmp_path / "run", resume=True)
    assert _equal(tmp_path / "whole", tmp_path / "run")
    for result in (whole, resumed):
        ended = result.model.peft_config["default"].plan
        assert {p.rank for p in ended.placements} == {2}
        assert ended.derived_from == (start.seal,)
        assert result.model.receipt.trainable_parameters == ended.cost.trainable_parameters


def test_a_checkpoint_of_another_plan_is_refused(finished: tuple[Path, Any], plan: Plan, attention: Plan) -> None:
    checkpoint = finished[0] / "checkpoints" / "checkpoint-4"
    assert plan_to_resume(checkpoint, plan) is plan
    with pytest.raises(ConfigurationError, match=r"checkpoint-4: its adapter belongs to another plan"):
        plan_to_resume(checkpoint, attention)


def test_an_unknown_procedure_is_refused_before_anything_is_changed(
    embedded_model: tuple[Any, Any], attention: Plan, tmp_path: Path
) -> None:
    model = copy.deepcopy(embedded_model[0])
    unknown = replace(attention, procedure={"name": "adding"})
    with pytest.raises(PlanError, match=r"(?s)procedure 'adding', which is not known here.*plain, lori"):
        train(model, embedded_model[1], unknown, ROWS, tmp_path / "run", SETTINGS, progress=False)
    assert not (tmp_path / "run").exists()
    assert not any("lora" in name for name, _ in model.named_modules())


def test_the_command_line_refuses_an_unknown_procedure_before_it_loads_the_model(
    attention: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(attention, procedure={"name": "adding"}).save(tmp_path / "plan.json")
    monkeypatch.setattr("apportion.cli.train.load_model", None)
    command = ["train", str(tmp_path / "plan.json"), "--data", "task:aiw", "--model", "embedded"]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "procedure 'adding'" in done.output
    assert not (tmp_path / "run").exists()


def test_a_name_is_registered_once() -> None:
    assert register_procedure("test_pruning")(Pruning) is Pruning
    with pytest.raises(ValueError, match="procedure 'test_pruning' already"):
        register_procedure("test_pruning")(Halving)


def test_procedures_refuse_plans_that_they_cannot_train(
    embedded_model: tuple[Any, Any], profile: apportion.Profile, attention: Plan, tmp_path: Path
) -> None:
    sparse = apportion.plan(profile, "lori", targets=("attention",), rank=2)
    with pytest.raises(PlanError, match="procedure 'plain' cannot train a sparse plan"):
        _train(embedded_model, replace(sparse, procedure={"name": "plain"}), tmp_path / "run")
    with pytest.raises(PlanError, match="'lori' trains sparse plans"):
        _train(embedded_model, replace(attention, procedure={"name": "lori"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lori_s_options_come_from_the_plan_unless_the_run_gives_them(
    embedded_model: tuple[Any, Any], profile: apportion.Profile, tmp_path: Path
) -> None:
    sparse = apportion.plan(profile, "lori", targets=("attention",), rank=2)
    procedure = {"name": "lori", "dense_steps": 4, "dense_lr": 1e-3}
    settings = TrainSettings(steps=3, batch_size=4, lr=1e-2, sparse=SparseTraining(dense_steps=3))
    _train(embedded_model, replace(sparse, procedure=procedure), tmp_path / "plan", settings)
    _train(
        embedded_model, sparse, tmp_path / "run", replace(settings, sparse=SparseTraining(dense_steps=3, dense_lr=1e-3))
    )
    assert json.loads((tmp_path / "plan" / "dense" / "training.json").read_text())["steps"] == 3
    states = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plan", "run")]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
