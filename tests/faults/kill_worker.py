"""Kills writers, and lets them meet the end of the disk, until the time is over; prints what became of each."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from random import Random
from typing import Any

from faults.kills import DefectError, Writer, forked, kill_one, limit_one, wait
from faults.pickles import loaded_with_pickles, resumed_with_pickles, unpickled
from faults.writers import quick_writers, slow_writers


def main(folder: Path, seed: int, seconds: float, mode: str) -> None:
    """Kill every writer in turn; print one line of JSON for each."""
    warnings.simplefilter("ignore")
    if mode == "pickles":
        for number, work in enumerate((unpickled, loaded_with_pickles, resumed_with_pickles)):
            place = folder / f"pickles-{number}"
            place.mkdir()
            for facts in work(place):
                print(json.dumps(facts), flush=True)
        return
    sources = folder / "sources"
    sources.mkdir()
    end = time.monotonic() + seconds
    writers = [(writer, *_undisturbed(writer, folder)) for writer in quick_writers(sources)]
    if mode == "slow":
        writers += [(writer, *_undisturbed(writer, folder)) for writer in slow_writers(sources)]
    number = 0
    while number == 0 or time.monotonic() < end:
        for writer, expected, duration_s, sizes in writers:
            for kind in ("kill", "limit") if writer.reports else ("kill",):
                draw = Random(f"{seed}/{writer.name}/{kind}/{number}")
                place = folder / f"{writer.name}-{kind}-{number}".replace(" ", "_").replace(",", "")
                place.mkdir()
                try:
                    if kind == "kill":
                        outcome, words = kill_one(writer, place, expected, duration_s, draw), ""
                    else:
                        outcome, words = limit_one(writer, place, expected, sizes, draw), ""
                    shutil.rmtree(place)
                except DefectError as error:
                    outcome, words = "defect", str(error)
                facts = {"kind": f"{writer.name}: {kind}", "number": number, "outcome": outcome, "words": words}
                print(json.dumps(facts), flush=True)
                if time.monotonic() > end and number:
                    return
        number += 1


def _undisturbed(writer: Writer, folder: Path) -> tuple[Any, float, list[int]]:
    """Let a writer end: what it writes, how long it takes (at least what a kill needs), and the sizes of its files."""
    place = folder / "undisturbed"
    place.mkdir()
    start = time.monotonic()
    log = folder / "undisturbed.log"
    code = wait(forked(lambda: writer.write(place), log))
    assert code == 0, f"{writer.name}: {log.read_text()[-2000:]}"
    duration_s = time.monotonic() - start
    expected = writer.read(place)
    assert expected is not None
    sizes = sorted({path.stat().st_size for path in place.rglob("*") if path.is_file()} - {0})
    shutil.rmtree(place)
    return expected, max(duration_s, 0.25 if writer.repeats else 0.0), sizes


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
