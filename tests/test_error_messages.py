"""No message is laid out by hand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import apportion

SOURCE = Path(apportion.__file__).parent
HAND_MADE = re.compile(r"\n +(fix|found|expected|place): |^ +fix: ")


def test_no_message_outside_errors_lays_itself_out() -> None:
    laid_out = []
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        laid_out += [
            f"{file.relative_to(SOURCE)}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
            if HAND_MADE.search(node.value)
        ]
    assert not laid_out, "give these as keywords: ApportionError(what, found=..., fix=...)"
