"""What is not public in other libraries is used in `apportion.compat` alone; the lowest versions are as promised."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "apportion"
COMPAT = SOURCE / "compat"
OWN = ("apportion", "__future__")
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(SOURCE.rglob("*.py"))}
# Attributes that libraries set on others' objects, which no leading underscore of a method call betrays.
FOREIGN_TEXTS = re.compile(r"_hf_hook|_old_forward|_is_expert_parallel|_experts_implementation|_apply_gate|__wrapped__")
ALLOWED = {"_asdict", "_exit", "_fields", "_make", "_replace"}  # public names of the standard library


def _is_private(name: str) -> bool:
    """Tell whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__") and name not in ALLOWED


def _names_defined_here() -> set[str]:
    """List the names of functions, classes, attributes and variables that the package itself defines."""
    names: set[str] = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def _foreign(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Find reaches into private parts of other libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            of_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if node.attr not in own or (of_super and not node.attr.startswith("_run_")):
                yield f"{node.lineno}: {node.attr}"
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] not in ("apportion", "__future__")
        ):
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.lineno}: {part}" for part in parts if _is_private(part))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and FOREIGN_TEXTS.fullmatch(node.value):
            yield f"{node.lineno}: {node.value!r}"


def _files() -> list[Path]:
    """List the files that may not reach into other libraries: all but `compat`, and models."""
    return [file for file in TREES if not file.is_relative_to(COMPAT) and not file.is_relative_to(SOURCE / "models")]


def test_private_parts_of_other_libraries_are_used_in_compat_alone() -> None:
    own = _names_defined_here()
    found = {str(file.relative_to(SOURCE)): list(_foreign(TREES[file], own)) for file in _files()}
    assert {file: reaches for file, reaches in found.items() if reaches} == {}


def test_the_search_finds_a_reach() -> None:
    text = "from a import _b\nx = getattr(m, '_hf_hook')\nm._theirs()\nsuper()._save_checkpoint()\nself._own()\n"
    found = sorted(_foreign(ast.parse(text), {"_save_checkpoint", "_own"}))
    assert found == ["1: _b", "2: '_hf_hook'", "3: _theirs", "4: _save_checkpoint"]


FILES = [file for file in COMPAT.glob("*.py") if file.stem != "__init__"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_module_says_what_it_was_checked_on_and_what_to_do_when_it_breaks(file: Path) -> None:
    text = ast.get_docstring(TREES[file]) or ""
    assert re.search(rf"^Checked on: {file.stem} \d", text, re.MULTILINE)
    assert "When it breaks: " in text


def test_the_lowest_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    promised = [*project["dependencies"], *extras["tasks"], *extras["gguf"], *extras["study"]]
    lowest = {re.split(r"[>\[]", text)[0]: re.search(r">=([\d.]+)", text)[1] for text in promised}  # type: ignore[index]
    lines = (ROOT / "constraints" / "lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert pinned == {name: version for name, version in lowest.items() if name != "torch"}
