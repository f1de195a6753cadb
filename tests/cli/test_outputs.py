"""The command line refuses outputs before it reads, measures or loads, and loses nothing that was measured."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import OlmoeModel
from typer.testing import CliRunner, Result

import apportion
from apportion.cli.main import app
from apportion.records.profile import Profile

Run = Callable[..., Result]
DATA = ("--data", "task:aiw", "--samples", 2)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(embedded_model: tuple[nn.Module, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, a profile, a plan, a page, an adapter and a text."""
    folder = tmp_path_factory.mktemp("made")
    model, tokenizer = embedded_model
    batch = tokenizer(["Calculate 5 - 3."], return_tensors="pt")
    profile = apportion.profile(model, [batch], provenance={"model": "embedded"})
    profile.save(folder / "p.safetensors")
    plan = apportion.plan(profile, "lora", targets="attention", rank=2)
    plan.save(folder / "plan.json")
    fresh, _ = apportion.embedded()
    apportion.apply(fresh, plan).save_pretrained(folder / "adapter")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "text.txt").write_text("a text")
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Path:
    """Those files in the test's own folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a model is loaded."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    for command in ("profile", "train", "merge", "combine"):
        monkeypatch.setattr(f"apportion.cli.{command}.load_model", refuse)
    monkeypatch.setattr("apportion.demo.embedded", refuse)


def tree(folder: Path) -> dict[Path, bytes | None]:
    """Read all files below a folder; folders count too."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_refused(done: Result, message: str) -> None:
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


REFUSED = {
    "profile onto its data": (["profile", "embedded", "--data", "rows.jsonl", "-o", "rows.jsonl"], "is an input"),
    "profile onto a text": (["profile", "embedded", *DATA, "-o", "text.txt"], "already exists"),
    "profile onto a folder": (["profile", "embedded", *DATA, "-o", "adapter"], "is a folder"),
    "profile below a file": (["profile", "embedded", *DATA, "-o", "text.txt/p.safetensors"], "Not a directory"),
    "profile into a model": (["profile", "adapter", *DATA, "-o", "adapter/adapter_config.json"], "is an input"),
    "plan onto its profile": (["plan", "p.safetensors", "-o", "p.safetensors"], "is an input"),
    "plan onto a text": (["plan", "p.safetensors", "-o", "text.txt"], "already exists"),
    "plan below a file": (["plan", "p.safetensors", "-o", "text.txt/plan.json"], "Not a directory"),
    "picture onto its profile": (
        ["plan", "p.safetensors", "-o", "new.json", "--picture", "p.safetensors"],
        "is an input",
    ),
    "picture onto a text": (["plan", "p.safetensors", "-o", "new.json", "--picture", "text.txt"], "already exists"),
    "picture onto the plan": (["plan", "p.safetensors", "-o", "new", "--picture", "new"], "would both be written"),
    "page onto its plan": (["report", "plan.json", "-o", "plan.json"], "is an input"),
    "page onto the plan's profile": (
        ["report", "plan.json", "--profile", "p.safetensors", "-o", "p.safetensors"],
        "is an input",
    ),
    "page onto a text": (["report", "plan.json", "-o", "text.txt"], "already exists"),
    "page of a study onto its data": (
        ["compare", "--data", "rows.jsonl", "--method", "lora", "--budget", "lora:1", "--page", "rows.jsonl"],
        "is an input",
    ),
    "page of a study onto a text": (
        ["compare", *DATA[:2], "--method", "lora", "--budget", "lora:1", "--page", "text.txt"],
        "already exists",
    ),
    "train into a file": (["train", "plan.json", *DATA, "-o", "text.txt"], "is a file"),
    "train below a file": (["train", "plan.json", *DATA, "-o", "text.txt/run"], "Not a directory"),
    "train into its model": (
        ["train", "plan.json", *DATA, "--model", "adapter", "-o", "adapter/run"],
        "is inside an input folder",
    ),
    "train onto what it is on top of": (
        ["train", "plan.json", *DATA, "--on-top-of", "adapter", "-o", "adapter"],
        "is inside an input folder",
    ),
    "merge into its adapter": (["merge", "adapter", "-o", "adapter"], "is inside an input folder"),
    "merge inside its adapter": (["merge", "adapter", "-o", "adapter/merged"], "is inside an input folder"),
    "merge into a file": (["merge", "adapter", "-o", "text.txt"], "is a file"),
    "merge below a file": (["merge", "adapter", "-o", "text.txt/merged"], "Not a directory"),
    "export into its adapter": (["export", "adapter", "-o", "adapter"], "is inside an input folder"),
    "export below a file": (["export", "adapter", "-o", "text.txt/plain"], "Not a directory"),
    "combine into an adapter": (["combine", "adapter", "adapter", "-o", "adapter/both"], "is inside an input folder"),
    "combine below a file": (["combine", "adapter", "adapter", "-o", "text.txt/both"], "Not a directory"),
    "demo into a file": (["demo", "-o", "text.txt"], "is a file"),
    "demo below a file": (["demo", "-o", "text.txt/demo"], "Not a directory"),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_output_is_refused_before_anything_is_loaded(run: Run, files: Path, name: str) -> None:
    arguments, message = REFUSED[name]
    before = tree(files)
    check_refused(run(*arguments), message)
    assert tree(files) == before


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", [name for name, (_, message) in REFUSED.items() if message == "is an input"])
def test_force_replaces_no_input(run: Run, files: Path, name: str) -> None:
    before = tree(files)
    check_refused(run(*REFUSED[name][0], "--force"), "is an input")
    assert tree(files) == before


def test_force_replaces_another_file(run: Run, files: Path) -> None:
    for name in ("new.json", "new.svg", "new.html", "new.safetensors"):
        (files / name).write_text("a text")
    done = run("plan", "p.safetensors", "--hot", 4, "--rank", 4, "-o", "new.json", "--picture", "new.svg", "--force")
    assert done.exit_code == 0, done.output
    assert run("report", "new.json", "-o", "new.html", "--force").exit_code == 0
    assert run("profile", "embedded", *DATA, "-o", "new.safetensors", "--force").exit_code == 0
    assert apportion.load_plan("new.json").rank == 4
    assert apportion.load_profile("new.safetensors").tasks == ("aiw",)
    assert "<svg" in Path("new.svg").read_text()
    assert "<!doctype html>" in Path("new.html").read_text()


def test_outputs_of_one_kind_replace_each_other(run: Run, files: Path) -> None:
    for rank in (2, 4):
        command = ("plan", "p.safetensors", "--hot", 4, "--rank", rank, "-o", "plan.json", "--picture", "plan.svg")
        assert run(*command).exit_code == 0
        assert apportion.load_plan("plan.json").rank == rank
        assert run("report", "plan.json", "-o", "report.html").exit_code == 0
    assert run("profile", "embedded", *DATA, "-o", "p.safetensors").exit_code == 0


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_what_was_measured_outlives_an_output_that_cannot_be_saved(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save, forward = Profile.save, OlmoeModel.forward
    failures, passes = [OSError(number, os.strerror(number), "p.safetensors")], []

    def fail_once(profile: Profile, path: Path) -> None:
        if failures:
            raise failures.pop()
        save(profile, path)

    def count(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(Profile, "save", fail_once)
    monkeypatch.setattr(OlmoeModel, "forward", count)
    first = run("profile", "embedded", *DATA, "-o", "p.safetensors")
    assert first.exit_code == 1
    assert "error: p.safetensors was not written" in first.stderr
    assert os.strerror(number) in first.stderr
    assert "kept:   the measurements, in p.safetensors.partial" in first.stderr
    assert "Traceback" not in first.output
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors.partial"]
    assert passes
    passes.clear()
    second = run("profile", "embedded", *DATA, "-o", "p.safetensors")
    assert second.exit_code == 0, second.output
    assert not passes
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    counted = apportion.load_profile("p.safetensors").counts["aiw"]
    run("profile", "embedded", *DATA, "-o", "q.safetensors")
    assert passes
    assert torch.equal(apportion.load_profile("q.safetensors").counts["aiw"], counted)


@pytest.mark.parametrize(("number", "said"), [(errno.EROFS, "Read-only file system"), (errno.ENOSPC, "disk is full")])
@pytest.mark.parametrize("command", ["plan", "report"])
def test_an_output_that_fails_late_gets_one_message_with_its_name(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str, command: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    before = tree(files)
    monkeypatch.setattr(Path, "replace", fail)
    source, output = {"plan": ("p.safetensors", "new.json"), "report": ("plan.json", "new.html")}[command]
    done = run(command, source, "-o", output)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {output} was not written")
    assert said in done.stderr
    assert "Traceback" not in done.output
    assert tree(files) == before
