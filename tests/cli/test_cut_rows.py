"""Rows that are cut before their completion: every command says how many there are and what it does with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from apportion.cli.main import app
from apportion.data.tasks import task_rows
from apportion.records.profile import load_profile


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two rows of which one has a prompt of more than 256 tokens."""
    rows = [dict(row) for row in task_rows("aiw", num_rows=2)]
    rows[1]["prompt"] *= 40
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _flat(result: Result) -> str:
    return " ".join(result.output.split())


def test_profile_measures_sensitivity_on_the_rows_that_have_a_label(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    options = ("--max-length", 256, "--batch-size", 1, "-o", path)
    done = _run("profile", "embedded", "--data", data, *options, "--sensitivity")
    assert done.exit_code == 0, done.output
    assert "rows: 1 of 2 rows have no completion token within 256 tokens and were skipped" in _flat(done)
    profile = load_profile(path)
    assert profile.provenance["sequences"] == {"rows": 1}
    assert profile.provenance["left_out"] == {"rows": 1}


def test_profile_without_sensitivity_needs_no_completion(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    done = _run("profile", "embedded", "--data", data, "--max-length", 256, "-o", path)
    assert done.exit_code == 0, done.output
    assert "skipped" not in done.output
    assert load_profile(path).provenance["sequences"] == {"rows": 2}


def test_profile_refuses_sensitivity_where_no_row_has_a_label(data: Path, tmp_path: Path) -> None:
    options = ("--sensitivity", "--max-length", 8, "-o", tmp_path / "p.safetensors")
    done = _run("profile", "embedded", "--data", data, *options)
    assert done.exit_code == 2
    assert "task 'rows': no row has a completion token within 8 tokens" in _flat(done)
    assert "--max-length" in done.output


def test_eval_says_how_many_rows_the_loss_leaves_out(data: Path) -> None:
    done = _run("eval", "embedded", "--data", data, "--max-length", 256)
    assert done.exit_code == 0, done.output
    assert "rows: 1 of 2 rows have no completion token within 256 tokens; the loss skips them" in _flat(done)
