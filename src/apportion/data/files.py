"""Read JSON, JSON lines, CSV and Parquet files into lists of dictionaries, without changing values."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apportion.errors import DataError
from apportion.records.json_file import JsonError, parse_json

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

_MAX_CELL_CHARS = 2**31 - 1  # the csv module's default is 131,072
_SHOWN_CHARS = 60
_LARGEST_EXACT = 2**53


def file_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file.

    Cells of a CSV file are text, exactly as written. Values of the other formats keep their types, with one exception:
    float columns of a Parquet file that contain only whole numbers and missing values are read as integers, because
    pandas stores integers with missing values as floats.

    Args:
        path: A file with an extension in `FILE_FORMATS`. Text files are UTF-8, with or without a byte order mark.

    Returns:
        One dictionary per row.

    Raises:
        DataError: the file is missing, of another format, or damaged.
    """
    if path.suffix not in _READERS:
        raise DataError(
            f"the format of {path} is not supported.", fix=f"give a file that ends in {', '.join(FILE_FORMATS)}"
        )
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    try:
        return _READERS[path.suffix](path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _json_list(path: Path) -> list[dict[str, Any]]:
    """Read a JSON file that contains one list of objects."""
    try:
        data = parse_json(_text(path))
    except JsonError as error:
        raise _unreadable(path, error) from error
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise DataError(f"{path} is not a list of rows.", fix="give [{...}, {...}], or one row per line as .jsonl")
    return data


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object per line. Only a newline ends a line: JSON strings may contain other line breaks."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except JsonError as error:
            raise DataError(f"{path} cannot be read.", place=f"line {number}", found=str(error)) from error
        if not isinstance(row, dict):
            shown = line[:_SHOWN_CHARS]
            raise DataError(f"{path} has a line that is not a JSON object.", place=f"line {number}", found=shown)
        rows.append(row)
    return rows


def _csv(path: Path) -> list[dict[str, Any]]:
    """Read a CSV file with a header. Every row must have as many columns as the header."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    names: list[str] = []
    rows = []
    with _long_cells():
        for line, cells in _numbered(reader, path):
            if not names:
                names = cells
                _refuse_duplicates([name for name in names if name], path)
            elif len(cells) != len(names):
                raise DataError(
                    f"a row of {path} has another number of columns than the header.",
                    place=f"line {line}",
                    expected=f"{len(names)} columns ({', '.join(names)})",
                    found=str(len(cells)),
                    fix="remove the extra comma, or put cells that contain commas in double quotes",
                )
            else:
                rows.append(dict(zip(names, cells, strict=True)))
    return rows


def _numbered(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the nonempty rows, each with the number of its first line."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path} cannot be read as csv.", place=f"line {line}", found=str(error)) from error
        if cells:
            yield line, cells


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let the csv module read cells of any length."""
    before = csv.field_size_limit(_MAX_CELL_CHARS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> list[dict[str, Any]]:
    """Read a Parquet file, nested columns as lists and dictionaries."""
    import pyarrow  # slow to import, and needed only here
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            table = file.read()
        _refuse_duplicates(table.column_names, path)
        columns = {name: _whole(table.column(name).to_pylist()) for name in table.column_names}
    except (pyarrow.ArrowException, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise _unreadable(path, error) from error
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _whole(values: list[Any]) -> list[Any]:
    """Convert a column of floats to integers if it contains only whole numbers and missing values."""
    present = [value for value in values if not _is_missing(value)]
    if len(present) == len(values) or not all(map(_is_whole, present)):
        return values
    return [None if _is_missing(value) else int(value) for value in values]


def _is_whole(value: Any) -> bool:
    """Return whether a float represents an integer exactly."""
    return isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_EXACT


def _is_missing(value: Any) -> bool:
    """Return whether a cell is empty."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(path: Path) -> str:
    """Read a text file without its byte order mark."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise DataError(
            f"{path} is not UTF-8.",
            place=f"line {line}",
            found=f"byte 0x{byte:02x} ({error.reason})",
            fix="save it as UTF-8",
        ) from error


def _refuse_duplicates(names: Sequence[str], path: Path) -> None:
    """Raise an error if several columns have the same name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path} has two columns {twice[0]!r}.", fix="rename or remove one")


def _unreadable(path: Path, error: Exception) -> DataError:
    """Make the error for a file that cannot be read."""
    return DataError(f"{path} cannot be read as {path.suffix.lstrip('.')}.", found=str(error))


_READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}
