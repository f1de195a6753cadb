"""Outputs are refused before anything is done for them; checking leaves nothing behind."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from torch import Tensor, nn

import apportion
from apportion.errors import OutputExistsError, OutputPathError, OutputWriteError
from apportion.records.files import whole_file, write_text
from apportion.records.outputs import OutputKind, check_output, check_output_folder
from apportion.report.page import write_report

KINDS: dict[OutputKind, str] = {
    "profile": "p.safetensors",
    "plan": "plan.json",
    "report": "report.html",
    "study page": "page.md",
    "study data": "page.json",
    "picture": "plan.svg",
}


@pytest.fixture
def files(tiny_model: nn.Module, tokens: Tensor, tmp_path: Path) -> Path:
    """A folder with one file of each kind."""
    profile = apportion.profile(tiny_model, [{"input_ids": tokens}])
    profile.save(tmp_path / "p.safetensors")
    apportion.plan(profile, "hellora", hot=2, rank=4).save(tmp_path / "plan.json")
    write_report(tmp_path / "plan.json", tmp_path / "report.html")
    (tmp_path / "page.md").write_text("# Study: mine\n")
    (tmp_path / "page.json").write_text('{"settings": {}, "versions": {}, "summary": {}, "runs": []}')
    (tmp_path / "plan.svg").write_text('<?xml version="1.0"?>\n<svg></svg>')
    return tmp_path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_may_replace_one_of_its_kind_alone(files: Path, kind: OutputKind) -> None:
    before = names_in(files)
    for other, name in KINDS.items():
        if other == kind:
            check_output(files / name, kind)
        else:
            with pytest.raises(
                OutputExistsError, match=f"already exists and is another kind of file.\n  expected:  {kind}"
            ):
                check_output(files / name, kind)
            check_output(files / name, kind, force=True)
    assert names_in(files) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["x", "{", "[" * 100_000, "5", "null", "\0\1\2"], ids=["x", "cut", "deep", "5", "null", "bytes"]
)
def test_a_file_of_no_kind_is_not_replaced(tmp_path: Path, kind: OutputKind, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(OutputExistsError, match="already exists"):
        check_output(tmp_path / "file", kind)


def test_an_empty_file_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").touch()
    check_output(tmp_path / "p.safetensors", "profile")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("link", ["itself", "dots", "symbolic", "hard"])
def test_an_input_is_never_replaced(files: Path, force: bool, link: str) -> None:
    source = files / "p.safetensors"
    output = files / "other"
    if link == "itself":
        output = source
    elif link == "dots":
        output = files / "new" / ".." / "p.safetensors"
    elif link == "symbolic":
        output.symlink_to(source)
    else:
        os.link(source, output)
    with pytest.raises(OutputExistsError, match="is an input, and would be overwritten by the profile"):
        check_output(output, "profile", inputs=("task:aiw", source), force=force)


def test_a_folder_that_is_read_keeps_what_is_not_replaced_by_its_like(files: Path) -> None:
    check_output(files / "report.html", "report", inputs=(files,), force=True)
    check_output(files / "new.html", "report", inputs=(files,))
    with pytest.raises(OutputExistsError, match="is an input"):
        check_output(files / "plan.json", "report", inputs=(files,), force=True)


@pytest.mark.parametrize("force", [False, True])
def test_folders_and_devices_are_no_files(tmp_path: Path, force: bool) -> None:
    with pytest.raises(OutputExistsError, match="is a folder; a file was expected"):
        check_output(tmp_path, "plan", force=force)
    with pytest.raises(OutputExistsError, match="not a regular file"):
        check_output("/dev/null", "plan", force=force)


@pytest.mark.parametrize(
    ("place", "reason"),
    [("file/plan.json", "Not a directory"), ("n" * 300 + "/plan.json", "too long"), ("n" * 256, "too long")],
    ids=["below a file", "long folder", "long name"],
)
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputPathError, match=f"is not writable(.|\n)*{reason}"):
        check_output(tmp_path / place, "plan")
    assert names_in(tmp_path) == {"file"}


@pytest.mark.parametrize(
    ("number", "expected", "message"),
    [
        (errno.EROFS, OutputPathError, "Read-only file system"),
        (errno.EACCES, OutputPathError, "Permission denied"),
        (errno.ENOSPC, OutputWriteError, "plan.json was not written: the disk is full"),
    ],
)
def test_what_the_system_says_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception], message: str
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(expected, match=message):
        check_output(tmp_path / "new" / "plan.json", "plan")
    assert names_in(tmp_path) == set()
    with pytest.raises(OutputWriteError, match=r"new.plan\.json was not written"):
        write_text(tmp_path / "new" / "plan.json", "text")


def test_checking_makes_no_folder(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "plan.json", "plan")
    check_output(tmp_path / "a" / ".." / "c" / "plan.json", "plan")
    check_output_folder(tmp_path / "a" / "b", renamed=True)
    assert names_in(tmp_path) == set()


def test_an_output_folder_lies_in_nothing_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("link").symlink_to("model")
    for output in ("model", "model/merged", "link", "link/merged", "new/../model"):
        with pytest.raises(OutputExistsError, match="is inside an input folder"):
            check_output_folder(output, inputs=("embedded", "model"))
    assert check_output_folder("models", inputs=("model", "task:aiw")) == Path("models")


def test_an_output_folder_is_empty_unless_it_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="is not empty"):
        check_output_folder(tmp_path)
    check_output_folder(tmp_path, may_hold=True)
    for may_hold in (False, True):
        with pytest.raises(OutputExistsError, match="is a file"):
            check_output_folder(tmp_path / "file", may_hold=may_hold)
        with pytest.raises(OutputPathError, match="Not a directory"):
            check_output_folder(tmp_path / "file" / "run", may_hold=may_hold)


def test_other_errors_in_a_file_stay_what_they_are(tmp_path: Path) -> None:
    for error in (ValueError("x"), SafetensorError("a tensor of an unknown type")):
        with pytest.raises(type(error)), whole_file(tmp_path / "file"):
            raise error
    with pytest.raises(OutputWriteError, match="the disk is full"), whole_file(tmp_path / "file"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert names_in(tmp_path) == set()


def test_paths_that_can_never_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "a" / "plan.json", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(OutputPathError, match=r"Too many levels|File name too long|null"):
            check_output(path, "plan")
        with pytest.raises(OutputPathError, match=r"Too many levels|File name too long|null"):
            check_output_folder(path)
    assert names_in(tmp_path) == {"a", "b"}


def test_the_longest_possible_name_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        check_output(tmp_path / name, "plan")
        write_text(tmp_path / name, "text")
    assert names_in(tmp_path) == {"x" * 255, "é" * 127}
