"""Pickles in the place of any file that a resumed run or `load` reads: none of them runs."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

import apportion
from apportion.training.checkpoints import last_checkpoint, seal_checkpoint
from faults.kills import Writer, forked, wait
from faults.writers import tiny_training
from tiny_models import build_tiny

PICKLED = {".pt", ".pth", ".bin", ".safetensors"}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.canary),)


def payloads(canary: Path) -> Iterator[bytes]:
    """A bare pickle, one as PyTorch writes it, and one as PyTorch wrote it before."""
    yield pickle.dumps(Payload(canary))
    for zipped in (True, False):
        written = io.BytesIO()
        torch.save({"state": Payload(canary)}, written, _use_new_zipfile_serialization=zipped)
        yield written.getvalue()


def resumed_with_pickles(folder: Path) -> Iterator[dict[str, Any]]:
    """Resume a killed run with a pickle in the place of every file in turn, the checkpoint's list sealed anew.

    Args:
        folder: An empty folder.

    Yields:
        What became of each.
    """
    writer, source, canary = tiny_training(), folder / "killed", folder / "canary"
    checkpoint = _killed(writer, source)
    names = {path.relative_to(source) for path in checkpoint.rglob("*") if path.is_file()}
    added = {checkpoint.relative_to(source) / name for name in ("adapter_model.bin", "pytorch_model.bin")}
    for name in sorted(names | added | {Path("run/run.json")}):
        for number, payload in enumerate(payloads(canary)):
            if number and name.suffix not in PICKLED:
                break
            place = folder / "resumed"
            shutil.copytree(source, place)
            (place / name).write_bytes(payload)
            if name.name != "manifest.json":
                seal_checkpoint(place / checkpoint.relative_to(source))
            code = wait(forked(partial(writer.write, place)))
            yield _outcome("pickle: resume", f"{name}, {number}", canary, ended=code is not None)
            shutil.rmtree(place)


def loaded_with_pickles(folder: Path) -> Iterator[dict[str, Any]]:
    """Load an adapter with a pickle in the place of every file in turn.

    Args:
        folder: An empty folder.

    Yields:
        What became of each.
    """
    model, canary = build_tiny("olmoe"), folder / "canary"
    profile = apportion.profile(model, [{"input_ids": torch.arange(3, 63).reshape(5, 12)}])
    for method in ("hellora", "hellori"):
        source = folder / method
        apportion.apply(build_tiny("olmoe"), apportion.plan(profile, method, hot=2, rank=2)).save_pretrained(source)
        for name in (*sorted(path.name for path in source.iterdir()), "adapter_model.bin"):
            for number, payload in enumerate(payloads(canary)):
                place = folder / "loaded"
                shutil.copytree(source, place)
                (place / name).write_bytes(payload)
                if name == "adapter_model.bin":
                    (place / "adapter_model.safetensors").unlink()
                with suppress(Exception):
                    apportion.load(build_tiny("olmoe"), place)
                yield _outcome("pickle: load", f"{method}, {name}, {number}", canary)
                shutil.rmtree(place)


def unpickled(folder: Path) -> Iterator[dict[str, Any]]:
    """Unpickle the payloads themselves, which must run, or the others would prove nothing.

    Args:
        folder: An empty folder.

    Yields:
        What became of each.
    """
    canary = folder / "canary"
    for number, payload in enumerate(payloads(canary)):
        with suppress(Exception):
            torch.load(io.BytesIO(payload), weights_only=False) if number else pickle.loads(payload)
        outcome = "ran" if canary.exists() else "defect"
        yield {"kind": "pickle: unpickled", "number": number, "outcome": outcome, "words": "a payload does nothing"}
        canary.rmdir()


def _killed(writer: Writer, place: Path) -> Path:
    """Kill a training run after a checkpoint, which is returned."""
    place.mkdir()
    process, deadline, found = forked(partial(writer.write, place)), time.monotonic() + 120, None
    while found is None:
        assert time.monotonic() < deadline, "no checkpoint was written"
        with suppress(Exception):  # a file may vanish while it is read
            found = last_checkpoint(place / "run" / "checkpoints")
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert not (place / "run" / "adapter_config.json").exists(), "the run ended before it was killed"
    return found


def _outcome(kind: str, name: str, canary: Path, *, ended: bool = True) -> dict[str, Any]:
    """Say whether a payload ran."""
    words = f"{name} ran" if canary.exists() else "" if ended else f"{name}: no end"
    return {"kind": kind, "number": name, "outcome": "defect" if words else "refused", "words": words}
