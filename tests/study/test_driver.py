"""The driver of a study's runs, with an executor that is defined here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from apportion.errors import ApportionError, ConfigurationError, TrainingError
from apportion.study.driver import Driver
from apportion.study.executors.base import Benches, Record, Work
from apportion.study.records import Trial
from apportion.study.runner import Job
from apportion.study.settings import StudySettings
from apportion.study.tuning import choose_rates

JOBS = [Job("m", "t", "lora", 10, 10, None, None, seed=100, lr=lr) for lr in (0.1, 0.2, 0.3)]


def trial_of(job: Job, loss: float | None = 1.0) -> Trial:
    return Trial(
        key=f"{job.lr}", model=job.model, task=job.task, contender=job.contender, budget=job.budget, lr=job.lr,
        loss=loss, train_s=1.0,
    )  # fmt: skip


class Backwards:
    """Does work in reverse, fails where it is told to, and remembers what it did."""

    def __init__(self, failing: float | None = None) -> None:
        self.failing, self.done = failing, list[Work]()

    def run(self, work: Sequence[Work]) -> Iterator[tuple[Work, Record | ApportionError]]:
        for one in reversed(work):
            self.done.append(one)
            failed = one.job.lr == self.failing
            yield one, ConfigurationError("no room.") if failed else trial_of(one.job, loss=one.job.lr)


def driver_in(folder: Path, executor: Backwards, said: list[str] | None = None) -> Driver:
    bench = SimpleNamespace(key=lambda job, trial: f"{job.lr}")
    say = (said if said is not None else []).append
    return Driver(folder, cast("Benches", lambda _: bench), executor, say)


def test_records_are_written_and_returned_in_the_order_of_the_jobs(tmp_path: Path) -> None:
    said: list[str] = []
    records = driver_in(tmp_path, Backwards(), said).trials(JOBS)
    assert [record.lr for record in records] == [0.1, 0.2, 0.3]
    assert {path.name for path in (tmp_path / "tuning").iterdir()} == {"0.1.json", "0.2.json", "0.3.json"}
    assert [line.partition(" m/")[0] for line in said] == ["trial 1/3", "trial 2/3", "trial 3/3"]


def test_finished_work_is_read_and_not_done_again(tmp_path: Path) -> None:
    driver_in(tmp_path, Backwards()).trials(JOBS[:2])
    executor = Backwards()
    records = driver_in(tmp_path, executor).trials(JOBS)
    assert [one.job for one in executor.done] == JOBS[2:]
    assert [record.loss for record in records] == [0.1, 0.2, 0.3]


def test_a_failure_does_not_stop_other_work(tmp_path: Path) -> None:
    executor = Backwards(failing=0.2)
    with pytest.raises(TrainingError, match=r"(?s)1 of 3 runs failed; the others are done.*m/t/lora/10/seed 100"):
        driver_in(tmp_path, executor).trials(JOBS)
    assert len(executor.done) == 3
    assert {path.name for path in (tmp_path / "tuning").iterdir()} == {"0.1.json", "0.3.json"}


def settings() -> StudySettings:
    data: dict[str, Any] = {
        "name": "s",
        "tasks": {"t": "task:gcd"},
        "contenders": ["lora", "attention"],
        "budgets": [10],
        "tuning": {"trials": 3, "low": 1e-3, "high": 1e-1},
    }
    return StudySettings(**data)


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [((3.0, 1.0, 2.0), 0.01), ((1.0, 1.0, 2.0), 0.001), ((None, None, 9.0), 0.1)],
)
def test_the_rate_with_the_lowest_loss_is_chosen(losses: tuple[float | None, ...], chosen: float) -> None:
    cell = ("m", "t", "lora", 10)
    rates = choose_rates(
        settings(), {cell: JOBS[0]}, lambda jobs: [trial_of(*pair) for pair in zip(jobs, losses, strict=True)]
    )
    assert rates == {cell: chosen}


def test_no_rate_that_converges_is_an_error() -> None:
    with pytest.raises(TrainingError, match="diverged at every learning rate"):
        choose_rates(settings(), {("m", "t", "lora", 10): JOBS[0]}, lambda jobs: [trial_of(job, None) for job in jobs])
