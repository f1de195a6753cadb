"""`DATA`: files, hub data sets and generated tasks, all read into the same rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

from apportion.data.tasks import Split, task_rows
from apportion.errors import DataError

Row = dict[str, Any]

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
DEFAULT_TASK_ROWS = 1000

_TASK = re.compile(r"task:(?P<name>[^:?]+)(?::(?P<split>[^?]*))?(?:\?(?P<options>.*))?")
_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<data>.+)")


def named_source(text: str) -> tuple[str, str]:
    """Split ``NAME=DATA``; without a name, the data's own last part is the name.

    Args:
        text: What the user gave.

    Returns:
        The task's name and the source.

    Example:
        >>> named_source("maths=task:chain_sum:train")
        ('maths', 'task:chain_sum:train')
        >>> named_source("data/my_rows.jsonl")
        ('my_rows', 'data/my_rows.jsonl')
    """
    match = _NAMED.fullmatch(text)
    if match and "?" not in match["name"]:
        return match["name"], match["data"]
    task = _TASK.fullmatch(text)
    if task:
        return task["name"], text
    return (Path(text).stem if Path(text).suffix in FILE_FORMATS else text.rpartition("/")[2].partition(":")[0]), text


def named_sources(texts: list[str]) -> dict[str, str]:
    """Name every data set, and refuse two of one name.

    Args:
        texts: What the user gave, each as `named_source` reads it.

    Returns:
        Sources by task.

    Raises:
        DataError: two data sets have the same name.
    """
    named = [named_source(text) for text in texts]
    sources = dict(named)
    if len(sources) < len(named):
        raise DataError("two data sets have the same name.\n  fix:  name them: --data NAME=DATA")
    return sources


def read_rows(source: str, *, num_rows: int | None = None, split: Split = "train", seed: int = 0) -> list[Row]:
    """Read a data source into rows.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file; ``task:NAME[:train|:test][?option=value&...]``;
            or a hub data set, ``id``, ``id:config`` or ``id:config:split``.
        num_rows: Rows to read, from the first; all of them where not given (1000 of a generated task).
        split: The split of a task or hub data set that names none.
        seed: Seed of generated tasks.

    Returns:
        Rows with ``prompt`` and ``completion``, or with ``text``; ``answer`` where there is one.

    Raises:
        DataError: the source cannot be found or read, has no row, or a row has other columns.
    """
    task = _TASK.fullmatch(source)
    if task:
        config = {name: _value(value) for name, value in parse_qsl(task["options"] or "", keep_blank_values=True)}
        chosen = cast("Split", task["split"] or split)
        count = DEFAULT_TASK_ROWS if num_rows is None else num_rows
        return [dict(row) for row in task_rows(task["name"], chosen, num_rows=count, seed=seed, config=config)]
    rows = _file_rows(Path(source)) if _looks_like_file(source) else _hub_rows(source, split)
    rows = rows[:num_rows]
    if not rows:
        raise DataError(f"{source} has no row.\n  fix:  give data with at least one row")
    return [_normalise(row, source, number) for number, row in enumerate(rows, start=1)]


def _looks_like_file(source: str) -> bool:
    """Tell a path from a hub data set's id."""
    path = Path(source)
    if path.exists() or path.suffix in FILE_FORMATS:
        return True
    return source.startswith((".", "/", "~")) or bool(re.fullmatch(r"\.\w{2,8}", path.suffix))


def _file_rows(path: Path) -> list[Row]:
    """Read a file with the library that fits its ending."""
    if path.suffix not in FILE_FORMATS:
        raise DataError(
            f"the format of {path} is not known.\n  fix:  give a file that ends in {', '.join(FILE_FORMATS)}"
        )
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    try:
        if path.suffix == ".jsonl":
            return _json_lines(path)
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
                raise DataError(
                    f"{path} is no list of rows.\n  fix:  give [{{...}}, {{...}}], or one row a line as .jsonl"
                )
            return data
        import pandas  # the optional readers of one format each

        if path.suffix == ".csv":
            frame = pandas.read_csv(path, dtype=str, keep_default_na=False)  # "007" and "NA" are text too
        else:
            frame = pandas.read_parquet(path)
        return cast("list[Row]", frame.to_dict("records"))
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as {path.suffix.lstrip('.')}.\n  found:  {error}") from error


def _json_lines(path: Path) -> list[Row]:
    """Read one JSON object a line, naming the line that is none."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} cannot be read.\n  place:  line {number}\n  found:  {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} has a line that is no row.\n  place:  line {number}\n  found:  {line[:60]}")
        rows.append(row)
    return rows


def _hub_rows(source: str, split: Split) -> list[Row]:
    """Read a data set from the hub."""
    from datasets import load_dataset  # slow to import, and needed here alone

    name, config, chosen = (*source.split(":"), "", "")[:3]
    try:
        return [dict(row) for row in load_dataset(name, config or None, split=chosen or split)]
    except Exception as error:  # the hub's clients raise errors of many kinds
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"the data set {source!r} is no file and cannot be read from the hub.\n  found:  {reason}\n"
            "  fix:    give a file, task:NAME, or a hub data set while the hub can be reached"
        ) from error


def _normalise(row: Row, source: str, number: int) -> Row:
    """Bring a row into one of the two forms, or say what it lacks."""
    kept = {"answer": str(row["answer"])} if row.get("answer") not in (None, "") else {}
    if row.get("prompt") is not None and row.get("completion") is not None:
        return {"prompt": row["prompt"], "completion": row["completion"], **kept}
    messages = row.get("messages")
    if messages is not None:
        if not isinstance(messages, list) or len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise DataError(
                f"row {number} of {source} has messages that do not end with the assistant's.\n"
                "  fix:  give at least one message and the assistant's reply as the last"
            )
        return {"prompt": messages[:-1], "completion": messages[-1:], **kept}
    if isinstance(row.get("text"), str):
        return {"text": row["text"], **kept}
    raise DataError(
        f"row {number} of {source} has neither prompt and completion, nor messages, nor text.\n"
        f"  found:  {', '.join(map(str, row)) or 'no column'}\n  fix:    rename or add the columns"
    )


def _value(text: str) -> Any:
    """Read an option's value: JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
