"""Damaged copies of files, drawn from a seed: the same seed and number give the same bytes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

BytesMutation = Callable[[Random, bytes], bytes]
Place = tuple[Any, Any]  # a container and the key or the position in it

_HEAD_BYTES = 256
_DEEP = 20_000
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_STRING = re.compile(rb'"[^"\\]{0,200}"')

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400, 10**4200, -(10**30), 0.5,
    1.5, -0.5, 1e308, 1e-320, float("inf"), float("-inf"), float("nan"), "", "x", "5", "\ud800", "\x00", "é" * 300,
    "{0,1}" * 60, "{", "../../x", [], [[]], [1], ["x"], [None], {}, {"x": 1}, {"": None},
)  # fmt: skip


def nested(depth: int, brackets: str = "[]") -> Any:
    """Build lists, or dictionaries, inside each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if brackets == "[]" else {"a": value}
    return value


def flip_bit(draw: Random, data: bytes) -> bytes:
    return _flip(data, draw.randrange(len(data)), draw)


def flip_head_bit(draw: Random, data: bytes) -> bytes:
    return _flip(data, draw.randrange(min(len(data), _HEAD_BYTES)), draw)


def flip_length_bit(draw: Random, data: bytes) -> bytes:
    return _flip(data, draw.randrange(min(len(data), 8)), draw)


def truncate(draw: Random, data: bytes) -> bytes:
    return data[: draw.choice((0, 1, 7, 8, 9, len(data) - 1, draw.randrange(len(data))))]


def delete_span(draw: Random, data: bytes) -> bytes:
    start, end = _span(draw, data)
    return data[:start] + data[end:]


def duplicate_span(draw: Random, data: bytes) -> bytes:
    start, end = _span(draw, data)
    return data[:end] + data[start:]


def swap_spans(draw: Random, data: bytes) -> bytes:
    size = draw.randint(1, max(1, min(64, len(data) // 4)))
    one, other = sorted((draw.randrange(len(data) // 2), draw.randrange(len(data) // 2, len(data))))
    first, second = data[one : one + size], data[other : other + size]
    return data[:one] + second + data[one + size : other] + first + data[other + size :]


def insert_bytes(draw: Random, data: bytes) -> bytes:
    place = draw.randrange(len(data) + 1)
    added = draw.choice((b"\x00", b"\x00" * 100, b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b'"'))
    return data[:place] + added + data[place:]


def prefix_mark(draw: Random, data: bytes) -> bytes:
    return draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x00", b"\n\n")) + data


def as_utf_16(draw: Random, data: bytes) -> bytes:
    return data.decode("latin-1").encode(draw.choice(("utf-16", "utf-16-be", "utf-32")))


def all_nested(draw: Random, data: bytes) -> bytes:
    return draw.choice((b"[" * _DEEP + b"]" * _DEEP, b"[" * _DEEP, b'{"a":' * _DEEP + b"1" + b"}" * _DEEP))


def replace_number(draw: Random, data: bytes) -> bytes:
    """Put another number, or something that is none, in the place of a number that stands in the text."""
    other = (b"9" * 5000, b"1e999", b"-1", b"NaN", b"-Infinity", b"nan", b"0", b"1.5", b"true", b"null", b'"7"', b"",
             b"1" + b"0" * 400, b"[" * 500 + b"]" * 500, b"[" * 5000 + b"]" * 5000, b"2000-01-01")  # fmt: skip
    return _replace(draw, data, _NUMBER, other)


def replace_text(draw: Random, data: bytes) -> bytes:
    other = (b'""', b'"x"', b"5", b"null", b"[]", b"{}", b'"\\ud800"', b'"\\u0000"', b'"' + b"a" * 5000 + b'"',
             b'"{0,1}{0,1}"', b"[" * 5000 + b"]" * 5000, b"9" * 5000, b"inf")  # fmt: skip
    return _replace(draw, data, _STRING, other)


BYTES: tuple[BytesMutation, ...] = (
    flip_bit, flip_head_bit, truncate, delete_span, duplicate_span, swap_spans, insert_bytes, prefix_mark, as_utf_16,
)  # fmt: skip
TEXT: tuple[BytesMutation, ...] = (all_nested, replace_number, replace_number, replace_text, replace_text)


def change_json(draw: Random, data: Any) -> Any:
    """Substitute, remove, rename, repeat or exchange what stands at a random place of plain data.

    Args:
        draw: The source of all choices.
        data: Plain data, which is not changed.

    Returns:
        A changed copy.
    """
    changed = {"all": copy.deepcopy(data)}
    place = draw.choice(list(_places(changed)))
    draw.choice((_substitute, _substitute, _substitute, _nest, _remove, _rename, _repeat, _exchange))(draw, place)
    return changed.get("all")


def change_json_bytes(draw: Random, data: bytes) -> bytes:
    """The same for a file of JSON."""
    return json.dumps(change_json(draw, json.loads(data))).encode()


def change_safetensors(draw: Random, data: bytes) -> bytes:
    """Change the header of a safetensors file, or the JSON that its metadata hold, and leave the tensors."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    texts = [name for name, text in header.get("__metadata__", {}).items() if text.startswith("{")]
    if texts and draw.random() < 0.7:
        name = draw.choice(texts)
        header["__metadata__"][name] = json.dumps(change_json(draw, json.loads(header["__metadata__"][name])))
    else:
        header = change_json(draw, header)
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + data[8 + size :]


def _places(data: Any) -> Iterator[Place]:
    """Go through all places of plain data, with few of long lists."""
    entries = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    for key, value in entries[:8] + entries[8::7]:
        yield data, key
        yield from _places(value)


def _substitute(draw: Random, place: Place) -> None:
    owner, key = place
    owner[key] = copy.deepcopy(draw.choice(VALUES))


def _nest(draw: Random, place: Place) -> None:
    owner, key = place
    owner[key] = nested(draw.choice((1, 40, 300, 900)), draw.choice(("[]", "{}")))


def _remove(draw: Random, place: Place) -> None:
    owner, key = place
    del owner[key]


def _rename(draw: Random, place: Place) -> None:
    owner, key = place
    if isinstance(owner, dict):
        owner[draw.choice(("x", "", "\ud800", "__class__", f"{key} "))] = owner.pop(key)
    else:
        owner.reverse()


def _repeat(draw: Random, place: Place) -> None:
    owner, key = place
    if isinstance(owner[key], list):
        owner[key] = owner[key] * 2
    elif isinstance(owner, list):
        owner.insert(key, owner[key])
    else:
        owner[key] = [owner[key]]


def _exchange(draw: Random, place: Place) -> None:
    owner, key = place
    other = draw.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
    owner[key], owner[other] = owner[other], owner[key]


def _flip(data: bytes, place: int, draw: Random) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _span(draw: Random, data: bytes) -> tuple[int, int]:
    start = draw.randrange(len(data))
    return start, min(len(data), start + draw.choice((1, 2, 8, 40, 400)))


def _replace(draw: Random, data: bytes, pattern: re.Pattern[bytes], others: tuple[bytes, ...]) -> bytes:
    found = list(pattern.finditer(data))
    if not found:
        return insert_bytes(draw, data)
    match = draw.choice(found)
    return data[: match.start()] + draw.choice(others) + data[match.end() :]
