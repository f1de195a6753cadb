"""JSON that others may have written: whatever is wrong with it becomes one error, and nothing in it is too deep."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1 << 28  # the largest record of this package, the plan of a huge model, has some megabytes
MAX_JSON_DEPTH = 64  # of lists and objects inside each other; records have less than ten

_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """A text is no JSON, or JSON that nothing here writes."""


def parse_json(text: str) -> Any:
    """Parse JSON.

    Args:
        text: The text, without a byte order mark.

    Returns:
        What it holds.

    Raises:
        JsonError: it is no JSON, has a number of too many digits, or lists and objects are nested too deep.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise JsonError(str(error)) from error
    except RecursionError as error:
        raise JsonError(_too_deep()) from error
    except ValueError as error:
        raise JsonError("a whole number has too many digits") from error
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH:
        check_depth(data)
    return data


def parse_record(text: str | bytes) -> dict[str, Any]:
    """Parse the JSON of one of this package's own files: an object, in UTF-8.

    Args:
        text: The text.

    Returns:
        The object.

    Raises:
        JsonError: it is something else, or holds text that UTF-8 cannot write.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise JsonError(f"byte {error.start} is not UTF-8 ({error.reason})") from error
    data = parse_json(decoded)
    if not isinstance(data, dict):
        raise JsonError(f"it holds a {type(data).__name__}, not an object")
    if _HALF_CHARACTER.search(decoded):  # two halves are one character
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise JsonError("it holds half a character") from error
    return data


def read_json(path: Path, refusal: Callable[[str], Exception]) -> dict[str, Any]:
    """Read one of this package's own JSON files.

    Args:
        path: The file.
        refusal: Makes the error to raise from what is wrong.

    Returns:
        The object in it.

    Raises:
        Exception: as `refusal` made it: the file cannot be read, or its JSON is refused by `parse_record`.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise JsonError(f"it has more than {MAX_JSON_BYTES:,} bytes")
        return parse_record(path.read_bytes())
    except OSError as error:
        raise refusal(error.strerror or str(error)) from error
    except JsonError as error:
        raise refusal(str(error)) from error


def require_finite(data: Any) -> None:
    """Refuse numbers that JSON does not have and Python's reader takes.

    Args:
        data: Plain data.

    Raises:
        JsonError: a number is infinite, or none.
    """
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise JsonError(f"it holds the number {value}")
        waiting.extend(_children(value))


def check_depth(data: Any) -> None:
    """Refuse lists and objects that are nested too deep.

    Args:
        data: Plain data.

    Raises:
        JsonError: there are more than `MAX_JSON_DEPTH`.
    """
    level = [data]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for value in level for child in _children(value) if isinstance(child, dict | list)]
        if not level:
            return
    raise JsonError(_too_deep())


def _children(value: Any) -> list[Any]:
    """Give what stands directly in a list or an object."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _too_deep() -> str:
    return f"lists and objects are nested more than {MAX_JSON_DEPTH} deep"
