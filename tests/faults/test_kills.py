"""Killed writers, full disks and pickles: a small part of `make faults`."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.campaign import DEFECTS, kills


@pytest.mark.parametrize(("mode", "seconds"), [("quick", 8), ("pickles", 0)])
def test_nothing_half_written_is_accepted_and_no_pickle_runs(mode: str, seconds: float, tmp_path: Path) -> None:
    lines = kills(tmp_path, 0, seconds, mode)
    assert not [line for line in lines if line["outcome"] in DEFECTS]
    assert len(lines) > 12
