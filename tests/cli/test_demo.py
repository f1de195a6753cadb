"""The demonstration, with hardly any training: everything is there, and a second call repeats nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apportion import demo
from apportion.cli.demo import Arguments, comparison_table, run
from apportion.cli.terminal import Terminal
from apportion.demo import METHODS, DemoSettings, markdown_table, run_demo
from apportion.errors import OutputExistsError
from apportion.records.plan import load_plan

TINY = DemoSettings(profile_rows=8, eval_rows=4, steps=1, batch_size=4, rank=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "out"
    run_demo(path, TINY)
    return path


def test_every_method_is_scored_on_every_task(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert [(r["task"], r["method"]) for r in results["runs"]] == [(t, m) for t in TINY.tasks for m in METHODS]
    for r in results["runs"]:
        assert 0 <= r["after"]["exact_match"] <= 1
        assert r["training"]["steps"] == 1
        assert r["unrelated_after"]["loss"] > 0
        assert load_plan(folder / r["task"] / r["method"] / "plan.json").cost.as_dict() == r["cost"]
        assert (folder / r["task"] / r["method"] / "adapter" / "adapter_config.json").is_file()
    assert (folder / "results.md").read_text() == markdown_table(results)
    budgets = {
        r["cost"]["trainable_parameters"] for r in results["runs"] if r["method"] in ("hellora", "random", "cold")
    }
    assert len(budgets) == 1


def test_finished_runs_are_not_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "results.json").read_text()

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(demo, "train", fail)
    run_demo(folder, TINY)
    assert (folder / "results.json").read_text() == before


def test_the_tables_show_every_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.cli.demo.QUICK", TINY)
    console = Terminal(record=True, force_terminal=False)
    result = run(console, Arguments(output=folder, quick=True))
    text = console.export_text()
    assert len(result["runs"]) == 10
    for word in (*METHODS, *TINY.tasks, "●", "match", "unrelated"):
        assert word in text
    assert comparison_table(run_demo(folder, TINY)).row_count == 12


def test_another_demonstration_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(OutputExistsError, match="other settings"):
        run_demo(folder, DemoSettings(steps=2))
