"""A run that two processes share gives the adapter of one process with twice the rows a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import apportion
from apportion.cli.main import app
from apportion.data.batches import batches, encode
from apportion.data.sources import read_rows

DATA = "task:aiw"


@pytest.fixture(scope="module")
def profile() -> apportion.Profile:
    model, tokenizer = apportion.embedded()
    rows = [encode(row, tokenizer, 512) for row in read_rows(DATA, num_rows=16)]
    return apportion.profile(model, list(batches(rows, int(tokenizer.pad_token_id), 16)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="one GPU has no room for two processes")
@pytest.mark.parametrize("method", ["hellora", "hellori"])
def test_two_processes_train_what_one_does(method: str, profile: apportion.Profile, tmp_path: Path) -> None:
    plan = apportion.plan(profile, method, hot=2, rank=2)
    plan.save(tmp_path / "plan.json")
    told = ["train", str(tmp_path / "plan.json"), "--model", "embedded", "--data", DATA, "--samples", "32"]
    told += ["--steps", "3", "--dropout", "0", "--json"]
    shared = [*told, "--batch-size", "4", "-o", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "apportion"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = subprocess.run([*launch, *shared], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout)["steps"] == 3  # said once
    one = CliRunner().invoke(app, [*told, "--batch-size", "8", "-o", str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name
    assert any(bool(tensor.any()) for name, tensor in expected.items() if "lora_B" in name)
    curves = [json.loads((tmp_path / name / "training.json").read_text())["loss_curve"] for name in ("two", "one")]
    for mine, other in zip(*curves, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
