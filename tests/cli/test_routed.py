"""LoRA-SMoE from the command line: several tasks profiled, voted for, trained on and scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import apportion
from apportion.cli.main import app

TASKS = ("--data", "a=task:chain_sum", "--data", "b=task:aiw", "--data", "c=task:syllogism")


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the embedded model with sensitivities of three tasks."""
    path = tmp_path_factory.mktemp("profile") / "p.safetensors"
    done = _run("profile", "embedded", *TASKS, "--samples", 8, "--sensitivity", "-o", path)
    assert done.exit_code == 0, done.output
    assert "attention.q" in done.output
    assert not Path(f"{path}.partial").exists()
    return path


def test_the_released_procedure_can_be_chosen(tmp_path: Path, profile: Path) -> None:
    path = tmp_path / "released.safetensors"
    options = ("--sensitivity", "--sensitivity-procedure", "block-coordinate")
    done = _run("profile", "embedded", *TASKS, "--samples", 8, *options, "-o", path)
    assert done.exit_code == 0, done.output
    released, ours = apportion.load_profile(path), apportion.load_profile(profile)
    assert released.provenance["sensitivity_procedure"] == "block-coordinate"
    assert released.sensitivity["a"].keys() == ours.sensitivity["a"].keys()
    assert released.sensitivity != ours.sensitivity


def test_plans_show_experts_and_budgets(tmp_path: Path, profile: Path) -> None:
    done = _run(
        "plan", profile, "--method", "lora_smoe", "--budget", "experts=20", "--rank", 4, "-o", tmp_path / "p.json"
    )
    assert done.exit_code == 0, done.output
    assert "LoRA experts" in done.output
    assert "budget: 18 of 20 experts used, 2 left" in done.output
    assert apportion.load_plan(tmp_path / "p.json").num_lora_experts == 18


def test_plans_of_several_ranks_are_shown(tmp_path: Path, profile: Path) -> None:
    path = tmp_path / "p.json"
    done = _run("plan", profile, "--method", "marginal", "--budget", "flops=200_000", "--max-rank", 12, "-o", path)
    assert done.exit_code == 0, done.output
    plan = apportion.load_plan(path)
    largest = max(placement.rank for placement in plan.placements)
    assert f"ranks 1 to {largest}" in done.output
    assert largest <= 12
    assert "of 200,000 flops" in done.output
    assert plan.cost.adapter_flops_per_token <= 200_000
    for options in (
        ("gradient", "--keep", "25%", "--per", "parameter"),
        ("hellora", "--criterion", "sensitivity_count"),
    ):
        done = _run("plan", profile, "--method", *options, "--rank", 4, "-o", path)
        assert done.exit_code == 0, done.output
    refused = _run("plan", profile, "--method", "marginal", "-o", path)
    assert refused.exit_code == 2
    assert "give --budget" in refused.output


def test_several_tasks_are_trained_on_and_scored(tmp_path: Path, profile: Path) -> None:
    plan, folder = tmp_path / "p.json", tmp_path / "run"
    assert _run("plan", profile, "--method", "lora_smoe", "--rank", 4, "-o", plan).exit_code == 0
    settings = ("--weights", "a=2,b=1,c=1", "--balance-loss", 0.01, "--steps", 2, "--samples", 20, "--batch-size", 4)
    trained = _run("train", plan, *TASKS, *settings, "-o", folder)
    assert trained.exit_code == 0, trained.output
    assert json.loads((folder / "run.json").read_text())["weights"] == {"a": 2.0, "b": 1.0, "c": 1.0}
    scored = _run("eval", "embedded", "--adapter", folder, *TASKS, "--samples", 4, "--json")
    assert scored.exit_code == 0, scored.output
    result = json.loads(scored.stdout)
    assert result["tasks"].keys() == {"a", "b", "c"}
    losses = [task["loss"] for task in result["tasks"].values()]
    assert result["mean"]["loss"] == pytest.approx(sum(losses) / 3)
    merged = _run("merge", folder, "-o", tmp_path / "merged")
    assert merged.exit_code == 2
    assert "gates depend on the input" in merged.output
    assert not (tmp_path / "merged").exists()


def test_one_task_and_uneven_tasks_are_warned_of(tmp_path: Path) -> None:
    rows = tmp_path / "one.jsonl"
    rows.write_text('{"prompt": "Say a.", "completion": " a"}\n')
    path = tmp_path / "p.safetensors"
    uneven = _run(
        "profile", "embedded", "--data", rows, "--data", "task:gcd", "--samples", 12, "--sensitivity", "-o", path
    )
    assert uneven.exit_code == 0, uneven.output
    assert "task 'one' has 1 rows and 'gcd' has 12" in " ".join(uneven.output.split())
    assert _run("profile", "embedded", "--data", rows, "--sensitivity", "-o", path).exit_code == 0
    planned = _run("plan", path, "--method", "lora_smoe", "--rank", 4, "-o", tmp_path / "p.json")
    assert planned.exit_code == 0, planned.output
    assert "the profile has one task, 'one'" in " ".join(planned.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "lora_smoe", "--keep", "0"), "keep"),
        (("--method", "lora_smoe", "--top-k", "7"), "top_k=7 is above"),
        (("--method", "lora_smoe", "--groups", "layers"), "groups"),
        (("--method", "uniform", "--budget", "12"), "too small for one LoRA expert"),
        (("--method", "mola", "--experts", "2-x"), "not understood"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, profile: Path, arguments: tuple[str, ...], message: str) -> None:
    done = _run("plan", profile, *arguments, "--rank", 4, "-o", tmp_path / "p.json")
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "p.json").exists()
