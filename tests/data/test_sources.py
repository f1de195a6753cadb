"""Data: every format, every form of row, and what is wrong with bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from apportion.data.sources import named_source, read_rows
from apportion.data.tasks import task_names, task_rows
from apportion.errors import DataError

ROWS = [{"prompt": "1+1=", "completion": " 2", "answer": "2"}, {"prompt": "2+2=", "completion": " 4", "answer": "4"}]


def _write(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif suffix == ".csv":
        path.write_text("prompt,completion,answer\n" + "".join(",".join(row.values()) + "\n" for row in ROWS))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = str(_write(tmp_path, suffix))
    assert read_rows(path) == ROWS
    assert read_rows(path, num_rows=1) == ROWS[:1]


def test_messages_become_prompt_and_completion(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    assert read_rows(str(path)) == [{"prompt": messages[:1], "completion": messages[1:]}]
    path.write_text(json.dumps({"messages": messages[:1]}))
    with pytest.raises(DataError, match="whose last one is not the assistant's"):
        read_rows(str(path))


def test_text_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "once", "source": "a book"}')
    assert read_rows(str(path)) == [{"text": "once"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "has no row"),
        ("columns.jsonl", '{"text": "a"}\n{"question": "b"}', "row 2 of .* has neither .*found:  question"),
        ("broken.jsonl", '{"text": "a"}\n{"text": ', "place:  line 2"),
        ("list.jsonl", "[1]", "a line that is not a JSON object"),
        ("object.json", '{"text": "a"}', "is not a list of rows"),
        ("rows.xml", "<rows/>", "format of .* is not supported.*jsonl"),
        ("rows.parquet", "not parquet", "cannot be read as parquet"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=f"(?s){message}"):
        read_rows(str(path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read_rows(str(tmp_path / "none.jsonl"))


def test_a_hub_data_set_without_a_network_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be read from the hub"):
        read_rows("nobody/nothing")


def test_splits_share_no_prompt() -> None:
    train = {row["prompt"] for row in task_rows("aiw", "train", num_rows=300)}
    test = {row["prompt"] for row in task_rows("aiw", "test", num_rows=300)}
    other_seed = {row["prompt"] for row in task_rows("aiw", "train", num_rows=300, seed=5)}
    assert not (train | other_seed) & test
    assert train != other_seed


def test_tasks_are_deterministic_and_take_options() -> None:
    source = "task:chain_sum:train?max_terms=2&max_digits=1"
    rows = read_rows(source, num_rows=20)
    assert rows == read_rows(source, num_rows=20)
    assert len(rows) == 20
    for row in rows:
        assert row["completion"] == f" {row['answer']}"
        assert row["prompt"].endswith("\nAnswer:")
    assert "chain_sum" in task_names()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("task:chain_sums", "did you mean chain_sum"),
        ("task:chain_sum:dev", "split 'dev'"),
        ("task:chain_sum?colour=1", "no option 'colour'"),
        ("task:chain_sum?max_terms=1", "does not accept the options"),
        ("task:rubiks_cube", "no single written answer"),
    ],
)
def test_wrong_tasks_are_refused(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(source, num_rows=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("maths=data.jsonl", ("maths", "data.jsonl")),
        ("task:aiw?a=1", ("aiw", "task:aiw?a=1")),
        ("x=task:aiw?a=1", ("x", "task:aiw?a=1")),
        ("folder/data.csv", ("data", "folder/data.csv")),
        ("org/set:config:train", ("set", "org/set:config:train")),
    ],
)
def test_data_have_names(text: str, expected: tuple[str, str]) -> None:
    assert named_source(text) == expected
