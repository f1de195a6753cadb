"""A study's folder holds one study's records, whatever their names and whoever writes to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import apportion
from apportion.cli.main import app
from apportion.loading import load_model
from apportion.study.runner import Bench
from apportion.study.sitting import Sitting
from apportion.study.store import load_study

COMMAND = [sys.executable, "-c", "from apportion.cli.main import main; main()", "compare"]
SMALL = """
budgets = ["lora:1"]
seeds = 1
eval_rows = 4
resamples = 100
[training]
steps = 1
batch_size = 4
[tuning]
trials = 1
rows = 2
each = "contender"
[profile]
rows = 4
resamples = 5
"""


def _compare(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def _refusal(*arguments: object) -> str:
    done = _compare(*arguments)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


def _write_rows(path: Path, first: int, num_rows: int = 6) -> None:
    """Write sums that start at a number."""
    numbers = range(first, first + num_rows)
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}", "answer": str(n + 1)} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished_sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of files and a model's folder, with everything beside it."""
    place = tmp_path_factory.mktemp("sums")
    model, tokenizer = load_model("embedded")
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    for number, name in enumerate(("train", "test", "other")):
        _write_rows(place / f"{name}.jsonl", 10 * number)
    (place / "study.toml").write_text(
        'models = ["model"]\nunrelated = "other.jsonl"\ncontenders = ["lora", "attention"]\n'
        + SMALL
        + '[tasks]\nsums = "train.jsonl"\n[eval]\nsums = "test.jsonl"\n'
    )
    before = Path.cwd()
    os.chdir(place)
    try:
        done = _compare("study.toml", "-o", "out")
    finally:
        os.chdir(before)
    assert done.exit_code == 0, done.output
    return place


@pytest.fixture
def sums(finished_sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished study, in the working directory."""
    shutil.copytree(finished_sums, tmp_path / "sums", copy_function=os.link)
    for path in (tmp_path / "sums").rglob("*.json*"):  # small files that a test may edit in place
        text = path.read_bytes()
        path.unlink()
        path.write_bytes(text)
    monkeypatch.chdir(tmp_path / "sums")
    return tmp_path / "sums"


def test_names_that_differ_in_signs_or_joints_share_no_file(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(
        'contenders = [{name = "hot+", method = "hellora", hot = 4}, {name = "hot-", method = "cold", hot = 4},\n'
        '              {name = "b-c", method = "attention"}, {name = "c", method = "lora"}]\n'
        + SMALL
        + '[tasks]\na = "task:aiw"\na-b = "task:gcd"\n'
    )
    done = _compare(tmp_path / "study.toml", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    study = load_study(tmp_path / "out")
    assert len(study.runs) == 2 * 4
    profile = study.profile("embedded")
    for run in study.runs:
        plan = study.plan(run)
        assert plan is not None
        assert plan.method == run.method == study.settings.contender(run.contender).method
        assert plan.profile_digest == profile.of_task(run.task).digest


def test_models_whose_names_differ_in_signs_have_their_own_profiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model("embedded")
    for name in ("a/b", "a-b"):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        model.get_input_embeddings().weight.data.mul_(1.5)
    Path("study.toml").write_text(
        'models = ["a/b", "a-b"]\ncontenders = ["lora", "attention"]\n' + SMALL + '[tasks]\na = "task:aiw"\n'
    )
    done = _compare("study.toml", "-o", "out")
    assert done.exit_code == 0, done.output
    study = load_study("out")
    profiles = {name: study.profile(name) for name in ("a/b", "a-b")}
    assert {name: profile.provenance["model"] for name, profile in profiles.items()} == {"a/b": "a/b", "a-b": "a-b"}
    assert study.bases["a/b"].before["a"].loss != study.bases["a-b"].before["a"].loss
    assert study.bases["a/b"].weights != study.bases["a-b"].weights
    for run in study.runs:
        plan = study.plan(run)
        assert plan is not None
        assert plan.base_model == run.model


def _scale_weights(place: Path) -> None:
    model, _ = load_model(place / "model")
    model.get_input_embeddings().weight.data.mul_(1.5)
    (place / "model" / "model.safetensors").unlink()  # the original has another link
    model.save_pretrained(place / "model")


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda place: _write_rows(place / "test.jsonl", 50), "the held-out rows of task 'sums' (test.jsonl)"),
        (lambda place: _write_rows(place / "train.jsonl", 50), "the training rows of task 'sums' (train.jsonl)"),
        (lambda place: _write_rows(place / "other.jsonl", 50), "the unrelated rows (other.jsonl)"),
        (_scale_weights, "the weights of model 'model'"),
    ],
)
def test_results_of_other_rows_or_weights_are_refused_before_anything_is_trained(
    sums: Path, edit: Callable[[Path], None], named: str
) -> None:
    edit(sums)
    before = _files(sums / "out")
    for options in ([], ["--seeds", 2], ["--dry-run"]):
        refusal = _refusal("study.toml", "-o", "out", *options)
        assert "holds the results of other data or models" in refusal
        assert named in refusal
        assert _files(sums / "out") == before


def test_rows_that_a_study_does_not_read_may_change(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (sums / "test.jsonl").open("a") as file:
        file.write('{"prompt": "more", "completion": " rows"}\n')
    monkeypatch.setattr(Bench, "_trained", None)
    done = _compare("study.toml", "-o", "out")
    assert done.exit_code == 0, done.output


def test_a_process_of_the_pool_refuses_rows_that_were_edited_meanwhile(
    sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apportion.study.executors import processes

    settings = load_study("out").settings
    _write_rows(sums / "test.jsonl", 50)
    with pytest.raises(apportion.ApportionError, match="held-out rows of task 'sums'"):
        processes._child_bench("out", settings.model_dump_json(), Sitting(), "model")


def test_records_that_are_not_this_studys_are_left_out_and_counted(sums: Path) -> None:
    whole = load_study("out").summary
    for kind in ("runs", "tuning"):
        path = next((sums / "out" / kind).glob("*.json"))
        record = json.loads(path.read_text())
        record["key"] = "0123456789abcdef"
        (sums / "out" / kind / "0123456789abcdef.json").write_text(json.dumps(record))
    done = _compare("out")
    assert done.exit_code == 0, done.output
    assert "2 records of other data, plans or settings were left out" in done.output
    study = load_study("out")
    assert study.num_left_out == 2
    assert len(study.runs) == 2
    assert study.summary == whole
    assert "2 records of other data" in _compare("study.toml", "-o", "out").output
    assert CliRunner().invoke(app, ["report", "out", "-o", "report.html"]).exit_code == 0
    assert "2 records with other data, plans or settings skipped" in Path("report.html").read_text()


def test_a_summary_of_other_settings_is_not_shown(sums: Path) -> None:
    path = sums / "out" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": "other"}))
    assert load_study("out").summary is None


def test_another_plan_in_the_place_of_a_runs_plan_is_refused(sums: Path) -> None:
    first, second = sorted((sums / "out" / "plans").glob("*.json"))[:2]
    shutil.copy(second, first)
    for arguments in (["compare", "study.toml", "-o", "out"], ["report", "out", "-o", "report.html"]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2, done.output
        assert f"out/plans/{first.name} holds another plan" in " ".join(done.output.split())


def test_a_profile_or_a_base_of_other_names_is_refused(sums: Path) -> None:
    base = next((sums / "out" / "profiles").glob("*.json"))
    record = json.loads(base.read_text())
    for changes, found in (
        ({"model": "other"}, "the model 'other'"),
        ({"weights": "0"}, "other weights of 'model'"),
        ({"before": {"x": record["before"]["sums"]}}, "the tasks x, sums"),
    ):
        base.write_text(json.dumps(record | changes))
        refusal = _refusal("out")
        assert f"{base.relative_to(sums)} does not belong to this study" in refusal
        assert found in refusal


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"5", b"null", b'{"seed": ' + b"9" * 5000 + b"}"],
    ids=["not-utf-8", "nested-lists", "nested-objects", "number", "null", "long-number"],
)
@pytest.mark.parametrize("kind", ["runs", "tuning", "profiles", "study.json", "summary.json"])
def test_an_unreadable_file_gets_one_error_that_names_it(sums: Path, kind: str, text: bytes) -> None:
    path = sums / "out" / kind
    path = next(path.glob("*.json")) if path.is_dir() else path
    path.write_bytes(text)
    refusal = _refusal("out")
    assert f"{path.relative_to(sums)} is damaged" in refusal


@pytest.mark.parametrize("kind", ["runs", "tuning"])
@pytest.mark.parametrize("name", ["model", "task", "contender"])
def test_a_record_of_an_unknown_name_gets_one_error_that_names_it(sums: Path, kind: str, name: str) -> None:
    path = next((sums / "out" / kind).glob("*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: "x"}))
    refusal = _refusal("out")
    assert f"{path.relative_to(sums)} does not belong to this study" in refusal
    assert f"the {name} 'x', which the study does not have" in refusal


def test_a_record_under_another_name_or_with_an_impossible_rate_is_refused(sums: Path) -> None:
    path = next((sums / "out" / "tuning").glob("*.json"))
    record = path.read_text()
    path.rename(path.with_name("abc.json"))
    assert "abc.json does not belong to this study" in _refusal("out")
    path.with_name("abc.json").unlink()
    path.write_text(json.dumps(json.loads(record) | {"lr": float("nan")}))
    assert f"{path.name} is damaged" in _refusal("out")


def test_a_failed_start_leaves_nothing_behind(sums: Path) -> None:
    _write_rows(sums / "train.jsonl", 0, num_rows=2)
    assert "have 2 rows, and 2 of them" in _refusal("study.toml", "-o", "new")
    assert not (sums / "new").exists()


def test_one_of_two_processes_works_and_the_other_is_refused(study_file: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = [*COMMAND, str(study_file), "-o", str(folder)]
    first = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    try:
        deadline = time.monotonic() + 300
        while not list(folder.glob("tuning/*.json")):
            assert first.poll() is None, first.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)  # so that it cannot end before the other has started
        before = _files(folder)
        second = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert second.returncode == 2, second.stderr
        refusals = [" ".join(second.stderr.split())]
        refusals += [_refusal(study_file, "-o", folder, "--dry-run"), _refusal(folder)]
        for refusal in refusals:
            assert f"{folder} is in use by another process" in refusal
            assert f"process {first.pid} on host {os.uname().nodename}" in refusal
        assert _files(folder) == before
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=300) == 0
    finally:
        first.kill()
        first.wait()
        first.stderr.close()
    scores = [{run.key: run.after for run in load_study(place).runs} for place in (folder, finished)]
    assert scores[0] == scores[1]
    assert not any(path.name.startswith(".lock") for path in folder.iterdir())
