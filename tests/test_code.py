"""Rules that the source code follows and no linter checks."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "apportion"
MAX_PARAMETERS = 7
FUNCTION_LINES, FILE_LINES, LONGEST_FILE = 32, 250, 400


def test_nine_of_ten_functions_and_files_are_short_and_no_file_is_long() -> None:
    texts = [path.read_text() for path in SOURCE.rglob("*.py")]
    files = sorted(len(text.splitlines()) for text in texts)
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = sorted(1 + (node.end_lineno or 0) - node.lineno for node in nodes if isinstance(node, kinds))
    assert functions[len(functions) * 9 // 10] <= FUNCTION_LINES
    assert files[len(files) * 9 // 10] <= FILE_LINES
    assert files[-1] <= LONGEST_FILE


def test_no_function_has_more_than_seven_parameters() -> None:
    too_many = {}
    for path in sorted(SOURCE.rglob("*.py")):
        file = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_command(file, node):
                continue
            num_parameters = _num_parameters(node)
            if num_parameters > MAX_PARAMETERS:
                too_many[f"{file}:{node.lineno} {node.name}"] = num_parameters
    assert not too_many


def _num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count all parameters except self and cls; ``*args`` and ``**kwargs`` count as one each."""
    arguments = node.args
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    variadic = [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return len([name for name in named + variadic if name not in ("self", "cls")])


def _is_command(file: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether a function is a command, whose parameters are the command's options."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return file == "cli/main.py" and any(text.startswith(("app.command", "app.callback")) for text in decorators)
