"""Every file and folder that the package writes is recognised, and nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from apportion.cli.main import app
from apportion.errors import ApportionError, ConfigurationError
from apportion.report.inventory import identify
from apportion.report.page import write_report
from study_folder import tiny_profile, write_study

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folder."""
    folder = tmp_path_factory.mktemp("study") / "study"
    write_study(folder, tiny_profile())
    return folder


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("profile.safetensors", "profile"),
        ("plans/marginal.json", "plan"),
        ("mask.safetensors", "mask"),
        ("adapters/hellori", "adapter"),
        ("adapters/hellori/adapter_config.json", "adapter"),
        ("adapters/hellora/adapter_model.safetensors", "tensors of an adapter"),
        ("run", "unfinished training run"),
        ("run/run.json", "unfinished training run"),
        ("run/checkpoints/checkpoint-2", "checkpoint"),
        ("run/checkpoints/checkpoint-2/manifest.json", "checkpoint"),
    ],
)
def test_files_of_one_model_are_recognised(name: str, kind: str) -> None:
    assert identify(FIXTURES / name).kind == kind


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("", "study"),
        ("study.json", "study"),
        ("summary.json", "summary of a study"),
        ("runs/*.json", "run of a study"),
        ("plans/*.json", "plan"),
        ("profiles/*.safetensors", "profile"),
    ],
)
def test_files_of_a_study_are_recognised(study: Path, pattern: str, kind: str) -> None:
    paths = list(study.glob(pattern)) if pattern else [study]
    assert paths
    assert {identify(path).kind for path in paths} == {kind}


def test_a_study_says_how_far_it_is(study: Path) -> None:
    assert identify(study).facts["finished runs"] == "54 of 54"


def test_a_report_and_a_study_file_are_recognised(tmp_path: Path) -> None:
    write_report(FIXTURES / "profile.safetensors", tmp_path / "page.html")
    assert identify(tmp_path / "page.html").kind == "report"
    (tmp_path / "s.toml").write_text(
        'tasks = { gcd = "task:gcd" }\ncontenders = [{ method = "lora" }, { method = "attention" }]\nbudgets = [1000]\n'
    )
    assert identify(tmp_path / "s.toml").kind == "study file"


def test_facts_are_those_of_the_plan() -> None:
    item = identify(FIXTURES / "adapters/lora_smoe")
    assert item.plan is not None
    assert item.facts["method"] == "lora_smoe"
    assert item.facts["mergeable"].startswith("no")
    assert item.facts["seal"] == item.plan.seal


@pytest.mark.parametrize(
    "name", ["missing.json", "rows.jsonl", "page.html", "other.json", "other.safetensors", "empty"]
)
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "page.html").write_text("<html></html>")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "empty").mkdir()
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigurationError, match=name):
        identify(tmp_path / name)


@pytest.mark.parametrize("name", ["adapter_config.json", "profile.safetensors", "manifest.json", "results.json"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{")
    with pytest.raises(ApportionError, match=name):
        identify(tmp_path / name)


def test_a_checkpoint_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "run/checkpoints/checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ConfigurationError, match=r"checkpoint-2.*trainer_state.json is missing|is missing"):
        identify(tmp_path / "checkpoint-2")


def test_the_command_prints_a_table_or_json() -> None:
    shown = CliRunner().invoke(app, ["show", str(FIXTURES / "plans/hellora.json")])
    assert shown.exit_code == 0
    assert "trainable parameters" in shown.output
    as_json = CliRunner().invoke(app, ["show", str(FIXTURES / "plans/hellora.json"), "--json"])
    plan = json.loads((FIXTURES / "plans/hellora.json").read_text())
    assert json.loads(as_json.stdout)["fingerprint"] == plan["fingerprint"]


def test_the_command_refuses_with_one_message(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert refused.exit_code == 2
    assert "was not written by apportion" in refused.stderr
