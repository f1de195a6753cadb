"""Options of one call of `run_study` that do not change results and are not stored in the study's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Say = Callable[[str], object]


@dataclass(frozen=True)
class Sitting:
    """One call of `run_study`.

    Args:
        processes: Number of runs at once.
        keep_adapters: Keep every run's adapter in ``adapters/``.
        dry_run: Measure and plan, but train nothing. A folder without this study stays unchanged.
        trust_remote_code: Run code that comes with the models.
        say: Called with progress messages.
        prepare: Called once in every child process, to silence other libraries.
    """

    processes: int = 1
    keep_adapters: bool = False
    dry_run: bool = False
    trust_remote_code: bool = False
    say: Say = str
    prepare: Callable[[], object] = list


ONE_PROCESS = Sitting()
