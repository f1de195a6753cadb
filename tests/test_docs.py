"""Every command and every Python block of README and docs runs, in order, in one folder a page."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from apportion.cli.main import app
from apportion.demo import markdown_table
from apportion.formats.export import FORMATS
from apportion.methods.registry import METHODS
from apportion.training.procedures.registry import PROCEDURES

ROOT = Path(__file__).parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "```" in page.read_text()]
REGISTRIES: tuple[dict[str, Any], ...] = (METHODS, FORMATS, PROCEDURES)  # which examples extend
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def _registries_restored() -> Iterator[None]:
    """Take out what a page registers."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("_registries_restored")
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for language, text in BLOCK.findall(page.read_text()):
        if language == "bash":
            for line in text.strip().splitlines():
                _run_line(line.partition("#")[0].strip())
        elif language == "python":
            exec(compile(text, str(page), "exec"), names)
        else:
            assert language in ("json", "text"), f"nothing runs {language} blocks"


def _run_line(line: str) -> None:
    command, *arguments = shlex.split(line)
    if command == "make":
        targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {argument for argument in arguments if "=" not in argument} <= set(targets), line
        return
    assert command == "apportion", line
    if arguments[0] == "demo":  # runs for minutes: its own tests run it with hardly any training
        return
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, f"{line}\n{done.output}"


def test_the_readme_reports_what_the_demonstration_found() -> None:
    results = json.loads((ROOT / "docs" / "results" / "demo.json").read_text())
    for page in ("README.md", "docs/results/demo.md"):
        assert markdown_table(results) in (ROOT / page).read_text(), page


def test_the_readme_reports_what_was_measured() -> None:
    facts = json.loads((ROOT / "docs" / "results" / "benchmarks" / "train_step.json").read_text())
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/benchmarks.md")]
    for name, row in facts["cases"][0]["contenders"].items():
        line = f"| {name} | {row['median_s'] * 1000:,.0f} | {row['ratio']:.2f} |"
        assert all(line in page for page in pages), line


def test_the_picture_of_the_layers_is_as_the_contract_says() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_layers.py"))["picture"]()
    assert (ROOT / "docs" / "images" / "layers.svg").read_text() == drawn, "run python docs/draw_layers.py"


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    commands = ("profile", "plan", "cost", "train", "eval", "merge", "report", "methods", "demo", "compare")
    for command in commands:
        assert f"apportion {command}" in text, command
