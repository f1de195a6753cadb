"""Convert rows to one of two forms: prompt, completion and answer; or text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date, time
from decimal import Decimal
from typing import Any, NoReturn

from apportion.errors import DataError, shortened

_EXPECTED = (
    "prompt and completion as text, or both as lists of messages with role and content as text",
    "messages that are objects with role and content as text",
    "text",
)


class _WrongFormError(Exception):
    """A row has neither form. Arguments: what was found and what was expected."""


def checked_row(row: dict[str, Any], source: str, number: int) -> dict[str, Any]:
    """Convert a row to one of the two forms.

    Args:
        row: A row as read from its source.
        source: The source's name, for messages.
        number: The row's number in the source, from 1.

    Returns:
        ``prompt`` and ``completion``, both text or both lists of messages, or ``text``; and ``answer`` as text, if
        present. Other columns and empty fields of messages are dropped.

    Raises:
        DataError: columns are missing or have values of another form.
    """
    try:
        return _body(row, source, number) | _answer(row.get("answer"))
    except _WrongFormError as error:
        found, expected = error.args
        raise DataError(
            f"row {number} of {source} cannot be used: {found}.",
            expected=expected,
            fix="correct or remove the row",
        ) from None


def _body(row: dict[str, Any], source: str, number: int) -> dict[str, Any]:
    """Return a row without its answer."""
    if row.get("prompt") is not None and row.get("completion") is not None:
        return _pair(row["prompt"], row["completion"])
    if row.get("messages") is not None:
        if not isinstance(row["messages"], list):
            _refuse("messages", _form(row["messages"]), _EXPECTED[1])
        messages = _messages("messages", row["messages"], _EXPECTED[1])
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(
                f"row {number} of {source} has messages whose last one is not the assistant's.",
                fix="give at least one message, followed by the assistant's reply",
            )
        return {"prompt": messages[:-1], "completion": messages[-1:]}
    if row.get("text") is not None:
        if not isinstance(row["text"], str):
            _refuse("text", _form(row["text"]), _EXPECTED[2])
        _check_characters("text", row["text"])
        return {"text": row["text"]}
    columns = ", ".join(shortened(str(name)) for name in row).encode("utf-8", "backslashreplace").decode()
    raise DataError(
        f"row {number} of {source} has neither prompt and completion, nor messages, nor text.",
        found=columns or "no column",
        fix="rename or add the columns",
    )


def _pair(prompt: Any, completion: Any) -> dict[str, Any]:
    """Check a prompt and its completion."""
    for column, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str | list):
            _refuse(column, _form(value), _EXPECTED[0])
    if isinstance(prompt, str) != isinstance(completion, str):
        _refuse("prompt", f"{_form(prompt)} and its completion is {_form(completion)}", _EXPECTED[0])
    if isinstance(prompt, list):
        prompt, completion = (
            _messages("prompt", prompt, _EXPECTED[0]),
            _messages("completion", completion, _EXPECTED[0]),
        )
    _check_characters("prompt", prompt)
    _check_characters("completion", completion)
    return {"prompt": prompt, "completion": completion}


def _messages(column: str, messages: list[Any], expected: str) -> list[dict[str, Any]]:
    """Check a list of messages, and drop their empty fields."""
    if not messages:
        _refuse(column, "an empty list", expected)
    for message in messages:
        if not isinstance(message, dict):
            raise _WrongFormError(f"its {column} contains {_form(message)} instead of a message", expected)
        for field in ("role", "content"):
            value = message.get(field)
            if value is None:
                raise _WrongFormError(f"its {column} contains a message without {field!r}", expected)
            if not isinstance(value, str):
                raise _WrongFormError(f"{field!r} of a message in {column} is {_form(value)}", expected)
    _check_characters(column, messages)
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def _answer(answer: Any) -> dict[str, str]:
    """Return the answer as text, if there is one."""
    if answer is None or answer == "" or (isinstance(answer, float) and math.isnan(answer)):
        return {}
    if not isinstance(answer, str | int | float | Decimal | date | time):
        _refuse("answer", _form(answer), "text or a number")
    _check_characters("answer", str(answer))
    return {"answer": str(answer)}


def _check_characters(column: str, value: Any) -> None:
    """Raise an error for unpaired surrogates, which JSON allows and tokenizers cannot read."""
    for text in _texts(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"half a character, \\u{ord(text[error.start]):04x}"
            raise _WrongFormError(f"its {column} contains {half}", "text that UTF-8 can encode") from None


def _texts(value: Any) -> Iterator[str]:
    """Iterate over all strings in nested lists and dictionaries."""
    pending = [value]
    while pending:
        node = pending.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, list):
            pending.extend(node)
        elif isinstance(node, dict):
            pending.extend((*node, *node.values()))


def _form(value: Any) -> str:
    """Describe a value's type."""
    forms: dict[type, str] = {
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return forms.get(type(value), f"of type {type(value).__name__}")


def _refuse(column: str, found: str, expected: str) -> NoReturn:
    """Raise the error for a column of the wrong form."""
    raise _WrongFormError(f"its {column} is {found}", expected)
