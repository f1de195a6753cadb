"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from apportion.errors import OutputExistsError
from apportion.records.files import whole_file, write_text
from apportion.records.outputs import require_empty


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "text")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "text"


def test_only_empty_folders_are_taken(tmp_path: Path) -> None:
    assert require_empty(tmp_path) == tmp_path
    assert require_empty(tmp_path / "new") == tmp_path / "new"
    for name in "abcd":
        write_text(tmp_path / name, "x")
    with pytest.raises(OutputExistsError, match="found:  a, b, c and 1 more"):
        require_empty(tmp_path)
    with pytest.raises(OutputExistsError, match="is a file"):
        require_empty(tmp_path / "a")
