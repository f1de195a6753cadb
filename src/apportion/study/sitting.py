"""How a study's runs are done this time: nothing here changes their results, and nothing is kept in its folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Say = Callable[[str], object]


@dataclass(frozen=True)
class Sitting:
    """One call of `run_study`.

    Args:
        processes: Runs at once.
        keep_adapters: Keep every run's adapter in ``adapters/``.
        dry_run: Measure and plan, and train nothing; a folder that the study did not begin in stays as it is.
        trust_remote_code: Run code that comes with the models.
        say: Told, in words, what is being done.
        prepare: Called once in every further process, to keep other libraries quiet.
    """

    processes: int = 1
    keep_adapters: bool = False
    dry_run: bool = False
    trust_remote_code: bool = False
    say: Say = str
    prepare: Callable[[], object] = list


ONE_PROCESS = Sitting()
