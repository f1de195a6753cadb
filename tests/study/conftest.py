"""A study of a few steps, run once through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from apportion.cli.main import app

STUDY = """
name = "tiny"
unrelated = "task:sentence_reordering?max_words_in_sentence=6"
contenders = ["lora", {method = "hellora", hot = 4}, {method = "full", lr_low = 1e-4, lr_high = 1e-3}]
budgets = ["lora:1", "lora:2"]
seeds = 2
eval_rows = 8
resamples = 199
[tasks]
siblings = "task:aiw"
[training]
steps = 1
batch_size = 4
[tuning]
trials = 2
rows = 4
[profile]
rows = 8
resamples = 20
"""


@pytest.fixture(scope="session")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "tiny.toml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="session")
def finished(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    done = CliRunner().invoke(app, ["compare", str(study_file), "-o", str(folder)])
    assert done.exit_code == 0, done.output
    return folder
