"""Damaged and forged files are refused by name, or read as what they were: no traceback, hang or full memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SEED = int(os.environ.get("APPORTION_FUZZ_SEED", "0"))
MUTANTS = int(os.environ.get("APPORTION_FUZZ_MUTANTS", "0"))  # of each kind; 0 for the kind's own number
TIME_S = 240 + 3 * MUTANTS
WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[1]
KINDS = (
    "plan", "plan, resealed", "profile", "profile, resealed", "mask", "mask, resealed", "partial totals",
    "adapter_config.json, plan", "adapter tensors, plan", "adapter_config.json, sparse", "adapter tensors, sparse",
    "STUDY.toml", "study.json", "study run", "study trial", "study summary", "run.json", "trainer_state.json",
    "checkpoint manifest", "data .jsonl", "data .json", "data .csv", "data .parquet", "data .parquet, rewritten",
    "show plan", "show profile", "show mask", "show study run", "show run.json", "show checkpoint manifest",
    "show adapter_config.json, plan", "show STUDY.toml", "show adapter tensors", "demonstration",
    "show demonstration", "report of a run", "export of adapter_config.json", "export of adapter tensors",
    "kept layout", "kept layout, rewritten", "config.json",
)  # fmt: skip
HELD = {"same", "refused", "other"}  # the last: other contents that are possible, of a file that tells no original


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What became of every mutant, by kind. A process that dies is started again for the kinds that are left."""
    folder = tmp_path_factory.mktemp("fuzz")
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in KINDS:
        missing = [kind for kind in KINDS if kind not in found]
        if missing:
            for line in _run(folder, skipped=list(found)):
                found.setdefault(line["kind"], []).append(line)
    return found


def _run(folder: Path, skipped: list[str]) -> Iterator[dict[str, Any]]:
    """Run the worker, and give the ends of its mutants; one that has no end is a crash."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(WORKER), str(folder), str(SEED), str(MUTANTS), json.dumps(skipped)]
    log = folder / f"log-{len(skipped)}"
    with log.open("w") as opened:
        try:
            code: object = subprocess.run(
                command, env=environment, stdout=opened, stderr=subprocess.PIPE, text=True, timeout=TIME_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            code = error
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    if not lines or set(lines.pop(0)["kinds"]) != set(KINDS):
        pytest.fail(f"the worker has other kinds than {KINDS}, or none: {code}")
    for number, line in enumerate(lines):
        if line["outcome"] != "begun":
            yield line
        elif number + 1 == len(lines):
            yield line | {"outcome": "crash", "words": f"the process ended: {code}"}


@pytest.mark.parametrize("kind", KINDS)
def test_no_mutant_crashes_a_reader_or_is_taken_for_what_it_is_not(
    kind: str, outcomes: dict[str, list[dict[str, Any]]]
) -> None:
    of_kind = outcomes[kind]
    counts = Counter(line["outcome"] for line in of_kind)
    print(f"FUZZ {kind}: {dict(sorted(counts.items()))}")
    defects = [
        f"{line['outcome']}: {kind}, seed {SEED}, mutant {line['number']} ({line['mutation']}): {line['words']}"
        for line in of_kind
        if line["outcome"] not in HELD
    ]
    shown = "\n".join(defects[:20])
    assert not defects, f"{len(defects)} of {len(of_kind)} mutants, kept in the test's folder under mutants/:\n{shown}"
    assert counts["refused"] or kind == "show adapter tensors", counts
