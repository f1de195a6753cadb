"""Read JSON from untrusted files: every problem raises one error type, and nesting is limited."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1 << 28  # the largest records, plans of huge models, take a few megabytes
MAX_JSON_DEPTH = 64  # nesting of lists and objects; records need less than ten

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """The text is not JSON, or not JSON that this package writes."""


def parse_json(text: str) -> Any:
    """Parse JSON.

    Args:
        text: The text, without a byte order mark.

    Returns:
        The parsed data.

    Raises:
        JsonError: the text is not JSON, a number has too many digits, or lists and objects are nested too deeply.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise JsonError(str(error)) from error
    except RecursionError as error:
        raise JsonError(_too_deep()) from error
    except ValueError as error:
        raise JsonError("an integer has too many digits") from error
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH:
        check_depth(data)
    return data


def parse_record(text: str | bytes) -> dict[str, Any]:
    """Parse the JSON of one of this package's files: an object, in UTF-8.

    Args:
        text: The text.

    Returns:
        The object.

    Raises:
        JsonError: the text is not a JSON object in UTF-8, or contains an unpaired surrogate.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise JsonError(f"byte {error.start} is not UTF-8 ({error.reason})") from error
    data = parse_json(decoded)
    if not isinstance(data, dict):
        raise JsonError(f"expected an object, found a {type(data).__name__}")
    if _SURROGATE.search(decoded):  # a pair is one valid character
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise JsonError("the text contains an unpaired surrogate") from error
    return data


def read_json(path: Path, refusal: Callable[[str], Exception]) -> dict[str, Any]:
    """Read one of this package's JSON files.

    Args:
        path: The file.
        refusal: Makes the error to raise from a description of the problem.

    Returns:
        The object in the file.

    Raises:
        Exception: made by `refusal` if the file cannot be read or `parse_record` refuses it.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise JsonError(f"the file has more than {MAX_JSON_BYTES:,} bytes")
        return parse_record(path.read_bytes())
    except OSError as error:
        raise refusal(error.strerror or str(error)) from error
    except JsonError as error:
        raise refusal(str(error)) from error


def require_finite(data: Any) -> None:
    """Refuse infinity and NaN, which Python's JSON parser accepts.

    Args:
        data: Plain data.

    Raises:
        JsonError: a number is infinite or NaN.
    """
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise JsonError(f"the number {value} is not finite")
        waiting.extend(_children(value))


def check_depth(data: Any) -> None:
    """Refuse lists and objects that are nested too deeply.

    Args:
        data: Plain data.

    Raises:
        JsonError: the nesting exceeds `MAX_JSON_DEPTH`.
    """
    level = [data]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for value in level for child in _children(value) if isinstance(child, dict | list)]
        if not level:
            return
    raise JsonError(_too_deep())


def _children(value: Any) -> list[Any]:
    """Return the direct children of a list or an object."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _too_deep() -> str:
    return f"lists and objects are nested more than {MAX_JSON_DEPTH} deep"
