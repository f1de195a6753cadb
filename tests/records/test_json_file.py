"""JSON of others: one error, whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apportion.errors import PlanError
from apportion.records import json_file
from apportion.records.json_file import MAX_JSON_DEPTH, JsonError, parse_json, parse_record, read_json, require_finite


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ('{"a": 1', "line 1 column 8"),
        ("9" * 5000, "too many digits"),
        (_nested(MAX_JSON_DEPTH + 1), "nested more than 64 deep"),
        (_nested(100_000), "nested more than 64 deep"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested more than 64 deep"),
    ],
    ids=["empty", "cut", "digits", "deep", "very-deep", "deep-objects"],
)
def test_what_no_reader_can_use_is_refused(text: str, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        parse_json(text)


@pytest.mark.parametrize("data", [json.loads(_nested(MAX_JSON_DEPTH)), [[]] * 1000, {"a": "[" * 1000}, "é", None])
def test_wide_data_and_brackets_in_texts_are_read(data: Any) -> None:
    assert parse_json(json.dumps(data)) == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"[1]", "expected an object, found a list"),
        (b"null", "found a NoneType"),
        (rb'{"a": "\ud800"}', "unpaired surrogate"),
        (rb'{"a\udc00": 1}', "unpaired surrogate"),
    ],
)
def test_a_record_is_an_object_of_text_that_can_be_written(text: bytes, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        parse_record(text)


def test_two_halves_of_a_character_are_one() -> None:
    assert parse_record(rb'{"a": "\ud83d\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_found_at_any_place(number: str) -> None:
    with pytest.raises(JsonError, match="is not finite"):
        require_finite(parse_json(f'{{"a": [1, {{"b": {number}}}]}}'))


def test_a_file_is_refused_by_the_callers_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path, PlanError) == {"a": 1}
    monkeypatch.setattr(json_file, "MAX_JSON_BYTES", 7)
    with pytest.raises(PlanError, match="more than 7 bytes"):
        read_json(path, PlanError)
    with pytest.raises(PlanError, match="No such file"):
        read_json(tmp_path / "none.json", PlanError)
