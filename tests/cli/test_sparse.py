"""LoRI from the command line: trained, looked at, combined, exported, and trained on top of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from apportion.cli.main import app


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRI adapters of attention, each of one task."""
    folder = tmp_path_factory.mktemp("lori")
    profile, plan = folder / "p.safetensors", folder / "plan.json"
    assert _run("profile", "embedded", "--data", "task:aiw", "--samples", 8, "-o", profile).exit_code == 0
    options = ("--method", "lori", "--targets", "attention", "--rank", 4, "--sparsity", 0.8)
    assert _run("plan", profile, *options, "-o", plan).exit_code == 0
    for task in ("aiw", "gcd"):
        settings = ("--steps", 2, "--dense-steps", 2, "--samples", 16, "--batch-size", 4, "--lr", 1e-2)
        done = _run("train", plan, "--data", f"task:{task}", *settings, "-o", folder / task)
        assert done.exit_code == 0, done.output
    return folder


def test_masks_are_shown_and_compared(folder: Path) -> None:
    done = _run("mask", folder / "aiw/mask.safetensors", "--with", folder / "gcd/mask.safetensors")
    assert done.exit_code == 0, done.output
    assert "20.00%" in done.output
    assert "by chance" in done.output
    facts = json.loads(_run("mask", folder / "aiw/mask.safetensors", "--json").stdout)
    assert facts["kept"] == -(-facts["entries"] // 5)
    assert _run("mask", folder / "plan.json").exit_code == 2


def test_adapters_are_combined_exported_and_merged(folder: Path, tmp_path: Path) -> None:
    weights = ("--weights", "0.5,0.4")
    combined = _run("combine", folder / "aiw", folder / "gcd", *weights, "-o", tmp_path / "both", "--json")
    assert combined.exit_code == 0, combined.output
    assert json.loads(combined.stdout)["weights"] == [0.5, 0.4]
    exported = _run("export", tmp_path / "both", "-o", tmp_path / "plain")
    assert exported.exit_code == 0, exported.output
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert _run("merge", tmp_path / "both", "-o", tmp_path / "merged").exit_code == 0
    wrong = _run("combine", folder / "aiw", folder / "gcd", "--weights", "1", "-o", tmp_path / "none")
    assert wrong.exit_code == 2
    assert not (tmp_path / "none").exists()


def test_a_second_task_is_trained_on_top(folder: Path, tmp_path: Path) -> None:
    settings = ("--steps", 1, "--samples", 8, "--batch-size", 4)
    on_top = ("--on-top-of", folder / "aiw", "--mask", folder / "gcd/mask.safetensors")
    done = _run("train", folder / "plan.json", "--data", "task:gcd", *settings, *on_top, "-o", tmp_path / "second")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "second/dense").exists()
    assert json.loads((tmp_path / "second/run.json").read_text())["on_top_of"]["path"] == str(folder / "aiw")
    merged = _run("merge", tmp_path / "second", "-o", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    (folder / "gcd" / "adapter_model.safetensors").replace(tmp_path / "moved")
    gone = _run(
        "train", folder / "plan.json", "--data", "task:gcd", *settings, "--on-top-of", folder / "gcd", "-o", "x"
    )
    assert gone.exit_code == 2
    (tmp_path / "moved").replace(folder / "gcd" / "adapter_model.safetensors")


def test_weights_that_overflow_leave_no_adapter(folder: Path) -> None:
    done = _run("combine", folder / "aiw", folder / "aiw", "--weights", "1e39,1", "-o", folder / "overflow")
    assert done.exit_code == 2, done.output
    assert "are not all finite in float32" in done.stderr
    assert not (folder / "overflow").exists()


@pytest.mark.parametrize("command", ["eval", "merge"])
def test_an_adapter_without_tensors_is_refused(folder: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    config = (folder / "aiw" / "adapter_config.json").read_text()
    (tmp_path / "empty" / "adapter_config.json").write_text(config)
    save_file({}, tmp_path / "empty" / "adapter_model.safetensors")
    arguments = {
        "eval": ["embedded", "--adapter", tmp_path / "empty", "--data", "task:aiw", "--samples", 2],
        "merge": [tmp_path / "empty", "-o", tmp_path / "merged"],
    }[command]
    done = _run(command, *arguments)
    assert done.exit_code == 2, done.output
    assert "tensors are missing" in done.stderr
    assert not (tmp_path / "merged").exists()
