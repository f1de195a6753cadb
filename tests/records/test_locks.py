"""A locked folder has one writer, and a process that dies leaves none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from apportion.errors import FolderInUseError
from apportion.records.locks import locked
from apportion.records.outputs import require_empty

HOLD = """
import sys, time
from apportion.records.locks import locked

with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=f"process {holder.pid} on host {os.uname().nodename}"):
            locked(tmp_path / "run").__enter__()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with locked(tmp_path / "run"):  # the system released what the killed process held
        require_empty(tmp_path / "run")


def test_an_unused_folder_is_gone_again_and_a_used_one_holds_no_lock_file(tmp_path):
    with locked(tmp_path / "unused"):
        pass
    assert not (tmp_path / "unused").exists()
    with locked(tmp_path / "used"):
        (tmp_path / "used" / "result").write_text("1")
    assert [entry.name for entry in (tmp_path / "used").iterdir()] == ["result"]


def test_a_folder_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 / 0
    with locked(tmp_path):
        pass
