"""What killed writers leave behind is removed by the next one, and nothing of a living process is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from apportion.records.files import whole_file, write_text
from apportion.records.outputs import require_empty

WRITER = """
import sys
from pathlib import Path
from apportion.records.temporary import temporary_folder
with temporary_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def _start_writer(folder: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def _kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "plan[1].json"
    living = _start_writer(tmp_path, path.name)
    dead = _start_writer(tmp_path, path.name)
    assert len(list(tmp_path.iterdir())) == 2
    _kill(dead)
    write_text(path, "whole")
    assert path.read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2, "the living process's folder was removed, or the other's was not"
    _kill(living)
    write_text(path, "again")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_leftovers_do_not_make_an_output_folder_full(tmp_path: Path) -> None:
    _kill(_start_writer(tmp_path, "adapter"))
    assert list(tmp_path.iterdir())
    require_empty(tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_that_only_look_alike_stay(tmp_path: Path) -> None:
    names = [".a.json.12345678.writing.txt", ".a.json.writing", "a.json.12345678.writing", ".a.json.12345678.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".a.json.12345678.writing").write_text("a file, and no folder")
    write_text(tmp_path / "a.json", "text")
    assert len(list(tmp_path.iterdir())) == len(names) + 2


def test_temporary_files_of_safetensors_are_inside_the_temporary_folder(tmp_path: Path) -> None:
    with whole_file(tmp_path / "p.safetensors") as temporary:
        save_file({"a": np.zeros(3)}, temporary)
        assert [entry.name for entry in tmp_path.iterdir()] == [temporary.parent.name]
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.safetensors"]
