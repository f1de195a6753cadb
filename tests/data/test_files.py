"""Files of rows: what is in a cell is what is read, and a damaged file is refused by name and line."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from apportion.data.sources import read_rows
from apportion.errors import DataError

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def _file(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def _parquet(folder: Path, columns: dict[str, Any]) -> str:
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def _refusal(path: str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert path in str(caught.value)
    return str(caught.value)


def test_a_trailing_comma_in_a_csv_is_refused_with_its_line(tmp_path: Path) -> None:
    path = _file(tmp_path, "rows.csv", "prompt,completion\nWhat is 0+1?,1\nWhat is 1+1?,2,\n")
    message = _refusal(path)
    assert "line 3" in message
    assert "expected:  2 columns" in message
    assert "found:     3" in message


def test_a_csv_row_with_too_few_columns_is_refused(tmp_path: Path) -> None:
    assert "line 2" in _refusal(_file(tmp_path, "rows.csv", "prompt,completion,answer\na,b\n"))


def test_the_line_of_a_csv_row_counts_quoted_newlines(tmp_path: Path) -> None:
    path = _file(tmp_path, "rows.csv", 'prompt,completion\n"two\nlines",2\n"three\nmore\nlines",3,\n')
    assert "line 4" in _refusal(path)


def test_cells_of_a_csv_stay_as_they_are_written(tmp_path: Path) -> None:
    content = 'prompt,completion,answer\n"a, ""b""\nc",007,NA\n\n nan ,1.0,\n'
    assert read_rows(_file(tmp_path, "rows.csv", content)) == [
        {"prompt": 'a, "b"\nc', "completion": "007", "answer": "NA"},
        {"prompt": " nan ", "completion": "1.0"},
    ]


def test_two_columns_of_one_name_are_refused_in_a_csv(tmp_path: Path) -> None:
    message = _refusal(_file(tmp_path, "rows.csv", "prompt,completion,prompt\na,b,c\n"))
    assert "two columns 'prompt'" in message


def test_columns_without_a_name_are_passed_over_in_a_csv(tmp_path: Path) -> None:
    path = _file(tmp_path, "rows.csv", ",prompt,completion,\n0,a,b,\n1,c,d,\n")
    assert read_rows(path)[1] == {"prompt": "c", "completion": "d"}


def test_an_open_quote_in_a_csv_is_refused(tmp_path: Path) -> None:
    assert "line 3" in _refusal(_file(tmp_path, "rows.csv", 'prompt,completion\na,b\nc,"d\n'))


def test_a_long_cell_of_a_csv_is_read_whole(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "word " * 50_000
    assert read_rows(_file(tmp_path, "rows.csv", f"text\n{long}\n")) == [{"text": long}]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (pyarrow.array([5, None]), ["5", None]),
        (pyarrow.array([5.0, None]), ["5", None]),  # how pandas stores [5, None]
        (pyarrow.array([5.5, float("nan")]), ["5.5", None]),
        (pyarrow.array([5.5, 6.0]), ["5.5", "6.0"]),
        (pyarrow.array([2**60, 7]), [str(2**60), "7"]),
        (pyarrow.array([True, None]), ["True", None]),
        (pyarrow.array(["nan", None]), ["nan", None]),
        (pyarrow.array(["x", "007"]).dictionary_encode(), ["x", "007"]),
    ],
)
def test_answers_of_a_parquet_file_are_those_that_were_stored(
    tmp_path: Path, answers: pyarrow.Array, expected: list[str | None]
) -> None:
    rows = read_rows(_parquet(tmp_path, {"prompt": ["a", "b"], "completion": ["c", "d"], "answer": answers}))
    assert [row.get("answer") for row in rows] == expected


def test_messages_of_a_parquet_file_are_those_of_json_lines(tmp_path: Path) -> None:
    named = [{"role": "system", "content": "be brief", "name": "s"}, *CHAT]
    parquet = _parquet(tmp_path, {"messages": [CHAT, named]})
    lines = _file(tmp_path, "rows.jsonl", "\n".join(json.dumps({"messages": chat}) for chat in (CHAT, named)))
    assert read_rows(parquet) == read_rows(lines)


def test_two_columns_of_one_name_are_refused_in_a_parquet_file(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert "two columns 'prompt'" in _refusal(str(tmp_path / "rows.parquet"))


def test_folder_names_add_no_column_to_a_parquet_file(tmp_path: Path) -> None:
    folder = tmp_path / "answer=9"
    folder.mkdir()
    assert read_rows(_parquet(folder, {"text": ["a"]})) == [{"text": "a"}]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_line_breaks_inside_a_json_text_do_not_end_its_row(tmp_path: Path, mark: str) -> None:
    row = {"text": f"one{mark}row"}
    content = json.dumps(row, ensure_ascii=ord(mark) < 32)
    assert read_rows(_file(tmp_path, "rows.jsonl", f"{content}\r\n{content}\n")) == [row, row]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"text": "é"}\n'),
        ("rows.json", '[{"text": "é"}]'),
        ("rows.csv", "text\né\n"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str, content: str) -> None:
    assert read_rows(_file(tmp_path, name, b"\xef\xbb\xbf" + content.encode())) == [{"text": "é"}]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": ' + "[" * 200_000 + "\n", "line 2"),
        ("rows.jsonl", '{"text": "a"}\n{"answer": ' + "9" * 5000 + "}\n", "line 2"),
        ("rows.json", '[{"text": ' + "[" * 200_000, "rows.json"),
        ("rows.json", '[{"answer": ' + "9" * 5000 + "}]", "rows.json"),
        ("rows.json", "5", "rows.json"),
        ("rows.json", "", "rows.json"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2"),
        ("rows.json", b'[\n{"text": "\xe9"}]', "line 2"),
        ("rows.csv", b"text\na\n\xe9\n", "line 3"),
        ("rows.csv", "text\nü\n".encode("utf-16"), "line 1"),
        ("rows.csv", "", "has no row"),
        ("rows.parquet", "PAR1" * 9, "rows.parquet"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_the_place(
    tmp_path: Path, name: str, content: str | bytes, place: str
) -> None:
    assert place in _refusal(_file(tmp_path, name, content))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": 7}, "completion is a number"),
        ({"prompt": 5, "completion": "b"}, "prompt is a number"),
        ({"prompt": True, "completion": "b"}, "prompt is true or false"),
        ({"prompt": CHAT[:1], "completion": ["b"]}, "completion contains text instead of a message"),
        ({"prompt": "a", "completion": {"role": "assistant"}}, "completion is an object"),
        ({"prompt": "a", "completion": CHAT[1:]}, "prompt is text and its completion is a list"),
        ({"prompt": CHAT[:1], "completion": "b"}, "prompt is a list and its completion is text"),
        ({"prompt": [], "completion": CHAT[1:]}, "prompt is an empty list"),
        ({"prompt": "a"}, "neither prompt and completion.*\n.*found:  prompt"),
        ({"prompt": "a", "completion": None}, "neither prompt and completion"),
        ({"text": 5}, "text is a number"),
        ({"text": ["a"]}, "text is a list"),
        ({"messages": "hello"}, "messages is text"),
        ({"messages": ["hello", "hi"]}, "messages contains text instead of a message"),
        ({"messages": [{"role": "user"}, CHAT[1]]}, "messages contains a message without 'content'"),
        ({"messages": [{"role": "user", "content": 5}, CHAT[1]]}, "'content' of a message in messages is a number"),
        ({"messages": [{"role": "user", "content": None}, CHAT[1]]}, "messages contains a message without 'content'"),
        ({"messages": [{"content": "a"}, CHAT[1]]}, "messages contains a message without 'role'"),
        ({"messages": CHAT[:1]}, "whose last one is not the assistant's"),
        ({"text": "a", "answer": ["b"]}, "answer is a list"),
        ({"text": "a", "answer": {"b": 1}}, "answer is an object"),
        ({"text": "a\ud800"}, "text contains half a character"),
        ({"prompt": "\udc00", "completion": "a"}, "prompt contains half a character"),
        ({"text": "a", "answer": "\ud800"}, "answer contains half a character"),
        ({"messages": [{"role": "user", "content": "\ud800"}, CHAT[1]]}, "messages contains half a character"),
        ({"messages": [{**CHAT[0], "name": "\ud800"}, CHAT[1]]}, "messages contains half a character"),
        ({"\ud800": 5}, r"found:  \\ud800"),
    ],
)
def test_rows_of_a_wrong_form_are_refused_with_their_number(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = _file(tmp_path, "rows.jsonl", f'{{"text": "fine"}}\n{json.dumps(row)}\n')
    with pytest.raises(DataError, match=rf"(?s)row 2 of {path}.*{message}") as caught:
        read_rows(path)
    str(caught.value).encode()  # it can be printed


def test_an_answer_that_is_a_list_is_refused_in_a_parquet_file(tmp_path: Path) -> None:
    path = _parquet(tmp_path, {"text": ["a"], "answer": [["b", "c"]]})
    assert "row 1" in _refusal(path)


def test_fields_that_a_message_leaves_empty_are_left_out(tmp_path: Path) -> None:
    chat = [{**message, "name": None} for message in CHAT]
    path = _file(tmp_path, "rows.jsonl", json.dumps({"messages": chat}))
    assert read_rows(path) == [{"prompt": CHAT[:1], "completion": CHAT[1:]}]


@pytest.mark.parametrize("answer", [float("nan"), None, ""])
def test_an_answer_that_is_none_is_left_out(tmp_path: Path, answer: Any) -> None:
    assert read_rows(_file(tmp_path, "rows.jsonl", json.dumps({"text": "a", "answer": answer}))) == [{"text": "a"}]


def test_the_options_of_a_task_may_hold_anything() -> None:
    with pytest.raises(DataError, match="no option 'a'"):
        read_rows(f"task:chain_sum?a={'[' * 100_000}")
    with pytest.raises(DataError, match="no option 'a'"):
        read_rows(f"task:chain_sum?a={'9' * (sys.get_int_max_str_digits() + 1)}")
