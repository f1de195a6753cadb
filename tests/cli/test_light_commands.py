"""Commands that read files alone start quickly: they load neither PyTorch nor transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import OlmoeConfig
from typer.testing import CliRunner

from apportion.cli.main import app
from apportion.configurations import known_configurations
from study_folder import tiny_profile, write_study

HEAVY = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "pandas", "pyarrow", "scipy", "matplotlib")
FIXTURES = Path(__file__).parent.parent / "fixtures"

_PROGRAM = """
import sys
from apportion.cli.main import app
from typer.testing import CliRunner
result = CliRunner().invoke(app, sys.argv[1:], catch_exceptions=False)
assert result.exit_code == 0, result.output
heavy = {HEAVY} & set(sys.modules)
assert not heavy, heavy
print(result.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files to read: those of the fixtures, and a study."""
    made = tmp_path_factory.mktemp("files")
    shutil.copytree(FIXTURES, made, dirs_exist_ok=True)
    write_study(made / "study", tiny_profile())
    return made


def _run(folder: Path, *words: str) -> str:
    """Run a command in a process of its own, and return what it prints."""
    program = _PROGRAM.replace("{HEAVY}", repr(set(HEAVY)))
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "methods --json",
        "plan --help",
        "train --help",
        "plan profile.safetensors --hot 2 --rank 2 --picture plan.svg -o plan.json",
        "plan profile.safetensors --method lora_smoe --targets attention --rank 2 -o plan_smoe.json",
        "plan profile.safetensors --method marginal --budget 20000 --rank 2 -o plan_marginal.json",
        "mask mask.safetensors --with mask.safetensors",
        "report profile.safetensors -o profile.html",
        "report plans/hellora.json --profile profile.safetensors -o plan.html",
        "report study -o study.html",
        "cost embedded --hot 4",
        "cost embedded --hot 2 --rank 2 --profile profile.safetensors",
        *(f"show {name}" for name in ("profile.safetensors", "plans/hellori.json", "mask.safetensors", "study")),
        *(f"show {name}" for name in ("adapters/hellora", "run", "run/checkpoints/checkpoint-2")),
    ],
)
def test_the_command_loads_no_heavy_library(folder: Path, command: str) -> None:
    _run(folder, *command.split())


@pytest.mark.parametrize("name", known_configurations())
def test_costs_of_shipped_configurations_load_no_heavy_library(folder: Path, name: str) -> None:
    assert json.loads(_run(folder, "cost", name, "--method", "lora", "--json"))["trainable_parameters"] > 10**7


def test_the_second_cost_of_a_configuration_loads_no_heavy_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path / "cache"))
    OlmoeConfig(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    words = ["cost", "model", "--method", "lora", "--json"]
    monkeypatch.chdir(tmp_path)
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    assert len(list((tmp_path / "cache").rglob("*.json.gz"))) == 1
    assert json.loads(_run(tmp_path, *words)) == json.loads(first.stdout)
    assert os.environ["APPORTION_CACHE"] == str(tmp_path / "cache")
