"""Files as `show`, `report`, `export` and `cost` read them."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from torch import nn

import apportion
from apportion.accounting import layout_of
from apportion.cli import show
from apportion.cli.terminal import Terminal
from apportion.configurations import keep_layout, known_layout, layout_file
from apportion.formats.export import export
from apportion.records.plan import Plan
from apportion.report.page import write_report
from faults.judges import anything, sealed
from faults.kind import JSON, TENSORS, Kind, RefusedError
from faults.mutations import BYTES, change_json
from study_folder import tiny_profile

DEMO = Path(__file__).parents[2] / "docs" / "results" / "demo.json"


def shown_kinds(others: list[Kind]) -> list[Kind]:
    """What `show` says of files of the other kinds, and of their folders.

    Args:
        others: Kinds with good files.

    Returns:
        The kinds.
    """
    by_name = {kind.name: kind for kind in others}
    named = {"plan": sealed, "profile": sealed, "mask": sealed, "study run": anything, "run.json": anything,
             "checkpoint manifest": sealed, "adapter_config.json, plan": anything, "STUDY.toml": anything}  # fmt: skip
    kinds = []
    for name, judge in named.items():
        kind = by_name[name]
        kinds.append(Kind(f"show {name}", kind.path, _shown(kind.path), kind.mutations, judge, 60, named=kind.named))
    tensors = by_name["adapter tensors, plan"].path
    kinds.append(Kind("show adapter tensors", tensors, _shown(tensors.parent), TENSORS, anything, 60))
    return kinds


def _shown(path: Path) -> Callable[[], Any]:
    """Return what reads a file as `show` does: no control character reaches the terminal."""

    def read() -> Any:
        written = io.StringIO()
        facts = show.run(Terminal(file=written), show.Arguments(path))
        odd = {character for character in written.getvalue() if character < " " and character != "\n"}
        assert not odd, f"control characters {odd}"
        return json.loads(json.dumps(facts))

    return read


def report_kinds(folder: Path) -> list[Kind]:
    """Files that only the report reads in full.

    Args:
        folder: Where to make them, with a study in it.

    Returns:
        The kinds.
    """
    demo, study = folder / "demo", folder / "study"
    demo.mkdir()
    profile = tiny_profile(("siblings",))
    profile.save(demo / "profile.safetensors")
    results = json.loads(DEMO.read_text())
    (demo / "results.json").write_text(json.dumps(results | {"runs": results["runs"][:2]}))

    def page_of(source: Path) -> Callable[[], Any]:
        def read() -> str:
            page = folder / "report.html"
            write_report(source, page)
            return page.read_text()

        return read

    run = sorted((study / "runs").glob("*.json"))[1]
    return [
        Kind("demonstration", demo / "results.json", page_of(demo), JSON, anything, 40),
        Kind("show demonstration", demo / "results.json", _shown(demo), JSON, anything, 60),
        Kind("report of a run", run, page_of(study), JSON, anything, 16, named=f"{study.name}/"),
    ]


def export_kinds(folder: Path, model: nn.Module, plan: Plan) -> list[Kind]:
    """Read an adapter of attention alone as `export` does, without the model.

    Args:
        folder: Where to make it.
        model: The model.
        plan: The plan.

    Returns:
        The kinds.
    """
    adapter, output, base = folder / "exported", folder / "peft", folder / "base"
    model.config.save_pretrained(base)
    apportion.apply(model, plan).save_pretrained(adapter)

    def read() -> Any:
        shutil.rmtree(output, ignore_errors=True)
        export(adapter, output, model=base)
        return [path.read_bytes() for path in sorted(output.iterdir())]

    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    return [
        Kind("export of adapter_config.json", config, read, JSON, anything, 60, named=adapter.name),
        Kind("export of adapter tensors", weights, read, TENSORS, sealed, 40, named=adapter.name),
    ]


def layout_kinds(folder: Path, model: nn.Module) -> list[Kind]:
    """Configurations and the layouts that are kept of them.

    Args:
        folder: Where to make them.
        model: The model.

    Returns:
        The kinds.
    """
    base = folder / "counted"
    model.config.save_pretrained(base)
    keep_layout(base, layout_of(base))
    kept = layout_file(str(base))
    assert kept is not None

    def read() -> Any:
        layout = known_layout(base)
        if layout is None:
            raise RefusedError(f"{kept.name} is not used")
        return layout.as_dict()

    def rewritten(draw: Random, data: bytes) -> bytes:
        return gzip.compress(json.dumps(change_json(draw, json.loads(gzip.decompress(data)))).encode(), mtime=0)

    def count() -> Any:
        kept.unlink(missing_ok=True)
        return layout_of(base).as_dict()

    config = base / "config.json"
    return [
        Kind("kept layout", kept, read, BYTES, sealed, 60),
        Kind("kept layout, rewritten", kept, read, (rewritten,), anything, 100),
        Kind("config.json", config, count, JSON, anything, 60, named=base.name),
    ]
