"""`apportion compare` from end to end: everything is there, nothing is repeated, and a kill changes no number."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from apportion.cli.main import app
from apportion.study.records import Run, Summary, Trial
from apportion.study.runner import Bench
from apportion.study.store import load_study


def _compare(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def _numbers(folder: Path) -> dict[str, dict[str, Any]]:
    """Read every run and trial without what a clock and a process's memory say."""
    found = {}
    for path in [*folder.glob("runs/*.json"), *folder.glob("tuning/*.json")]:
        record = json.loads(path.read_text())
        found[path.name] = {name: value for name, value in record.items() if name not in ("train_s", "peak_bytes")}
    return found


def test_every_run_is_recorded(finished: Path) -> None:
    study = load_study(finished)
    assert len(study.runs) == 2 * (2 * 2 + 1)
    assert len(study.trials) == 3 * 2
    base = study.bases["embedded"]
    for run in study.runs:
        assert len(run.after.items) == 8
        assert run.before == base.before[run.task]
        assert run.unrelated_after is not None
        assert run.unrelated_before == base.unrelated
        assert run.steps == 1
        assert run.tokens > 0
        assert run.peak_bytes > 10**7
        assert run.hot_set_drift is not None
        assert 0 <= run.hot_set_drift <= 1
        assert {"torch", "threads", "apportion"} <= run.versions.keys()
        plan = study.plan(run)
        if run.method == "full":
            assert plan is None
            assert run.trainable_parameters == run.spent == run.budget > 4_000_000
        else:
            assert plan is not None
            assert plan.cost.trainable_parameters == run.trainable_parameters == run.spent
            assert 0.95 * run.budget <= run.spent <= run.budget
    assert not (finished / ".work").exists() or not any((finished / ".work").iterdir())
    assert 0 < base.stability["siblings"].estimate <= 1


def test_a_rate_is_the_one_with_the_lowest_loss(finished: Path) -> None:
    study = load_study(finished)
    for run in study.runs:
        mine = [trial for trial in study.trials if trial.contender == run.contender]
        assert run.lr == min(mine, key=lambda trial: trial.loss or 9.0).lr


def test_the_summary_says_that_so_few_runs_tell_nothing(finished: Path) -> None:
    summary = load_study(finished).summary
    assert summary is not None
    assert summary.finished_runs == summary.planned_runs == 10
    assert len(summary.comparisons) == 3  # full fine-tuning is compared once
    assert not any(one.differs for one in summary.comparisons)
    assert "No verdict is possible" in summary.verdicts[0]
    assert any("full fine-tuning, at no budget" in sentence for sentence in summary.verdicts)
    assert summary.commands[0].startswith("apportion compare")


def test_finished_runs_are_not_repeated(study_file: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _numbers(finished)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Bench, "_trained", fail)
    done = _compare(study_file, "-o", finished, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["finished_runs"] == 10
    assert _numbers(finished) == before


def test_more_seeds_go_on_with_a_finished_study(study_file: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    _copy(finished, folder)
    kept = {path: path.stat().st_mtime_ns for path in [*folder.glob("runs/*.json"), *folder.glob("tuning/*.json")]}
    done = _compare(study_file, "-o", folder, "--seeds", 3, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["finished_runs"] == 15
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert load_study(folder).settings.seeds == 3


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_study_goes_on_with_the_same_numbers(
    study_file: Path, finished: Path, tmp_path: Path, jobs: int
) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-c", "from apportion.cli.main import main; main()", "compare", str(study_file)]
    command += ["-o", str(folder), "--jobs", str(jobs)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(folder.glob("runs/*.json"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # for processes that end with their parent
    kept = {path: path.stat().st_mtime_ns for path in [*folder.glob("runs/*.json"), *folder.glob("tuning/*.json")]}
    assert 3 <= len(list(folder.glob("runs/*.json"))) < 10
    done = _compare(study_file, "-o", folder, "--jobs", jobs)
    assert done.exit_code == 0, done.output
    assert _numbers(folder) == _numbers(finished)
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    whole = load_study(finished).summary
    again = load_study(folder).summary
    assert whole is not None
    assert again is not None
    assert again.model_copy(update={"commands": whole.commands}) == whole


def test_a_failed_run_does_not_stop_the_others(
    study_file: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apportion.errors import TrainingError

    original = Bench.run

    def run(self: Bench, job: Any, **options: Any) -> Run:
        if job.contender == "lora" and job.seed == 0:
            raise TrainingError("the loss became nan")
        return original(self, job, **options)

    folder = tmp_path / "out"
    _copy(finished, folder)
    for path in folder.glob("runs/*.json"):
        path.unlink()
    monkeypatch.setattr(Bench, "run", run)
    done = _compare(study_file, "-o", folder)
    assert done.exit_code == 2
    assert "2 of 10 runs failed; the others are done" in done.output
    assert "embedded/siblings/lora" in done.output
    assert len(list(folder.glob("runs/*.json"))) == 8
    done = _compare(folder)
    assert "8 of 10 runs are done: no verdict is given yet" in done.output


def test_rates_at_which_training_diverges_are_left_out(
    study_file: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Bench.trial

    def trial(self: Bench, job: Any) -> Trial:
        return original(self, job).model_copy(update={"loss": None})

    folder = tmp_path / "out"
    _copy(finished, folder)
    for path in folder.glob("tuning/*.json"):
        path.unlink()
    monkeypatch.setattr(Bench, "trial", trial)
    done = _compare(study_file, "-o", folder)
    assert done.exit_code == 2
    assert "diverged at every learning rate" in done.output


def test_a_dry_run_plans_and_trains_nothing(study_file: Path, tmp_path: Path) -> None:
    done = _compare(study_file, "-o", tmp_path / "out", "--dry-run", "--unit", "flops", "--budget", "lora:4")
    assert done.exit_code == 0, done.output
    assert "6 runs, after 6 shorter ones" in done.output
    assert "plans take" in done.output
    assert not (tmp_path / "out").exists()  # so that a changed study may take the folder


def test_the_page_holds_the_summary_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    done = _compare(finished, "--page", tmp_path / "placement.md")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "placement.md").read_text()
    data = json.loads((tmp_path / "placement.json").read_text())
    summary = Summary.model_validate(data["summary"])
    assert len(data["runs"]) == summary.finished_runs
    for sentence in summary.verdicts:
        assert sentence in text
    for cell in summary.cells:
        assert f"{cell.loss.estimate:.3f} ({cell.loss.low:.3f} to {cell.loss.high:.3f})" in text
    for one in summary.comparisons:
        assert f"{one.difference.estimate:+.3f}" in text
    for plot in ("score", "forgetting"):
        assert f"placement-{plot}.svg" in text
        assert "<svg" in (tmp_path / f"placement-{plot}.svg").read_text()
    again = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    _compare(finished, "--page", tmp_path / "placement.md")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == again


def test_a_study_of_options_alone_with_one_seed_gives_no_verdict(tmp_path: Path) -> None:
    done = _compare(
        *("--data", "siblings=task:aiw", "--method", "lora", "--method", "attention", "--budget", "62272"),
        *("--seeds", 1, "--steps", 1, "--batch-size", 4, "--trials", 1, "--eval-rows", 4, "-o", tmp_path / "out"),
        "--keep-adapters",
    )
    assert done.exit_code == 0, done.output
    assert "One seed: no verdict is given" in done.output
    adapters = sorted(path.name for path in next((tmp_path / "out" / "adapters").iterdir()).iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(adapters)


def _copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
