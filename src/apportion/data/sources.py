"""Data sources: files, hub data sets and generated tasks, read into rows of the same form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

from apportion.data.files import FILE_FORMATS, file_rows
from apportion.data.rows import checked_row
from apportion.data.tasks import Split, task_rows
from apportion.errors import DataError
from apportion.hub import is_downloaded, is_hub_id, reason_without_hub
from apportion.records.json_file import JsonError, parse_json
from apportion.records.names import nearest

__all__ = ["DEFAULT_TASK_ROWS", "FILE_FORMATS", "Row", "named_source", "named_sources", "read_rows"]

Row = dict[str, Any]

DEFAULT_TASK_ROWS = 1000
_UNREADABLE = "the data set {!r} is not a file and cannot be read from the hub."
_FIX = "give a file, task:NAME, or a hub data set (which needs a connection to the hub)"

_TASK = re.compile(r"task:(?P<name>[^:?]+)(?::(?P<split>[^?]*))?(?:\?(?P<options>.*))?")
_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<data>.+)")


def named_source(text: str) -> tuple[str, str]:
    """Split ``NAME=DATA``. Without a name, the last part of the source is used.

    Args:
        text: A source with or without a name.

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
    """Split several ``NAME=DATA`` texts, and check that names are unique.

    Args:
        texts: Texts as `named_source` reads them.

    Returns:
        Sources by task.

    Raises:
        DataError: two data sets have the same name.
    """
    named = [named_source(text) for text in texts]
    sources = dict(named)
    if len(sources) < len(named):
        raise DataError("two data sets have the same name.", fix="name them: --data NAME=DATA")
    return sources


def read_rows(source: str, *, num_rows: int | None = None, split: Split = "train", seed: int = 0) -> list[Row]:
    """Read a data source into rows.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file; ``task:NAME[:train|:test][?option=value&...]``;
            or a hub data set, ``id``, ``id:config`` or ``id:config:split``.
        num_rows: Number of rows to read, from the first; by default all (1000 for a generated task).
        split: Split to use if the task or hub data set names none.
        seed: Seed of generated tasks.

    Returns:
        Rows with ``prompt`` and ``completion``, or with ``text``; with ``answer`` if present.

    Raises:
        DataError: the source cannot be found or read, has no row, or has a row of another form.
    """
    task = _TASK.fullmatch(source)
    if task:
        config = {name: _value(value) for name, value in parse_qsl(task["options"] or "", keep_blank_values=True)}
        chosen = cast("Split", task["split"] or split)
        count = DEFAULT_TASK_ROWS if num_rows is None else num_rows
        return [dict(row) for row in task_rows(task["name"], chosen, num_rows=count, seed=seed, config=config)]
    rows = file_rows(Path(source)) if _looks_like_file(source) else _hub_rows(source, split)
    rows = rows[:num_rows]
    if not rows:
        raise DataError(f"{source} has no row.", fix="give data with at least one row")
    return [checked_row(row, source, number) for number, row in enumerate(rows, start=1)]


def _looks_like_file(source: str) -> bool:
    """Return whether a source is a path rather than a hub data set's id."""
    path = Path(source)
    if path.exists() or path.suffix in FILE_FORMATS:
        return True
    return source.startswith((".", "/", "~")) or bool(re.fullmatch(r"\.\w{2,8}", path.suffix))


def _hub_rows(source: str, split: Split) -> list[Row]:
    """Read a data set from the hub."""
    from datasets import load_dataset  # slow to import, and needed only here

    name, config, chosen = (*source.split(":"), "", "")[:3]
    _require_hub(source, name)
    try:
        return [dict(row) for row in load_dataset(name, config or None, split=chosen or split)]
    except Exception as error:  # the hub's clients raise errors of many kinds
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            _UNREADABLE.format(source),
            found=reason,
            fix=_FIX,
        ) from error


def _require_hub(source: str, name: str) -> None:
    """Raise an error at once for a data set that cannot be on the hub, or if the hub cannot be asked."""
    if ":" in source and nearest(name, ["task"]):
        raise DataError(f"there is no data set {name!r}.", fix=f"did you mean task{source.removeprefix(name)}?")
    reason = None if is_hub_id(name) else "no file, and no id of a data set on the hub"
    if reason is None and not is_downloaded(name, "dataset"):
        reason = reason_without_hub()
    if reason:
        raise DataError(
            f"the data set {source!r} is not a file and cannot be read from the hub.", found=reason, fix=_FIX
        )


def _value(text: str) -> Any:
    """Parse an option's value as JSON, or return the text if it is not JSON."""
    try:
        return parse_json(text)
    except JsonError:
        return text
