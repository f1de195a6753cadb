"""Code that comes with a model runs when the user says so on the command line, and never otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from typer.testing import CliRunner, Result

import apportion
from apportion.accounting import layout_of
from apportion.cli.main import app
from apportion.errors import ConfigurationError, ModelLoadError
from apportion.loading import load_model
from tiny_models import build_tiny

Run = Callable[..., Result]

CODE = """
from pathlib import Path
from transformers import OlmoeConfig, OlmoeForCausalLM

Path({marker!r}).write_text("ran")

class OwnConfig(OlmoeConfig):
    model_type = "own"

class OwnForCausalLM(OlmoeForCausalLM):
    config_class = OwnConfig
"""
COMPARE = ["--method", "lora", "--method", "cold", "--budget", "lora:1", "--dry-run"]
DATA = ["--data", "task:aiw", "--samples", "2"]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that the model's code writes."""
    return tmp_path / "marker"


@pytest.fixture
def own_model(tmp_path: Path, marker: Path) -> Path:
    """A folder with a small model whose classes are in a file of its own."""
    folder = tmp_path / "own"
    tokenizer = apportion.embedded()[1]
    tokenizer.save_pretrained(folder)
    build_tiny("olmoe", vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": classes}))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    return folder


@pytest.fixture
def plan(own_model: Path, tokens: Tensor) -> apportion.Plan:
    """A plan that names the folder as its model."""
    profile = apportion.profile(build_tiny("olmoe"), [{"input_ids": tokens}])
    return replace(apportion.plan(profile, "lora", targets="attention", rank=2), base_model=str(own_model))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line with a user who says yes to everything."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments], input="y\ny\n")


def check_refused(done: Result, marker: Path) -> None:
    """See that nothing ran, nothing was asked, and the message says how to allow it."""
    assert not marker.exists()
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert "comes with Python code of its own, which was not run" in done.stderr
    assert "--trust-remote-code" in done.stderr


@pytest.mark.parametrize("command", ["eval", "profile", "cost", "cost of a file", "compare"])
def test_code_of_a_named_model_does_not_run(run: Run, own_model: Path, marker: Path, command: str) -> None:
    arguments = {
        "eval": ["eval", own_model, *DATA],
        "profile": ["profile", own_model, *DATA, "-o", "p.safetensors"],
        "cost": ["cost", own_model],
        "cost of a file": ["cost", own_model / "config.json"],
        "compare": ["compare", "--model", own_model, "--data", "task:aiw", *COMPARE],
    }[command]
    check_refused(run(*arguments, "--json"), marker)


def test_code_of_a_configuration_alone_does_not_run(run: Run, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "rc"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}))
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    check_refused(run("eval", folder, *DATA), marker)
    check_refused(run("cost", folder), marker)


def test_code_of_a_tokenizer_does_not_run(run: Run, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "rc"
    model, tokenizer = apportion.embedded()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "code.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    run("eval", folder, *DATA)
    assert not marker.exists()


def test_code_of_a_plans_model_does_not_run(run: Run, plan: apportion.Plan, marker: Path, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    check_refused(run("train", "plan.json", *DATA, "-o", "run"), marker)


@pytest.mark.parametrize("command", ["merge", "export", "combine"])
def test_code_of_an_adapters_model_does_not_run(run: Run, plan: apportion.Plan, marker: Path, command: str) -> None:
    apportion.apply(build_tiny("olmoe"), plan).save_pretrained("adapter")
    names = ["adapter", "adapter"] if command == "combine" else ["adapter"]
    check_refused(run(command, *names, "-o", "out"), marker)


def test_code_does_not_run_from_python(own_model: Path, marker: Path) -> None:
    with pytest.raises(ModelLoadError, match="trust_remote_code=True"):
        load_model(own_model)
    with pytest.raises(ConfigurationError, match="trust_remote_code=True"):
        layout_of(own_model)
    with pytest.raises(ConfigurationError, match="trust_remote_code=True"):
        apportion.cost(own_model, "lora")
    assert not marker.exists()


def test_code_runs_when_it_is_trusted(own_model: Path, plan: apportion.Plan, marker: Path, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    commands = [
        ["cost", str(own_model), "--method", "lora", "--rank", "2"],
        ["cost", str(own_model / "config.json"), "--method", "lora", "--rank", "2"],
        ["eval", str(own_model), *DATA],
        ["profile", str(own_model), *DATA, "-o", str(tmp_path / "p.safetensors")],
        ["compare", "--model", str(own_model), "--data", "task:aiw", *COMPARE, "-o", str(tmp_path / "study")],
        ["plan", str(tmp_path / "p.safetensors"), "--method", "lora", "--rank", "2", "-o", str(tmp_path / "own.json")],
        ["train", str(tmp_path / "own.json"), *DATA, "--steps", "1", "-o", str(tmp_path / "run")],
    ]
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom typer.testing import CliRunner\n"
        "from apportion.cli.main import app\n"
        "marker, commands = json.load(sys.stdin)\n"
        "for command in commands:\n"
        "    trust = [] if command[0] == 'plan' else ['--trust-remote-code']\n"
        "    done = CliRunner().invoke(app, [*command, *trust])\n"
        "    assert done.exit_code == 0, (command, done.output, done.exception)\n"
        "    assert Path(marker).read_text() == 'ran'\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([str(marker), commands]),
        text=True,
        check=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
