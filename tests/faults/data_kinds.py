"""Files of training rows."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from pyarrow import BufferOutputStream, BufferReader, Table
from pyarrow.parquet import read_table, write_table

from apportion.data.sources import read_rows
from apportion.records.files import seal
from faults.judges import anything
from faults.kind import JSON, Kind
from faults.mutations import BYTES, TEXT, change_json


def data_kinds(folder: Path) -> list[Kind]:
    rows: list[dict[str, Any]] = [
        {"prompt": "What is 1 + 1?", "completion": "2 é", "answer": 2},
        {"prompt": 'a "quoted", b', "completion": "c\nd", "answer": None},
        {"prompt": "x" * 100, "completion": "y", "answer": 3},
    ]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "calls": [{"a": [1, 2]}]}]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*rows, {"messages": messages})))
    (folder / "d.json").write_text(json.dumps([*rows, {"text": "t"}, {"messages": messages}]))
    (folder / "d.csv").write_text('prompt,completion,answer\n"a, b",c,1\nd,"e\nf",2\n"g ""h""",i,\n')
    write_table(Table.from_pylist(rows), folder / "d.parquet")
    mutations = {"jsonl": (*BYTES, *TEXT, *TEXT), "json": JSON, "csv": (*BYTES, *TEXT), "parquet": BYTES}
    kinds = []
    for ending, chosen in mutations.items():
        path = folder / f"d.{ending}"

        def read(path: Path = path) -> str:
            return seal({"rows": read_rows(str(path))})

        kinds.append(Kind(f"data .{ending}", path, read, chosen, anything))
        if ending == "parquet":
            kinds.append(Kind("data .parquet, rewritten", path, read, (_rewritten,), anything, 100))
    return kinds


def _rewritten(draw: Random, data: bytes) -> bytes:
    """Write other values, of other types, as a whole file."""
    rows = read_table(BufferReader(data)).to_pylist()
    written = BufferOutputStream()
    try:
        write_table(Table.from_pylist(change_json(draw, rows)), written)
    except Exception:  # noqa: BLE001 - of many kinds: no table can hold that
        return data
    return bytes(written.getvalue())
