"""Checkpoints and adapters are whole and finite, or a run does not go on from them."""

from __future__ import annotations

import copy
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
import torch
from safetensors.torch import load_file

import apportion
from apportion.data.sources import read_rows
from apportion.errors import ApportionWarning, ConfigurationError, FolderInUseError, TrainingError
from apportion.records.locks import locked
from apportion.records.plan import Plan
from apportion.signals import raising_terminated
from apportion.training.checkpoints import MANIFEST, last_checkpoint, seal_checkpoint
from apportion.training.interrupts import StopOnSignal
from apportion.training.settings import TrainSettings
from apportion.training.sft import train

ROWS = read_rows("task:syllogism", num_rows=16)
SETTINGS = TrainSettings(steps=4, batch_size=4, lr=1e-3, save_every=1, dropout=0.1)


# The command line in a process that ignores no signal: a shell's background processes do.
LISTENING = """
import signal
from apportion.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
main()
"""


@pytest.fixture(scope="module")
def plan(embedded_model: tuple[Any, Any]) -> Plan:
    model, tokenizer = embedded_model
    profile = apportion.profile(model, [dict(tokenizer([ROWS[0]["prompt"]], return_tensors="pt"))])
    return apportion.plan(profile, "hellora", hot=2, rank=2)


@pytest.fixture(scope="module")
def finished(embedded_model: tuple[Any, Any], plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after the last step, before its adapter was saved."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    _train(embedded_model, plan, folder)
    for name in ("adapter_config.json", "adapter_model.safetensors", "training.json"):
        (folder / name).rename(folder.parent / name)
    return folder


def _train(embedded_model: tuple[Any, Any], plan: Plan, folder: Path, **kwargs: Any) -> Any:
    model, tokenizer = embedded_model
    settings = kwargs.pop("settings", SETTINGS)
    return train(copy.deepcopy(model), tokenizer, plan, ROWS, folder, settings, progress=False, **kwargs)


def _resume(embedded_model: tuple[Any, Any], plan: Plan, finished: Path, folder: Path, newest: int = 3) -> Path:
    """Copy the run as it was after some of its steps, and give its newest checkpoint."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    for path in (folder / "checkpoints").glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > newest:
            shutil.rmtree(path)
    return folder / "checkpoints" / f"checkpoint-{newest}"


def test_every_checkpoint_lists_its_files(finished: Path) -> None:
    names = sorted(path.name for path in (finished / "checkpoints").glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-4"]
    for name in names:
        folder = finished / "checkpoints" / name
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        assert set(listed) == {path.name for path in folder.iterdir()} - {MANIFEST}
        assert {"rng_state.pth", "optimizer.pt", "adapter_model.safetensors"} <= set(listed)


def _missing(checkpoint: Path) -> str:
    (checkpoint / "rng_state.pth").unlink()
    return "rng_state.pth is missing"


def _edited_state(change: dict[str, int]) -> Callable[[Path], str]:
    def edit(checkpoint: Path) -> str:
        file = checkpoint / "trainer_state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        return "trainer_state.json was changed"

    return edit


def _flipped(checkpoint: Path) -> str:
    file = checkpoint / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return "adapter_model.safetensors was changed"


def _cut(checkpoint: Path) -> str:
    file = checkpoint / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:100])
    return "optimizer.pt was changed"


def _damaged_list(checkpoint: Path) -> str:
    (checkpoint / MANIFEST).write_text("[" * 100_000)
    return f"{MANIFEST} was changed"


@pytest.mark.parametrize(
    "damage",
    [
        _missing,
        _edited_state({"max_steps": 2}),
        _edited_state({"global_step": 10**9}),
        _edited_state({"global_step": -1}),
        _flipped,
        _cut,
        _damaged_list,
    ],
)
def test_a_checkpoint_that_is_not_as_it_was_written_is_refused(
    damage: Callable[[Path], str], embedded_model: tuple[Any, Any], plan: Plan, finished: Path, tmp_path: Path
) -> None:
    checkpoint = _resume(embedded_model, plan, finished, tmp_path)
    message = damage(checkpoint)
    with pytest.raises(TrainingError, match=rf"cannot resume from .*checkpoint-3.*\n  found:  {message}"):
        _train(embedded_model, plan, tmp_path, resume=True)
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_run_goes_on_from_the_checkpoint_before_one_that_was_not_finished(
    embedded_model: tuple[Any, Any], plan: Plan, finished: Path, tmp_path: Path
) -> None:
    checkpoint = _resume(embedded_model, plan, finished, tmp_path, newest=4)
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "optimizer.pt").write_bytes(b"")
    (tmp_path / "checkpoints" / "checkpoint-best").mkdir()
    with pytest.warns(
        ApportionWarning, match="checkpoint-4 was incomplete and was removed; the run resumes from checkp.*3"
    ):
        assert _train(embedded_model, plan, tmp_path, resume=True).steps == 4
    expected = load_file(finished.parent / "adapter_model.safetensors")
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_run_without_a_finished_checkpoint_begins_anew_and_says_so(
    embedded_model: tuple[Any, Any], plan: Plan, finished: Path, tmp_path: Path
) -> None:
    for checkpoint in (_resume(embedded_model, plan, finished, tmp_path) / "..").resolve().glob("checkpoint-*"):
        (checkpoint / MANIFEST).unlink()
    with pytest.warns(
        ApportionWarning, match="checkpoint-3 was incomplete and was removed; the run starts from the beginning"
    ):
        assert _train(embedded_model, plan, tmp_path, resume=True).steps == 4


@pytest.mark.parametrize(
    "content", ["", "{", "5", "{}", '{"identity": 3}', "[" * 100_000, '{"identity": ' + "9" * 5000]
)
def test_a_damaged_note_of_the_run_is_refused(
    content: str, embedded_model: tuple[Any, Any], plan: Plan, finished: Path, tmp_path: Path
) -> None:
    _resume(embedded_model, plan, finished, tmp_path)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"run\.json is damaged"):
        _train(embedded_model, plan, tmp_path, resume=True)


@pytest.mark.parametrize("steps", [2, 6])
def test_weights_that_are_not_finite_are_never_written(
    steps: int, embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path
) -> None:
    settings = TrainSettings(steps=steps, batch_size=4, lr=3e38, save_every=1, warmup_frac=0.0)
    with pytest.raises(TrainingError, match=r"(?s)(not finite|became nan).*lower the learning rate"):
        _train(embedded_model, plan, tmp_path / "run", settings=settings)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())


def test_a_run_of_an_earlier_version_is_not_begun_anew(
    embedded_model: tuple[Any, Any], plan: Plan, finished: Path, tmp_path: Path
) -> None:
    checkpoint = _resume(embedded_model, plan, finished, tmp_path)
    (checkpoint / MANIFEST).unlink()
    note = json.loads((tmp_path / "run.json").read_text())
    del note["identity"]["plan_schema_1"]
    (tmp_path / "run.json").write_text(json.dumps(note))
    with pytest.raises(ConfigurationError, match="started by an earlier version"):
        _train(embedded_model, plan, tmp_path, resume=True)
    assert (checkpoint / "optimizer.pt").is_file()


def test_two_runs_never_share_a_folder(embedded_model: tuple[Any, Any], plan: Plan, tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(FolderInUseError, match=f"process {os.getpid()} on host"):
        _train(embedded_model, plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_of_two_commands_started_together_one_trains(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-m", "apportion", "train", str(tmp_path / "plan.json"), "--data", "task:syllogism"]
    command += [
        "--samples",
        "8",
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--model",
        "embedded",
        "-o",
        str(tmp_path / "run"),
    ]
    runs = [
        subprocess.Popen([*command, "--seed", seed], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for seed in ("0", "7")
    ]
    outputs = [run.communicate(timeout=300)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], outputs
    seed = (0, 7)[[run.returncode for run in runs].index(0)]
    refused = outputs[[run.returncode for run in runs].index(2)]
    assert "in use by another process" in refused or "is not empty" in refused
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["seed"] == seed
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["init_seed"] == seed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 1)])
def test_a_signal_leaves_a_checkpoint_and_its_exit_code(
    number: signal.Signals, code: int, plan: Plan, tmp_path: Path
) -> None:
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-c", LISTENING, "train", str(tmp_path / "plan.json"), "--data", "task:syllogism"]
    command += ["--samples", "8", "--steps", "5000", "--model", "embedded", "-o", str(tmp_path / "run"), "--json"]
    command += ["--batch-size", "4", "--save-every", "1000000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log, deadline = "", time.monotonic() + 200
    while "/5000" not in log or " 0/5000" in log[-200:]:  # the bar says that steps are being done
        assert process.poll() is None, log
        assert time.monotonic() < deadline, log
        log += process.stderr.read(40)
    process.send_signal(number)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == code, rest
    assert "with a checkpoint; run the same command with --resume to continue" in rest
    assert last_checkpoint(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ignored_signals_stay_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        stop = StopOnSignal()
        with raising_terminated(), stop.listening():
            os.kill(os.getpid(), number)
        assert stop.signal == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_sealing_names_files_in_subfolders(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "part").mkdir(parents=True)
    (checkpoint / "part" / "data").write_text("1")
    seal_checkpoint(checkpoint)
    assert last_checkpoint(tmp_path) == checkpoint
    (checkpoint / "part" / "data").write_text("2")
    with pytest.raises(TrainingError, match="part/data was changed"):
        last_checkpoint(tmp_path)


def test_a_list_from_which_a_file_was_struck_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    for name in ("optimizer.pt", "rng_state.pth"):
        (checkpoint / name).write_text(name)
    seal_checkpoint(checkpoint)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["files"]["rng_state.pth"]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    (checkpoint / "rng_state.pth").unlink()
    with pytest.raises(TrainingError, match=f"{MANIFEST} was changed"):
        last_checkpoint(tmp_path)
