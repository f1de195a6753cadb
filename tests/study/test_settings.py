"""What a study file may not say, and the word that it gets back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from apportion.cli.main import app
from apportion.errors import ApportionError, ConfigurationError
from apportion.study.settings import StudySettings, check_settings, load_settings

GOOD: dict[str, Any] = {
    "name": "x",
    "tasks": {"a": "task:aiw"},
    "contenders": ["lora", {"method": "hellora", "hot": 4}, "full"],
    "budgets": ["lora:2", 100_000],
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"buget": [1]}, ["no key 'buget'", "did you mean budgets?", "study.toml"]),
        ({"training": {"stepps": 3}}, ["no key 'training.stepps'", "did you mean steps?"]),
        ({"contenders": ["lora", "helora"]}, ["no method 'helora'", "did you mean hellora?"]),
        ({"contenders": ["lora", {"method": "ful"}]}, ["no method 'ful'", "did you mean full?"]),
        (
            {"contenders": ["lora", {"method": "hellora", "hott": 4}]},
            ["contender 'hellora' has an unknown key 'hott'", "did you mean hot?"],
        ),
        ({"contenders": ["lora", {"name": "x"}]}, ["contender 'x' has no method"]),
        ({"contenders": ["lora", "lora"]}, ["two contenders have the name 'lora'"]),
        ({"contenders": ["lora"]}, ["contenders", "at least 2"]),
        (
            {"contenders": ["lora", {"method": "hellora", "rank": 3}]},
            ["has a rank, but its rank follows from the budget"],
        ),
        ({"contenders": ["lora", {"method": "uniform", "budget": "5"}]}, ["has its own budget"]),
        ({"contenders": ["lora", {"method": "cold", "lr_low": 1.0}]}, ["no learning rate from 1 to 0.02"]),
        ({"tasks": {"a": "task:aiww"}}, ["no task 'aiww'", "did you mean aiw?"]),
        ({"tasks": {"a": "rows.jsonl"}}, ["no test split", "[eval] a = ..."]),
        ({"tasks": {"a": "task:aiw:train"}}, ["no test split"]),
        ({"eval": {"b": "task:aiw"}}, ["eval names a task 'b'"]),
        ({"reference": "lorra"}, ["'lorra' is not a contender", "did you mean lora?"]),
        ({"reference": "full"}, ["full fine-tuning cannot be the reference"]),
        ({"budgets": ["lora:x"]}, ["'lora:x' is not understood", "lora:2"]),
        ({"budgets": [0]}, ["is too small"]),
        ({"seeds": 0}, ["seeds = 0 is wrong"]),
        ({"seeds": 2000}, ["tuning seed 1000 is one of the study's"]),
        ({"unit": "bytes"}, ["unit = 'bytes' is wrong"]),
        ({"profile": {"hot": "x"}}, ["hot='x' is not understood"]),
        ({"contenders": ["lora", 1.5]}, ["a contender is 1.5"]),
        ({"contenders": ["lora", {"method": ["hellora"]}]}, ["no method ['hellora']"]),
        ({"contenders": ["lora", {"method": "hellora", "options": 5}]}, ["give a method's name, or a table"]),
        ({"budgets": ["lora:²"]}, ["'lora:²' is not understood", "lora:2"]),
        ({"budgets": ["lora:" + "9" * 5000]}, ["'lora:999", "... is not understood"]),
        ({"tuning": {"high": float("inf")}}, ["tuning.high = inf is wrong"]),
    ],
)
def test_a_wrong_study_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ApportionError) as caught:
        check_settings(GOOD | changes, place="study.toml")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [b"a = " + b"[" * 5000, b"a = " + b"[" * 100 + b"]" * 100, b"seeds = " + b"9" * 5000, b'a = "\xff"', b"a ="],
    ids=["very-deep", "deep", "digits", "not-utf-8", "cut"],
)
def test_a_study_file_that_cannot_be_read_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_bytes(text)
    with pytest.raises(ConfigurationError, match=r"study\.toml is not TOML"):
        load_settings(tmp_path / "study.toml")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ApportionError, match="'budgets' is missing"):
        check_settings({name: value for name, value in GOOD.items() if name != "budgets"})


def test_settings_survive_their_json() -> None:
    settings = check_settings(GOOD, {"tuning.trials": 3})
    assert settings.tuning.trials == 3
    assert settings.reference == "lora"
    assert settings.contenders[1].options == {"hot": 4}
    assert StudySettings.model_validate_json(settings.model_dump_json()) == settings


def _output(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


def test_the_command_line_refuses_what_it_cannot_run(study_file: Path, finished: Path, tmp_path: Path) -> None:
    assert "there is no study file" in _output(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    assert "is not TOML" in _output(tmp_path / "bad.toml")
    assert "--data and --method and --budget must be given" in _output()
    assert "holds no study" in _output(tmp_path)
    assert "both given" in _output(study_file, "--data", "task:aiw")
    assert "seeds cannot be used with" in _output(finished, "--seeds", 3)


def test_another_studys_folder_is_not_touched(study_file: Path, finished: Path, tmp_path: Path) -> None:
    assert "another study. differs in: eval_rows" in _output(study_file, "-o", finished, "--eval-rows", 9)
    assert "another study. differs in: seeds" in _output(study_file, "-o", finished, "--seeds", 1)
    (tmp_path / "file").write_text("mine")
    assert "something else than a study" in _output(study_file, "-o", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_versions_are_refused(study_file: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.study.runner.__version__", "0.0.1")
    assert "started with other versions" in _output(study_file, "-o", finished)


def test_a_damaged_run_is_named(study_file: Path, finished: Path, tmp_path: Path) -> None:
    for name in ("study.json",):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "abc.json").write_text("{")
    assert "abc.json is damaged" in _output(tmp_path)


def test_a_budget_that_no_plan_meets_is_refused(study_file: Path, tmp_path: Path) -> None:
    assert "too small for lora: at rank 1 it takes 62,272" in _output(
        study_file, "-o", tmp_path / "a", "--budget", 1000, "--dry-run"
    )
    assert "the nearest plan takes" in _output(study_file, "-o", tmp_path / "b", "--budget", 10**9, "--dry-run")
    assert "two budgets are the same" in _output(
        study_file, "-o", tmp_path / "c", "--budget", 62272, "--budget", "lora:1", "--dry-run"
    )


def test_too_few_rows_to_choose_rates_are_refused(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    (tmp_path / "study.toml").write_text(
        f'contenders = ["lora", "attention"]\nbudgets = ["lora:1"]\n[tasks]\nmine = "{rows}"\n[eval]\nmine = "{rows}"\n'
    )
    assert "have 4 rows, and 128 of them" in _output(tmp_path / "study.toml", "-o", tmp_path / "out")
